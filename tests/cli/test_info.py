"""`tvq info`: what a run is."""

import json

import jax

from tests.helpers import STEPS
from transformer_vq import costs
from transformer_vq.cli import info, main
from transformer_vq.run.folder import load_run


def test_info(capsys, run, data, monkeypatch):
    monkeypatch.setattr(info, "memory_at_hand", lambda: 3 << 30)
    assert main(["info", "--run", run, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    model, _ = load_run(run)
    assert record["model"]["parameters"] == sum(x.size for x in jax.tree.leaves(model.params))
    assert record["data"]["path"] == str(data) and record["data"]["size"] == 60_000
    assert record["training"]["step"] == STEPS
    assert record["training"]["tokens"] == STEPS * 8 * 64
    assert [c["step"] for c in record["checkpoints"]] == [STEPS]
    serving = record["serving"]
    rest = (2 << 30) - costs.serving_bytes(model.config, serving["slots"])
    assert serving["memory"] == 3 << 30 and 0 <= rest < serving["slot_bytes"]
    assert main(["info", "--run", run]) == 0
    printed = capsys.readouterr().out
    assert f"{record['model']['parameters']:,}" in printed
    assert f"{serving['slots']:,} of" in printed and "in the 3.22 GB" in printed
    assert f"{record['training']['validation_loss']:.4f}" in printed
    monkeypatch.setenv("COLUMNS", "20")  # no word is broken, so the names stand above
    assert main(["info", "--run", run]) == 0
    narrow = capsys.readouterr().out.splitlines()[1:]  # after the path of the run
    assert max(map(len, narrow)) <= 20
    words = " ".join(line.strip() for line in narrow)
    assert "per sequence, whatever its length" in words
