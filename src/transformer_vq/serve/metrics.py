"""What Prometheus is told."""

from collections.abc import Callable
from math import isfinite

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client import generate_latest as written

from transformer_vq.engine.scheduler import Scheduler
from transformer_vq.serve.completion import Completion
from transformer_vq.serve.service import Service


class Metrics:
    """Counts of one server, in a registry of its own."""

    media_type = CONTENT_TYPE_LATEST

    def __init__(self, service: Service):
        self._registry = CollectorRegistry()
        self._service = service
        self._answers = Counter(
            "tvq_responses", "responses, by status", ["status"], registry=self._registry
        )
        self._first_token = Histogram(
            "tvq_time_to_first_token_seconds", "from a request to a token", registry=self._registry
        )
        self._gauge("tvq_rows_running", "rows being decoded", lambda s: s.running)
        self._gauge("tvq_requests_waiting", "requests waiting for a slot", lambda s: s.waiting)
        self._gauge("tvq_prompt_tokens", "tokens of prompts so far", lambda s: s.prompt_tokens)
        self._gauge("tvq_generated_tokens", "tokens written so far", lambda s: s.written_tokens)
        self._gauge("tvq_guessed_tokens", "tokens guessed ahead so far", lambda s: s.drafted[0])
        self._gauge("tvq_right_guesses", "of them, those that were right", lambda s: s.drafted[1])
        self._gauge("tvq_dispatches", "calls of the decoding program", lambda s: s.dispatches)
        self._gauge(
            "tvq_step_seconds",
            "of a decoding step, all slots busy; 0 before one was measured",
            lambda s: seconds if isfinite(seconds := s.step_seconds[max(s.step_seconds)]) else 0,
        )
        live = Gauge("tvq_requests", "requests that have not ended", registry=self._registry)
        live.set_function(lambda: service.live)
        cached = Gauge(
            "tvq_cached_tokens", "tokens of prompts, known before", registry=self._registry
        )
        cached.set_function(lambda: service.cached_tokens)
        kept = Gauge("tvq_state_cache_bytes", "of states in memory", registry=self._registry)
        kept.set_function(lambda: service.loaded.store.num_bytes if service.loaded else 0)

    def _gauge(self, name: str, help: str, value: Callable[[Scheduler], float]) -> None:
        def now() -> float:
            engine = self._service.engine
            return value(engine.scheduler) if engine and engine.scheduler else 0

        Gauge(name, help, registry=self._registry).set_function(now)

    def answered(self, status: int) -> None:
        """A response has begun."""
        self._answers.labels(status=status).inc()

    def completed(self, completion: Completion) -> None:
        """A completion has ended."""
        if completion.first_token is not None:
            self._first_token.observe(completion.first_token)

    def text(self) -> bytes:
        """All of it."""
        return written(self._registry)
