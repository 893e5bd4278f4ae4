"""Pictures: read as bytes, trained on whole, scored one by one, drawn as PNG."""

import gzip
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from tests.helpers import make_run
from transformer_vq import Model, ModelConfig, init_model, init_state
from transformer_vq.cli import main
from transformer_vq.cli.images import contact_sheet
from transformer_vq.data import Batches, DataError, Source, load_tokenizer, open_source
from transformer_vq.data.vocabulary import train_tokenizer
from transformer_vq.nn.extend import extend
from transformer_vq.ops.evaluate import evaluate

RANDOM = np.random.default_rng(0)


def pixels(count: int, height: int = 4, width: int = 6, channels: int = 3) -> np.ndarray:
    return RANDOM.integers(0, 256, (count, height, width, channels), np.uint8)


def write_idx(path: Path, images: np.ndarray) -> Path:
    head = bytes([0, 0, 8, images.ndim]) + np.array(images.shape, ">u4").tobytes()
    content = head + images.tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def write_npz(path: Path, images: np.ndarray) -> Path:
    rows = images.transpose(0, 3, 1, 2).reshape(len(images), -1)
    np.savez(path, data=rows, labels=np.arange(len(images)))
    return path


def write_pictures(folder: Path, images: np.ndarray, suffix: str = ".png") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(images):
        Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image).save(
            folder / f"{i:03}{suffix}"
        )
    return folder


def pictures(source: Source) -> np.ndarray:
    """The pictures of a source, each without its start token."""
    rows = source.tokens.reshape(-1, source.sequence_len + 1)
    assert not rows[:, 0].any()
    np.testing.assert_array_equal(source.starts, np.arange(len(rows)) * rows.shape[1])
    return rows[:, 1:].reshape(-1, *source.image_shape)


# Reading


def test_a_folder_of_pictures(tmp_path):
    images = pixels(20)
    write_pictures(tmp_path / "a", images)
    (tmp_path / "notes.txt").write_text("no picture")
    source = open_source([tmp_path])
    np.testing.assert_array_equal(pictures(source), images)
    assert source.image_shape == (4, 6, 3) and source.sequence_len == 72
    assert source.notes == ("left out 1 file, which is no picture: notes.txt",)
    assert [len(source.split(s).starts) for s in ("train", "validation", "test")] == [18, 1, 1]
    np.testing.assert_array_equal(pictures(source.split("test")), images[19:])
    assert source.num_bytes == images.size and source.bytes_per_token == 1.0
    # A pixel's channels are side by side, and the next pixel is to its right.
    np.testing.assert_array_equal(source.tokens[1:7], images[0, 0, :2].ravel())


def test_grey_stays_grey_unless_one_is_in_colour(tmp_path):
    grey = pixels(5, channels=1)
    folder = write_pictures(tmp_path / "a", grey)
    np.testing.assert_array_equal(pictures(open_source([folder])), grey)
    Image.fromarray(pixels(1)[0]).save(folder / "z.png")
    mixed = pictures(open_source([folder]))
    np.testing.assert_array_equal(mixed[:5], grey.repeat(3, axis=3))


def test_image_size_resizes_and_crops(tmp_path):
    wide = np.zeros((1, 8, 32, 3), np.uint8)
    wide[:, :, 12:20] = 200  # the middle
    tall = wide.transpose(0, 2, 1, 3)
    write_pictures(tmp_path / "a", wide)
    write_pictures(tmp_path / "b", tall, ".jpg")
    with pytest.raises(DataError, match=r"000.jpg is 32 x 8 x 3, and not 8 x 32 x 3 .*image-size"):
        open_source([tmp_path])
    skipped = open_source([tmp_path], on_error="skip")
    assert len(skipped.starts) == 1 and "skipped 1 broken record" in skipped.notes[0]
    source = open_source([tmp_path], image_size=4)
    assert source.image_shape == (4, 4, 3)
    assert np.abs(pictures(source).astype(int) - 200).max() < 30


@pytest.mark.parametrize("name", ["x-idx3-ubyte", "x-idx3-ubyte.gz", "x.npz", "x-idx4-ubyte"])
def test_arrays_of_pictures(tmp_path, name):
    if "idx3" in name:
        images = pixels(20, channels=1)
        path = write_idx(tmp_path / name, images[..., 0])
    elif "idx4" in name:
        path = write_idx(tmp_path / name, images := pixels(20))
    else:
        path = write_npz(tmp_path / name, images := pixels(20, 5, 5))
    source = open_source([path], cache=tmp_path / "cache")
    np.testing.assert_array_equal(pictures(source), images)
    np.testing.assert_array_equal(pictures(source.split("validation")), images[18:19])
    again = open_source([path], cache=tmp_path / "cache")
    assert again.image_shape == source.image_shape and again.fingerprint == source.fingerprint


