"""What paths name: links, loops, files that are given twice, and folders of our own."""

import os
from pathlib import Path

import pytest

from transformer_vq.data import DataError, find_files, open_source


def make(folder: Path, *names: str) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"text of {name}")
    return folder


def names(*paths: Path) -> list[str]:
    return [path.name for path in find_files(paths).all]


def test_links_to_folders_are_entered(tmp_path):
    make(tmp_path / "far", "far.txt")
    make(tmp_path / "near", "own.txt")
    (tmp_path / "near/more").symlink_to("../far")
    (tmp_path / "all").symlink_to("near")
    assert names(tmp_path / "near") == names(tmp_path / "all") == ["far.txt", "own.txt"]


def test_splits_can_be_links(tmp_path):
    for name in ("train", "validation"):
        make(tmp_path / f"disk/{name}-data", f"{name}.txt")
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / f"data/{name}").symlink_to(f"../disk/{name}-data")
    source = open_source([tmp_path / "data"])
    assert source.split("train").tokens.tobytes() == b"\0text of train.txt"
    assert source.split("validation").num_bytes == len("text of validation.txt")


def test_loops_of_links_end_without_a_word(tmp_path):
    make(tmp_path / "a", "x.txt", "b/y.txt")
    (tmp_path / "a/b/up").symlink_to("..")
    (tmp_path / "a/self").symlink_to(".")
    found = find_files([tmp_path / "a"])
    assert [path.name for path in found.all] == ["y.txt", "x.txt"] and not found.notes()


@pytest.mark.parametrize("how", ["twice", "folder", "link", "hard link", "folder by a link"])
def test_what_is_given_twice_counts_once(tmp_path, how):
    folder = make(tmp_path / "a", "x.txt", "y.txt")
    paths, repeated = [folder], "x.txt"
    if how == "twice":
        paths, repeated = [folder, tmp_path / "b/../a"], "a"
        (tmp_path / "b").mkdir()
    elif how == "folder":
        paths = [folder, folder / "x.txt"]
    elif how == "link":
        (folder / "z.txt").symlink_to("x.txt")
        repeated = "z.txt"
    elif how == "hard link":
        os.link(folder / "x.txt", folder / "z.txt")
        repeated = "z.txt"
    else:
        make(folder, "b/w.txt")
        (folder / "c").symlink_to("b")
        repeated = "c"
    found = find_files(paths)
    rest = ["w.txt"] if how.startswith("folder by") else []
    assert [path.name for path in found.all] == [*rest, "x.txt", "y.txt"]
    assert found.notes() == [f"counted once what is given twice: {repeated}"]


def test_broken_links(tmp_path):
    folder = make(tmp_path / "a", "x.txt")
    (folder / "gone.txt").symlink_to("nothing")
    (folder / "gone.jsonl").symlink_to("nothing")
    with pytest.raises(DataError, match=r"there is no file .*gone.jsonl: it is a link to nothing"):
        open_source([folder])
    source = open_source([folder], on_error="skip")
    assert source.tokens.tobytes() == b"text of x.txt"
    assert "skipped 2 broken records, the first: there is no file" in source.notes[0]
    with pytest.raises(DataError, match=r"there is no file .*gone.txt"):
        open_source([folder, folder / "gone.txt"], on_error="skip")


def test_our_own_folders_are_left_out(tmp_path):
    make(tmp_path, "x.txt", "runs/r/config.json", "runs/r/metrics.jsonl", "runs/r/checkpoints/3/w",
         "cache/k/source.json", "cache/k/tokens.bin", "other/config.json")  # fmt: skip
    found = find_files([tmp_path])
    assert [path.name for path in found.all] == ["config.json", "x.txt"]
    assert found.notes() == ["left out what this program made itself: k, r"]


def test_a_run_in_the_folder_of_its_data(tmp_path):
    make(tmp_path, "x.txt", "y.txt")
    before = open_source([tmp_path]).fingerprint
    make(tmp_path, "config.json", "metrics.jsonl", "checkpoints/3/w")
    assert open_source([tmp_path]).fingerprint == before


@pytest.mark.parametrize(("path", "says"), [("", "is empty"), ("a\0b", "cannot read"),
                                            ("x" * 5000, "cannot read")])  # fmt: skip
def test_what_is_no_path(path, says):
    with pytest.raises(DataError, match=says):
        open_source([path])
