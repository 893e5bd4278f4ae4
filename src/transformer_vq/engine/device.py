"""What a scheduler does on the device: rows in slots, and all programs over them.

Every program is compiled when a `Device` is made, and called as compiled. So no request ever waits
for a compiler. One thread uses a device.
"""

import functools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from transformer_vq.engine.controls import controls_row
from transformer_vq.engine.decoders import decoder_for
from transformer_vq.engine.prefill import FEW, PREFILL_SIZES, chunk_size
from transformer_vq.engine.request import SamplingParams
from transformer_vq.engine.scheduler import MOST_STEPS, Dispatch, Scores, Snapshot
from transformer_vq.engine.slots import put_rows, take_rows
from transformer_vq.errors import UserError, shown
from transformer_vq.nn.decode import Decoder
from transformer_vq.nn.model import Model, State, init_state
from transformer_vq.ops.decode import (
    Controls,
    Generated,
    Pause,
    Rows,
    generate_tokens,
    prefill,
    prefill_few,
    prefill_scored,
    prefill_scored_few,
    unsound,
)

ENDED, ACTIVE, UNSOUND = 0, 1, 2  # what became of a row

Slots = tuple[Controls, Rows]


class Device:
    """Rows of constant-size states in slots, and the programs that read, insert and decode.

    Args:
      model: of which requests are served.
      widths: how many slots each batch of rows has; a request runs in one of them.
      largest: tokens of a prompt that are read at once, one of `PREFILL_SIZES`. It changes the
        rounding of states, so it follows nothing that happens.
      room: tokens that each row must be able to take; only full attention has such a limit.
      device: of JAX, where all of it is; None: where the model is, or JAX's default.

    Raises `UserError` for another `largest`.
    """

    def __init__(
        self,
        model: Model,
        widths: Sequence[int],
        *,
        largest: int = PREFILL_SIZES[-1],
        room: int | None = None,
        device: Any = None,
    ):
        if largest not in PREFILL_SIZES:
            sizes = ", ".join(map(str, PREFILL_SIZES))
            raise UserError(
                f"the size of a prompt's chunks is {shown(largest)}: it must be one of {sizes}"
            )
        if device is not None:
            model = jax.device_put(model, device)
        self.model, self.largest, self.widths = model, largest, tuple(sorted(set(widths)))
        self.vocab_size = model.config.vocab_size
        with jax.default_device(device):
            self._make(model, room)

    def _make(self, model: Model, room: int | None) -> None:
        """All arrays and programs."""
        self._empty = init_state(model.config, 1, room=room)
        self.capacity = self._empty.capacity
        state = sum(x.nbytes for x in jax.tree.leaves(self._empty))
        self.row_bytes = state + 5 * self.vocab_size  # of a `Snapshot`
        self._decoder = decoder_for(model, self._empty)  # of one row
        self._decoders = {width: decoder_for(model, self._empty, width) for width in self.widths}
        self._slots = {width: _new_slots(model, width, room) for width in self.widths}
        row = _new_slots(model, 1, room)
        self._compiled = _compile(
            model, self._decoder, self._decoders, row, self._slots, self.largest
        )

    # Prompts are read at one row, before they have a slot.

    def begin(self, start: Snapshot | None) -> State:
        """The state of a request before its prompt, which `read` may overwrite."""
        return self.copy(self._empty if start is None else start.state)

    def copy(self, state: State) -> State:
        """The same state in arrays of its own."""
        return self._compiled["copy"](state, np.zeros(1, np.int32))

    def read(self, state: State, tokens: Sequence[int]) -> State:
        """The state after a chunk of a prompt; the given one is no more. Waits for the device."""
        size, *chunk = self._chunk(tokens)
        state = self._compiled["read", size](self._reader(size), state, *chunk)
        return jax.block_until_ready(state)

    def read_scored(self, state: State, tokens: Sequence[int]) -> tuple[State, Scores]:
        """`read`, and how probable the tokens were."""
        size, *chunk = self._chunk(tokens)
        state, scored = self._compiled["score", size](self._reader(size), state, *chunk)
        return state, Scores(*(np.asarray(x)[0, : len(tokens)] for x in scored))

    def _reader(self, size: int) -> Model | Decoder:
        """What reads chunks of this size."""
        return self._decoder if size <= FEW else self.model

    def _chunk(self, tokens: Sequence[int]) -> tuple[int, np.ndarray, np.ndarray]:
        size = chunk_size(len(tokens), self.largest)
        padded = np.zeros((1, size), np.int32)
        padded[0, : len(tokens)] = tokens
        return size, padded, np.array([len(tokens)], np.int32)

    def is_sound(self, state: State) -> bool:
        """Whether what comes next has probabilities."""
        return not np.isnan(np.asarray(state.logits)).any()

    # Rows in slots.

    def insert(self, width: int, slot: int, start: Snapshot, params: SamplingParams) -> None:
        """Begin a request in a slot, after what `start` has read."""
        controls = controls_row(params, self.vocab_size)
        rows = Rows(
            state=start.state,
            prompt=start.seen[None],  # pyright: ignore[reportArgumentType]
            counts=start.counts[None],  # pyright: ignore[reportArgumentType]
            generated=np.zeros(1, np.int32),  # pyright: ignore[reportArgumentType]
            remaining=np.array([params.max_tokens], np.int32),  # pyright: ignore[reportArgumentType]
            active=np.ones(1, bool),  # pyright: ignore[reportArgumentType]
        )
        self._put(width, slot, (controls, rows))

    def move(self, width: int, slot: int, to_width: int, to_slot: int) -> None:
        """A running request goes on in a slot of another width."""
        self._put(to_width, to_slot, self._take(width, slot))

    def snapshot(self, width: int, slot: int) -> Snapshot:
        """What the request in a slot has read and written."""
        _, rows = self._take(width, slot)
        return Snapshot(rows.state, np.asarray(rows.prompt)[0], np.asarray(rows.counts)[0])

    def _put(self, width: int, slot: int, row: Slots) -> None:
        index = np.array([slot], np.int32)
        self._slots[width] = self._compiled["put", width](self._slots[width], index, row)

    def _take(self, width: int, slot: int) -> Slots:
        return self._compiled["take", width](self._slots[width], np.array([slot], np.int32))

    def decode(
        self, width: int, keep: np.ndarray, *, steps: int, at_end: bool, with_logprobs: bool
    ) -> Dispatch:
        """One dispatch of all rows of a width; those not in `keep`, bool `[width]`, have ended."""
        controls, rows = self._slots[width]
        pause = Pause(np.int32(steps), np.bool_(at_end))
        decode = self._compiled["decode", width, with_logprobs]
        rows, new, became = decode(self._decoders[width], controls, rows, keep, pause)
        self._slots[width] = controls, rows
        new, became = jax.device_get((new, became))
        return Dispatch(*new, active=became == ACTIVE, unsound=became == UNSOUND)


