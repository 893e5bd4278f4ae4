"""The moving average of the weights."""

import jax
import numpy as np
import pytest

from tests.helpers import CONFIG, START, TOKENS, raw, replace
from transformer_vq import Model
from transformer_vq.config import TrainConfig
from transformer_vq.io.checkpoint import Checkpoints
from transformer_vq.ops.evaluate import evaluate
from transformer_vq.run import loop
from transformer_vq.run.folder import RunError, load_run
from transformer_vq.sharding import data_mesh

pytestmark = pytest.mark.slow

PLAIN = TrainConfig(
    batch_size=4, sequence_len=16, update_len=8, steps=20, warmup_steps=0, learning_rate=0.02
)


@pytest.fixture(scope="module")
def averaged_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "averaged"
    train = replace(PLAIN, ema_decay=0.6, sequence_len=8, steps=6, log_every=2)
    train = replace(train, evaluate_tokens=50, checkpoint_every=1, keep_checkpoints=9)
    mesh = data_mesh(jax.devices()[:1])
    result = loop.train(CONFIG, train, TOKENS[:540], TOKENS[540:], folder, mesh=mesh)
    return folder, train, result


def test_average_by_hand(averaged_run):
    """Of the weights after every update, against numpy."""
    folder, train, _ = averaged_run
    state = START(CONFIG, train)
    expected = jax.tree.map(np.asarray, {"params": state.params, "codebook": state.codebook})
    for i in range(train.steps):
        state, _ = Checkpoints(folder / "checkpoints").restore(i + 1, state)
        now = {"params": state.params, "codebook": state.codebook}
        d = min(0.6, (1 + i) / (10 + i))
        expected = jax.tree.map(lambda old, new, d=d: d * old + (1 - d) * new, expected, now)
        for a, b in zip(*map(jax.tree.leaves, (state.average, expected)), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    assert raw(state.average["params"]) != raw(state.params)


def test_the_average_is_what_is_evaluated_and_loaded(averaged_run):
    folder, train, result = averaged_run
    model, info = load_run(folder)
    latest, _ = load_run(folder, average=False)
    state, _ = Checkpoints(folder / "checkpoints").restore(None, START(CONFIG, train))
    assert info.train.ema_decay == 0.6
    assert raw((model.codebook, model.params)) == raw(state.average)
    assert raw(latest.params) == raw(state.params)
    assert raw(model) != raw(latest)
    scored = [
        evaluate(x, TOKENS[540:], max_tokens=train.evaluate_tokens).loss for x in (model, latest)
    ]
    assert scored[0] == pytest.approx(result.validation_loss, abs=1e-6)
    assert abs(scored[1] - result.validation_loss) > 1e-4


def test_without_an_average_a_checkpoint_is_as_before(averaged_run):
    folder, train, _ = averaged_run

    def names(state):
        return {jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(state)}

    with_average = names(START(CONFIG, train))
    without = names(START(CONFIG, PLAIN))
    assert without < with_average
    assert {name.split("[")[0].split(".")[1] for name in without} == {
        "step",
        "params",
        "codebook",
        "opt_state",
    }
    for changes, message in (
        (dict(ema_decay=0), "has ema_decay 0.6, not 0"),
        (dict(optimizer="lion"), "has optimizer adamw, not lion"),
    ):
        with pytest.raises(RunError, match=message):
            other = replace(train, **changes)
            loop.train(
                CONFIG, other, TOKENS, None, folder, resume=True, mesh=data_mesh(jax.devices()[:1])
            )
    assert isinstance(load_run(folder)[0], Model)
