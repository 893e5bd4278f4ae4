"""A model that is served: requests of the API become requests of the engine. No HTTP, no JAX."""

import asyncio
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from transformer_vq.data import Tokenizer
from transformer_vq.data.tokenizer import Tokens
from transformer_vq.data.vocabulary import END_OF_TEXT
from transformer_vq.engine.engine import Engine, EngineDead, QueueFull
from transformer_vq.engine.request import SamplingParams, check_params
from transformer_vq.engine.scheduler import Event, Request, Snapshot
from transformer_vq.engine.tokens import check_vocabulary
from transformer_vq.errors import UserError
from transformer_vq.serve.aside import LARGE, aside, encoded, token_array
from transformer_vq.serve.completion import Completion, Prompt
from transformer_vq.serve.hashes import Hashed
from transformer_vq.serve.protocol import MOST_PROMPTS, ApiError, CompletionRequest, StateRequest
from transformer_vq.serve.states import CacheMode, StateStore, StoreFull


@dataclass(frozen=True)
class Loaded:
    """What is known once the model is loaded."""

    name: str  # of the model
    tokenizer: Tokenizer
    vocab_size: int  # of the model, which may have more tokens than its vocabulary
    ends_documents: bool  # whether it has learnt where a document ends
    capacity: int | None  # tokens of a sequence; None: any number
    store: StateStore
    cache: CacheMode  # where a request does not say it
    created: int = field(default_factory=lambda: int(time.time()))


