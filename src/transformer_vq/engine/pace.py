"""How many tokens to try at once: what is fastest, as measured while it goes on. No JAX here.

Drafts pay where guesses are right often enough for what a round costs, and both depend on the
text, the model and the machine. So the measured speed of each size decides: the fastest goes on,
and the next size up or down is tried now and then for a few rounds, ever more rarely while it
loses.
"""

SIZES = (1, 4, 16)  # tokens of a round; 1: plain decoding. Each is a compiled program
TRIAL = 4  # rounds of a trial: few, for it may be slow
FIRST_WAIT, LONGEST_WAIT = 128, 1024  # tokens of a row between trials


class Pace:
    """Chooses the size of each dispatch. Tell it (`measure`) what came of the last choice."""

    def __init__(self) -> None:
        self._begun: set[int] = set()  # sizes whose first dispatch, with a compilation, is done
        self._speeds: dict[int, float] = {}  # tokens a second of a row, of the sizes timed since
        self._best = SIZES[0]
        self._wait, self._since, self._up = FIRST_WAIT, 0.0, True

    def choose(self, steps: int) -> tuple[int, int]:
        """Size and rounds of the next dispatch, which has `steps` rounds if nothing is tried."""
        size = self._trial()
        if size is None or size == self._best in self._begun:
            return self._best, steps
        return size, min(steps, TRIAL if size in self._begun else 1)

    def _trial(self) -> int | None:
        """A size to try now, if it is time."""
        missing = [size for size in SIZES[:2] if size not in self._speeds]
        if missing:
            return missing[0]
        at = SIZES.index(self._best)
        up, down = SIZES[at + 1 : at + 2], SIZES[max(0, at - 1) : at]
        if self._best > 1 and up and up[0] not in self._speeds:
            return up[0]
        if self._since < self._wait:
            return None
        return (up or down)[0] if self._up else (down or up)[0]

    def measure(self, size: int, tokens: float, seconds: float) -> None:
        """A dispatch of this size took so long for so many tokens of each row that took part."""
        self._since += tokens
        if size not in self._begun:
            self._begun.add(size)
            return
        if not tokens:
            return
        speed, before = tokens / seconds, self._best
        if size == before and size in self._speeds:
            speed = 0.5 * (speed + self._speeds[size])
        self._speeds[size] = speed
        self._best = max(self._speeds, key=self._speeds.__getitem__)
        if self._best != before:
            self._wait, self._since = FIRST_WAIT, 0.0
        elif size != before:  # a trial that lost
            self._wait, self._since = min(2 * self._wait, LONGEST_WAIT), 0.0
            self._up = not self._up
