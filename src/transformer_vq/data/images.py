"""Pictures as sequences of bytes: files of one each, IDX, and npz as of downsampled ImageNet.

A picture is its rows from the top, pixels from the left, channels of a pixel side by side.
"""

import math
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from transformer_vq.data.records import is_image_array
from transformer_vq.data.text import DataError, open_binary, read_errors

Shape = tuple[int, int, int]  # height, width, channels
_GREY = ("1", "L", "LA", "I", "F", "I;16", "I;16B")  # modes of Pillow


def image_shape(path: Path) -> Shape:
    """Height, width and channels (1 or 3) of the pictures in a file. Raises `DataError`."""
    if is_image_array(path):
        return _array_images(path).shape[1:]
    with _picture(path) as picture:
        return picture.height, picture.width, 1 if picture.mode in _GREY else 3


def read_images(path: Path, shape: Shape, image_size: int = 0) -> np.ndarray:
    """The pictures in a file, uint8 `[n, *shape]`.

    `image_size`: one picture in a file of its own is resized so that its shorter side is that,
    and its middle is kept. Raises `DataError` if the pictures are of another shape.
    """
    if is_image_array(path):
        images = _array_images(path)
    else:
        images = _pixels(path, image_size, shape[2])[None]
    if images.shape[1:] != shape:
        raise DataError(
            f"{path} is {_say(images.shape[1:])}, and not {_say(shape)} as those before it: "
            f"resize and crop all with --image-size"
        )
    return images


def common_shape(paths: Sequence[Path], shapes: Sequence[Shape], image_size: int = 0) -> Shape:
    """The shape that the first picture has or gets; in colour if any picture is.

    Raises `DataError` if arrays of pictures are to be resized.
    """
    height, width, _ = shapes[0]
    if image_size:
        for path, shape in zip(paths, shapes, strict=True):
            if is_image_array(path) and shape[:2] != (image_size, image_size):
                raise DataError(
                    f"{path} holds pictures of {_say(shape)}: --image-size is for pictures that "
                    f"have a file each"
                )
        height = width = image_size
    return height, width, max(channels for _, _, channels in shapes)


def _say(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))


# Files of one picture.


@contextmanager
def _picture(path: Path) -> Iterator[Any]:
    """A picture open in Pillow; what Pillow raises while it is becomes a `DataError`."""
    from PIL import Image

    if not path.is_file():
        raise DataError(f"there is no file {path}")
    try:
        with Image.open(path) as picture:
            yield picture
    except (*read_errors(), ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise _no_picture(path, error) from None


def _pixels(path: Path, image_size: int, channels: int) -> np.ndarray:
    from PIL import Image, ImageOps

    with _picture(path) as picture:
        picture = picture.convert("L" if channels == 1 else "RGB")
        if image_size:
            picture = ImageOps.fit(picture, (image_size, image_size), Image.Resampling.LANCZOS)
        pixels = np.asarray(picture, np.uint8)
    return pixels.reshape(*pixels.shape[:2], channels)


def _no_picture(path: Path, error: Exception) -> DataError:
    reason = " ".join(str(error).split())
    return DataError(f"{path} is no picture that can be read: {reason}")


# Files of many.


def _array_images(path: Path) -> np.ndarray:
    try:
        with open_binary(path) as file:
            if path.suffix.lower() == ".npz":
                return _npz_images(path, file)
            return _idx_images(path, file.read())
    except (*read_errors(), zipfile.BadZipFile, ValueError, KeyError) as error:
        if isinstance(error, DataError):
            raise
        raise _no_picture(path, error) from None


def _idx_images(path: Path, content: bytes) -> np.ndarray:
    """IDX: two zeros, the type (8: unsigned bytes), the number of axes, their sizes, the bytes."""
    axes = content[3] if len(content) > 3 else 0
    if content[:3] != b"\0\0\x08" or axes not in (3, 4) or len(content) < 4 + 4 * axes:
        raise DataError(f"{path} is no IDX file of pictures of unsigned bytes")
    sizes = tuple(np.frombuffer(content, ">u4", axes, offset=4).tolist())
    expected = 4 + 4 * axes + math.prod(sizes)
    if len(content) != expected:
        raise DataError(f"{path} has {len(content):,} bytes, and {expected:,} by its own account")
    pixels = np.frombuffer(content, np.uint8, offset=4 + 4 * axes)
    return _checked(path, pixels.reshape(*sizes, *(() if axes == 4 else (1,))))


def _npz_images(path: Path, file: Any) -> np.ndarray:
    """Downsampled ImageNet: `data`, a row a picture, all of red, all of green, all of blue."""
    with np.load(file) as arrays:
        if "data" not in arrays:
            raise DataError(f"{path} has no array 'data': it has {', '.join(arrays) or 'none'}")
        data = arrays["data"]
    side = math.isqrt(data.shape[1] // 3) if data.ndim == 2 else 0
    if data.dtype != np.uint8 or side < 1 or 3 * side * side != data.shape[1]:
        raise DataError(
            f"'data' in {path} is {data.dtype} of shape {_say(data.shape)}: it must be uint8, "
            f"pictures x 3 side side"
        )
    return _checked(path, data.reshape(-1, 3, side, side).transpose(0, 2, 3, 1))


def _checked(path: Path, images: np.ndarray) -> np.ndarray:
    if not images.size or images.shape[3] not in (1, 3):
        raise DataError(f"{path} is of shape {_say(images.shape)}: it holds no pictures")
    return images
