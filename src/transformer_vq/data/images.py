"""Pictures as sequences of bytes: files of one each, IDX, and npz as of downsampled ImageNet.

A picture is its rows from the top, pixels from the left, channels of a pixel side by side. It is
read as a viewer shows it: upright, on white where it is transparent, with 8 bits a channel.
"""

import io
import math
import os
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from transformer_vq.data.compressed import (
    ReadError,
    free_memory,
    is_compressed,
    load_bytes,
    open_binary,
)
from transformer_vq.data.files import kind_of
from transformer_vq.data.text import DataError

Shape = tuple[int, int, int]  # height, width, channels
LARGEST_SIDE = 8192  # of --image-size
_GREY = ("1", "L", "LA", "La", "I", "F", "I;16", "I;16L", "I;16B", "I;16N")  # modes of Pillow
_ORIENTATION = 0x0112  # tags of EXIF and TIFF
_BITS, _PHOTOMETRIC = 258, 262


class Look(NamedTuple):
    """What is known of a file of pictures before it is read."""

    shape: Shape
    frames: bool = False  # there are more, of which the first is taken
    deep: bool = False  # 16 bits a pixel, of which the upper 8 are taken


def look_at(path: Path) -> Look:
    """What the pictures in a file are. Raises `DataError` if that cannot be told."""
    if kind_of(path) == "pictures":
        return Look(_array_images(path).shape[1:])
    with _picture(path) as picture:
        height, width = picture.height, picture.width
        # Pillow turns a TIFF itself. The others of a camera's MPO are no part of the picture.
        if picture.format != "TIFF" and _turn(picture) in _SIDEWAYS:
            height, width = width, height
        more = bool(getattr(picture, "is_animated", False)) and picture.format != "MPO"
        grey = picture.mode in _GREY
        return Look((height, width, 1 if grey else 3), more, picture.mode.startswith("I"))


def read_images(path: Path, shape: Shape, image_size: int = 0) -> np.ndarray:
    """The pictures in a file, uint8 `[n, *shape]`; grey ones in colour if `shape` is.

    `image_size`: one picture in a file of its own is resized so that its shorter side is that,
    and its middle is kept. Raises `DataError` if the pictures are of another shape.
    """
    if kind_of(path) == "pictures":
        images = _array_images(path)
        if images.shape[3] < shape[2]:
            images = np.broadcast_to(images, (*images.shape[:3], shape[2]))
    else:
        images = _pixels(path, image_size, shape[2])[None]
    if images.shape[1:] != shape:
        raise DataError(
            f"{path} is {_say(images.shape[1:])}, and not {_say(shape)} as those before it: "
            f"resize and crop all with --image-size"
        )
    return images


def common_shape(
    paths: Sequence[Path], shapes: Sequence[Shape], image_size: int = 0, channels: int = 0
) -> Shape:
    """The shape that the first picture has or gets; `channels`, or in colour if any picture is.

    Raises `DataError` if arrays of pictures are to be resized, or made grey.
    """
    height, width, _ = shapes[0]
    for path, shape in zip(paths, shapes, strict=True):
        if kind_of(path) == "picture":
            continue
        if image_size and shape[:2] != (image_size, image_size):
            raise DataError(
                f"{path} holds pictures of {_say(shape)}: --image-size is for pictures that have a "
                f"file each"
            )
        if channels == 1 < shape[2]:
            raise DataError(f"{path} holds pictures of {_say(shape)}, and grey ones are wanted")
    if image_size:
        height = width = image_size
    return height, width, channels or max(channels for _, _, channels in shapes)


def _say(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))


# Files of one picture.


@contextmanager
def _picture(path: Path) -> Iterator[Any]:
    """A picture open in Pillow; what Pillow raises while it is becomes a `DataError`."""
    from PIL import Image

    open_binary(path).close()  # it is a file
    content: Any = io.BytesIO(load_bytes(path).data) if is_compressed(path) else path
    try:
        with _quiet(), Image.open(content) as picture:
            yield picture
    except DataError:
        raise
    except Exception as error:  # a damaged file makes Pillow raise what it will
        raise _no_picture(path, error) from None


@contextmanager
def _quiet() -> Iterator[None]:
    """No warnings of Pillow, nor lines that its C libraries print: an error says what matters."""
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        with suppress(OSError):  # no standard error, nothing to keep quiet
            standard_error = os.dup(2)
            stack.callback(os.close, standard_error)
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, 2)
            os.close(nowhere)
            stack.callback(os.dup2, standard_error, 2)
        yield


def _pixels(path: Path, image_size: int, channels: int) -> np.ndarray:
    from PIL import Image, ImageOps

    with _picture(path) as picture:
        picture.load()
        turn = _turn(picture)  # of a TIFF there is none any more
        if picture.mode.startswith(("I", "F")):
            picture = Image.fromarray(_eight_bits(path, picture))
        elif picture.has_transparency_data:
            picture = _on_white(picture)
        picture = picture.convert("L" if channels == 1 else "RGB")
        if turn is not None:
            picture = picture.transpose(turn)
        if image_size:
            picture = ImageOps.fit(picture, (image_size, image_size), Image.Resampling.LANCZOS)
        pixels = np.asarray(picture, np.uint8)
    return pixels.reshape(*pixels.shape[:2], channels)


