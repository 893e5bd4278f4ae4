"""What the tests of clients need of the project itself: run by its own Python, from its root.

python -m tests.clients.project make FOLDER     two untrained models, of bytes and of a vocabulary
python -m tests.clients.project score RUN       pairs of texts on standard input, as JSON: the log-
                                                probabilities of the second of each, as `score` has
                                                them, and whether greedy choices would write it
"""

import json
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from tests.helpers import make_run
from transformer_vq import extend, init_state, load, score
from transformer_vq.data import bundled_corpus, load_tokenizer, open_source, train_tokenizer


def make(folder: Path) -> None:
    moderate = dict(logit_scale=0.03)  # or perplexities are beyond all floats
    make_run(folder / "bytes", **moderate)
    (folder / "book.txt").write_bytes(bundled_corpus().read_bytes()[:30_000])
    vocabulary = folder / "vocabulary.json"
    train_tokenizer(open_source([folder / "book.txt"]), vocabulary, 400)
    make_run(folder / "bpe", load_tokenizer(vocabulary), **moderate)


def score_pairs(run: str, pairs: list[list[str]]) -> list[tuple[list[float], bool]]:
    model, tokenizer = load(run)
    texts, starts = [], []
    for whole, after in pairs:
        context = whole.rstrip()  # as harnesses do: spaces belong to what follows them
        text = whole[len(context) :] + after
        tokens, start = tokenizer.encode(context + text), len(tokenizer.encode(context))
        if not start:  # then harnesses put the token before it that ends documents
            tokens, start = [tokenizer.eos_id, *tokens], 1
        texts.append(tokens)
        starts.append(start)
    padded = np.zeros((len(texts), max(map(len, texts))), np.int32)
    for row, tokens in zip(padded, texts, strict=True):
        row[: len(tokens)] = tokens
    logits, _ = extend(model, init_state(model.config, len(texts)), jnp.array(padded))
    greedy = np.asarray(logits).argmax(-1)
    found = []
    for row, tokens, start, scores in zip(greedy, texts, starts, score(model, texts), strict=True):
        same = row[start - 1 : len(tokens) - 1].tolist() == tokens[start:]
        found.append((scores[start:], same))
    return found


if __name__ == "__main__":
    command, argument = sys.argv[1:]
    if command == "make":
        make(Path(argument))
    else:
        print(json.dumps(score_pairs(argument, json.load(sys.stdin))))
