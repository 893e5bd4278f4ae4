"""Small pictures of noise, and the files that people keep pictures in."""

import gzip
from pathlib import Path

import numpy as np
from PIL import Image

from transformer_vq.data import Source

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
