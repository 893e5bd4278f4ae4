"""Pictures that are damaged, or not what they say: each is named in one sentence, or skipped."""

import contextlib
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.pictures import pixels, write_idx, write_npz, write_pictures
from transformer_vq.data import DataError, open_source


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
        ("text", r"bad.png is no picture that can be read: it begins as no kind"),
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
