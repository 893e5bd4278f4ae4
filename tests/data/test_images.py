"""Pictures read as bytes: what is read is what a viewer shows."""

import gzip
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.pictures import pictures, pixels, write_idx, write_npz, write_pictures
from transformer_vq.data import DataError, Source, load_tokenizer, open_source
from transformer_vq.data.vocabulary_trainer import train_tokenizer

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


def test_pictures_are_bytes(tmp_path):
    train_tokenizer(Source.of(np.zeros(9, np.uint8)), tmp_path / "t.json", 300)
    folder = write_pictures(tmp_path / "a", pixels(2))
    with pytest.raises(DataError, match="holds pictures, which are bytes"):
        open_source([folder], tokenizer=load_tokenizer(tmp_path / "t.json"))
    path = write_npz(tmp_path / "x.npz", pixels(2, 5, 5))
    with pytest.raises(DataError, match=r"x.npz holds pictures of 5 x 5 x 3: --image-size is for"):
        open_source([path], image_size=4)


def test_image_size_is_for_pictures(tmp_path):
    for name, content in (("a.txt", "text"), ("a.jsonl", '{"text": "text"}')):
        (path := tmp_path / name).write_text(content)
        with pytest.raises(DataError, match=r"a\.\w+ holds text, and --image-size is for pictures"):
            open_source([path], image_size=8)
        assert open_source([path]).num_bytes == 4  # control


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
