"""One request for completions, from its first token to its last."""

import asyncio
import functools
import time
import uuid
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from transformer_vq.engine.scheduler import Event, Finish, Request, Snapshot
from transformer_vq.serve.aside import aside
from transformer_vq.serve.hashes import Hashed
from transformer_vq.serve.protocol import ApiError, CompletionRequest
from transformer_vq.serve.writer import Entry, Piece, Writer, logprobs_object

if TYPE_CHECKING:
    from transformer_vq.serve.service import Service

MOST_AT_ONCE = 4096  # tokens and alternatives of a prompt that are written while all others wait
MOST_UNREAD = 65_536  # tokens and alternatives of a stream that its reader has not taken


@dataclass
class Prompt:
    """A prompt of the request, and what is known of it."""

    request: Request
    follows_unknown: bool  # it goes on from a state
    hashed: Hashed | None  # its tokens, where states of it may be kept and used again
    exact: bool  # it goes on from what it would itself have read
    offset: int  # characters before the answer, where places in the text are told
    end: Snapshot | None = None  # after it, if that was to be kept


@dataclass
class _Choice:
    """One answer."""

    index: int
    prompt: Prompt
    sample: int
    writer: Writer
    text: str = ""
    finish: Finish | None = None
    snapshot: Snapshot | None = None  # after the answer

    def __post_init__(self) -> None:
        self.entries: list[Entry] = []
        self.echoed = 0  # entries of the prompt