def _new_slots(model: Model, width: int, room: int | None) -> Slots:
    """Slots in which nothing runs."""
    vocab = model.config.vocab_size
    row = controls_row(SamplingParams(), vocab)
    controls = jax.tree.map(lambda x: jnp.asarray(np.repeat(x, width, axis=0)), row)
    rows = Rows(
        state=init_state(model.config, width, room=room),
        prompt=jnp.zeros((width, vocab), bool),
        counts=jnp.zeros((width, vocab), jnp.int32),
        generated=jnp.zeros(width, jnp.int32),
        remaining=jnp.zeros(width, jnp.int32),
        active=jnp.zeros(width, bool),
    )
    return controls, rows


class Program:
    """A function of trees, compiled for arguments like these. Call `compile` before calling it.

    It is compiled as a function of lists of leaves: the types in `nn` are of arrays, and JAX would
    make some of what merely describes its arguments.
    """

    def __init__(self, fn: Callable[..., Any], args: Sequence[Any], donate: tuple[int, ...] = ()):
        trees = [jax.tree.structure(arg) for arg in args]
        out = None

        def flat(*leaves: list[Any]) -> list[Any]:
            nonlocal out
            given = (tree.unflatten(x) for tree, x in zip(trees, leaves, strict=True))
            leaves_out, out = jax.tree.flatten(fn(*given))
            return leaves_out

        lowered = jax.jit(flat, donate_argnums=donate).lower(*map(jax.tree.leaves, args))
        assert out is not None  # it was traced
        self._lowered, self._out = lowered, out

    def compile(self) -> None:
        self._call = self._lowered.compile()
        del self._lowered

    def text(self) -> str:
        """What was compiled, as XLA writes it."""
        return self._call.as_text() or ""

    def __call__(self, *args: Any) -> Any:
        return self._out.unflatten(self._call(*map(jax.tree.leaves, args)))


def _compile(
    model: Model,
    reading: Decoder,
    decoders: dict[int, Decoder],
    row: Slots,
    slots: dict[int, Slots],
    largest: int,
) -> dict[Any, Program]:
    """All programs, by what they do and their sizes; compiled in some threads at once."""
    index, empty = np.zeros(1, np.int32), row[1].state
    programs: dict[Any, Program] = {"copy": Program(take_rows, (empty, index))}
    for size in PREFILL_SIZES[: PREFILL_SIZES.index(largest) + 1]:
        few = size <= FEW
        reader = reading if few else model
        args = (reader, empty, np.zeros((1, size), np.int32), index)
        read, score = (prefill_few, prefill_scored_few) if few else (prefill, prefill_scored)
        programs["read", size] = Program(read, args, donate=(1,))
        programs["score", size] = Program(score, args, donate=(1,))
    pause = Pause(np.int32(0), np.bool_(False))
    for width, tree in slots.items():
        programs["take", width] = Program(take_rows, (tree, index))
        programs["put", width] = Program(put_rows, (tree, index, row), donate=(0,))
        for with_logprobs in (False, True):
            decode = functools.partial(_decode, with_logprobs=with_logprobs)
            args = (decoders[width], *tree, np.ones(width, bool), pause)
            programs["decode", width, with_logprobs] = Program(decode, args, donate=(2,))
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(Program.compile, programs.values()))
    return programs


def _decode(
    decoder: Decoder,
    controls: Controls,
    rows: Rows,
    keep: jax.Array,
    pause: Pause,
    *,
    with_logprobs: bool,
) -> tuple[Rows, Generated, jax.Array]:
    """`generate_tokens` for the rows to `keep`, bool `[B]`; and what became of each, int32."""
    rows = replace(rows, active=rows.active & keep)
    rows, new = generate_tokens(
        decoder, controls, rows, steps=MOST_STEPS, with_logprobs=with_logprobs, pause=pause
    )
    ended = jnp.where(unsound(rows.state), UNSOUND, ENDED)
    return rows, new, jnp.where(rows.active, ACTIVE, ended)
