"""A file of requests, answered by one engine or more, a few at a time, in any order. No JAX."""

import asyncio
import contextlib
import signal
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from pydantic import ValidationError

from transformer_vq.engine.engine import Engine
from transformer_vq.errors import UserError
from transformer_vq.serve.answers import AnswerFile
from transformer_vq.serve.completion import Completion
from transformer_vq.serve.lines import Line, seed_of
from transformer_vq.serve.protocol import ApiError, CompletionRequest, validation_error
from transformer_vq.serve.service import Service

SIGNALS = (signal.SIGINT, signal.SIGTERM)  # that end a job; the same command goes on


class Job:
    """All requests that are left, and where their answers go.

    Args:
      requests: what is to be answered.
      answers: where the answers go.
      engines: each with the service that it is of, which knows its model once it is ready.
      depth: how many requests an engine has at a time: those in slots, and as many that wait.
      defaults: fields of requests that do not have them.
      seed: from which, and from its id, a request without a seed gets one.
      keeps_states: whether states outlive the job.
      tell: called after each answer with its tokens, 0 if it is an error.
    """

    def __init__(
        self,
        requests: Iterator[Line],
        answers: AnswerFile,
        engines: Sequence[tuple[Service, Engine]],
        *,
        depth: int,
        defaults: dict[str, Any],
        seed: int,
        keeps_states: bool,
        tell: Callable[[int], None],
    ):
        self._requests, self._answers, self._engines = requests, answers, engines
        self._depth, self._defaults, self._seed = depth, defaults, seed
        self._keeps_states, self._tell = keeps_states, tell
        self._writing: dict[asyncio.Task[None], Service] = {}

    def run(self) -> int:
        """Answer them: 0, or the number of the signal that ended it before.

        Raises `UserError` if answers cannot be written or requests not be read, and what made an
        engine fail. What was in flight then has no answer.
        """
        return asyncio.run(self._until_a_signal())

    async def _until_a_signal(self) -> int:
        loop = asyncio.get_running_loop()
        stop: asyncio.Future[int] = loop.create_future()
        with contextlib.suppress(NotImplementedError):  # Windows: KeyboardInterrupt ends it
            for number in SIGNALS:
                loop.add_signal_handler(number, _set, stop, int(number))
        work = asyncio.ensure_future(self._answer_all())
        try:
            await asyncio.wait((work, stop), return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                work.cancel()
                await asyncio.wait((work,))
            if work.cancelled():
                return stop.result()
            work.result()
            return 0
        finally:
            with contextlib.suppress(NotImplementedError):
                for number in SIGNALS:
                    loop.remove_signal_handler(number)

    async def _answer_all(self) -> None:
        try:
            await asyncio.gather(*(_ready(*engine) for engine in self._engines))
            for line in self._requests:
                await self._begin(line)
                await asyncio.sleep(0)  # a signal may have come
            while self._writing:
                await self._one_more()
        finally:
            for task in self._writing:
                task.cancel()
            await asyncio.gather(*self._writing, return_exceptions=True)

    async def _begin(self, line: Line) -> None:
        """Give a request to the engine that has the fewest, as soon as it takes it."""
        try:
            body = self._body(line)
        except ApiError as error:
            return self._write(line, error)
        seed = seed_of(self._seed, line.custom_id) if body.seed is None else body.seed
        while True:
            load = Counter(self._writing.values())
            service = min((service for service, _ in self._engines), key=lambda s: load[s])
            if load[service] < self._depth:
                try:
                    completion = await service.complete(body, "", seed)
                except ApiError as error:
                    _refuse_dead(service)
                    if error.code != "queue_full":
                        return self._write(line, error)
                else:
                    task = asyncio.create_task(self._finish(line, service, completion))
                    self._writing[task] = service
                    return None
            await self._one_more()

    def _body(self, line: Line) -> CompletionRequest:
        """What is asked for. Raises `ApiError`, as the server answers."""
        body = completion_request({**self._defaults, **line.body})
        if body.save_state is not None and not self._keeps_states:
            message = "save_state would end with the job: start it with --state-dir"
            raise ApiError(400, message, param="save_state", code="invalid_value")
        return body

    async def _finish(self, line: Line, service: Service, completion: Completion) -> None:
        """Wait for an answer, and write it."""
        try:
            found = await completion.whole()
        except ApiError as error:
            _refuse_dead(service)
            return self._write(line, error)
        except asyncio.CancelledError:
            completion.cancel()
            raise
        usage = found["usage"]
        del usage["prompt_tokens_details"]  # what was known depends on what else was asked
        self._answers.add(line.number, line.custom_id, 200, found)
        self._tell(usage["total_tokens"])

    def _write(self, line: Line, error: ApiError) -> None:
        self._answers.add(line.number, line.custom_id, error.status, error.content)
        self._tell(0)

    async def _one_more(self) -> None:
        """Wait until a request that is being answered has ended. Raises what ended it."""
        if not self._writing:  # the engine has not noticed yet that the last one has ended
            await asyncio.sleep(0.01)
            return
        done, _ = await asyncio.wait(self._writing, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            del self._writing[task]
            task.result()


def completion_request(fields: dict[str, Any]) -> CompletionRequest:
    """A request as the server takes it, but for streams. Raises `ApiError`."""
    try:
        body = CompletionRequest.model_validate(fields)
    except ValidationError as error:
        raise validation_error(dict(error.errors()[0])) from None
    if body.stream:
        message = "stream is true, and an answer in a file is whole: leave it out"
        raise ApiError(400, message, param="stream", code="invalid_value")
    return body


def _refuse_dead(service: Service) -> None:
    """Raise what made an engine fail: it is no answer to a request."""
    assert service.engine is not None
    if service.engine.error is not None:
        raise service.engine.error


async def _ready(service: Service, engine: Engine) -> None:
    """Start an engine and wait until it takes requests. Raises what makes it fail."""
    loop = asyncio.get_running_loop()
    started: asyncio.Future[None] = loop.create_future()

    def soon(error: Exception | None) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(_set, started, None, error)

    engine.on_ready = lambda: soon(None)
    engine.on_end = lambda error: soon(error or UserError("the engine has ended"))
    service.engine = engine
    service.bind()
    engine.start()
    await started


def _set(future: asyncio.Future[Any], value: Any, error: Exception | None = None) -> None:
    """Settle a future, unless it is."""
    if future.done():
        return
    if error is None:
        future.set_result(value)
    else:
        future.set_exception(error)