def test_arrays_say_what_they_are_for(tmp_path):
    train, test = pixels(19, channels=1), pixels(4, channels=1)
    write_idx(tmp_path / "train-images-idx3-ubyte.gz", train[..., 0])
    write_idx(tmp_path / "t10k-images-idx3-ubyte.gz", test[..., 0])
    write_idx(tmp_path / "t10k-labels-idx1-ubyte.gz", np.arange(4))
    source = open_source([tmp_path])
    np.testing.assert_array_equal(pictures(source.split("train")), train[:18])
    np.testing.assert_array_equal(pictures(source.split("validation")), train[18:])
    np.testing.assert_array_equal(pictures(source.split("test")), test)
    assert "t10k-labels" in source.notes[0]
    alone = open_source([tmp_path / "t10k-images-idx3-ubyte.gz"])
    np.testing.assert_array_equal(pictures(alone), test)


def test_fashion_mnist():
    """The first pictures of its own files."""
    folder = Path(__file__).parent / "recorded/fashion-mnist"
    source = open_source([folder])
    assert source.image_shape == (28, 28, 1) and len(source.starts) == 25
    raw = gzip.decompress((folder / "t10k-images-idx3-ubyte.gz").read_bytes())
    assert pictures(source.split("test")).tobytes() == raw[16:]


