"""Pictures: read as bytes, trained on whole, scored one by one, drawn as PNG."""

import contextlib
import gzip
import json
import shutil
import zipfile
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
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


# What is read is what a viewer shows


def one(path: Path, **options) -> np.ndarray:
    return pictures(open_source([path], **options))[0]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", [".png", ".tif", ".webp", ".jpg"])
def test_orientation(tmp_path, suffix, orientation):
    corner = np.zeros((8, 16, 3), np.uint8)
    corner[:4, :4] = 255  # top left
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"a{suffix}"
    Image.fromarray(corner).save(path, exif=exif)
    upright = one(path)
    assert upright.shape == ((8, 16, 3) if orientation < 5 else (16, 8, 3))
    top, left = upright[:4].max() > 200, upright[:, :4].max() > 200
    # By the standard: which corner of the scene the first pixel is.
    assert (top, left) == {1: (1, 1), 2: (1, 0), 3: (0, 0), 4: (0, 1), 5: (1, 1), 6: (1, 0),
                           7: (0, 0), 8: (0, 1)}[orientation]  # fmt: skip


DEEP = np.array([[256, 40_000, 65_535]], np.uint16)


@pytest.mark.parametrize("name", ["a.png", "a.tif", "big-endian.tif", "white.tif", "a.pgm"])
def test_16_bits_are_scaled_and_not_clipped(tmp_path, name):
    path = tmp_path / name
    if name == "a.pgm":
        path.write_bytes(b"P5 3 1 65535\n" + DEEP.astype(">u2").tobytes())
    elif name == "white.tif":  # 0 is white
        Image.fromarray(65_535 - DEEP).save(path, tiffinfo={262: 0})
    else:
        Image.fromarray(DEEP.astype(">u2") if "endian" in name else DEEP).save(path)
    assert one(path).ravel().tolist() == [1, 156, 255]
    assert open_source([path]).notes == (f"took the upper 8 of 16 bits of {path}",)
    Image.fromarray(pixels(1, 1, 3)[0]).save(tmp_path / "z.png")  # among colours
    mixed = pictures(open_source([path, tmp_path / "z.png"]))
    np.testing.assert_array_equal(mixed[0], np.repeat([[[1], [156], [255]]], 3, axis=2))


