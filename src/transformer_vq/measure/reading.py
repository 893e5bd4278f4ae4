"""A second reading: what a model gains from having read a passage before.

Text at hand hardly needs its past; a text that repeats itself does. Passages of a held-out text are
each read, followed by other text of it, and read again. The difference is what was remembered.
"""

import math
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from transformer_vq.data import Source
from transformer_vq.errors import UserError
from transformer_vq.fields import require_count
from transformer_vq.nn.model import Model
from transformer_vq.ops.evaluate import Evaluation, evaluate, has_far_part


class Reading(NamedTuple):
    """Bits per byte of the same passages, read twice, and what the far part brings to the second
    reading: by how many bits per byte it costs more with keys beyond the window masked."""

    first: float
    second: float
    far: float | None = None  # None where it was not asked for
    far_error: float | None = None  # standard error; None for few tokens

    @property
    def gain(self) -> float:
        """What the second reading costs less, in bits per byte."""
        return self.first - self.second


def second_reading(
    model: Model,
    text: np.ndarray,
    *,
    passage: int = 2000,
    between: int = 2000,
    passages: int = 8,
    far_gain: bool = False,
    start: int | None = None,
) -> Reading:
    """Read `passages` passages, spread over the text, twice, with `between` tokens in between.

    Each begins with an empty state. `text`: bytes that the model was not trained on, `[N]`. With
    `far_gain` also what the far part brings to the second reading, if the model has one. `start`:
    the token that is given first; by default the one before the passage in the text. (A token that
    the model never met would spoil the first reading alone.)

    Raises:
      UserError: if the text is shorter than a passage and what comes in between, or for sizes
        below 1.
    """
    for name, value in (("passage", passage), ("between", between), ("passages", passages)):
        require_count(name, value)
    if len(text) < 1 + passage + between:
        raise UserError(
            f"the text has {len(text):,} tokens, and a passage, the token before it and what comes "
            f"in between take {1 + passage + between:,}: give a longer text, or smaller sizes"
        )
    size = 1 + 2 * passage + between  # begins with a token that is given
    begins = np.linspace(1, len(text) - passage - between, passages).astype(int)
    first_time = text[begins[:, None] - 1 + np.arange(size - passage)]
    if start is not None:
        first_time[:, 0] = start
    tokens = np.concatenate([first_time, first_time[:, 1 : 1 + passage]], axis=1).ravel()
    place = np.arange(len(tokens)) % size
    read = Source(tokens, np.arange(passages) * size, passages * (size - 1), whole_documents=True)
    rows = passages if model.config.attention == "vq" else 1  # all keys of all rows are too many

    def score(counted: np.ndarray, far_gain: bool = False) -> Evaluation:
        return evaluate(model, replace(read, counted=counted), rows=rows, far_gain=far_gain)

    first = score((place > 0) & (place <= passage))
    second = score(place >= size - passage, far_gain and has_far_part(model.config))
    if (far := second.far_gain) is None:
        return Reading(first.bpb, second.bpb)
    error = None if far.error is None else far.error / math.log(2)
    return Reading(first.bpb, second.bpb, far.nats / math.log(2), error)
