from pathlib import Path

import pytest

from tests.io.trees import train_state
from transformer_vq.io.checkpoint import Checkpoints


@pytest.fixture
def folder(tmp_path) -> Path:
    """Three checkpoints, of steps 10, 20 and 30."""
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        for step in (10, 20, 30):
            checkpoints.save(step, train_state(step), {"position": step * 512})
    return tmp_path / "checkpoints"
