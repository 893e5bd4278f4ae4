"""The tokens of one request on their way out: where its stop sequences end it. No JAX here."""

from transformer_vq.engine.request import SamplingParams, Token


class Output:
    """Passes on the tokens of one request until a stop sequence ends it.

    Tokens that may be the beginning of a stop sequence are held back until that is known. Stops of
    a single token, and `max_tokens`, are the device's business (`ops.decode.generate_tokens`).
    """

    def __init__(self, params: SamplingParams):
        self.ended = False  # by a stop sequence
        self._stops = [stop for stop in params.stop_sequences() if len(stop) > 1]
        self._min_tokens = params.min_tokens
        self._held: list[Token] = []
        self._seen = 0

    def push(self, token: Token) -> list[Token]:
        """Take the next token of the request: the tokens that are certain to be output."""
        if self.ended:
            return []
        self._held.append(token)
        self._seen += 1
        for stop in self._stops:
            if self._may_end(len(stop)) and self._ends_with(stop):
                self.ended = True
                return self._release(len(self._held) - len(stop))
        keep = max(map(self._overlap, self._stops), default=0)
        return self._release(len(self._held) - keep)

    def flush(self) -> list[Token]:
        """The request has ended, and no stop sequence ended it: the tokens that were held back."""
        return [] if self.ended else self._release(len(self._held))

    def _release(self, count: int) -> list[Token]:
        ready, self._held = self._held[:count], self._held[count:]
        return ready

    def _may_end(self, length: int) -> bool:
        """Whether enough tokens are left if the last so many are a stop sequence."""
        return self._seen - length >= self._min_tokens

    def _ends_with(self, tokens: tuple[int, ...]) -> bool:
        return tuple(self._held[-len(tokens) :]) == tokens

    def _overlap(self, stop: tuple[int, ...]) -> int:
        """Length of the longest end of what is held that begins this stop sequence."""
        lengths = range(min(len(stop) - 1, len(self._held)), 0, -1)
        return next((n for n in lengths if self._may_end(n) and self._ends_with(stop[:n])), 0)
