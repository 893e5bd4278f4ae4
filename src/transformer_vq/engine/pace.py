"""How many tokens to try at once: what is fastest, as measured while it goes on. No JAX here.

Drafts pay where guesses are right often enough for what a round costs. What a round costs, in steps
of plain decoding, is the machine's and the model's: the median of the last measurements. How many
tokens a round brings is the text's: counted, and what was counted last counts most. The best size
goes on, and the next one up or down is tried now and then for a few rounds: the more that costs,
the more rarely.
"""

import statistics
from collections import deque

# Tokens of a round, each a compiled program, and what it costs before that is known, in steps.
# 1: plain decoding.
COSTS = {1: 1.0, 4: 2.0, 16: 3.0}
SIZES = tuple(COSTS)
TRIAL = 4  # rounds of a trial at least: few, for it may be slow
LONG_ENOUGH = 0.002  # seconds of a trial, beside which what comes of every dispatch is little
SPARED = 200  # tokens of a row for each that trials cost
SHORTEST_WAIT, LONGEST_WAIT = 32, 8192  # tokens of a row between trials
MEASURES = 5  # of a round


class Pace:
    """Chooses the size of each dispatch. Tell it (`measure`) what came of the last choice."""

    def __init__(self) -> None:
        self._begun: set[int] = set()  # sizes whose first dispatch, with a compilation, is done
        self._tokens = {SIZES[0]: 1.0}  # of a row in a round, of the sizes timed since
        self._costs = {s: deque([cost], MEASURES) for s, cost in COSTS.items()}
        self._steps = deque[float](maxlen=MEASURES)  # seconds of plain decoding
        self._best = SIZES[0]
        self._due = dict.fromkeys(SIZES, 0.0)  # tokens of a row until a size may be tried

    def choose(self, steps: int) -> tuple[int, int]:
        """Size and rounds of the next dispatch, which has `steps` rounds if nothing is tried."""
        size = self._trial()
        if size not in self._begun:
            return size, 1
        if size in (1, self._best):  # plain decoding in full: all costs are told in its steps
            return size, steps
        a_round = statistics.median(self._steps) * self._cost(size)
        return size, min(steps, max(TRIAL, round(LONG_ENOUGH / a_round)))

    def _trial(self) -> int:
        """What goes on, or another size, if it is time to try one."""
        if not self._steps:  # nothing to compare with
            return self._best
        at = SIZES.index(self._best)
        due = [size for size in SIZES[max(0, at - 1) : at + 2] if self._due[size] <= 0]
        return max((size for size in due if size != self._best), default=self._best)

    def measure(self, size: int, rounds: int, tokens: float, seconds: float) -> None:
        """A dispatch of so many rounds of this size took so long for so many tokens of each row."""
        self._due = {size: due - tokens for size, due in self._due.items()}
        compiled = size in self._begun
        self._begun.add(size)
        telling = rounds > 1 or seconds >= LONG_ENOUGH
        if not compiled or not telling or not tokens:
            return
        best, speed = self._best, self._speed(self._best)
        if size == 1:
            if best > 1:
                self._steps.clear()  # what was measured long ago
            self._steps.append(seconds / rounds)
        elif self._steps:
            self._costs[size].append(seconds / rounds / statistics.median(self._steps))
            brought = tokens / rounds
            share = rounds / (rounds + 2)
            self._tokens[size] = share * brought + (1 - share) * self._tokens.get(size, brought)
        self._best = max(self._tokens, key=self._speed)
        if self._best != best:
            self._due = dict.fromkeys(SIZES, SHORTEST_WAIT)
        elif size != best:  # a trial that lost
            lost = self._cost(size) * rounds * speed - tokens
            self._due[size] = min(max(SPARED * lost, SHORTEST_WAIT), LONGEST_WAIT)

    def _cost(self, size: int) -> float:
        """Of a round, in steps."""
        return statistics.median(self._costs[size])

    def _speed(self, size: int) -> float:
        """Tokens for the time of a step."""
        return self._tokens[size] / self._cost(size)
