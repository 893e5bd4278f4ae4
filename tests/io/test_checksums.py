"""Damage of a checkpoint is found, named and never read; what came from elsewhere is no damage."""

import random
import shutil
from pathlib import Path

import pytest

from tests.io.trees import assert_same, refused, train_state
from transformer_vq.io.checkpoint import Checkpoints


def files_of(checkpoint: Path) -> list[Path]:
    """Every file that a restore depends on."""
    unused = {"_CHECKPOINT_METADATA", "commit_success.txt"}
    files = (f for f in sorted(checkpoint.rglob("*")) if f.is_file() and f.name not in unused)
    return [f for f in files if f.stat().st_size > 0]


def flipped(content: bytes, position: int) -> bytes:
    return content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :]


def test_any_flipped_bit_and_any_cut_is_found(folder):
    checkpoints, rng = Checkpoints(folder), random.Random(0)
    files = files_of(folder / "30")
    assert len(files) > 5 and {"metadata.json", "SHA256SUMS"} < {f.name for f in files}
    for file in files:
        whole = file.read_bytes()
        for position in (0, len(whole) - 2, *rng.sample(range(len(whole)), 3)):
            for damaged in (flipped(whole, position), whole[:position]):
                file.write_bytes(damaged)
                assert "is damaged" in refused(checkpoints.restore, None, train_state())
        file.unlink()
        assert "is damaged" in refused(checkpoints.restore, None, train_state())
        file.write_bytes(whole)
    assert_same(checkpoints.restore(None, train_state())[0], train_state(30))


def test_damage_names_the_newest_intact_step_before(folder):
    checkpoints = Checkpoints(folder)
    data = next((folder / "30").glob("ocdbt.process_0/d/*"))
    data.write_bytes(flipped(data.read_bytes(), 100))
    for read in (checkpoints.restore, checkpoints.restore_subtree):
        message = refused(read, None, train_state())
        assert f"{folder / '30'} is damaged ({data.relative_to(folder / '30')} " in message
        assert f"step 20 is intact: delete {folder / '30'}" in message
    assert "is damaged" in refused(checkpoints.metadata)
    assert_same(checkpoints.restore(20, train_state())[0], train_state(20))

    (folder / "20" / "metadata.json").write_text("{")
    assert "step 10 is intact" in refused(checkpoints.restore, None, train_state())
    shutil.rmtree(folder / "10" / "d")
    assert "no earlier one is intact" in refused(checkpoints.restore, None, train_state())


def test_after_deleting_the_damaged_one_the_run_goes_on(folder):
    (folder / "30" / "SHA256SUMS").write_text("")
    with Checkpoints(folder) as checkpoints:
        refused(checkpoints.restore, None, train_state())
        shutil.rmtree(folder / "30")
        assert checkpoints.restore(None, train_state())[1] == {"position": 20 * 512}
        assert checkpoints.metadata() == {"position": 20 * 512}
        checkpoints.save(30, train_state(30), wait=True)
        assert_same(checkpoints.restore(30, train_state())[0], train_state(30))


def test_foreign_files_are_no_damage(folder):
    """What an explorer or a sync program leaves; and what a save would write is no such thing."""
    for name in ("desktop.ini", "Thumbs.db", "d/.dropbox", "notes.txt"):
        (folder / "30" / name).write_text("x")
    (folder / "030").mkdir()
    (folder / "40").write_text("a file")
    checkpoints = Checkpoints(folder)
    assert checkpoints.steps() == [10, 20, 30]
    assert_same(checkpoints.restore(None, train_state())[0], train_state(30))
    (folder / "30" / "d" / ("0" * 32)).write_text("x")
    assert f"d/{'0' * 32} is not as it was written" in refused(checkpoints.metadata)


@pytest.fixture
def measured(tmp_path) -> Path:
    """Steps 1 to 4, of which 2 is the best."""
    with Checkpoints(tmp_path, keep=4) as checkpoints:
        for step, loss in enumerate((3.0, 1.0, 2.0, 4.0), 1):
            checkpoints.save(step, {"w": step}, metrics={"validation_loss": loss})
    return tmp_path


@pytest.mark.parametrize("damage", ["cut", "gone", "another number"])
def test_the_best_one_is_not_guessed_where_one_is_damaged(measured, damage):
    path = measured / "2" / "metadata.json"
    assert Checkpoints(measured).best() == 2
    content = path.read_bytes()
    path.unlink()
    if damage != "gone":
        path.write_bytes(content[:9] if damage == "cut" else content.replace(b"1.0", b"9.0"))
    message = refused(Checkpoints(measured).best)
    assert f"{measured / '2'} is damaged (metadata.json is " in message and "name a step" in message


def test_what_is_damaged_is_not_tidied_away(measured):
    (measured / "2" / "metadata.json").write_text("{")
    with Checkpoints(measured, keep=1) as checkpoints:
        checkpoints.save(5, {"w": 5}, metrics={"validation_loss": 5.0})
    assert checkpoints.steps() == [2, 3, 5]  # damaged; the best of the others; the newest
