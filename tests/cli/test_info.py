"""`tvq info`: what a run is."""

import json

import jax

from tests.helpers import STEPS
from transformer_vq.cli import main
from transformer_vq.run.folder import load_run


def test_info(capsys, run, data):
    assert main(["info", "--run", run, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    model, _ = load_run(run)
    assert record["model"]["parameters"] == sum(x.size for x in jax.tree.leaves(model.params))
    assert record["data"]["path"] == str(data) and record["data"]["size"] == 60_000
    assert record["training"]["step"] == STEPS
    assert record["training"]["tokens"] == STEPS * 8 * 64
    assert [c["step"] for c in record["checkpoints"]] == [STEPS]
    assert main(["info", "--run", run]) == 0
    printed = capsys.readouterr().out
    assert f"{record['model']['parameters']:,}" in printed
    assert f"{record['training']['validation_loss']:.4f}" in printed