def _break(folder: Path, how: str) -> Path:
    """A path that cannot be read."""
    good = write_pictures(folder / "good", pixels(1))
    if how == "cut":
        content = (good / "000.png").read_bytes()
        (good / "bad.png").write_bytes(content[: len(content) // 2])
        return good
    if how == "text":
        (good / "bad.png").write_text("no picture")
        return good
    if how == "short":
        path = write_idx(folder / "bad-idx3-ubyte", pixels(2, channels=1)[..., 0])
        path.write_bytes(path.read_bytes()[:-1])
        return path
    if how == "labels":
        return write_idx(folder / "bad-idx3-ubyte", np.arange(9, dtype=np.uint8))
    if how == "damaged":
        path = folder / "bad.npz"
        path.write_bytes(b"PK nonsense")
        return path
    arrays = {"key": {"images": pixels(2)}, "shape": {"data": np.zeros((2, 10), np.uint8)}}[how]
    np.savez(folder / "bad.npz", **arrays)
    return folder / "bad.npz"


@pytest.mark.parametrize(
    ("how", "sentence"),
    [
        ("cut", r"bad.png is no picture that can be read: "),
        ("text", r"bad.png is no picture that can be read: cannot identify"),
        ("short", r"bad-idx3-ubyte has 63 bytes, and 64 by its own account"),
        ("labels", r"bad-idx3-ubyte is no IDX file of pictures of unsigned bytes"),
        ("damaged", r"bad.npz is no picture that can be read: "),
        ("key", r"bad.npz has no array 'data': it has images"),
        ("shape", r"bad.npz is uint8 of shape 2 x 10: it must be uint8, pictures x 3 side side"),
    ],
)
def test_broken_pictures_are_named_or_skipped(tmp_path, how, sentence):
    path = _break(tmp_path, how)
    with pytest.raises(DataError, match=sentence) as caught:
        open_source([path])
    assert "\n" not in str(caught.value)
    if how in ("cut", "text"):
        source = open_source([path], on_error="skip")
        assert len(source.starts) == 1 and "bad.png" in source.notes[0]
    else:
        with pytest.raises(DataError, match=r"there is no picture that can be read: .*bad"):
            open_source([path], on_error="skip")


def test_no_picture_left(tmp_path):
    path = _break(tmp_path, "cut")
    (path / "000.png").unlink()
    with pytest.raises(DataError, match=r"hold no tokens: skipped 1 broken record: .*bad.png"):
        open_source([path], on_error="skip")
    with pytest.raises(DataError, match="the image size is -1"):
        open_source([path], image_size=-1)


def test_pictures_are_bytes(tmp_path):
    train_tokenizer(Source.of(np.zeros(9, np.uint8)), tmp_path / "t.json", 300)
    folder = write_pictures(tmp_path / "a", pixels(2))
    with pytest.raises(DataError, match="holds pictures, which are bytes"):
        open_source([folder], tokenizer=load_tokenizer(tmp_path / "t.json"))
    path = write_npz(tmp_path / "x.npz", pixels(2, 5, 5))
    with pytest.raises(DataError, match=r"x.npz holds pictures of 5 x 5 x 3: --image-size is for"):
        open_source([path], image_size=4)


# Training and scoring


def test_a_row_is_a_picture(tmp_path):
    images = pixels(7)
    source = open_source([write_pictures(tmp_path / "a", images)]).split("all")
    batches = Batches(source.tokens, starts=source.starts, whole_documents=True, batch_size=7,
                      sequence_len=72, seed=0)  # fmt: skip
    for index in range(2):
        batch = batches.batch(index)
        assert not batch.inputs[:, 0].any() and batch.loss_mask.all()
        np.testing.assert_array_equal(batch.inputs[:, 1:], batch.targets[:, :-1])
        order = batch.document_ids[:, 0]
        np.testing.assert_array_equal(batch.targets, images.reshape(7, -1)[order])
        assert sorted(order) == list(range(7)) and (np.diff(batch.document_ids) == 0).all()


CONFIG = ModelConfig(d_model=16, d_k=8, num_layers=1, codebook_size=8, block_len=16, window_len=8,
                     absolute_positions=True)  # fmt: skip


def _model(config: ModelConfig) -> Model:
    """One whose predictions depend on all that it sees."""
    model = init_model(config, 0)
    louder = {name: 3.0 * model.params["units"][name] for name in ("w_q", "w_v", "w_o", "w_r")}
    return Model({**model.params, "units": {**model.params["units"], **louder}}, model.codebook,
                 config)  # fmt: skip


@jax.jit
def _losses(model: Model, rows: jax.Array) -> jax.Array:
    full = model.config.attention == "full"
    state = init_state(model.config, len(rows), capacity=rows.shape[1] if full else None)
    predicted = jax.nn.log_softmax(extend(model, state, rows[:, :-1])[0])
    return -np.take_along_axis(predicted, rows[:, 1:, None], axis=2)[..., 0]


@pytest.mark.parametrize("attention", ["vq", "full"])
def test_pictures_are_scored_one_by_one(tmp_path, attention):
    source = open_source([write_pictures(tmp_path / "a", pixels(6))])
    model = _model(CONFIG.replace(attention=attention))
    rows = source.tokens.reshape(6, 73).astype(np.int32)
    expected = np.asarray(_losses(model, rows))
    for rows in (1, 4) if attention == "vq" else (1,):
        result = evaluate(model, source, chunk_len=50, rows=rows)
        assert result.tokens == 6 * 72
        assert result.loss == pytest.approx(expected.mean(), rel=1e-5)
        assert result.bpb == result.loss / np.log(2)
        assert [bin[:2] for bin in result.by_position] == [(0, 64), (64, 72)]
        assert result.by_position[1][2] == pytest.approx(expected[:, 64:].mean(), rel=1e-5)
    if attention == "vq":  # control: as one text, it would be another number
        assert abs(evaluate(model, source.tokens).loss - result.loss) > 1e-4
        some = evaluate(model, source, max_tokens=100, chunk_len=50)
        assert some.tokens == 99  # the start token of the second picture is given
        with pytest.raises(DataError, match="6 documents for 7 rows"):
            evaluate(model, source, rows=7)


def test_documents_are_scored_as_the_model_reads_them():
    """A model that resets at documents is scored so; each start is predicted, as an end."""
    starts = np.array([0, 30, 75])
    tokens = RANDOM.integers(1, 256, 110).astype(np.uint8)
    source = Source(tokens, starts, 107)
    model = _model(CONFIG.replace(reset_at_document=True))
    result = evaluate(model, source, chunk_len=40)
    pieces = [tokens[a : b + 1].astype(np.int32) for a, b in ((0, 30), (30, 75), (75, 110))]
    alone = np.concatenate([np.asarray(_losses(model, piece[None]))[0] for piece in pieces])
    assert result.tokens == 109 == len(alone)
    assert result.loss == pytest.approx(alone.mean(), rel=1e-5)
    assert result.bpb == pytest.approx(alone.mean() / np.log(2) * 110 / 107, rel=1e-5)
    assert abs(evaluate(model, tokens, chunk_len=40).loss - result.loss) > 1e-4


# The command line

SIZES = [
    *(f"--config.{name}={value}" for name, value in {
        "d-model": 16, "d-k": 8, "num-layers": 1, "codebook-size": 8, "block-len": 16,
        "window-len": 8}.items()),
    "--train.batch-size=8", "--steps=2", "--train.update-len=36",
]  # fmt: skip


@pytest.mark.slow
def test_train_score_and_draw(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TVQ_CACHE", "")
    data, out = write_pictures(tmp_path / "a", pixels(40)), str(tmp_path / "run")
    train = ["train", "--data", str(data), "--out", out, *SIZES]
    assert main([*train, "--train.sequence-len", "64"]) == 2
    assert "pictures of 4 x 6 x 3 are sequences of 72: leave it out" in capsys.readouterr().err
    assert main([*train, "--train.update-len", "50"]) == 2
    assert "not a multiple of update_len, 50" in capsys.readouterr().err
    assert not Path(out).exists()
    assert main(train) == 0
    told = capsys.readouterr().out
    assert "40 pictures of 4 x 6 x 3, of which 36 to train on" in told
    assert f"sample --run {out} --num-images 25" in told
    assert main(["eval", "--run", out, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["tokens"] == 2 * 72 and record["bpd"] == record["loss"] / np.log(2)
    assert main(["eval", "--run", out]) == 0
    assert f"{record['bpd']:.4f} bits per dimension" in capsys.readouterr().out

    drawn = tmp_path / "drawn"
    draw = ["sample", "--run", out, "--num-images", "4", "--out", str(drawn)]
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
    assert main([*draw[:-3], "3", *draw[-2:], "--seed", "1"]) == 0
    again = np.asarray(Image.open(drawn / "0.png"))
    assert np.array_equal(again, images[1])  # a picture depends on its seed alone
    capsys.readouterr()
    for wrong, says in (([], "draws pictures: give --num-images"), (["--prompt", "x"], "pictures")):
        assert main(["sample", "--run", out, *wrong]) == 2
        assert says in capsys.readouterr().err


def test_contact_sheet():
    images = pixels(5, 40, 40)
    sheet = contact_sheet(images)
    assert sheet.shape == (4 + 2 * 84, 4 + 3 * 84, 3)
    np.testing.assert_array_equal(sheet[4:84:2, 88:168:2], images[1])
    np.testing.assert_array_equal(sheet[88:168:2, 88:168:2], images[4])
    assert (sheet[88:, 172:] == 255).all() and (sheet[:4] == 255).all()


# Options that are for one kind of data are refused with another, and not ignored


def test_image_size_is_for_pictures(tmp_path):
    for name, content in (("a.txt", "text"), ("a.jsonl", '{"text": "text"}')):
        (path := tmp_path / name).write_text(content)
        with pytest.raises(DataError, match=r"a\.\w+ holds text, and --image-size is for pictures"):
            open_source([path], image_size=8)
        assert open_source([path]).num_bytes == 4  # control


@pytest.mark.parametrize(
    ("shape", "arguments", "says"),
    [
        (None, ["sample", "--out", "drawn"], "--out is for pictures, and the run in"),
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
            for option in (["--max-tokens", "9"], ["--num-samples", "2"], ["--logprobs"])
        ),
    ],
)
def test_options_of_another_kind_of_run(tmp_path, monkeypatch, capsys, shape, arguments, says):
    monkeypatch.setenv("TVQ_CACHE", "")
    monkeypatch.chdir(tmp_path)
    run = make_run(tmp_path / "run", image_shape=shape)
    write_pictures(tmp_path / "pictures", pixels(2))
    (tmp_path / "text.txt").write_text("some text")
    command, *options = arguments
    assert main([command, "--run", run, *options]) in (1, 2)
    printed = capsys.readouterr().err
    assert says in printed and printed.count("\n") == 1
    assert not (tmp_path / "drawn").exists() and not (tmp_path / "samples").exists()


def test_train_refuses_image_size_for_text(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TVQ_CACHE", "")
    (path := tmp_path / "text.txt").write_text("some text " * 50)
    out = tmp_path / "run"
    arguments = ["train", "--data", str(path), "--out", str(out), "--image-size", "32"]
    assert main(arguments) == 1
    assert "--image-size is for pictures: leave it out" in capsys.readouterr().err
    assert not out.exists()
