"""Charts as SVG text that takes its colours from the page's style sheet, so that it can be dark.

Standard library only. A chart is a `<figure>`: title, readout, legend, `<svg>`. The classes `c1`
and `c2` are the colours of series, which also differ in weight or marks. Points of a chart are in
its attribute `data-points`, for a script that reads out the nearest.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape

WIDTH, HEIGHT = 460, 250
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 10, 40
BUCKETS = 200  # a line has at most two points in each
HEAT_COLUMNS = 60

Points = Sequence[tuple[float, float]]  # (x, y), ordered by x


@dataclass(frozen=True)
class Series:
    """A line of a chart."""

    label: str
    points: Points
    color: str = "c1"
    dots: bool = False  # marks at the points: for few of them
    errors: Sequence[float] = ()  # standard errors of the points: bars of two of them either way

    def spread(self) -> list[tuple[float, float]]:
        """The values with their errors; none if there are none."""
        return [(y, e) for (_, y), e in zip(self.points, self.errors, strict=False)]


def line_chart(
    title: str,
    series: Sequence[Series],
    *,
    x_label: str,
    log_x: bool = False,
    cut: bool = False,
    from_zero: bool = False,
) -> str:
    """Lines over x; empty text if there is no point.

    `log_x` leaves out x <= 0. `cut`: a few values far above the others may leave the frame.
    """
    thinned = [replace(s, points=_thin(s.points, log_x)) for s in series]
    shown = [s for s in thinned if s.points]
    xs = [x for s in shown for x, _ in s.points]
    ys = [y for s in shown for _, y in s.points]
    ys += [y + side * 2 * e for s in shown for y, e in s.spread() for side in (-1, 1)]
    if not xs:
        return ""
    low, high = (min(0.0, *ys), max(0.0, *ys)) if from_zero else (min(ys), max(ys))
    if cut and len(ys) > 20:
        high = max(
            sorted(ys)[int(0.98 * len(ys))],
            *(y for s in shown if s.dots for _, y in s.points[1:]),
            low,
        )
    margin = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    low = low if from_zero and low == 0 else low - margin
    high = high + margin
    x_axis = _Axis(min(xs), max(xs), LEFT, WIDTH - RIGHT, log=log_x)
    y_axis = _Axis(low, high, HEIGHT - BOTTOM, TOP)

    parts = []
    for value in y_axis.ticks(5):
        y = y_axis(value)
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(_text(LEFT - 6, y + 4, compact(value), "end"))
    for value in x_axis.ticks(6):
        parts.append(_text(x_axis(value), HEIGHT - BOTTOM + 16, compact(value), "middle"))
    zero = y_axis(0.0) if from_zero else HEIGHT - BOTTOM
    parts.append(f'<path class="axis" d="M{LEFT} {zero:.1f}H{WIDTH - RIGHT}"/>')
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, x_label, "middle", "label"))
    places = []
    for s in shown:
        at = [(x_axis(x), max(y_axis(y), TOP - 20)) for x, y in s.points]
        line = "L".join(f"{x:.1f} {y:.1f}" for x, y in at)
        for (x, _), (y, error) in zip(at, s.spread(), strict=False):
            ends = [y_axis(y + side * 2 * error) for side in (-1, 1)]
            parts.append(f'<path class="bar {s.color}" d="M{x:.1f} {ends[0]:.1f}V{ends[1]:.1f}"/>')
        parts.append(f'<path class="line {s.color}{" marked" if s.dots else ""}" d="M{line}"/>')
        if s.dots:
            parts += [
                f'<circle class="{s.color}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>'
                for x, y in at
                if y >= TOP
            ]
        texts = [(compact(x), f"{y:.4g}") for x, y in s.points]
        places.append(
            [s.label, [[round(x, 1), *text] for (x, _), text in zip(at, texts, strict=True)]]
        )
    parts.append(f'<path class="cursor" d="M0 {TOP}V{HEIGHT - BOTTOM}"/>')
    summary = ", ".join(f"{s.label}: {s.points[0][1]:.4g} to {s.points[-1][1]:.4g}" for s in shown)
    frame = f'viewBox="0 {TOP - 4} {WIDTH} {HEIGHT - TOP + 4}"'
    legend = "".join(
        f'<span class="{s.color}{" marked" if s.dots else ""}">{escape(s.label)}</span>'
        for s in shown
    )
    return (
        f'<figure class="chart"><figcaption>{escape(title)}</figcaption>'
        f'<p class="legend">{legend if len(shown) > 1 else ""}<output></output></p>'
        f'<svg {frame} role="img" aria-label="{escape(f"{title}. {summary}")}" '
        f'data-x="{escape(x_label)}" data-points="{escape(json.dumps(places))}">'
        f"{''.join(parts)}</svg></figure>"
    )


def heat_map(
    title: str,
    columns: Sequence[tuple[float, Sequence[float]]],
    *,
    x_label: str,
    row_label: str,
    top: float = 0.0,
) -> str:
    """Values of many rows over x, as shades: `columns` are (x, a value for each row).

    `top`: the value of the darkest shade; the largest by default. Empty text without columns.
    """
    if not columns:
        return ""
    rows = len(columns[0][1])
    columns = _averaged([c for c in columns if len(c[1]) == rows])
    top = top or max(max(values) for _, values in columns) or 1.0
    height = max(6.0, min(32.0, 190 / rows))
    width = (WIDTH - LEFT - RIGHT) / len(columns)
    parts = []
    for row in range(rows):
        y = TOP + row * height
        cells = "".join(
            f'<rect x="{LEFT + i * width:.1f}" y="{y:.1f}" '
            f'width="{width:.2f}" height="{height - 0.5:.1f}" '
            f'fill-opacity="{0.04 + 0.96 * min(values[row] / top, 1):.2f}"/>'
            for i, (_, values) in enumerate(columns)
        )
        now = columns[-1][1][row]
        parts.append(
            f'<g class="heat"><title>{escape(row_label)} {row}: {now:.3g} now</title>{cells}</g>'
        )
        if row % max(1, round(14 / height)) == 0:
            parts.append(_text(LEFT - 6, y + height / 2 + 4, str(row), "end"))
    bottom = TOP + rows * height
    for i in sorted({0, len(columns) // 2, len(columns) - 1}):
        anchor = "start" if i == 0 else "end" if i == len(columns) - 1 else "middle"
        at = LEFT + (i + {"start": 0, "middle": 0.5, "end": 1}[anchor]) * width
        parts.append(_text(at, bottom + 16, compact(columns[i][0]), anchor))
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, bottom + 34, x_label, "middle", "label"))
    scale = "".join(f'<i style="opacity:{0.04 + 0.96 * i / 4:.2f}"></i>' for i in range(5))
    now = columns[-1][1]
    summary = f"now {min(now):.3g} to {max(now):.3g} in {rows} rows"
    return (
        f'<figure class="chart"><figcaption>{escape(title)}</figcaption>'
        f'<p class="legend">0 <span class="scale">{scale}</span> {top:.3g}</p>'
        f'<svg viewBox="0 {TOP - 4} {WIDTH} {bottom + 40 - TOP:.0f}" role="img" '
        f'aria-label="{escape(f"{title}. {summary}")}">{"".join(parts)}</svg></figure>'
    )


def compact(value: float) -> str:
    """A number as an axis shows it: `1.5k`, `2M`, `0.001`."""
    for power, name in ((9, "G"), (6, "M"), (3, "k")):
        if abs(value) >= 10**power:
            return f"{value / 10**power:.4g}{name}"
    return f"{value:.4g}"


class _Axis:
    """From values to places, linear or logarithmic."""

    def __init__(self, low: float, high: float, start: float, end: float, *, log: bool = False):
        self.log = log
        self.low, self.high = low, high if high > low else low + 1.0
        self.start, self.end = start, end

    def __call__(self, value: float) -> float:
        scale = math.log if self.log else float
        low, high = scale(self.low), scale(self.high)
        return self.start + (self.end - self.start) * (scale(value) - low) / (high - low)

    def ticks(self, count: int) -> list[float]:
        """About `count` round values in the range; powers of ten where it is logarithmic."""
        if self.log:
            first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
            factors = (1, 2, 5) if last - first <= 3 else (1,)
            values = [
                factor * 10.0**power for power in range(first, last + 1) for factor in factors
            ]
        else:
            raw = (self.high - self.low) / count
            power = 10.0 ** math.floor(math.log10(raw))
            step = next(f * power for f in (1, 2, 5, 10) if f * power >= raw * 0.999)
            values = [
                i * step
                for i in range(math.ceil(self.low / step), math.floor(self.high / step) + 1)
            ]
        return [value for value in values if self.low <= value <= self.high]


def _text(x: float, y: float, text: str, anchor: str, kind: str = "tick") -> str:
    return (
        f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
    )


def _thin(points: Points, log_x: bool) -> Points:
    """The lowest and the highest point of each stretch of x, so that no spike is lost."""
    if log_x:
        points = [point for point in points if point[0] > 0]
    if len(points) <= 2 * BUCKETS:
        return points
    scale = math.log if log_x else float
    low, high = scale(points[0][0]), scale(points[-1][0])
    buckets: dict[int, list[tuple[float, float]]] = {}
    for point in points:
        place = (scale(point[0]) - low) / ((high - low) or 1.0)
        buckets.setdefault(min(int(place * BUCKETS), BUCKETS - 1), []).append(point)
    ends = ({min(b, key=lambda p: p[1]), max(b, key=lambda p: p[1])} for b in buckets.values())
    return [point for pair in ends for point in sorted(pair)]


def _averaged(columns: Sequence[tuple[float, Sequence[float]]]) -> list[tuple[float, list[float]]]:
    """At most `HEAT_COLUMNS` columns, each the mean of neighbours, at the last x of them."""
    size = -(-len(columns) // HEAT_COLUMNS)
    groups = [columns[i : i + size] for i in range(0, len(columns), size)]
    return [
        (
            group[-1][0],
            [sum(row) / len(group) for row in zip(*(values for _, values in group), strict=True)],
        )
        for group in groups
    ]
