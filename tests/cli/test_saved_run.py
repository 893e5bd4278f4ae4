"""What `tvq train --resume` knows of a run whose config.json is damaged."""

import shutil
from pathlib import Path

import jax
import pytest

from tests.helpers import fails
from transformer_vq.cli.parse import UsageError
from transformer_vq.cli.train import _saved_run


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"config": 1}', b"\xff\xfe"])
def test_the_checkpoint_knows_what_a_damaged_file_said(run, tmp_path, capsys, damage):
    folder = Path(shutil.copytree(run, tmp_path / "run"))
    whole = _saved_run(folder, by_hand=False)
    (folder / "config.json").write_bytes(damage)
    found = _saved_run(folder, by_hand=False)
    assert "is damaged: the checkpoint says what it said" in capsys.readouterr().err
    assert found is not None and whole is not None
    assert all(found[name] == whole[name] for name in ("config", "train", "data", "tokenizer"))


def test_without_a_checkpoint_data_are_given_by_hand(tmp_path):
    (tmp_path / "config.json").write_bytes(b"{")
    with pytest.raises(UsageError, match=r"is damaged .*, and there is no checkpoint: give --data"):
        _saved_run(tmp_path, by_hand=False)
    assert _saved_run(tmp_path, by_hand=True) is None


def test_a_run_goes_on_with_numbers_of_as_many_bits(run, tmp_path, capsys):
    """With others the same seeds draw other numbers, so the run would not be the unbroken one."""
    folder = Path(shutil.copytree(run, tmp_path / "run"))
    with jax.enable_x64(True):
        said = fails(capsys, 1, "train", "--resume", "--out", str(folder), "--steps", "1000")
    assert f"JAX_ENABLE_X64 is on, and it was off when the run in {folder} was trained" in said
