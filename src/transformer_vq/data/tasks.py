"""Made-up texts whose end only those can know who remember their beginning.

A task is named like data, `recall:pairs=6,filler=32` (`tvq train --data recall:...`). It gives
episodes, each a document of its own, in letters that people can read:

    recall   EvKaBz 0271...8 KaBzEv       keys with values, filler, then each key with its value
    updates  EvKaEbKc 0271...4 KcEb       keys are written several times: the last value counts
    copy     qmzhw 0271...8 = qmzhw       letters, each once, filler, the letters again
    passkey  English, with `The pass key is 582130.` in it, and asked for at the end
    reading  English, of which a passage comes again and again, with other text in between

(without the spaces). Only the answers count, in the loss and in the accuracy: nothing else can be
foretold. Of reading all counts: what comes for the first time is text like any other.

After the multi-query associative recall of Arora et al. (2023, arXiv 2312.04927) and the passkey of
Mohtashami and Jaggi (2023, arXiv 2305.16300).
"""

import math
import os
import re
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from transformer_vq.data.compressed import load_bytes
from transformer_vq.data.source import Source, Span
from transformer_vq.data.text import bundled_corpus, split
from transformer_vq.data.tokenizer import ByteTokenizer
from transformer_vq.errors import ConfigError, UserError, shown
from transformer_vq.fields import MOST_SEED, check, choice, limits, whole

Kind = Literal["far", "updates", "copy", "passkey", "reading"]

KEYS = np.frombuffer(b"ABCDEFGHIJKLMNOPQRSTUVWXYZ", np.uint8)
VALUES = np.frombuffer(b"abcdefghijklmnopqrstuvwxyz", np.uint8)
DIGITS = np.frombuffer(b"0123456789", np.uint8)
TOLD, QUESTION = b" The pass key is ", b" What is the pass key? The pass key is "
NEAREST = 300  # bytes of text, at least, between a pass key and the question

AUTO = -1  # left out; `--data` has no such number
USUAL_EPISODES, USUAL_BYTES, MOST_BYTES = 100_000, 2**26, 2**30
MOST_TEXT = 50_000  # bytes of text at a time: a held-out split has a few more
USUAL_FILLER, USUAL_PAIRS = {"passkey": 1800, "reading": 200}, {"reading": 100}  # else 32 and 6
SHORTEST = 8  # bytes of a passage
# What a task is called in `--data` (of kind far: recall), and the fields that mean something there.
_FIELDS = {
    "recall": ("pairs", "letters", "filler", "nearest", "episodes", "seed"),
    "updates": ("pairs", "writes", "letters", "filler", "nearest", "episodes", "seed"),
    "copy": ("pairs", "letters", "filler", "nearest", "episodes", "seed"),
    "passkey": ("pairs", "filler", "nearest", "episodes", "seed"),
    "reading": ("pairs", "filler", "episodes", "seed"),
}


