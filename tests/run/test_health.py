"""Models that are lost: a run says so, names the last good checkpoint, and saves no other."""

import dataclasses
import errno
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import CONFIG, TOKENS, replace
from tests.run.runs import TRAIN, Compiled, Told, history, train
from transformer_vq.io.checkpoint import Checkpoints
from transformer_vq.run import loop
from transformer_vq.run.folder import DataSource, RunError
from transformer_vq.sharding import data_mesh


@pytest.mark.slow
def test_divergence_names_the_last_good_step(tmp_path, monkeypatch):
    monkeypatch.setattr(Compiled, "bad_step", 8)
    with pytest.raises(
        RunError, match=r"loss is nan at step 8, and step 4 in .*checkpoints is the"
    ):
        train(tmp_path / "run")
    assert Checkpoints(tmp_path / "run" / "checkpoints").steps() == [4]
    assert history(tmp_path / "run")[-1]["step"] == 6
    monkeypatch.setattr(Compiled, "bad_step", 2)
    with pytest.raises(RunError, match="loss is nan at step 2, and nothing was saved before"):
        train(tmp_path / "other")


@pytest.mark.parametrize(
    "number, problem", [(errno.EDQUOT, "the quota of the disk"), (errno.EFBIG, "ulimit -f")]
)
def test_a_line_that_cannot_be_written_names_the_last_good_step(tmp_path, number, problem):
    def full(record):
        if record["step"] == 6:
            raise OSError(number, os.strerror(number))

    with pytest.raises(RunError, match=problem) as caught:
        train(tmp_path / "run", observers=[Told(full)])
    assert "step 4 in" in str(caught.value) and "is the last good checkpoint" in str(caught.value)


@pytest.mark.slow
def test_a_loss_spike_names_the_last_good_step(run, tmp_path, monkeypatch):
    usual = np.median([line["loss"] for line in history(run[0]) if "loss" in line][:8])
    monkeypatch.setattr(Compiled, "bad_step", 18)
    monkeypatch.setattr(Compiled, "bad_loss", usual + 3.1)
    with pytest.raises(
        RunError, match=rf"max_loss_spike \(3\) above the {usual:.4f} of .*step 16 "
    ):
        train(tmp_path / "run")
    assert Checkpoints(tmp_path / "run" / "checkpoints").latest() == 16
    off = replace(TRAIN, max_loss_spike=0.0)
    assert train(tmp_path / "run", train=off, resume=True).status == "done"
    monkeypatch.setattr(Compiled, "bad_loss", usual + 2.9)  # control
    assert train(tmp_path / "other").status == "done"


HOT = replace(TRAIN, learning_rate=1e30, warmup_steps=0, grad_clip=0.0, steps=2, log_every=1)


@pytest.mark.parametrize("held_out", [TOKENS[540:], None])
def test_a_lost_model_is_not_done(tmp_path, held_out):
    """The update that loses it is the last: no batch follows that would show it."""
    mesh = data_mesh(jax.devices()[:1])
    options = dict(data=DataSource.of("walk", TOKENS), mesh=mesh)
    with pytest.raises(RunError, match="nothing was saved before: use a lower learning rate"):
        loop.train(CONFIG, HOT, TOKENS[:540], held_out, tmp_path / "run", **options)
    assert Checkpoints(tmp_path / "run" / "checkpoints").steps() == []
    assert "NaN" not in (tmp_path / "run" / "metrics.jsonl").read_text()


def test_a_checkpoint_of_a_lost_model_is_not_the_last_good_one(tmp_path, monkeypatch):
    """It was saved before a batch showed what it is. Resumed from the good one, the run goes on."""
    folder, saved = tmp_path / "run", Checkpoints.save

    def spoil(self, step, state, *arguments, **options):
        if step == 8:
            state = dataclasses.replace(state, params=jax.tree.map(lambda x: x * 1e4, state.params))
        saved(self, step, state, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", spoil)
        patch.setattr(Compiled, "bad_step", 10)
        with pytest.raises(RunError, match=r"loss is nan at step 10, and step 4 in .* last good"):
            train(folder)
    checkpoints = folder / "checkpoints"
    assert sorted(os.listdir(checkpoints)) == ["4", "8.diverged"]
    assert train(folder, resume=True).status == "done"


@pytest.mark.slow
def test_learning_by_heart_is_not_divergence(tmp_path):
    """A high validation loss alone stops no run: the training text is still known."""
    options = dict(data=DataSource.of("walk", TOKENS), mesh=data_mesh(jax.devices()[:1]))
    plan = replace(TRAIN, steps=16, evaluate_every=0, max_loss_spike=0.5)
    constant = np.zeros(540, np.uint8)
    backwards = np.tile(np.arange(31, 0, -1), 2).astype(np.uint8)
    result = loop.train(CONFIG, plan, constant, backwards, tmp_path / "run", **options)
    usual = np.median([r["loss"] for r in history(tmp_path / "run") if "loss" in r])
    assert result.status == "done" and result.validation_loss > usual + 0.5  # control


def test_weights_that_are_not_finite_are_not_saved(tmp_path, monkeypatch):
    def spoil(self, state, batch):
        state, metrics = self.program(state, batch)
        if state.step == 4:
            state.params["output_bias"] = state.params["output_bias"].at[0].set(jnp.inf)
        return state, metrics

    monkeypatch.setattr(Compiled, "__call__", spoil)
    with pytest.raises(RunError, match="weights are not finite after step 4, and nothing was sav"):
        train(tmp_path / "run")
