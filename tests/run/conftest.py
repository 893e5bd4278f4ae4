"""What tests of runs share: a train step that is compiled once, and a run."""

import pytest

from tests.run.runs import Told, make_compiled, train
from transformer_vq.run import loop


@pytest.fixture(autouse=True)
def compiled_once(monkeypatch):
    monkeypatch.setattr(loop, "make_train_step", make_compiled)


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """A run of 20 updates, and what it told on its way. Look, don't touch."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    told = Told()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "make_train_step", make_compiled)
        result = train(folder, observers=[told])
    return folder, result, told.records
