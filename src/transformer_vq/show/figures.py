"""Pictures of runs, for people to look at."""

import contextlib
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, SOFT, TRAIN, VALIDATION, TEST = "#222222", "#8a8a8a", "#9bb8d3", "#1f5a94", "#d1495b"


@contextlib.contextmanager
def _by_itself() -> Iterator[None]:
    """Meanwhile matplotlib can be imported, whatever the user's environment says to it.

    A notebook names a backend of its own to all that it starts, which matplotlib refuses where that
    is not installed; and a home folder that cannot be written to is told on the terminal.
    """
    backend = os.environ.pop("MPLBACKEND", None)
    log = logging.getLogger("matplotlib")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)
        if backend is not None:
            os.environ["MPLBACKEND"] = backend


def _figure_class() -> "type[Figure]":
    with _by_itself():
        import matplotlib.font_manager  # noqa: F401  (which looks for the home folder)
        from matplotlib.figure import Figure  # not pyplot: no windows, no global state
    return Figure


def learning_curve(
    records: Sequence[Mapping[str, Any]],
    path: Path,
    *,
    title: str = "",
    levels: Mapping[str, float] | None = None,
    test: float | None = None,
) -> None:
    """Draw bits per byte over updates as a PNG.

    `records`: of metrics.jsonl. `levels`: bits per byte to compare with, by name, as lines
    across. `test`: bits per byte at the end, on text of its own.
    """
    Figure = _figure_class()
    trained = [(r["step"], r["bpb"]) for r in records if "bpb" in r]
    scored = [(r["step"], r["validation_bpb"]) for r in records if "validation_bpb" in r]
    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    if trained:
        axes.plot(*zip(*trained, strict=True), color=TRAIN, linewidth=1.2, label="training")
    if scored:
        axes.plot(
            *zip(*scored, strict=True),
            color=VALIDATION,
            linewidth=2,
            marker="o",
            markersize=4,
            label="validation (held-out text)",
        )
    end = max([step for step, _ in trained + scored], default=1)
    if test is not None:
        label = f"test: {test:.2f}"
        axes.plot([end], [test], "*", color=TEST, markersize=13, clip_on=False, label=label)
    for name, level in (levels or {}).items():
        axes.axhline(level, color=SOFT, linewidth=1, linestyle=(0, (4, 3)))
        axes.annotate(
            f"{name}  {level:.2f}",
            (end, level),
            xytext=(0, 3),
            textcoords="offset points",
            ha="right",
            color=SOFT,
            fontsize=9,
        )
    values = [bpb for _, bpb in trained + scored] + list((levels or {}).values())
    values += [] if test is None else [test]
    if values:
        # The first steps are far above all that follows: they may leave the picture.
        top = float(np.percentile(values, 98)) if len(values) > 20 else max(values)
        top = max([top, *(levels or {}).values()])
        low = min(values)
        axes.set_ylim(low - 0.12 * (top - low), top + 0.08 * (top - low))
    axes.set_xlim(0, end * 1.02)
    axes.set_xlabel("updates")
    axes.set_ylabel("bits per byte")
    axes.set_title(title, loc="left", color=INK, fontweight="bold", fontsize=11)
    axes.grid(axis="y", color="#e8e8e8", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, loc="upper right")
    figure.savefig(path)
