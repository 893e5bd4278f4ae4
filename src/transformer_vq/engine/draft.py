"""Drafts for a batch of requests: what guesses are made from, and whether they are worth it."""

import time
from collections.abc import Sequence

import jax
import numpy as np

from transformer_vq.config import ModelConfig
from transformer_vq.engine.decoders import decoder_for
from transformer_vq.engine.pace import Pace
from transformer_vq.engine.prefill import begin, read_chunks
from transformer_vq.errors import UserError, require_kind
from transformer_vq.nn.decode import Decoder
from transformer_vq.nn.model import Model
from transformer_vq.ops.decode import Controls, Generated, Rows, generate_tokens
from transformer_vq.ops.draft import draft_tokens

RECENT = 4096  # tokens of a row's text that guesses are looked up in


def check_draft(draft: bool | Model, config: ModelConfig) -> None:
    """Raise `UserError` for what cannot guess the tokens of this model."""
    if isinstance(draft, bool):
        return
    require_kind("draft", draft, Model, "a small model of the same vocabulary, or True")
    if draft.config.vocab_size != config.vocab_size:
        raise UserError(
            f"draft has a vocabulary of {draft.config.vocab_size} tokens and the model one of "
            f"{config.vocab_size}: give a model that was trained with the same vocabulary"
        )


class Drafts:
    """Decodes the rows of a batch with drafts, where that is faster than without.

    Args:
      guide: a small model that guesses; None: guesses are looked up in the row's own text.
      prompts: of each request; guesses may come from them.
      need: how many tokens each request is to consume.
      batch: rows of the arrays, of which the first are the requests.
    """

    def __init__(
        self,
        guide: Model | None,
        prompts: Sequence[Sequence[int]],
        need: Sequence[int],
        batch: int,
    ):
        self.pace = Pace()
        self.guessed = self.right = 0  # tokens so far
        self._recent = np.full((batch, RECENT), -1, np.int32)
        self._guide, self._guide_state = guide, None
        self._unread: list[list[int]] = [[] for _ in range(batch)]  # by the guide
        if guide is not None:
            self._guide_state = begin(guide.config, None, need, batch, None)
        for row, prompt in enumerate(prompts):
            self._push(row, prompt, unread=True)

    def dispatch(
        self,
        decoder: Decoder,
        controls: Controls,
        rows: Rows,
        active: np.ndarray,
        steps: int,
        with_logprobs: bool,
    ) -> tuple[Rows, Generated, np.ndarray]:
        """One call of the device, as `generate_tokens`: the rows, and what is new and which rows
        are active, both on the host. `active`: bool of the rows of requests, before."""
        size, rounds = self.pace.choose(steps)
        if size > 1:
            guide, began = self._reader(), time.monotonic()
            done = draft_tokens(
                decoder,
                controls,
                rows,
                self._recent,
                guide,
                self._guide_state,
                np.int32(rounds),
                size=size,
                steps=steps,
                with_logprobs=with_logprobs,
            )
            rows, self._guide_state = done.rows, done.guide
            new, now, took_part = jax.device_get((done.new, rows.active, done.rounds))
            self.guessed += int(took_part.sum()) * (size - 1)
            self.right += int((new.lengths - took_part).sum())
        else:
            began = time.monotonic()
            rows, new = generate_tokens(
                decoder, controls, rows, steps=steps, with_logprobs=with_logprobs
            )
            new, now = jax.device_get((new, rows.active))
        seconds = time.monotonic() - began
        taking_part = max(1, int(active.sum()))
        self.pace.measure(size, float(new.lengths.sum()) / taking_part, seconds)
        for row, length in enumerate(new.lengths):
            self._push(row, new.tokens[row, :length].tolist(), unread=size == 1)
        return rows, new, now

    def _push(self, row: int, tokens: Sequence[int], *, unread: bool) -> None:
        """A row's text has grown."""
        some = np.asarray(tokens, np.int32)[-RECENT:]
        if len(some):
            self._recent[row] = np.concatenate([self._recent[row, len(some) :], some])
        if unread and self._guide is not None:
            self._unread[row] += tokens

    def _reader(self) -> Decoder | None:
        """The guide, which has read all that was written without it."""
        if self._guide is None or self._guide_state is None:
            return None
        if any(self._unread):
            self._guide_state = read_chunks(self._guide, self._guide_state, self._unread, None)
            self._unread = [[] for _ in self._unread]
        return decoder_for(self._guide, self._guide_state)