@pytest.mark.parametrize(
    ("values", "says"),
    [
        (DEEP.astype(np.int32), "has pixels in whole numbers of 32 bits, of which nobody knows"),
        (DEEP / np.float32(65_535), "has pixels in floating point, of which nobody knows"),
        (DEEP // 256, "has 16 bits a pixel, and no value above 255: it would be all black"),
    ],
)
def test_pixels_of_unknown_range_are_refused(tmp_path, values, says):
    Image.fromarray(values).save(tmp_path / "a.tif")
    with pytest.raises(DataError, match=rf"a.tif {says}"):
        open_source([tmp_path / "a.tif"])


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L", "RGB", "gif"])
def test_what_is_transparent_is_white(tmp_path, mode):
    """The first of two pixels is; the second is as it was."""
    path, options = tmp_path / "a.png", {}
    if mode in ("RGBA", "LA"):
        colour = [200, 100, 50] if mode == "RGBA" else [200]
        picture = Image.fromarray(np.array([[[*colour, 0], [*colour, 255]]], np.uint8), mode)
    elif mode in ("P", "gif"):
        colour = [200, 100, 50]
        picture = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
        picture.putpalette([9, 9, 9, *colour])
        path, options = tmp_path / f"a.{'gif' if mode == 'gif' else 'png'}", {"transparency": 0}
    else:
        colour = [200, 100, 50][: len(mode)]
        rows = np.array([[[9] * len(mode), colour]], np.uint8)
        picture = Image.fromarray(rows.squeeze(2) if mode == "L" else rows)
        options = {"transparency": 9 if mode == "L" else (9, 9, 9)}
    picture.save(path, **options)
    assert one(path).tolist() == [[[255] * len(colour), colour]]


def test_half_transparent(tmp_path):
    Image.fromarray(np.array([[[200, 0, 100, 128]]], np.uint8)).save(tmp_path / "a.png")
    np.testing.assert_allclose(one(tmp_path / "a.png").ravel(), [227, 127, 177], atol=1)


@pytest.mark.parametrize("suffix", [".gif", ".tif", ".webp", ".png"])
def test_of_many_frames_the_first_with_a_word(tmp_path, suffix):
    first, *more = (Image.fromarray(np.full((4, 6, 3), v, np.uint8)) for v in (10, 100, 200))
    path = tmp_path / f"a{suffix}"
    first.save(path, save_all=True, append_images=more)
    assert np.abs(one(path).astype(int) - 10).max() <= 2
    assert open_source([path]).notes == (f"took only the first frame or page of {path}",)
    first.save(path)
    assert open_source([path]).notes == ()


def test_a_damaged_picture_prints_nothing(tmp_path, capfd, recwarn):
    Image.fromarray(pixels(1)[0]).save(path := tmp_path / "a.tif", compression="tiff_adobe_deflate")
    content = path.read_bytes()
    for place in range(0, len(content), 7):
        path.write_bytes(content[:place] + bytes([content[place] ^ 0x55]) + content[place + 1 :])
        with contextlib.suppress(DataError):
            open_source([path])
    printed = capfd.readouterr()
    assert not printed.err and not printed.out and not list(recwarn)


def test_too_large_pictures(tmp_path):
    from PIL import PngImagePlugin

    good = write_pictures(tmp_path / "a", pixels(1))
    content = bytearray((good / "000.png").read_bytes())
    content[16:24] = (60_000).to_bytes(4, "big") * 2
    content[29:33] = PngImagePlugin._crc32(bytes(content[12:29])).to_bytes(4, "big")
    (good / "bomb.png").write_bytes(content)
    with pytest.raises(DataError, match=r"bomb.png is no picture that can be read: Image size \("):
        open_source([good])
    assert len(open_source([good], on_error="skip").starts) == 1
    with pytest.raises(DataError, match=r"image size is 1000000: it must be from 1 to 8,192"):
        open_source([good], image_size=1_000_000)


def npz(path: Path, head: str, body: bytes = bytes(96), method: int = 0) -> Path:
    """An archive with an array that says of itself what `head` does."""
    with zipfile.ZipFile(path, "w", method) as archive:
        text = head.encode().ljust(117) + b"\n"
        archive.writestr("data.npy", b"\x93NUMPY\1\0" + b"\x76\0" + text + body)
    return path


HEADS = ("(10**12, 48)", "(1000000000000, 48)", "(True, 48)", "(2, -48)", "(2.0, 48)", "'no'",
         "(100000000000000000000, 48)", "((2,), 48)")  # fmt: skip


@pytest.mark.parametrize("shape", HEADS)
def test_heads_of_arrays_that_cannot_be(tmp_path, shape):
    head = "{'descr': '|u1', 'fortran_order': False, 'shape': %s}"
    assert len(open_source([npz(tmp_path / "good.npz", head % "(2, 48)")]).starts) == 2
    with pytest.raises(DataError, match=r"bad.npz"):
        open_source([npz(tmp_path / "bad.npz", head % shape)])


def test_archives_of_arrays_that_are_not_read(tmp_path):
    good = write_npz(tmp_path / "good.npz", pixels(2, 4, 4)).read_bytes()
    start = good.index(b"PK\1\2")  # of the list of what is in it
    for place, value in ((start + 8, 1), (start + 10, 9), (start + 10, 99)):
        content = bytearray(good)
        content[place] = value  # encrypted; compressed in other ways
        (tmp_path / "bad.npz").write_bytes(content)
        with pytest.raises(DataError, match=r"bad.npz is no picture that can be read: "):
            open_source([tmp_path / "bad.npz"])


def test_pictures_get_the_channels_that_a_run_has(tmp_path):
    grey = write_pictures(tmp_path / "grey", pixels(3, channels=1))
    colour = write_pictures(tmp_path / "colour", pixels(3))
    assert open_source([grey], channels=3).image_shape == (4, 6, 3)
    made = open_source([colour], channels=1)
    assert made.image_shape == (4, 6, 1)
    assert made.notes == (f"made grey: {colour / '000.png'} and 2 more",)
    array = write_idx(tmp_path / "x-idx3-ubyte", pixels(3, channels=1)[..., 0])
    in_colour = pictures(open_source([array], channels=3))
    np.testing.assert_array_equal(in_colour, in_colour[..., :1].repeat(3, axis=3))
    with pytest.raises(DataError, match=r"x.npz holds pictures of 5 x 5 x 3, and grey ones"):
        open_source([write_npz(tmp_path / "x.npz", pixels(2, 5, 5))], channels=1)


KINDS = {"a.png": {}, "a.jpg": {}, "a.gif": {}, "a.tif": {"compression": "tiff_lzw"}, "a.webp": {}}


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from([*KINDS, "a.npz", "a-idx3-ubyte"]),
    st.lists(st.tuples(st.integers(0, 2**20), st.integers(0, 255)), min_size=1, max_size=6),
    st.sampled_from([0, 4]),
)
def test_any_damage_is_a_data_error(tmp_path_factory, name, changes, image_size):
    path = tmp_path_factory.mktemp("damaged") / name
    if name == "a.npz":
        write_npz(path, pixels(2, 4, 4))
    elif name in KINDS:
        Image.fromarray(pixels(1)[0]).save(path, **KINDS[name])
    else:
        write_idx(path, pixels(2, channels=1)[..., 0])
    content = bytearray(path.read_bytes())
    for place, value in changes:
        content[place % len(content)] = value
    path.write_bytes(content)
    with contextlib.suppress(DataError):
        assert open_source([path], image_size=image_size).image_shape


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
