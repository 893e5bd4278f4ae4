"""Pictures that a model draws: a PNG each, and all of them on a contact sheet."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from transformer_vq import Model, SamplingParams

BATCH = 32  # pictures drawn side by side
SHEET = "contact.png"


def draw_images(
    model: "Model",
    params: "Sequence[SamplingParams]",
    shape: tuple[int, int, int],
    start_id: int,
    on_progress: Callable[[int, int], None],
) -> np.ndarray:
    """A picture for each of `params`, uint8 `[n, *shape]`, from the start token on.

    `on_progress`: called with the number of bytes drawn, and of all.
    """
    from transformer_vq import stream

    size = math.prod(shape)
    pixels = np.zeros((len(params), size), np.uint8)
    done = 0
    for first in range(0, len(params), BATCH):
        some = params[first : first + BATCH]
        places = [0] * len(some)
        for token in stream(model, [[start_id]] * len(some), some):
            pixels[first + token.row, places[token.row]] = token
            places[token.row] += 1
            done += 1
            if not done % 1024:
                on_progress(done, pixels.size)
    return pixels.reshape(-1, *shape)


def write_images(images: np.ndarray, folder: Path) -> Path:
    """Write pictures `[n, H, W, C]` as 0.png, 1.png, ..., and the contact sheet; where that is."""
    folder.mkdir(parents=True, exist_ok=True)
    width = len(str(len(images) - 1))
    for i, image in enumerate(images):
        _to_picture(image).save(folder / f"{i:0{width}}.png")
    _to_picture(contact_sheet(images)).save(folder / SHEET)
    return folder / SHEET


def contact_sheet(images: np.ndarray) -> np.ndarray:
    """Pictures `[n, H, W, C]` in rows from the left, on white, small ones enlarged: `[H, W, C]`."""
    scale = max(1, 96 // max(images.shape[1:3]))
    images = images.repeat(scale, axis=1).repeat(scale, axis=2)
    count, height, width, channels = images.shape
    columns = math.ceil(math.sqrt(count * height / width))
    rows = -(-count // columns)
    gap = 4
    sheet = np.full(
        (gap + rows * (height + gap), gap + columns * (width + gap), channels), 255, np.uint8
    )
    for i, image in enumerate(images):
        top, left = (gap + (i // columns) * (height + gap), gap + (i % columns) * (width + gap))
        sheet[top : top + height, left : left + width] = image
    return sheet


def _to_picture(pixels: np.ndarray):
    from PIL import Image

    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
