"""Rows of constant-size states in slots, on the device, and the programs over them.

`Slots` are rows that are decoded together. A `Device` is what a scheduler has: slots of some
widths, and what reads prompts, at one row. All its programs are compiled when it is made, and
called as compiled, so no request ever waits for a compiler; a session's are compiled when they are
called. One thread uses them.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from transformer_vq import sharding
from transformer_vq.data.tokenizer import Tokens
from transformer_vq.engine import ready
from transformer_vq.engine.controls import controls_batch
from transformer_vq.engine.decoders import decoder_for, model_on
from transformer_vq.engine.draft import Drafts, check_draft
from transformer_vq.engine.pace import SIZES
from transformer_vq.engine.prefill import FEW, PREFILL_SIZES, prompt_chunks, read_chunks
from transformer_vq.engine.program import Program, compile_all
from transformer_vq.engine.request import SamplingParams
from transformer_vq.engine.running import MOST_STEPS, Dispatch, Snapshot
from transformer_vq.engine.scheduler import Scores
from transformer_vq.engine.slots import num_rows, put_rows, take_rows
from transformer_vq.errors import UserError, shown
from transformer_vq.nn.decode import Decoder
from transformer_vq.nn.model import Model, State, init_state
from transformer_vq.ops.decode import (
    Controls,
    Pause,
    Rows,
    empty_state,
    generate_tokens,
    prefill,
    prefill_few,
    prefill_scored,
    prefill_scored_few,
)


@functools.partial(jax.jit, static_argnames="mesh", donate_argnums=0)
def _put(tree: Any, slots: Any, rows: Any, *, mesh: Mesh | None = None) -> Any:
    """`put_rows`; on a mesh, one row for each device, in a slot of its own rows."""
    if mesh is None:
        return put_rows(tree, slots, rows)
    return sharding.map_rows(lambda _, *given: put_rows(*given), mesh)((), tree, slots, rows)


@functools.partial(jax.jit, static_argnames="mesh")
def _take(tree: Any, slots: Any, *, mesh: Mesh | None = None) -> Any:
    """`take_rows`; on a mesh, one row from each device, of its own."""
    if mesh is None:
        return take_rows(tree, slots)
    return sharding.map_rows(lambda _, *given: take_rows(*given), mesh)((), tree, slots)


class Slots:
    """Rows that are decoded together.

    Args:
      model: where the rows are (`model_on`).
      state: of the rows; the slots own it from now on.
      params, prompts: of requests in the first slots; what `state` has not read, `read` reads.
      most_steps: of a dispatch.
      mesh: devices that the rows are spread over, each with as many, side by side.
      drafts: what guesses tokens of these rows; on one device.
    """

    def __init__(
        self,
        model: Model,
        state: State,
        params: Sequence[SamplingParams] = (),
        prompts: Sequence[Sequence[int]] = (),
        *,
        most_steps: int = MOST_STEPS,
        mesh: Mesh | None = None,
        drafts: Drafts | None = None,
    ):
        self.width, self.drafts = num_rows(state), drafts
        self._model, self._most_steps, self._mesh = model, most_steps, mesh
        self._devices = [None] if mesh is None else list(mesh.devices.flat)
        self._each = self.width // len(self._devices)  # slots of a device
        at_once = self._each if drafts is None else self._each * SIZES[-1]
        self.decoder = decoder_for(model, state, at_once)
        vocab_size = model.config.vocab_size
        controls, rows = _begin((), params, seen_tokens(prompts, self.width, vocab_size))
        if mesh is None:
            controls, rows = jax.device_put((controls, rows))
        else:
            controls, rows = sharding.spread(mesh, (controls, rows))
        self.controls: Controls = controls
        self.rows: Rows = replace(rows, state=state)
        self._ahead: dict[Any, Program] = {}

    # Requests begin, move and leave.

    def read(self, prompts: Sequence[Sequence[int]]) -> None:
        """Consume the prompts of the first rows, all together."""
        state = read_chunks(self._model, self.rows.state, prompts, self._mesh)
        self.rows = replace(self.rows, state=state)

    def insert(self, slot: int, start: Snapshot, params: SamplingParams, text: Tokens) -> None:
        """Begin a request after what `start` has read, which ends with the text."""
        slots, state = self._own(slot), start.state
        if self._mesh is not None:
            device = self._device_of(slot)
            state = sharding.with_part(self._take(slot)[1].state, device, state)
        same = len(slots), 1  # what the other devices are given has no slot
        seen, counts = np.tile(start.seen, same), np.tile(start.counts, same)
        self.join(slots, state, [params] * len(slots), seen, counts)
        if self.drafts is not None:
            self.drafts.begin(slot, text)

    def join(
        self,
        slots: Sequence[int],
        state: State,
        params: Sequence[SamplingParams],
        seen: np.ndarray,
        counts: np.ndarray | None = None,
    ) -> None:
        """Begin a request on each device, after row i of the state, in slot `slots[i]` of its own
        rows; none where there is no such slot. `seen`, `counts`: what penalties count."""
        controls, rows = self._spread(_begin((), params, seen, counts))
        self._put(slots, (controls, replace(rows, state=state)))

    def move(self, slot: int, to: "Slots", to_slot: int) -> None:
        """A running request goes on in a slot of others, on the same devices."""
        rows = self._take(slot)
        if self._mesh is not None:
            device, to_device = self._device_of(slot), to._device_of(to_slot)
            rows = sharding.with_part(rows, to_device, sharding.part_of(rows, device))
        to._put(to._own(to_slot), rows)
        if self.drafts is not None and to.drafts is not None:
            to.drafts.begin(to_slot, self.drafts.text(slot))

    def snapshot(self, slot: int) -> Snapshot:
        """What the request in a slot has read and written; on the first device of a mesh."""
        _, rows = self._take(slot)
        if self._mesh is not None:
            device = self._device_of(slot)
            rows = jax.device_put(sharding.part_of(rows, device), self._devices[0])
        return Snapshot(rows.state, np.asarray(rows.prompt)[0], np.asarray(rows.counts)[0])

    def _device_of(self, slot: int) -> Any:
        return self._devices[slot // self._each]

    def _own(self, slot: int) -> list[int]:
        """A slot for each device: for that of the slot its own, for others one that is none."""
        device, own = divmod(slot, self._each)
        return [own if i == device else self._each for i in range(len(self._devices))]

    def _spread(self, tree: Any) -> Any:
        """Arrays of the host, with a row for each device, as programs take them."""
        return tree if self._mesh is None else sharding.spread(self._mesh, tree)

    def _put(self, slots: Sequence[int], rows: tuple[Controls, Rows]) -> None:
        put = self._ahead.get("put", functools.partial(_put, mesh=self._mesh))
        index = self._spread(np.array(slots, np.int32))
        self.controls, self.rows = put((self.controls, self.rows), index, rows)

    def _take(self, slot: int) -> tuple[Controls, Rows]:
        """The request in a slot, alone; on a mesh, with a row of each other device."""
        take = self._ahead.get("take", functools.partial(_take, mesh=self._mesh))
        index = np.full(len(self._devices), slot % self._each, np.int32)
        return take((self.controls, self.rows), self._spread(index))

    # Decoding.

    @property
    def drafted(self) -> tuple[int, int]:
        """How many tokens were guessed so far, and how many of them were right."""
        return (0, 0) if self.drafts is None else (self.drafts.guessed, self.drafts.right)

    def decode(
        self,
        keep: np.ndarray,
        *,
        steps: int,
        at_end: bool,
        with_logprobs: bool,
        meanwhile: Callable[[], None] = lambda: None,
    ) -> Dispatch:
        """One dispatch of all rows; those not in `keep`, bool `[width]`, have ended.

        `meanwhile` is called once, while the device is at work if it can be."""
        plain = self._ahead.get(with_logprobs, self._plain(with_logprobs))
        pause = Pause(np.int32(steps), np.bool_(at_end))
        args = self.decoder, self.controls, self.rows, self._spread(keep), pause
        if self.drafts is None:
            self.rows, new = plain(*args)
            meanwhile()
        else:
            self.rows, new = self.drafts.dispatch(
                plain, args, with_logprobs=with_logprobs, meanwhile=meanwhile
            )
        return Dispatch(*sharding.fetch(new))

    def _plain(self, with_logprobs: bool) -> Callable[..., Any]:
        return functools.partial(
            ready.call,
            generate_tokens,
            steps=self._most_steps,
            with_logprobs=with_logprobs,
            mesh=self._mesh,
        )

    def ahead(self) -> list[Program]:
        """All programs, to be compiled before any is called."""
        tree, mesh, one_each = (self.controls, self.rows), self._mesh, len(self._devices)
        index = self._spread(np.zeros(one_each, np.int32))
        rows = jax.tree.map(
            lambda x: self._spread(jnp.zeros((one_each, *x.shape[1:]), x.dtype)), tree
        )
        keep = self._spread(np.ones(self.width, bool))
        args = self.decoder, *tree, keep, Pause(np.int32(0), np.bool_(False))
        self._ahead = {
            "put": Program(functools.partial(_put, mesh=mesh), (tree, index, rows), donate=(0,)),
            "take": Program(functools.partial(_take, mesh=mesh), (tree, index)),
            False: Program(self._plain(False), args, donate=(2,), model_first=True),
            True: Program(self._plain(True), args, donate=(2,), model_first=True),
        }
        return [*self._ahead.values(), *(self.drafts.ahead(args) if self.drafts else ())]


def seen_tokens(prompts: Sequence[Sequence[int]], rows: int, vocab_size: int) -> np.ndarray:
    """Which tokens the first rows have read, bool `[rows, vocab]`."""
    seen = np.zeros((rows, vocab_size), bool)
    for row, prompt in enumerate(prompts):
        seen[row, prompt] = True
    return seen


def _begin(
    state: Any, params: Sequence[SamplingParams], seen: np.ndarray, counts: Any = None
) -> tuple[Controls, Rows]:
    """Requests that begin after a state, as arrays of the host; rows beyond `params` are none.

    `seen` bool and `counts` int32, `[rows, vocab]`: what penalties count.
    """
    remaining = np.zeros(len(seen), np.int32)
    remaining[: len(params)] = [p.max_tokens for p in params]
    host: dict[str, Any] = dict(
        prompt=seen,
        counts=np.zeros(seen.shape, np.int32) if counts is None else counts,
        generated=np.zeros(len(seen), np.int32),
        remaining=remaining,
        active=remaining > 0,
    )
    controls = controls_batch(params or [SamplingParams()], *seen.shape)
    return controls, Rows(state=state, **host)


def _check_shared(widths: Sequence[int], mesh: Mesh, draft: bool | Model) -> None:
    """Raise `UserError` if the devices of a mesh cannot share the slots."""
    for width in widths:
        sharding.require_divisible(width, mesh, "slots")
    if draft:
        raise UserError("draft is for one device, and there is a mesh: give one of them")


class Device:
    """What a scheduler has: slots, and what reads prompts.

    Args:
      model: of which requests are served.
      widths: how many slots each batch of rows has; a request runs in one of them.
      largest: tokens of a prompt that are read at once, one of `PREFILL_SIZES`. It changes the
        rounding of states, so it follows nothing that happens.
      room: tokens that each row must be able to take; only full attention has such a limit.
      device: of JAX, where all of it is; None: where the model is, or JAX's default.
      mesh: devices that share the slots of each width, whose prompts the first of them reads.
      draft: guess tokens ahead, as in `generate`; on one device.

    Raises `UserError` for another `largest`, for slots that the mesh cannot share, and for what
    cannot guess.
    """

    def __init__(
        self,
        model: Model,
        widths: Sequence[int],
        *,
        largest: int = PREFILL_SIZES[-1],
        room: int | None = None,
        device: Any = None,
        mesh: Mesh | None = None,
        draft: bool | Model = False,
    ):
        if largest not in PREFILL_SIZES:
            sizes = ", ".join(map(str, PREFILL_SIZES))
            raise UserError(
                f"the size of a prompt's chunks is {shown(largest)}: it must be one of {sizes}"
            )
        check_draft(draft, model.config)
        if mesh is not None:
            _check_shared(widths, mesh, draft)
            model, device = model_on(model, mesh), mesh.devices.flat[0]
        elif device is not None:
            model = jax.device_put(model, device)
            draft = jax.device_put(draft, device) if isinstance(draft, Model) else draft
        self.model, self.largest, self.vocab_size = model, largest, model.config.vocab_size
        self._mesh = mesh
        with jax.default_device(device):
            self._empty = init_state(model.config, 1, room=room)
            self._copied: State | None = None  # the empty state, for the next request
            readers = model, decoder_for(model, self._empty)  # of one row
            self._readers = readers if mesh is None else sharding.part_of(readers, device)
            self.slots = {width: self._make(width, room, draft) for width in sorted(set(widths))}
            self._programs = self._reading()
            ahead = [slots.ahead() for slots in self.slots.values()]
            compile_all(itertools.chain(self._programs.values(), *ahead))
        self.capacity = self._empty.capacity
        state = sum(x.nbytes for x in jax.tree.leaves(self._empty))
        self.row_bytes = state + 5 * self.vocab_size  # of a `Snapshot`

    def _make(self, width: int, room: int | None, draft: bool | Model) -> Slots:
        if self._mesh is not None:
            state = empty_state(self.model.config, width, room, self._mesh)
            return Slots(self.model, state, mesh=self._mesh)
        drafts = Drafts(draft, width, room) if draft else None
        return Slots(self.model, init_state(self.model.config, width, room=room), drafts=drafts)

    def _reading(self) -> dict[Any, Program]:
        """The programs that read prompts, by what they do and their sizes."""
        index = np.zeros(1, np.int32)
        programs: dict[Any, Program] = {"copy": Program(take_rows, (self._empty, index))}
        for size in PREFILL_SIZES[: PREFILL_SIZES.index(self.largest) + 1]:
            args = (self._reader(size), self._empty, np.zeros((1, size), np.int32), index)
            few = size <= FEW
            read, score = (prefill_few, prefill_scored_few) if few else (prefill, prefill_scored)
            programs["read", size] = Program(read, args, donate=(1,), model_first=True)
            programs["score", size] = Program(score, args, donate=(1,), model_first=True)
        return programs

    # Prompts are read at one row, before they have a slot.

    def prepare(self) -> None:
        """Have what `begin` gives, so that the next request need not wait for it."""
        if self._copied is None:
            self._copied = self.copy(self._empty)

    def begin(self, start: Snapshot | None) -> State:
        """The state of a request before its prompt, which `read` may overwrite."""
        if start is not None:
            return self.copy(start.state)
        self.prepare()
        state, self._copied = self._copied, None
        assert state is not None
        return state

    def copy(self, state: State) -> State:
        """The same state in arrays of its own, where prompts are read."""
        (here,) = self._empty.position.devices()
        if state.position.devices() != {here}:  # of a file, or of other devices
            state = jax.device_put(state, here)
        return self._programs["copy"](state, np.zeros(1, np.int32))

    def read(self, state: State, tokens: Tokens) -> State:
        """The state after at most `largest` tokens of a prompt; the given one is no more."""
        for chunk, lengths in prompt_chunks([tokens], 1):
            state = self._read("read", state, chunk, lengths)
        return state

    def wait(self, state: State) -> None:
        """Wait till a state is there."""
        jax.block_until_ready(state)

    def read_scored(self, state: State, tokens: Tokens) -> tuple[State, Scores]:
        """`read`, and how probable the tokens were."""
        parts = []
        for chunk, lengths in prompt_chunks([tokens], 1):
            state, scored = self._read("score", state, chunk, lengths)
            parts.append(Scores(*(np.asarray(x)[0, : lengths[0]] for x in scored)))
        return state, Scores(*map(np.concatenate, zip(*parts, strict=True)))

    def _read(self, what: str, state: State, chunk: np.ndarray, lengths: np.ndarray) -> Any:
        size = chunk.shape[1]
        return self._programs[what, size](self._reader(size), state, chunk, lengths)

    def _reader(self, size: int) -> Model | Decoder:
        """What reads chunks of this size."""
        return self._readers[size <= FEW]

    def is_sound(self, state: State) -> bool:
        """Whether what comes next has probabilities."""
        return not np.isnan(np.asarray(state.logits)).any()
