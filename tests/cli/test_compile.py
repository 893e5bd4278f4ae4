"""`tvq bench compile`: wrong options, and what it prints of a program."""

import pytest

from transformer_vq.cli import main
from transformer_vq.cli.compile import _line

SMALL = [
    "--config.d-model", "16", "--config.d-k", "8", "--config.num-layers", "1",
    "--config.window-len", "8", "--config.block-len", "8", "--config.codebook-size", "8",
]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "--topology is missing"),
        (["--topology", "cuda", "--batch", "0"], "--batch is 0"),
        (["--topology", "cuda", "--programs", "fly"], "one of decode, sample, prefill, train"),
        (["--topology", "cuda", "--mesh.fsdp", "0"], "--mesh.fsdp is 0"),
        (["--topology", "cuda", "--train.update-len", "7"], "--train.sequence-len is 1024, not a"),
        (["--topology", "cuda:3", *SMALL, "--programs", "train"], "--train.batch-size is 8: it m"),
    ],
)
def test_wrong_options(arguments, sentence, capsys):
    assert main(["bench", "compile", "--preset", "tiny", *arguments]) in (1, 2)
    assert sentence in capsys.readouterr().err


def test_a_program_that_is_lowered(capsys):
    command = ["bench", "compile", "--topology", "cuda:2", "--preset", "tiny", *SMALL]
    assert main([*command, "--programs", "sample", "--batch", "3"]) == 0
    head, target, line = capsys.readouterr().out.splitlines()
    assert head.startswith("tiny: ") and ", float32; jax " in head
    assert target == "cuda:2: 2 x GPU; mesh data 2, fsdp 1, tensor 1"
    assert line.startswith("  sample  3 rows a device: lowered in ")
    assert line.endswith(" operations; not compiled")


def test_a_program_that_is_compiled():
    memory = {"total": 3_000, "arguments": 2_000, "temporaries": 1_000}
    copies = {"least_bytes": 4_000, "copies": 1, "returns": 2, "reads": 5, "largest": 4_000}
    record = {
        "program": "decode", "rows": 8, "compile_seconds": 1.25, "memory": memory,
        "collectives": {"all-reduce": {"bytes": 7_000, "times": 24}}, "flops": 9_000,
        "xla_flops": None, "copies": copies,
    }  # fmt: skip
    first, *rest = (line.strip() for line in _line(record).splitlines())
    assert first == "decode  8 rows a device: compiled in 1.2 s"
    assert rest == [
        "memory 3 kB: arguments 2 kB, temporaries 1 kB",
        "exchanged: all-reduce 7 kB in 24",
        "9 kFLOP by formula",
        "copies of 4 kB or more in a step: 3 (2 back from the chip's own memory); 5 read ahead",
    ]
    none = record | {"collectives": {}, "copies": copies | {"copies": 0, "returns": 0, "reads": 0}}
    assert "exchanged: nothing" in _line(none)
    assert _line(none).endswith("copies of 4 kB or more in a step: none")
    failed = {"program": "train", "rows": 0.5, "failed": "does not fit: all take 2 GiB"}
    assert _line(failed) == "  train   0.5 rows a device: does not fit: all take 2 GiB"
