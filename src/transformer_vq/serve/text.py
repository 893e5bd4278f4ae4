"""Stop texts, where a text can be written in tokens in many ways: found in the text itself."""

from collections.abc import Iterable

from transformer_vq.errors import UserError


class TextStops:
    """Passes text on until one of the stop texts is in it; holds back what may begin one.

    Raises `UserError` for a stop text that is empty, which every text has in it.
    """

    def __init__(self, stops: Iterable[str]):
        self._stops = list(stops)
        if not all(self._stops):
            raise UserError("a stop text is empty: give at least one character")
        self._held = ""
        self.found = False
        self.stop = ""  # the one that was found

    def push(self, text: str) -> str:
        """The text that is certain to come before any stop text."""
        if not self._stops:
            return text
        self._held += text
        starts = [(start, s) for s in self._stops if (start := self._held.find(s)) >= 0]
        if starts:
            start, self.stop = min(starts, key=lambda found: found[0])
            self.found = True
            ready, self._held = self._held[:start], ""
            return ready
        keep = max(map(self._overlap, self._stops), default=0)
        ready = self._held[: len(self._held) - keep]
        self._held = self._held[len(ready) :]
        return ready

    def flush(self, text: str) -> str:
        """What is left once no more text will come, `text` the last of it."""
        if self.found:
            return ""
        ready = self.push(text)
        ready += self._held
        self._held = ""
        return ready

    def _overlap(self, stop: str) -> int:
        """Length of the longest end of what is held that begins this stop text."""
        lengths = range(min(len(stop) - 1, len(self._held)), 0, -1)
        return next((n for n in lengths if self._held.endswith(stop[:n])), 0)