def _eight_bits(path: Path, picture: Any) -> np.ndarray:
    """The upper 8 bits of a grey picture of 16. Raises `DataError` where its range is not known."""
    bits = 16
    if picture.format == "TIFF":
        bits = picture.tag_v2.get(_BITS, (16,))[0]
    if not picture.mode.startswith("I;16") and picture.format not in ("PNG", "PPM"):
        kind = "floating point" if picture.mode == "F" else "whole numbers of 32 bits"
        raise DataError(
            f"{path} has pixels in {kind}, of which nobody knows what is black and what is white: "
            f"save it with 8 bits a pixel"
        )
    values = np.asarray(picture).astype(np.int32)
    if picture.format == "TIFF" and picture.tag_v2.get(_PHOTOMETRIC) == 0:  # 0 is white
        values = (1 << bits) - 1 - values
    clear = picture.info.get("transparency")
    if isinstance(clear, int):
        values[values == clear] = (1 << bits) - 1
    brightest = int(values.max())
    if 0 < brightest < 1 << (bits - 8):
        raise DataError(
            f"{path} has {bits} bits a pixel, and no value above {brightest}: it would be all "
            f"black. Save it with 8 bits a pixel"
        )
    return (values >> (bits - 8)).astype(np.uint8)


def _on_white(picture: Any) -> Any:
    """As a viewer shows what is transparent, and not the colour that is stored below it."""
    from PIL import Image

    mode = "L" if picture.mode in _GREY else "RGB"
    picture = picture.convert(f"{mode}A")
    flat = Image.new(mode, picture.size, "white")
    flat.paste(picture.convert(mode), mask=picture.getchannel("A"))
    return flat


def _turn(picture: Any) -> Any:
    """What makes a picture upright, of Pillow's `Transpose`; None if it is."""
    try:
        return _TURNS.get(picture.getexif().get(_ORIENTATION, 1))
    except Exception:  # a damaged note about a picture is no damage of the picture
        return None


# By the value of EXIF: mirrored, upside down, and so on. Values of `PIL.Image.Transpose`.
_TURNS = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}
_SIDEWAYS = (5, 4, 6, 2)


def _no_picture(path: Path, error: Exception) -> DataError:
    from PIL import UnidentifiedImageError

    reason = ReadError(path, error).reason
    if isinstance(error, UnidentifiedImageError):  # which names an object, or the path once more
        reason = "it begins as no kind of picture does"
    return DataError(f"{path} is no picture that can be read: {reason}")


# Files of many.


def _array_images(path: Path) -> np.ndarray:
    if path.suffix.lower() == ".npz":
        open_binary(path).close()  # it is a file
        return _npz_images(path, path)
    content = load_bytes(path)
    is_npz = kind_of(path) == "pictures" and content[:2].tobytes() == b"PK"
    return _npz_images(path, io.BytesIO(content.data)) if is_npz else _idx_images(path, content)


def _idx_images(path: Path, content: np.ndarray) -> np.ndarray:
    """IDX: two zeros, the type (8: unsigned bytes), the number of axes, their sizes, the bytes."""
    axes = int(content[3]) if len(content) > 3 else 0
    head = 4 + 4 * axes
    if content[:3].tobytes() != b"\0\0\x08" or axes not in (3, 4) or len(content) < head:
        raise DataError(f"{path} is no IDX file of pictures of unsigned bytes")
    sizes = tuple(np.frombuffer(content[4:head].tobytes(), ">u4").tolist())
    expected = head + math.prod(sizes)
    if len(content) != expected:
        raise DataError(f"{path} has {len(content):,} bytes, and {expected:,} by its own account")
    if not all(sizes):
        raise DataError(f"{path} is of shape {_say(sizes)}: it holds no pictures")
    return _checked(path, content[head:].reshape(*sizes, *(() if axes == 4 else (1,))))


def _npz_images(path: Path, file: Any) -> np.ndarray:
    """Downsampled ImageNet: `data`, a row a picture, all of red, all of green, all of blue."""
    try:
        with zipfile.ZipFile(file) as arrays:
            names = [name.removesuffix(".npy") for name in arrays.namelist()]
            if "data" not in names:
                has = ", ".join(names[:8]) or "none"
                raise DataError(f"{path} has no array 'data': it has {has}")
            data = _npy(path, arrays, "data.npy")
    except DataError:
        raise
    except Exception as error:  # a damaged archive makes its libraries raise what they will
        raise _no_picture(path, error) from None
    side = math.isqrt(data.shape[1] // 3)
    return _checked(path, data.reshape(-1, 3, side, side).transpose(0, 2, 3, 1))


def _npy(path: Path, arrays: zipfile.ZipFile, name: str) -> np.ndarray:
    """An array of pictures in an archive, uint8 `[pictures, 3 side side]`.

    What its head says is looked at before there is memory for it.
    """
    from numpy.lib import format as npy

    info = arrays.getinfo(name)
    with arrays.open(info) as file:
        version = npy.read_magic(file)
        read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        shape, by_columns, dtype = read(file)
        side = math.isqrt(shape[1] // 3) if len(shape) == 2 else 0
        if dtype != np.uint8 or side < 1 or 3 * side * side != shape[1]:
            raise DataError(
                f"'data' in {path} is {dtype} of shape {_say(shape)}: it must be uint8, "
                f"pictures x 3 side side"
            )
        size, stored = math.prod(shape), info.file_size - file.tell()
        if size != stored:
            raise DataError(f"'data' in {path} has {stored:,} bytes, and {size:,} by its head")
        if size > free_memory() // 2:
            raise DataError(f"'data' in {path} has {size:,} bytes, too much for the memory")
        data = np.frombuffer(file.read(), np.uint8)
    if by_columns:
        return data.reshape(shape[::-1]).T
    return data.reshape(shape)


def _checked(path: Path, images: np.ndarray) -> np.ndarray:
    if not images.size or images.shape[3] not in (1, 3):
        raise DataError(f"{path} is of shape {_say(images.shape)}: it holds no pictures")
    return images