class Completion:
    """The answers to all prompts of a request, as they come."""

    prefix = "cmpl"  # of ids
    object, chunk_object = "text_completion", "text_completion"  # what the response is called

    def __init__(
        self,
        service: "Service",
        body: CompletionRequest,
        owner: str,
        prompts: list[Prompt],
        seed: int,
    ):
        self._service, self._body, self._owner, self.seed = service, body, owner, seed
        self.id = f"{self.prefix}-{uuid.uuid4().hex}"
        self.created = int(time.time())
        self._loaded = service.ready
        self._prompts = {prompt.request: prompt for prompt in prompts}
        self._choices = [
            _Choice(p * body.samples + i, prompt, i, self._writer(prompt))
            for p, prompt in enumerate(prompts)
            for i in range(body.samples)
        ]
        self._choices_of = {
            prompt.request: self._choices[p * body.samples : (p + 1) * body.samples]
            for p, prompt in enumerate(prompts)
        }
        self._changed = asyncio.Event()
        self._unread: deque[tuple[_Choice, Piece, Finish | None]] = deque()
        self._unread_size = 0
        self._error: ApiError | None = None
        self._echoing: asyncio.Future[None] | None = None  # a long prompt
        self._later: list[Event] = []  # what has come since
        self.began = time.monotonic()
        self.first_token: float | None = None  # seconds until there was one
        self.size = 0  # tokens and alternatives of what is sent now

    def _writer(self, prompt: Prompt) -> Writer:
        body, tokens, tokenizer = self._body, prompt.request.prompt, self._loaded.tokenizer
        before = None if prompt.follows_unknown else () if body.echo else tokens
        return Writer(
            tokenizer,
            before,
            stops=body.stops,
            min_tokens=body.min_tokens,
            alternatives=body.logprobs,
            include_stop=body.include_stop_str_in_output,
            offset=prompt.offset,
        )

    # What comes of the engine.

    def take(self, event: Event) -> None:
        """News of one of the requests."""
        if self._error is not None:
            return
        if self._echoing is not None:
            self._later.append(event)
            return
        prompt = self._prompts[event.request]
        if event.finish == "error":
            self.fail(ApiError(500, event.error, code="engine_error"))
        elif event.choice is None:
            self._take_prompt(prompt, event)
        else:
            self._take_tokens(self._choices_of[event.request][event.choice], event)
        self._changed.set()

    def _take_prompt(self, prompt: Prompt, event: Event) -> None:
        """A prompt is read."""
        tokens, grid = prompt.request.prompt, self._loaded.store.grid
        for length, snapshot in event.snapshots.items():
            if length == len(tokens):
                prompt.end = snapshot
            if prompt.hashed is not None:
                exact = prompt.exact and prompt.request.known % grid == 0
                self._loaded.store.keep(
                    self._owner, prompt.hashed, snapshot, exact=exact, length=length
                )
        size = len(tokens) * (1 + (self._body.logprobs or 0))
        if self._body.echo and size > MOST_AT_ONCE:
            self._echoing = asyncio.ensure_future(self._echo_aside(prompt, event))
        else:
            self._begin(prompt, self._echoes(prompt, event))

    def _echoes(self, prompt: Prompt, event: Event) -> list[Piece]:
        """What each answer begins with: the prompt, if that is asked for."""
        choices, tokens = self._choices_of[prompt.request], prompt.request.prompt
        if not self._body.echo:
            return [Piece() for _ in choices]
        first = not prompt.follows_unknown
        return [choice.writer.echo(tokens, event.scores, first=first) for choice in choices]

    async def _echo_aside(self, prompt: Prompt, event: Event) -> None:
        """A long prompt is written in a thread, so that others are answered meanwhile."""
        self._service.writing += 1
        try:
            pieces = await asyncio.to_thread(self._echoes, prompt, event)
        except Exception:
            self.fail(ApiError(500, "this is a fault of the server", code="fault"))
            raise
        finally:
            self._service.writing -= 1
        later, self._later, self._echoing = self._later, [], None
        if self._error is None:
            self._begin(prompt, pieces)
            self._changed.set()
        for event in later:
            self.take(event)

    def _begin(self, prompt: Prompt, pieces: list[Piece]) -> None:
        """All that comes before the first token of each answer."""
        finish = None if prompt.request.params else "length"
        for choice, piece in zip(self._choices_of[prompt.request], pieces, strict=True):
            choice.echoed = len(piece.entries)
            if piece.text or piece.entries or finish:
                self._add(choice, piece, finish)

    def _take_tokens(self, choice: _Choice, event: Event) -> None:
        """An answer has grown, or ended."""
        if choice.finish is not None:  # at a stop text, a moment ago
            return
        if self.first_token is None and event.tokens:
            self.first_token = time.monotonic() - self.began
        piece = choice.writer.push(event.tokens)
        finish = event.finish
        if finish is not None:
            rest = choice.writer.flush()
            piece = Piece(piece.text + rest.text, piece.entries + rest.entries)
        if choice.writer.ended:
            if finish is None:
                self._service.forget(choice.prompt.request, choice.sample)
            finish = "stop"
        elif event.snapshot is not None:
            choice.snapshot = event.snapshot
            prompt = choice.prompt
            if prompt.hashed is not None:
                tokens = prompt.hashed.followed_by(choice.writer.tokens)
                self._loaded.store.keep(self._owner, tokens, event.snapshot, exact=False)
        if piece.text or piece.entries or finish:
            self._add(choice, piece, finish)

    def _add(self, choice: _Choice, piece: Piece, finish: Finish | None) -> None:
        choice.finish = finish
        # An answer that ended at a stop text may have been the last: the engine says no more of it.
        if all(c.finish for c in self._choices_of[choice.prompt.request]):
            self._service.forget(choice.prompt.request)
        if not self._body.stream:
            choice.text += piece.text
            choice.entries += piece.entries
            return
        self._unread.append((choice, piece, finish))  # and then it is nowhere: a stream has no end
        self._unread_size += self._size(piece)
        if self._unread_size > MOST_UNREAD:
            self.fail(ApiError(500, "the stream is not read", code="slow_reader"))

    def _size(self, piece: Piece) -> int:
        """How many tokens and alternatives a piece has."""
        return len(piece.entries) * (1 + (self._body.logprobs or 0))

    # The end of it.

    def fail(self, error: ApiError) -> None:
        """No more answers: an error."""
        self._error = self._error or error
        self.cancel()
        self._changed.set()

    def cancel(self) -> None:
        """Nobody waits for the answers."""
        for request in self._prompts:
            self._service.forget(request)

    async def _news(self) -> None:
        await self._changed.wait()
        self._changed.clear()

    async def _save(self, choice: _Choice) -> None:
        """Keep the state after an answer, if that was asked for."""
        name = self._body.save_state
        if name is None:
            return
        prompt, tokens = choice.prompt, choice.writer.tokens
        snapshot = choice.snapshot
        if choice.writer.ended or snapshot is None:  # the state is further than the text
            snapshot = prompt.end
            if tokens:
                count = len(tokens)
                again = Request(tokens, [], prompt.end, written=count, keep=frozenset({count}))
                snapshot = (await self._service.read(again)).snapshots[count]
        assert snapshot is not None
        await self._service.save(self._owner, name, snapshot)

    # What is sent.

    async def whole(self) -> dict[str, Any]:
        """The response, once all answers are there. Raises `ApiError`."""
        while self._error is None and any(c.finish is None for c in self._choices):
            await self._news()
        if self._error is not None:
            raise self._error
        await self._save(self._choices[0])
        choices = self._best()

        def written() -> list[dict[str, Any]]:
            return [
                self._choice(i, Piece(choice.text, choice.entries), choice.finish, chunk=False)
                for i, choice in enumerate(choices)
            ]

        self.size = sum(self._size(Piece(choice.text, choice.entries)) for choice in choices)
        found = await aside(self.size, written)
        return {**self._head(self.object), "choices": found, "usage": self.usage}

    async def chunks(self) -> AsyncIterator[dict[str, Any]]:
        """The response in chunks. Raises `ApiError`."""
        left = len(self._choices)
        while left:
            while self._unread:
                choice, piece, finish = self._unread.popleft()
                self._unread_size -= self._size(piece)
                if finish is not None:
                    left -= 1
                    await self._save(choice)
                self.size = self._size(piece)
                written = functools.partial(self._choice, choice.index, piece, finish, chunk=True)
                yield {
                    **self._head(self.chunk_object),
                    "choices": [await aside(self.size, written)],
                    **({"usage": None} if self._body.stream_options.include_usage else {}),
                }
            if self._error is not None:
                raise self._error
            if left:
                await self._news()
        if self._body.stream_options.include_usage:
            yield {**self._head(self.chunk_object), "choices": [], "usage": self.usage}

    def _best(self) -> list[_Choice]:
        """With `best_of`, the n most probable answers to each prompt."""
        samples, n = self._body.samples, self._body.n
        if samples == n:
            return self._choices

        def mean(choice: _Choice) -> float:
            logprobs = [entry.logprob or 0.0 for entry in choice.entries[choice.echoed :]]
            return sum(logprobs) / max(1, len(logprobs))

        found: list[_Choice] = []
        for first in range(0, len(self._choices), samples):
            found += sorted(self._choices[first : first + samples], key=mean, reverse=True)[:n]
        return found

    def _head(self, name: str) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": name,
            "created": self.created,
            "model": self._loaded.name,
            "seed": self.seed,
        }

    def _choice(
        self, index: int, piece: Piece, finish: Finish | None, *, chunk: bool
    ) -> dict[str, Any]:
        found = {"index": index, **self._content(index, piece, chunk=chunk)}
        found |= {"finish_reason": finish, "logprobs": None}
        if self._body.logprobs is not None:
            found["logprobs"] = self._logprobs(piece, self._body.logprobs)
        if self._body.return_token_ids:
            found["token_ids"] = [entry.token for entry in piece.entries]
        return found

    def _content(self, index: int, piece: Piece, *, chunk: bool) -> dict[str, Any]:
        """The text of an answer, or what it has grown by."""
        return {"text": piece.text}

    def _logprobs(self, piece: Piece, alternatives: int) -> dict[str, Any]:
        return logprobs_object(piece.entries, alternatives, ids=self._body.return_token_ids)

    @property
    def cached_tokens(self) -> int:
        """Tokens of the prompts that had not to be read."""
        return sum(request.known for request in self._prompts)

    @property
    def usage(self) -> dict[str, Any]:
        prompts = sum(len(request.prompt) for request in self._prompts)
        written = sum(len(choice.writer.tokens) for choice in self._choices)
        return {
            "prompt_tokens": prompts,
            "completion_tokens": written,
            "total_tokens": prompts + written,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }
