"""The model card."""

import re

import pytest

from transformer_vq.config import ModelConfig, TrainConfig
from transformer_vq.run.folder import DataSource, RunInfo
from transformer_vq.show.card import model_card

INFO = RunInfo(
    ModelConfig(),
    TrainConfig(),
    DataSource("/home/me/book.txt", 60_000, "f00"),
    step=400,
    seconds=65,
)
RECORDS = [
    {"step": 300, "validation_loss": 2.0, "validation_bpb": 2.885},
    {"step": 400, "loss": 1.5, "bpb": 2.164},
    {"step": 400, "validation_loss": 1.6, "validation_bpb": 2.308},
]


def pictures() -> RunInfo:
    data = DataSource("digits", 784, "f00", image_shape=(28, 28, 1))
    return RunInfo(ModelConfig(), TrainConfig(), data)


def test_it_says_what_is_known():
    card = model_card("book", INFO, RECORDS, licence="cc-by-4.0")
    assert card.startswith("---\nlicense: cc-by-4.0\nlibrary_name: transformer-vq\n")
    for words in (
        "# book\n",
        "layers of width 256",
        "`book.txt`, 60,000 tokens; vocabulary: bytes.",
        "400 updates with adamw, 3.28 M tokens",
        "2.3080 bits per byte (1.6000 nats per token) on the validation split, at step 400.",
        "**Licence.** `cc-by-4.0`.",
        "    pip install 'transformer-vq[hub,serve]'\n    tvq sample --run book",
        'load("book")',
    ):
        assert words in card, words
    assert "/home/me" not in card


def test_it_says_no_more_than_is_known():
    card = model_card("book", INFO, RECORDS[1:2])
    assert "2.1640 bits per byte (1.5000 nats per token) on the batches of training" in card
    assert "license:" not in card and "**Licence.** Not stated" in card
    assert "Results" not in model_card("book", INFO, [])
    card = model_card("book", INFO, [], origin="From elsewhere.")
    assert "**Origin.** From elsewhere." in card and "**Training.**" not in card


def test_pictures_are_drawn():
    card = model_card("digits", pictures(), RECORDS)
    assert "tvq draw --run digits" in card and "bits per dimension" in card
    assert "tvq sample" not in card and "unconditional-image-generation" in card


@pytest.mark.parametrize("name", ["a b", "x'; rm -rf ~; '", "a\n---\nlicense: mit", "`](http://x)"])
def test_names_stay_names(name):
    """In the head, in Markdown and in the shell."""
    card = model_card(name, INFO, [], licence="My own: #1")
    head = card.split("---\n")[1]
    assert 'license: "My own: #1"\n' in head and "mit" not in head
    (title,) = re.findall(r"^# (.*)$", card, re.M)
    assert "](" not in title.replace("\\](", "").replace("\\]", "")
    (command,) = re.findall(r"^    tvq sample --run (.*) --prompt", card, re.M)
    assert command.startswith("'") and command.endswith("'")
