"""Drafts for rows in slots: what guesses are made from, and whether they are worth it."""

import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from transformer_vq.config import ModelConfig
from transformer_vq.data.tokenizer import Tokens
from transformer_vq.engine.decoders import decoder_for
from transformer_vq.engine.pace import SIZES, Pace
from transformer_vq.engine.prefill import FEW, PREFILL_SIZES, begin, read_chunks
from transformer_vq.engine.program import Program
from transformer_vq.engine.running import MOST_STEPS
from transformer_vq.errors import UserError, require_kind
from transformer_vq.nn.decode import Decoder
from transformer_vq.nn.model import Model, State, init_state
from transformer_vq.ops.decode import Generated, Rows, prefill, prefill_few
from transformer_vq.ops.draft import draft_tokens

RECENT = 4096  # tokens of a row's text that guesses are looked up in
READ = PREFILL_SIZES[2]  # tokens at the end of a text that a guide reads if it has not read it


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
      draft: a small model that guesses; True: guesses are looked up in the row's own text.
      width: rows of the batch.
      room: tokens that each row must be able to take, if the small model has such a limit.
      most_steps: of a dispatch.
    """

    def __init__(
        self, draft: bool | Model, width: int, room: int | None, most_steps: int = MOST_STEPS
    ):
        self.pace = Pace()
        self.guessed = self.right = 0  # tokens so far
        self._most_steps = most_steps
        self._recent = np.full((width, RECENT), -1, np.int32)
        self._unread: list[list[int]] = [[] for _ in range(width)]  # by the guide
        self._new = np.zeros(width, bool)  # rows of which the guide's state is another text's
        self._guide = draft if isinstance(draft, Model) else None
        self._guide_state: State | None = None
        if self._guide is not None:
            if room is None and self._guide.config.default_capacity is not None:
                raise UserError(
                    "draft is a model of full attention, which takes so many tokens and no more, "
                    "and texts here have no end: give one of vq attention"
                )
            try:
                self._guide_state = begin(self._guide.config, None, [room or 1], width, None)
            except UserError as error:
                raise UserError(f"draft does not fit: {error}") from None
        self._ahead: dict[Any, Program] = {}

    def begin(self, row: int, text: Tokens) -> None:
        """Another text is in a row, of which this is what is known, or its end."""
        self._recent[row], self._new[row] = -1, True
        self._push(row, text, unread=False)
        self._unread[row] = [*text[-READ:]] if self._guide is not None else []

    def text(self, row: int) -> list[int]:
        """The end of the text in a row."""
        return self._recent[row][self._recent[row] >= 0].tolist()

    def dispatch(
        self,
        plain: Callable[..., Any],
        args: tuple[Any, ...],
        *,
        with_logprobs: bool,
        meanwhile: Callable[[], None],
    ) -> tuple[Rows, Generated]:
        """One call of the device: the rows, and what is new, on the host.

        `args` are those of `plain`, which is `generate_tokens` with all else that it takes;
        `meanwhile` is called while the device is at work.
        """
        keep, pause = args[3], args[4]
        size, rounds = self.pace.choose(int(pause.steps))
        if size > 1:
            guide, began = self._reader(), time.monotonic()
            draft = self._ahead.get((size, with_logprobs), self._drafted(size, with_logprobs))
            done = draft(*args, self._recent, guide, self._guide_state, np.int32(rounds))
            meanwhile()
            rows, self._guide_state = done.rows, done.guide
            new, took_part = jax.device_get((done.new, done.rounds))
            did = int(took_part.max())
            self.guessed += int(took_part.sum()) * (size - 1)
            self.right += int((new.lengths - took_part).sum())
        else:
            began = time.monotonic()
            rows, new = plain(*args)
            meanwhile()
            new = jax.device_get(new)
            did = int(new.lengths.max())
        seconds = time.monotonic() - began
        tokens = float(new.lengths.sum()) / max(1, int(keep.sum()))
        self.pace.measure(size, did, tokens, seconds)
        for row, length in enumerate(new.lengths):
            self._push(row, new.tokens[row, :length].tolist(), unread=size == 1)
        return rows, new

    def _drafted(self, size: int, with_logprobs: bool) -> Callable[..., Any]:
        return functools.partial(
            draft_tokens, size=size, steps=self._most_steps, with_logprobs=with_logprobs
        )

    def _push(self, row: int, tokens: Tokens, *, unread: bool) -> None:
        """A row's text has grown."""
        some = np.asarray(tokens, np.int32)[-RECENT:]
        if len(some):
            self._recent[row] = np.concatenate([self._recent[row, len(some) :], some])
        if unread and self._guide is not None:
            self._unread[row] += tokens
            if len(self._unread[row]) > READ:  # to read all would cost more than it tells
                self._unread[row], self._new[row] = self._unread[row][-READ:], True

    def _reader(self) -> Decoder | None:
        """The guide, which has read all that was written without it."""
        guide, state = self._guide, self._guide_state
        if guide is None or state is None:
            return None
        if self._new.any():
            state = self._ahead.get("empty", functools.partial(_emptied, guide.config))(
                state, self._new
            )
            self._new = np.zeros_like(self._new)  # the program may still read the old one
        if any(self._unread):
            state = read_chunks(guide, state, self._unread, None, self._ahead)
            self._unread = [[] for _ in self._unread]
        self._guide_state = jax.block_until_ready(state)  # before the clock of a dispatch starts
        return decoder_for(guide, state)

    def ahead(self, args: tuple[Any, ...]) -> list[Program]:
        """All programs, to be compiled before any is called. `args`: as of `dispatch`."""
        width, state, guide = len(self._new), self._guide_state, None
        if self._guide is not None and state is not None:
            guide = decoder_for(self._guide, state)
            lengths = np.zeros(width, np.int32)
            for size in PREFILL_SIZES[: PREFILL_SIZES.index(READ) + 1]:
                tokens = np.zeros((width, size), np.int32)
                few = size <= FEW
                reader = guide if few else self._guide
                given = reader, state, tokens, lengths
                read = prefill_few if few else prefill
                self._ahead["read", size] = Program(read, given, donate=(1,))
            empty = functools.partial(_emptied, self._guide.config)
            self._ahead["empty"] = Program(empty, (state, self._new), donate=(0,))
        args = *args, self._recent, guide, state, np.int32(0)
        for size in SIZES[1:]:
            for with_logprobs in (False, True):
                draft = self._drafted(size, with_logprobs)
                self._ahead[size, with_logprobs] = Program(
                    draft, args, donate=(2, 7), model_first=True
                )
        return list(self._ahead.values())


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def _emptied(config: ModelConfig, state: State, rows: jax.Array) -> State:
    """The state with some rows, bool `[B]`, as at the beginning."""
    start = init_state(config, 1, room=state.capacity)

    def choose(x: jax.Array, new: jax.Array) -> jax.Array:
        return jnp.where(rows.reshape(-1, *[1] * (x.ndim - 1)), new, x)

    return jax.tree.map(choose, state, start)