class Service:
    """Requests, each followed until it ends. All methods are for the event loop's thread."""

    def __init__(self) -> None:
        self.engine: Engine | None = None
        self.loaded: Loaded | None = None  # once the engine is ready
        self.failed = False  # the engine has died
        self.draining = False  # nothing new is taken
        self.cached_tokens = 0  # of prompts, that had not to be read
        self.writing = 0  # answers that are being written in threads
        self._loop: asyncio.AbstractEventLoop | None = None
        self._followers: dict[Request, Completion | asyncio.Future[Event]] = {}

    def bind(self) -> None:
        """Events come to the loop that runs now."""
        self._loop = asyncio.get_running_loop()

    def deliver(self, events: list[Event]) -> None:
        """Events of one step; from the thread of the engine."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._take, events)

    def _take(self, events: list[Event]) -> None:
        for event in events:
            follower = self._followers.get(event.request)
            if event.last:
                self._followers.pop(event.request, None)
            if isinstance(follower, Completion):
                follower.take(event)
            elif follower is not None and not follower.done():
                follower.set_result(event)

    @property
    def ready(self) -> Loaded:
        """Raises `ApiError` (503) before the model is loaded, and when nothing new is taken."""
        if self.failed:
            raise ApiError(503, "the engine has failed: the server ends", code="engine_failed")
        if self.draining:
            raise ApiError(503, "the server is shutting down", code="shutting_down")
        if self.loaded is None or self.engine is None or self.engine.scheduler is None:
            raise ApiError(503, "the model is being loaded: try again later", code="loading")
        return self.loaded

    @property
    def busy(self) -> bool:
        """Whether any request has not been answered."""
        return bool(self.live or self.writing)

    @property
    def live(self) -> int:
        """Requests that have not ended."""
        return len(self._followers)

    def require_model(self, name: str | None) -> None:
        """Raise `ApiError` for a model that is not the one that is served."""
        loaded = self.ready
        if name is not None and name != loaded.name:
            raise ApiError(
                404,
                f"there is no model {name!r}: this server has {loaded.name!r}",
                param="model",
                code="model_not_found",
            )

    # Completions.

    async def complete(
        self, body: CompletionRequest, owner: str, seed: int, kind: type[Completion] = Completion
    ) -> Completion:
        """Begin to answer. Raises `ApiError` for what cannot be answered, or not now.

        `kind`: how the answer is written.
        """
        loaded = self.ready
        self.require_model(body.model)
        start = None if body.state is None else await self.named(owner, body.state)
        reads_files = start is None and loaded.store.in_files
        size = LARGE + 1 if reads_files else _size(body.prompt)
        prompts = await aside(size, self._prompts, body, owner, start, seed)
        completion = kind(self, body, owner, prompts, seed)
        self._submit(completion, *(prompt.request for prompt in prompts))
        self.cached_tokens += completion.cached_tokens
        return completion

    def _prompts(
        self, body: CompletionRequest, owner: str, start: Snapshot | None, seed: int
    ) -> list[Prompt]:
        """The prompts of a request, checked and hashed; in any thread, for they may be long."""
        given = self._tokens(body, start is not None)
        if body.save_state is not None and len(given) > 1:
            raise ApiError(400, "save_state keeps one state: give one prompt", param="save_state")
        return [self._prompt(body, owner, tokens, start, seed) for tokens in given]

    def _tokens(self, body: CompletionRequest, goes_on: bool) -> list[np.ndarray]:
        """The tokens of every prompt; where nothing comes before an empty one, of its start."""
        loaded = self.ready
        texts = [body.prompt] if _is_one(body.prompt) else body.prompt
        if not texts or len(texts) > MOST_PROMPTS:
            raise ApiError(
                400,
                f"there are {len(texts)} prompts: from 1 to {MOST_PROMPTS} are allowed",
                param="prompt",
            )
        found: list[np.ndarray] = []
        for text in texts:
            tokens = self.tokens("prompt", text)  # pyright: ignore[reportArgumentType]
            if not len(tokens) and not goes_on:
                eos, begin = loaded.tokenizer.eos_id, loaded.tokenizer.start_id
                tokens = token_array([eos if loaded.ends_documents else begin])
            found.append(tokens)
        return found

    def _prompt(
        self,
        body: CompletionRequest,
        owner: str,
        tokens: np.ndarray,
        start: Snapshot | None,
        seed: int,
    ) -> Prompt:
        """One prompt as a request of the engine, from the longest state that is known of it."""
        loaded = self.ready
        self._check_length(start, len(tokens) + body.max_tokens)
        params = [self._params(body, seed + i) for i in range(body.samples)]
        scored = body.echo and body.logprobs is not None
        mode = body.cache or loaded.cache
        cached = mode != "off" and start is None and not scored
        hashed = Hashed(tokens) if cached else None
        known = None
        if hashed is not None:
            loaded.store.fetch(owner, hashed, mode)
            known = loaded.store.find(owner, hashed, mode)
        keep = frozenset({len(tokens)}) if body.save_state else frozenset()
        length = known.length if known else 0
        if hashed is not None:
            keep |= loaded.store.worth_keeping(owner, hashed, length)
            hashed.digests(sorted(keep))
        request = Request(
            tokens,
            params if body.max_tokens else [],
            known.snapshot if known else start,
            known=length,
            scored=scored,
            streams=body.stream,
            keep=keep,
            keep_answers=cached or body.save_state is not None,
        )
        exact = known is None or known.exact
        named = body.logprobs is not None and not body.echo  # its tokens, by their place
        offset = len(loaded.tokenizer.decode_text(tokens)) if named else 0
        return Prompt(request, start is not None, hashed=hashed, exact=exact, offset=offset)

    def _check_length(self, start: Snapshot | None, more: int) -> None:
        """Raise `ApiError` for more tokens than a state of full attention holds."""
        capacity = self.ready.capacity
        if capacity is None:
            return
        used = (start.position if start else 0) + more
        if used > capacity:
            raise ApiError(
                400,
                f"prompt and answer would have {used:,} tokens, and this model of full attention "
                f"takes {capacity:,}: give a shorter prompt, or a smaller max_tokens",
                param="max_tokens",
                code="context_length_exceeded",
            )

    def _params(self, body: CompletionRequest, seed: int) -> SamplingParams:
        loaded = self.ready
        size = loaded.tokenizer.vocab_size
        stops = list(body.stop_token_ids)
        if loaded.ends_documents and not body.ignore_eos:
            stops.append(loaded.tokenizer.eos_id)
        try:
            params = SamplingParams(
                max_tokens=max(1, body.max_tokens),
                temperature=body.temperature,
                top_k=body.top_k,
                top_p=body.top_p,
                min_p=body.min_p,
                typical_p=body.typical_p,
                repetition_penalty=body.repetition_penalty,
                presence_penalty=body.presence_penalty,
                frequency_penalty=body.frequency_penalty,
                logit_bias={int(token): bias for token, bias in body.logit_bias.items()},
                banned_tokens=range(size, loaded.vocab_size),  # they mean nothing
                min_tokens=body.min_tokens,
                stop=[[token] for token in dict.fromkeys(stops)],
                seed=seed,
                logprobs=body.logprobs is not None or body.samples > body.n,
            )
            check_params(params, loaded.vocab_size)
        except UserError as error:
            raise ApiError(400, str(error), param=getattr(error, "field", None) or None) from None
        return params

    def _submit(self, follower: "Completion | asyncio.Future[Event]", *requests: Request) -> None:
        """To the engine; the follower gets the events. Raises `ApiError` if it takes none."""
        assert self.engine is not None
        try:
            self.engine.submit(*requests)
        except QueueFull as error:
            raise ApiError(429, str(error), code="queue_full") from None
        except EngineDead as error:
            raise ApiError(503, str(error), code="engine_failed") from None
        # Events come through this thread's loop, so none was missed.
        self._followers.update(dict.fromkeys(requests, follower))

    def forget(self, request: Request, choice: int | None = None) -> None:
        """Nobody wants what would come of a request, or of one of its answers."""
        if self.engine is not None:
            self.engine.cancel(request, choice)
        if choice is None:
            self._followers.pop(request, None)

    def give_up(self, why: str) -> None:
        """End all that has not ended, with an error."""
        for follower in list(self._followers.values()):
            if isinstance(follower, Completion):
                follower.fail(ApiError(503, why, code="shutting_down"))

    async def read(self, request: Request) -> Event:
        """Read a prompt without an answer: the event at its end."""
        done: asyncio.Future[Event] = asyncio.get_running_loop().create_future()
        self._submit(done, request)
        try:
            event = await done
        except asyncio.CancelledError:
            self.forget(request)
            raise
        if event.finish == "error":
            raise ApiError(500, event.error, code="engine_error")
        return event

    # Text and tokens.

    def tokens(self, name: str, given: str | Tokens) -> np.ndarray:
        """Text or tokens as tokens, int32. Raises `ApiError` for what the vocabulary has not."""
        if isinstance(given, str):
            return self.encode(given)
        self.check_tokens(name, given)
        return token_array(given)

    def encode(self, text: str) -> np.ndarray:
        """Raises `ApiError` for what the vocabulary cannot express."""
        try:
            return encoded(self.ready.tokenizer, text)
        except ValueError as error:  # half a character (a surrogate), too
            raise ApiError(400, f"the text has no tokens: {error}", param="prompt") from None

    @property
    def eos_text(self) -> str:
        """What clients write for the token that ends a document, which most often has no text."""
        tokenizer = self.ready.tokenizer
        return tokenizer.decode_text([tokenizer.eos_id]) or END_OF_TEXT

    def check_tokens(self, name: str, tokens: Tokens) -> None:
        """Raise `ApiError` for a token that the vocabulary does not have."""
        try:
            check_vocabulary(name, tokens, self.ready.tokenizer.vocab_size)
        except UserError as error:
            raise ApiError(400, str(error), param=name, code="invalid_value") from None

    # States.

    async def named(self, owner: str, name: str) -> Snapshot:
        """A state that was saved. Raises `ApiError`, 404 if there is none, 409 if it is no use."""
        try:
            snapshot = await asyncio.to_thread(self.ready.store.load, owner, name)
        except (UserError, OSError) as error:
            raise ApiError(409, str(error), param="state", code="state_unusable") from None
        if snapshot is None:
            raise no_state(name)
        return snapshot

    async def save(self, owner: str, name: str, snapshot: Snapshot) -> None:
        """Keep a state under a name. Raises `ApiError` (507) if there is no room for it."""
        assert self.loaded is not None
        try:
            await asyncio.to_thread(self.loaded.store.save, owner, name, snapshot)
        except (StoreFull, OSError) as error:
            raise no_room(error) from None

    async def make_state(self, body: StateRequest, owner: str) -> Snapshot:
        """Read a prompt and keep what it leaves."""
        start = None if body.state is None else await self.named(owner, body.state)
        tokens = await aside(len(body.prompt), self.tokens, "prompt", body.prompt)
        if not len(tokens) and start is None:
            raise ApiError(400, "there is neither a prompt nor a state", param="prompt")
        self._check_length(start, len(tokens))
        keep = frozenset({len(tokens)})
        event = await self.read(Request(tokens, [], start, keep=keep))
        snapshot = event.snapshots[len(tokens)]
        await self.save(owner, body.name, snapshot)
        return snapshot


def _is_one(prompt: Any) -> bool:
    """Whether it is one prompt, and no list of them."""
    if isinstance(prompt, str | np.ndarray):
        return True
    return bool(prompt) and isinstance(prompt[0], int)


def _size(prompt: Any) -> int:
    """How many characters or tokens there are in all."""
    return len(prompt) if _is_one(prompt) else sum(map(len, prompt))


def no_room(error: Exception) -> ApiError:
    """The error where a state cannot be kept: memory or a disk is full."""
    said = str(error) if isinstance(error, UserError) else "the state cannot be written to its file"
    return ApiError(507, said, code="no_room")


def no_state(name: str) -> ApiError:
    """The error where there is no such state."""
    message = f"there is no state {name!r}: save it first"
    return ApiError(404, message, param="state", code="state_not_found")
