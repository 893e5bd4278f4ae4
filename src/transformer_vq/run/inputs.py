"""What a run learns from and what it is scored on: tokens that fit the model, in batches."""

from collections.abc import Generator
from dataclasses import dataclass
from typing import Self

import numpy as np
from jax.sharding import Mesh

from transformer_vq.config import ModelConfig, TrainConfig
from transformer_vq.data import Batch, Batches, Source, as_source, check_tokens
from transformer_vq.sharding import process_share


@dataclass(frozen=True)
class Inputs:
    """The data of a run, looked at."""

    source: Source  # to train on
    validation: Source | None
    notes: tuple[str, ...] = ()  # what people want to know of them

    @classmethod
    def of(
        cls,
        tokens: np.ndarray | Source,
        validation: np.ndarray | Source | None,
        config: ModelConfig,
        train: TrainConfig,
    ) -> Self:
        """Tokens `[N]`, or sources, for a model and a recipe.

        Raises `DataError` if there are too few tokens or a document is too long, `UserError` for
        a token that the model does not have, or a recipe that such data cannot be trained by.
        """
        source = as_source(tokens)
        held_out = None if validation is None else as_source(validation)
        Batches.of(source, train)  # refuses what no batch can be made of
        for part in (source, held_out):
            if part is not None:
                _require_in_vocabulary(part.tokens, config.vocab_size)
        if held_out is not None and len(held_out.tokens) < 2:
            return cls(source, None, ("the validation split is too short to score: none is made",))
        return cls(source, held_out)

    def batches(self, train: TrainConfig, step: int, mesh: Mesh) -> Generator[Batch]:
        """This process's share of the batches from the one that follows `step` updates."""
        batches = Batches.of(self.source, train, *process_share(mesh))
        yield from batches.iterate(step // train.updates_per_sequence)


def _require_in_vocabulary(tokens: np.ndarray, vocab_size: int) -> None:
    """Raise `UserError` naming the first token outside of the vocabulary."""
    if not len(tokens) or np.iinfo(tokens.dtype).max < vocab_size:
        return  # bytes need no look
    if tokens.min() < 0 or tokens.max() >= vocab_size:
        check_tokens(tokens, vocab_size)
