"""samples.jsonl: what a model writes as it learns, the same prompt and seed at every validation."""

import contextlib
from collections.abc import Callable, Generator, Sequence
from pathlib import Path

import jax
import numpy as np

from transformer_vq.data import Source
from transformer_vq.engine.batch import NoProbabilities, stream
from transformer_vq.engine.request import SamplingParams
from transformer_vq.nn.model import Model
from transformer_vq.run.folder import RunInfo
from transformer_vq.run.log import JsonLines

PROMPT_TOKENS = 16  # from the beginning of the validation data
TOP_P = 0.9


class SampleLog:
    """samples.jsonl of a run folder, open for more; lines of a lost future go, as in metrics."""

    def __init__(
        self,
        path: Path,
        step: int,
        validation: np.ndarray,
        max_tokens: int,
        banned: Sequence[int],
        decode: Callable[[Sequence[int]], str],
    ):
        self._lines = JsonLines(path, step)
        self.notes = self._lines.notes
        self._prompt = [int(token) for token in validation[:PROMPT_TOKENS]]
        self._params = SamplingParams(max_tokens=max_tokens, top_p=TOP_P, banned_tokens=banned)
        self._decode = decode

    def write(self, step: int, model: Model, check: Callable[[], None]) -> None:
        """Sample and add a line. What `check`, called for every token, raises ends it before."""
        leaves = jax.tree.leaves(model)
        if all(leaf.is_fully_replicated for leaf in leaves):  # then one device is enough
            model = jax.tree.map(lambda leaf: leaf.addressable_data(0), model)
        tokens = []
        with contextlib.suppress(NoProbabilities):  # a model that has diverged writes no more
            for token in stream(model, [self._prompt], self._params):
                check()
                tokens.append(int(token))
        prompt, whole = self._decode(self._prompt), self._decode([*self._prompt, *tokens])
        # What is decoded on its own may lose the space before its first word.
        self._lines.write({"step": step, "prompt": prompt, "text": whole[len(prompt) :]})

    def close(self) -> None:
        self._lines.close()


@contextlib.contextmanager
def open_samples(
    folder: Path,
    info: RunInfo,
    validation: Source | None,
    decode: Callable[[Sequence[int]], str] | None,
) -> Generator[SampleLog | None]:
    """samples.jsonl while it is open; None where no samples are kept."""
    length = info.train.sample_tokens
    if not length or validation is None or decode is None or jax.process_count() > 1:
        yield None
        return
    path, tokens = folder / "samples.jsonl", validation.tokens
    # What the vocabulary has no tokens for is not drawn, if it is the vocabulary of these tokens.
    size = validation.tokenizer.vocab_size
    banned = range(size, info.config.vocab_size) if tokens.max() < size else ()
    with contextlib.closing(SampleLog(path, info.step, tokens, length, banned, decode)) as samples:
        yield samples