@dataclass(frozen=True)
class Task:
    """A task and its sizes. The same fields give the same episodes, with every version of NumPy.

    Raises `ConfigError`, naming the field, the value and the limit, if a value makes no sense.
    """

    kind: Kind = choice("far", "which task; far is called recall: in --data")
    pairs: int = whole(AUTO, "keys to remember with their values; letters of copy, digits of "
                       "passkey, bytes of the longest passage of reading", low=1, high=1024,
                       also={AUTO: "6, of reading 100"})  # fmt: skip
    letters: int = whole(16, "how many there are to choose from, as keys and as values",
                         low=2, high=26)  # fmt: skip
    filler: int = whole(AUTO, "bytes between what is told and what is asked; of passkey, text "
                        "around the key", high=2**24,
                        also={AUTO: "32, of passkey 1,800, of reading 200"})  # fmt: skip
    writes: int = whole(2, "of updates: how often each key is written", low=1, high=64)
    episodes: int = whole(AUTO, "of which a tenth is held out", low=20, high=2**24,
                          also={AUTO: "100,000, or what 64 MiB hold"})  # fmt: skip
    seed: int = whole(0, "of the random numbers", high=MOST_SEED)
    nearest: int = whole(AUTO, "bytes of the filler, at least, between what is told and what is "
                         "asked, each as likely; the rest comes before what is told", high=2**24,
                         also={AUTO: "all of it, of passkey 300"})  # fmt: skip

    def __post_init__(self) -> None:
        check(self)
        if self.pairs == AUTO:
            object.__setattr__(self, "pairs", USUAL_PAIRS.get(self.kind, 6))
        if self.kind not in ("passkey", "reading") and self.pairs > self.letters:
            raise ConfigError(
                f"pairs is {self.pairs}, and there are {self.letters} letters to choose from, each "
                f"once: lower pairs, or raise letters (at most {len(KEYS)})",
                "pairs",
            )
        if self.filler == AUTO:
            object.__setattr__(self, "filler", USUAL_FILLER.get(self.kind, 32))
        if self.kind in USUAL_FILLER and self.filler > MOST_TEXT:
            raise ConfigError(
                f"filler is {self.filler:,}: of {self.kind} it must be at most {MOST_TEXT:,}, "
                f"because it is text",
                "filler",
            )
        if self.nearest > self.filler:
            raise ConfigError(
                f"nearest is {self.nearest:,}, and filler {self.filler:,}: it is a part of the "
                f"filler, so it must be at most that",
                "nearest",
            )
        if self.episodes == AUTO:
            fit = max(USUAL_BYTES // self.length, 20)
            object.__setattr__(self, "episodes", min(USUAL_EPISODES, fit))
        if (size := self.episodes * self.length) > MOST_BYTES:
            raise ConfigError(
                f"episodes is {self.episodes:,}, of {self.length:,} bytes each: that is "
                f"{size / 2**30:.1f} GiB, and 1 GiB is the most",
                "episodes",
            )

    @classmethod
    def named(cls, text: str) -> "Task":
        """The task that `NAME:FIELD=VALUE,...` names, as `recall:pairs=6` does.

        Raises `UserError`, with the fields and their limits, for anything else.
        """
        name, _, rest = text.partition(":")
        name = "recall" if name == "far" else name
        if name not in _FIELDS:
            raise UserError(
                f"there is no file {shown(text)}, and {shown(name)} is no task: "
                f"the tasks are {', '.join(_FIELDS)}"
            )
        bounds = limits(cls)
        if name in USUAL_FILLER:
            bounds["filler"] = f"0 to {MOST_TEXT:,}"
        else:  # each letter once
            bounds["pairs"] = f"1 to {len(KEYS)}"
        fields = ", ".join(f"{field} ({bounds[field]})" for field in _FIELDS[name])
        values = {}
        for part in filter(None, rest.split(",")):
            field, _, value = part.partition("=")
            number = value.isascii() and value.isdecimal() and len(value) < 20
            if field not in _FIELDS[name] or field in values or not number:
                raise UserError(
                    f"{shown(text)} has {shown(part)}: give FIELD=NUMBER, once for each of the "
                    f"fields of {name}, {fields}"
                )
            values[field] = int(value)
        try:
            kind: Any = "far" if name == "recall" else name
            return cls(kind, **values)
        except ConfigError as error:
            said = re.sub(r", or -1 \([^)]*\)", "", str(error))  # which is how it is left out
            raise UserError(f"in {shown(text)}, {said} (the fields are {fields})") from None

    def __str__(self) -> str:
        """The name that `named` reads, with every field that is not left out."""
        name = "recall" if self.kind == "far" else self.kind
        fields = {field: getattr(self, field) for field in _FIELDS[name]}
        return f"{name}:" + ",".join(f"{field}={x}" for field, x in fields.items() if x != AUTO)

    @property
    def length(self) -> int:
        """Bytes of an episode, without the token that it begins with."""
        if self.kind == "copy":
            return 2 * self.pairs + self.filler + 1
        if self.kind == "passkey":
            return len(TOLD) + 2 + len(QUESTION) + 2 * self.pairs + self.filler
        if self.kind == "reading":
            return 2 * self.pairs + self.filler
        writes = self.writes if self.kind == "updates" else 1
        return 2 * self.pairs * (writes + 1) + self.filler

    @property
    def least_between(self) -> int:
        """Bytes of filler between what is told and what is asked, at least."""
        if self.nearest != AUTO:
            return self.nearest
        return min(NEAREST, self.filler) if self.kind == "passkey" else self.filler

    def source(self) -> Source:
        """The episodes, 90 % to train on, 5 % for validation, 5 % to test, and what counts."""
        eos = ByteTokenizer().eos_id
        tokens, spans, first = [], {}, 0
        for number, name in enumerate(("train", "validation", "test")):
            last = math.ceil(self.episodes * (0.9, 0.95, 1.0)[number])
            made = _MAKERS[self.kind](self, _Draws(self.seed, number), last - first, name)
            tokens.append(np.pad(made, ((0, 0), (1, 0)), constant_values=eos))
            size = self.length + 1
            spans[name] = Span(first * size, last * size, (last - first) * self.length)
            first = last
        return Source(
            tokens=np.concatenate(tokens).ravel(),
            starts=np.arange(self.episodes, dtype=np.int64) * (self.length + 1),
            num_bytes=self.episodes * self.length,
            path=str(self),
            spans=spans,
            whole_documents=True,
            counted=np.tile(self._answers(), self.episodes),
        )

    def _answers(self) -> np.ndarray:
        """Which tokens of an episode count, bool `[1 + length]`."""
        answers = np.zeros(1 + self.length, bool)
        if self.kind == "reading":
            answers[1:] = True
        elif self.kind in ("copy", "passkey"):
            answers[-self.pairs :] = True
        else:  # every other one: key, value, key, value
            answers[-2 * self.pairs + 1 :: 2] = True
        return answers


def is_task(path: str | os.PathLike) -> bool:
    """Whether a path of `--data` names a task, or is meant to. A file of such a name is
    `./recall:x`."""
    name, colon, rest = os.fspath(path).partition(":")
    meant = re.fullmatch(r"[a-z]+", name) and re.match(r"[a-z]+=", rest)
    return bool(colon) and (name in _FIELDS or bool(meant and not os.path.exists(path)))


class _Draws:
    """Random numbers by seed and split, from raw bits: those do not change with NumPy."""

    def __init__(self, seed: int, part: int):
        self._bits = np.random.PCG64(np.random.SeedSequence((seed, part)))

    def _raw(self, *shape: int) -> np.ndarray:
        return np.asarray(self._bits.random_raw(math.prod(shape)), np.uint64).reshape(shape)

    def below(self, limit: int | np.ndarray, *shape: int) -> np.ndarray:
        """Whole numbers from 0 to `limit` - 1, int64 of this shape; each may have its limit."""
        return (self._raw(*shape) % np.asarray(limit, np.uint64)).astype(np.int64)

    def order(self, rows: int, size: int) -> np.ndarray:
        """A permutation of 0 to `size` - 1 in each row, int64 `[rows, size]`."""
        return np.argsort(self._raw(rows, size), axis=1, kind="stable")


# Makers of episodes: uint8 [count, length], without the token that each begins with.


def _pairs(task: Task, draws: _Draws, count: int, split_name: str) -> np.ndarray:
    """Keys and values, filler, and the keys again in another order, each with its last value."""
    writes = task.pairs * (task.writes if task.kind == "updates" else 1)
    keys = draws.order(count, task.letters)[:, : task.pairs]
    which = (
        draws.order(count, writes) % task.pairs
    )  # the key that each write is to, [count, writes]
    values = draws.below(task.letters, count, writes)
    latest = [writes - 1 - np.argmax(which[:, ::-1] == i, axis=1) for i in range(task.pairs)]
    true = np.take_along_axis(values, np.stack(latest, axis=1), axis=1)
    asked = draws.order(count, task.pairs)
    told = _interleaved(np.take_along_axis(keys, which, axis=1), values)
    answered = _interleaved(*(np.take_along_axis(x, asked, axis=1) for x in (keys, true)))
    return np.concatenate([_amid_filler(task, draws, told), answered], axis=1)


def _interleaved(keys: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Key, value, key, value, ... as letters, `[count, 2 n]`."""
    return np.stack([KEYS[keys], VALUES[values]], axis=2).reshape(len(keys), -1)


def _amid_filler(task: Task, draws: _Draws, told: np.ndarray) -> np.ndarray:
    """What is told, with filler behind it, and before it what is left: `[count, told + filler]`."""
    count, size = told.shape
    filler = DIGITS[draws.below(len(DIGITS), count, task.filler)]
    before = (task.filler - _between(task, draws, count))[:, None]
    place = np.arange(size + task.filler)
    order = np.where(
        place < before, size + place, np.where(place < before + size, place - before, place)
    )
    return np.take_along_axis(np.concatenate([told, filler], axis=1), order, axis=1)


def _between(task: Task, draws: _Draws, count: int) -> np.ndarray:
    """How much of each episode's filler lies between what is told and what is asked."""
    least = task.least_between
    if least == task.filler:  # nothing to draw
        return np.full(count, least)
    return least + draws.below(task.filler - least + 1, count)


def _copy(task: Task, draws: _Draws, count: int, split_name: str) -> np.ndarray:
    letters = VALUES[draws.order(count, task.letters)[:, : task.pairs]]
    sign = np.full((count, 1), ord("="), np.uint8)
    return np.concatenate([_amid_filler(task, draws, letters), sign, letters], axis=1)


def _passkey(task: Task, draws: _Draws, count: int, split_name: str) -> np.ndarray:
    """Text of the split, `filler` bytes, in which the key comes `least_between` bytes before its
    end, or earlier."""
    text = split(load_bytes(bundled_corpus()), split_name)
    numbers = DIGITS[draws.below(len(DIGITS), count, task.pairs)]
    starts = draws.below(len(text) - task.filler, count)
    after = _between(task, draws, count)
    told, stop, question = (np.frombuffer(part, np.uint8) for part in (TOLD, b". ", QUESTION))
    made = np.empty((count, task.length), np.uint8)
    for row, number, start, behind in zip(made, numbers, starts, after, strict=True):
        piece = text[start : start + task.filler]
        at = task.filler - behind
        parts = (piece[:at], told, number, stop, piece[at:], question, number)
        np.concatenate(parts, out=row)
    return made


def _reading(task: Task, draws: _Draws, count: int, split_name: str) -> np.ndarray:
    """A passage of the split, other text of it, the passage, how the other text goes on, and so on.

    Short passages come more often than long ones, with less in between, and so more times: a model
    that has learned nothing yet learns to copy from those (docs/log.md).
    """
    text = split(load_bytes(bundled_corpus()), split_name)
    passages = draws.below(len(text) - task.pairs + 1, count)
    fillers = draws.below(len(text) - task.length + 1, count)
    least = min(SHORTEST, task.pairs)
    sizes = least + draws.below(1 + draws.below(task.pairs - least + 1, count), count)
    gaps = draws.below(1 + task.filler * sizes // task.pairs, count)
    made, place = np.empty((count, task.length), np.uint8), np.arange(task.length)
    for row, passage, size, filler, gap in zip(made, passages, sizes, fillers, gaps, strict=True):
        turn, at = np.divmod(place, size + gap)
        row[:] = text[np.where(at < size, passage + at, filler + turn * gap + at - size)]
    return made


_MAKERS = {
    "far": _pairs,
    "updates": _pairs,
    "copy": _copy,
    "passkey": _passkey,
    "reading": _reading,
}
