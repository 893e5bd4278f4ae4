"""`tvq train`, `eval` and `draw` on pictures, and options that are for one kind of data."""

import functools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.helpers import make_run
from tests.pictures import pixels, write_pictures
from transformer_vq.cli import main
from transformer_vq.cli.images import contact_sheet

SIZES = [
    *(f"--config.{name}={value}" for name, value in {
        "d-model": 16, "d-k": 8, "num-layers": 1, "codebook-size": 8, "block-len": 16,
        "window-len": 8}.items()),
    "--train.batch-size=8", "--steps=2", "--train.update-len=36",
]  # fmt: skip


@pytest.mark.slow
def test_train_score_and_draw(tmp_path, capsys):
    data, out = write_pictures(tmp_path / "a", pixels(40)), str(tmp_path / "run")
    train = ["train", "--data", str(data), "--out", out, *SIZES]
    assert main([*train, "--train.sequence-len", "64"]) == 2
    assert "pictures of 4 x 6 x 3 are sequences of 72: leave it out" in capsys.readouterr().err
    assert main([*train, "--train.update-len", "50"]) == 2
    assert "not a multiple of --train.update-len, 50" in capsys.readouterr().err
    assert not Path(out).exists()
    assert main(train) == 0
    told = capsys.readouterr().out
    assert "40 pictures of 4 x 6 x 3, of which 36 to train on" in told
    assert f"draw --run {out} --num-images 25" in told
    assert main(["eval", "--run", out, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["tokens"] == 2 * 72 and record["bpd"] == record["loss"] / np.log(2)
    assert main(["eval", "--run", out]) == 0
    assert f"{record['bpd']:.4f} bits per dimension" in capsys.readouterr().out

    drawn = tmp_path / "drawn"
    draw = ["draw", "--run", out, "--num-images", "4", "--out", str(drawn)]
    assert main([*draw, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["contact_sheet"] == str(drawn / "contact.png")
    assert sorted(p.name for p in drawn.iterdir()) == [
        *(f"{i}.png" for i in range(4)),
        "contact.png",
    ]
    images = [np.asarray(Image.open(drawn / f"{i}.png")) for i in range(4)]
    assert {image.shape for image in images} == {(4, 6, 3)}
    assert not np.array_equal(images[0], images[1])
    shutil.rmtree(drawn)
    before = ["sample", *draw[1:4], "3", *draw[-2:], "--seed", "1"]  # as it was called before
    assert main(before) == 0
    again = np.asarray(Image.open(drawn / "0.png"))
    assert np.array_equal(again, images[1])  # a picture depends on its seed alone
    capsys.readouterr()
    for options in ([], ["--prompt", "x"]):
        assert main(["sample", "--run", out, *options]) == 2
        assert f"draws pictures: tvq draw --run {out}" in capsys.readouterr().err


def test_contact_sheet():
    images = pixels(5, 40, 40)
    sheet = contact_sheet(images)
    assert sheet.shape == (4 + 2 * 84, 4 + 3 * 84, 3)
    np.testing.assert_array_equal(sheet[4:84:2, 88:168:2], images[1])
    np.testing.assert_array_equal(sheet[88:168:2, 88:168:2], images[4])
    assert (sheet[88:, 172:] == 255).all() and (sheet[:4] == 255).all()


@pytest.fixture(scope="module")
def untrained(tmp_path_factory):
    """A run on pictures of a shape, or on text."""

    @functools.cache
    def make(shape):
        return make_run(tmp_path_factory.mktemp("runs") / "run", image_shape=shape)

    return make


@pytest.mark.parametrize(
    ("shape", "arguments", "says"),
    [
        (None, ["sample", "--out", "drawn"], "was not trained on pictures: tvq sample writes text"),
        (None, ["draw", "--out", "drawn"], "was not trained on pictures: tvq sample writes text"),
        (None, ["sample", "--num-images", "2"], "was not trained on pictures"),
        (None, ["eval", "--data", "pictures"], "holds pictures of 4 x 6 x 3, and the run was tr"),
        ((4, 6, 3), ["eval", "--data", "text.txt"], "holds text, and the run was trained on pict"),
        (
            (4, 5, 3),
            ["eval", "--data", "pictures"],
            "3, and the run was trained on pictures of 4",
        ),
        (
            (4, 6, 3),
            ["eval", "--data", "pictures", "--context-len", "72"],
            "--context-len is for text",
        ),
        *(
            ((4, 6, 3), ["sample", "--num-images", "1", *option], f"{option[0]} is for text")
            for option in (["--max-tokens", "9"], ["--num-samples", "2"], ["--prompt", "x"])
        ),
    ],
)
def test_options_of_another_kind_of_run(
    tmp_path, monkeypatch, capsys, untrained, shape, arguments, says
):
    monkeypatch.chdir(tmp_path)
    run = untrained(shape)
    write_pictures(tmp_path / "pictures", pixels(2))
    (tmp_path / "text.txt").write_text("some text")
    command, *options = arguments
    assert main([command, "--run", run, *options]) in (1, 2)
    printed = capsys.readouterr().err
    assert says in printed and printed.count("\n") == 1
    assert not (tmp_path / "drawn").exists() and not (tmp_path / "samples").exists()


def test_train_refuses_image_size_for_text(tmp_path, capsys):
    (path := tmp_path / "text.txt").write_text("some text " * 50)
    out = tmp_path / "run"
    arguments = ["train", "--data", str(path), "--out", str(out), "--image-size", "32"]
    assert main(arguments) == 1
    assert "--image-size is for pictures: leave it out" in capsys.readouterr().err
    assert not out.exists()
