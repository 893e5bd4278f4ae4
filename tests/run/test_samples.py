"""What a run keeps of its vocabulary, and writes with it as it learns."""

import json
import re

import numpy as np
import pytest

from tests.vocabularies import make_vocabularies
from transformer_vq import ModelConfig, TrainConfig, init_model
from transformer_vq.data import Source, bundled_corpus, load_tokenizer, run_tokenizer
from transformer_vq.run import loop
from transformer_vq.run.folder import DataSource, RunInfo
from transformer_vq.run.samples import open_samples


@pytest.mark.slow
def test_train_replaces_the_vocabulary_of_an_earlier_start(tmp_path, one_device):
    """In a folder without checkpoints."""
    config = ModelConfig(d_model=16, d_k=8, num_layers=1, codebook_size=8, window_len=8)
    train = TrainConfig(batch_size=8, sequence_len=16, steps=1, evaluate_every=0)
    text = bundled_corpus().read_bytes()[:30_000].decode(errors="ignore")
    vocabulary = load_tokenizer(make_vocabularies(tmp_path, text) / "bpe.json")
    tokens = np.zeros(50, np.uint8)
    (out := tmp_path / "run").mkdir()
    vocabulary.save(out)
    assert run_tokenizer(out).name == vocabulary.name  # control
    loop.train(config, train, tokens, None, out)
    assert run_tokenizer(out).name == "bytes"


@pytest.mark.slow
def test_samples_of_a_run_are_of_its_vocabulary(tmp_path):
    """The same in training, as long as the tokens are those of the vocabulary."""
    config = ModelConfig(
        vocab_size=4096, d_model=16, d_k=8, num_layers=1, codebook_size=8, window_len=8
    )
    train = TrainConfig(batch_size=1, sequence_len=16, sample_tokens=40)
    model, texts = init_model(config, 0), {}
    for name, top in (("bytes", 255), ("others", 4000)):
        validation = Source.of(np.linspace(0, top, 30).astype(np.int32))
        info = RunInfo(config, train, DataSource.of("", validation))
        folder = tmp_path / name
        folder.mkdir()
        with open_samples(folder, info, validation, lambda tokens: f"{tokens}") as samples:
            samples.write(1, model, lambda: None)
        record = json.loads((folder / "samples.jsonl").read_text())
        texts[name] = [int(token) for token in re.findall(r"\d+", record["text"])]
    assert len(texts["bytes"]) >= 40 and max(texts["bytes"]) < 256
    assert max(texts["others"]) >= 256  # control
