"""Sources: files, folders and tables as documents; their splits, their cache, what is broken."""

import gzip
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow
import pytest
import zstandard
from pyarrow import parquet

from transformer_vq.cli import main
from transformer_vq.data import DataError, Source, fingerprint, load_bytes, open_source, split
from transformer_vq.data.prepare import cut
from transformer_vq.errors import UserError

TEXTS = ["Call me Ishmael.\n", "Some — years ago", "never mind\nhow long", "precisely " * 5]
EOS = b"\0"


def documents(source: Source) -> list[bytes]:
    """The documents as they were, without what stands between them."""
    ends = [*source.starts[1:], len(source.tokens)]
    pieces = zip(source.starts, ends, strict=True)
    texts = [source.tokens[start:end].tobytes() for start, end in pieces]
    if len(texts) > 1:
        assert all(text.startswith(EOS) for text in texts)
        texts = [text[1:] for text in texts]
    return texts


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    content = content.encode() if isinstance(content, str) else content
    if path.suffix == ".gz":
        content = gzip.compress(content)
    if path.suffix == ".zst":
        content = zstandard.compress(content)
    path.write_bytes(content)
    return path


def lines(texts: list[str], column: str = "text") -> str:
    return "".join(json.dumps({"id": i, column: text}) + "\n" for i, text in enumerate(texts))


# What a path can be


def test_a_plain_file_is_mapped_as_it_is(tmp_path):
    path = write(tmp_path, "book.txt", "It was a dark night. " * 50)
    source = open_source([path], cache=tmp_path / "cache")
    assert isinstance(source.tokens.base, np.memmap) and not (tmp_path / "cache").exists()
    assert source.fingerprint == fingerprint(load_bytes(path))
    for name in ("train", "validation", "test", "all"):
        part = source.split(name)
        np.testing.assert_array_equal(part.tokens, split(source.tokens, name))
        assert part.num_bytes == len(part.tokens) and part.bytes_per_token == 1.0
        assert part.starts.tolist() == [0]


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_compressed_files_are_what_they_hold(tmp_path, suffix):
    path = write(tmp_path, f"book.txt{suffix}", bytes(range(256)))
    assert open_source([path]).tokens.tobytes() == bytes(range(256))
    whole = path.read_bytes()
    path.write_bytes(whole * 3)  # several frames, as parallel programs write them
    assert open_source([path]).tokens.tobytes() == bytes(range(256)) * 3
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=f"cannot read .*book.txt{suffix}"):
        open_source([path])


def test_a_folder_in_sorted_order_with_all_below_it(tmp_path):
    for name, text in zip(["b.txt", "a/z.txt", "a/y.txt.gz", "c.txt.zst"], TEXTS, strict=True):
        write(tmp_path, name, text)
    write(tmp_path, ".hidden", "no")
    write(tmp_path, "a/.git/no", "no")
    source = open_source([tmp_path])
    expected = [TEXTS[i].encode() for i in (2, 1, 0, 3)]
    assert documents(source) == expected
    assert source.num_bytes == sum(map(len, expected))
    several = open_source([tmp_path / "b.txt", tmp_path / "a"])
    assert documents(several) == [TEXTS[i].encode() for i in (0, 2, 1)]
    assert several.fingerprint != source.fingerprint


@pytest.mark.parametrize("name", ["t.jsonl", "t.jsonl.gz", "t.jsonl.zst", "t.parquet"])
@pytest.mark.parametrize("column", ["text", "content"])
def test_tables(tmp_path, name, column):
    if name.endswith("parquet"):
        table = pyarrow.table({"id": list(range(4)), column: TEXTS})
        parquet.write_table(table, tmp_path / name, row_group_size=2)
    else:
        write(tmp_path, name, lines(TEXTS, column))
    source = open_source([tmp_path / name], text_column=column)
    assert documents(source) == [text.encode() for text in TEXTS]
    with pytest.raises(DataError, match=f"{name}.* 'body'.*'id', '{column}' .*--text-column"):
        open_source([tmp_path / name], text_column="body")


def test_given_splits_as_pg19_has_them(tmp_path):
    for name, texts in (("train", TEXTS[:2]), ("validation", TEXTS[2:3]), ("test", TEXTS[3:])):
        for i, text in enumerate(texts):
            write(tmp_path, f"{name}/{i}.txt", text)
    write(tmp_path, "metadata.csv", "no text")
    source = open_source([tmp_path])
    assert documents(source.split("train")) == [text.encode() for text in TEXTS[:2]]
    for name, text in (("validation", TEXTS[2]), ("test", TEXTS[3])):
        part = source.split(name)
        assert part.starts.tolist() == [0]
        assert part.tokens.tobytes() == EOS + text.encode() and part.num_bytes == len(text.encode())
    assert "metadata.csv" in source.notes[0]
    write(tmp_path, "more.txt", "more")
    with pytest.raises(DataError, match=r"more.txt belongs to no split"):
        open_source([tmp_path, tmp_path / "more.txt"])


def test_splits_are_cut_in_the_text_before_there_are_tokens():
    enwik8 = cut({"": 100_000_000})
    assert enwik8["train"] == (0, 90_000_000) and enwik8["test"] == (95_000_000, 100_000_000)
    assert cut({"train": 95, "test": 10}) == {
        "train": (0, 90),
        "validation": (90, 95),
        "test": (95, 105),
    }
    assert cut({"train": 95, "validation": 5}) == {"train": (0, 95), "validation": (95, 100)}


def test_a_missing_split_is_named(tmp_path):
    for name in ("train", "validation"):
        write(tmp_path, f"{name}/a.txt", "text " * 9)
    with pytest.raises(DataError, match="has no test split: it has train, validation, and all"):
        open_source([tmp_path]).split("test")


def test_many_documents_cut_within_one(tmp_path):
    """Every byte is in one split, and the rest of a document that is cut is a document."""
    texts = ["x" * n for n in (300, 500, 180, 20)]
    source = open_source([write(tmp_path, "t.jsonl", lines(texts))])
    parts = [source.split(name) for name in ("train", "validation", "test")]
    assert [part.num_bytes for part in parts] == [900, 50, 50]
    assert documents(source) == [text.encode() for text in texts]
    assert [part.starts.tolist() for part in parts] == [[0, 301, 802], [0], [0, 30]]
    assert parts[1].tokens.tobytes() == b"x" * 50  # within a document: no separator
    assert parts[2].tokens.tobytes() == b"x" * 30 + EOS + b"x" * 20
    assert parts[2].bytes_per_token == 50 / 51  # it counts as a token, and for no byte


# The cache


def test_the_cache_answers_until_a_file_changes(tmp_path):
    path = write(tmp_path, "t.jsonl", lines(TEXTS))
    cache = tmp_path / "cache"

    def opened(**options) -> Source:
        return open_source([path], cache=cache, **options)

    first = opened()
    made = sorted(cache.iterdir())
    assert len(made) == 1 and isinstance(first.tokens.base, np.memmap)
    content = (made[0] / "tokens.bin").read_bytes()
    again = opened()
    assert again.tokens.tobytes() == first.tokens.tobytes() == content
    assert again.fingerprint == first.fingerprint == fingerprint(first.tokens)
    assert sorted(cache.iterdir()) == made and sorted(p.name for p in made[0].iterdir()) == [
        "source.json",
        "starts.npy",
        "tokens.bin",
    ]
    opened(on_error="skip")
    assert len(list(cache.iterdir())) == 2
    path.write_text(lines(TEXTS[:2]))
    assert documents(opened()) == [text.encode() for text in TEXTS[:2]]
    # Without a cache, or where it cannot be written, the tokens are the same.
    for folder in (None, path / "no folder"):
        source = open_source([path], cache=folder)
        assert source.fingerprint == opened().fingerprint != first.fingerprint


def test_a_failure_leaves_nothing_in_the_cache(tmp_path):
    path = write(tmp_path, "t.jsonl", lines(TEXTS) + "{broken\n")
    with pytest.raises(DataError):
        open_source([path], cache=tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


# What is broken

BROKEN_LINES = {
    "{broken": "line 3 is not JSON: Expecting property name",
    "[1, 2]": "line 3 is a JSON list, not an object",
    '{"body": "x"}': "line 3 has no 'text': it has 'body'",
    '{"text": 7}': "line 3 has 'text' 7, which is no text",
    '{"text": "\\ud800"}': "line 3 holds half a surrogate pair",
    "\udcff{}": "line 3 is not JSON: ",
}


@pytest.mark.parametrize("line", BROKEN_LINES)
def test_a_broken_line_is_named_or_skipped_and_counted(tmp_path, line):
    content = lines(TEXTS[:1]) + "\n" + line + "\n" + lines(TEXTS[1:])
    path = tmp_path / "t.jsonl"
    path.write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(DataError, match=r"t.jsonl, " + BROKEN_LINES[line]) as caught:
        open_source([path])
    assert "--on-error skip" in str(caught.value)
    source = open_source([path], on_error="skip")
    assert documents(source) == [text.encode() for text in TEXTS]
    assert source.notes[0].startswith(f"skipped 1 broken record: {path}, line 3 ")


def test_other_broken_things(tmp_path):
    good = write(tmp_path, "good.txt", "good text")
    parquet.write_table(pyarrow.table({"text": ["a", None, "c"]}), tmp_path / "null.parquet")
    whole = gzip.compress(lines(TEXTS * 500).encode())
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "damaged.gz").write_bytes(b"no gzip")
    (tmp_path / "bad.parquet").write_bytes(b"no parquet")
    for name, sentence in {
        "null.parquet": "null.parquet, row 2 has 'text' None, which is no text",
        "cut.jsonl.gz": r"cannot read .*cut.jsonl.gz after line [\d,]+: Compressed file ended",
        "damaged.gz": "cannot read .*damaged.gz: Not a gzipped",
        "bad.parquet": "cannot read .*bad.parquet after row 0",
    }.items():
        with pytest.raises(DataError, match=sentence) as caught:
            open_source([good, tmp_path / name])
        assert "\n" not in str(caught.value)
        source = open_source([good, tmp_path / name], on_error="skip")
        assert source.notes and b"good text" in documents(source)


def test_nothing_is_left_out_in_silence(tmp_path):
    write(tmp_path, "a.txt", "text")
    write(tmp_path, "b.txt", "more text")
    write(tmp_path, "empty.txt", "")
    write(tmp_path, "logo.png", b"\x89PNG")
    source = open_source([tmp_path])
    assert len(source.starts) == 2
    assert source.notes == (
        "left out 1 file, which is no text: logo.png",
        "left out 1 empty document",
    )


def test_no_data_at_all(tmp_path):
    for name in ("missing.txt", "missing.jsonl", "missing.parquet"):
        with pytest.raises(DataError, match=f"there is no file .*{name}"):
            open_source([tmp_path / name], on_error="skip")
    with pytest.raises(DataError, match="is a directory without files"):
        open_source([tmp_path])
    path = write(tmp_path, "t.jsonl", "nothing\n")
    with pytest.raises(
        DataError, match=r"t.jsonl holds no data: skipped 1 broken record: .*line 1 is not"
    ):
        open_source([path], on_error="skip")


def test_one_path_is_a_list_of_one(tmp_path):
    path = write(tmp_path, "a.txt", TEXTS[0])
    for given in (path, str(path), (str(path),)):
        assert documents(open_source(given)) == [TEXTS[0].encode()]
    assert len(open_source("copy:pairs=1,filler=0,episodes=20").starts) == 20


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"paths": None}, "the paths are None: give a path, or a list of them"),
        ({"paths": b"a"}, "the paths are b'a': give a path, or a list of them"),
        ({"paths": [5]}, "a path of the data is 5: it must be a path"),
        ({"paths": []}, "there is no path"),
        ({"paths": "https://example.com/a.txt"}, "an address is not read: download it first"),
        ({"tokenizer": "t.json"}, "tokenizer is 't.json': it must be a vocabulary (load_tokenizer"),
        ({"text_column": 5}, "text_column is 5: it must be a str"),
        ({"image_size": "32"}, "image_size is '32': it must be a whole number"),
        ({"image_size": True}, "image_size is True: it must be a whole number"),
        ({"channels": 2}, "channels is 2: it must be one of 0, 1, 3"),
        ({"on_error": "ignore"}, "on_error is 'ignore': it must be one of stop, skip"),
        ({"cache": 5}, "cache is 5: it must be a path"),
    ],
)
def test_arguments_that_are_none_are_named(tmp_path, arguments, sentence):
    path = write(tmp_path, "a.jsonl", '{"text": "a"}')
    with pytest.raises(UserError) as caught:
        open_source(**{"paths": path, **arguments})
    assert sentence in str(caught.value)


@pytest.mark.parametrize("library", ["zstandard", "pyarrow"])
def test_a_library_that_is_missing_is_named(tmp_path, library):
    path = tmp_path / {"zstandard": "t.jsonl.zst", "pyarrow": "t.parquet"}[library]
    path.touch()
    code = (
        f"import sys; sys.modules[{library!r}] = None\n"
        f"from transformer_vq.data import open_source; open_source([{str(path)!r}])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    extra = {"zstandard": "text", "pyarrow": "parquet"}[library]
    command = rf"(\S+ -m )?pip install 'transformer-vq\[{extra}\]'"
    assert re.search(f"needs {library} to be read: {command}", done.stderr)


def test_a_file_of_the_size_of_enwik8_is_cut_as_it_is_by_custom(tmp_path):
    with open(tmp_path / "enwik8", "wb") as file:
        file.truncate(100_000_000)  # takes no room on a disk
    source = open_source([tmp_path / "enwik8"])
    sizes = {name: len(source.split(name).tokens) for name in ("train", "validation", "test")}
    assert sizes == {"train": 90_000_000, "validation": 5_000_000, "test": 5_000_000}


# The command line


@pytest.mark.slow
def test_train_and_eval_take_many_paths(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TVQ_CACHE", "")
    write(tmp_path, "a.txt", "the first book. " * 40)
    write(tmp_path, "b/c.txt", "the second book. " * 40)
    write(tmp_path, "d.jsonl.gz", '{"body": "a third one"}\nbroken\n')
    sizes = "--config.d-model 8 --config.d-k 4 --config.num-layers 1 --config.codebook-size 4 "
    sizes += "--config.block-len 16 --config.window-len 8 --train.batch-size 8 --steps 2 "
    sizes += "--train.sequence-len 32"
    out = str(tmp_path / "run")
    paths = ["--data", str(tmp_path / "a.txt"), str(tmp_path / "b"), "--data",
             str(tmp_path / "d.jsonl.gz"), "--text-column", "body"]  # fmt: skip
    arguments = ["train", *paths, "--out", out, *sizes.split()]
    assert main(arguments) == 1
    assert "line 2 is not JSON: Expecting value (or leave out" in capsys.readouterr().err
    assert main([*arguments, "--on-error", "skip"]) == 0
    told = capsys.readouterr()
    assert "1,334 tokens (bytes) of 1,331 bytes in 3 documents" in told.out
    assert "skipped 1 broken record: " in told.err
    assert main(["train", "--out", out, "--resume"]) == 0  # it knows its data
    assert main(["eval", "--run", out, "--json"]) == 0
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert record["data"].endswith("a.txt and 2 more")
    assert record["bpb"] / record["loss"] * np.log(2) == pytest.approx(68 / 67, rel=0.05)
    assert main(["eval", "--run", out, "--data", str(tmp_path / "b"), "--split", "all"]) == 0
    (tmp_path / "b/c.txt").write_text("another")
    assert main(["eval", "--run", out]) == 1
    assert "has changed since" in capsys.readouterr().err


MAKING = """
import sys, time
from pathlib import Path
from transformer_vq.data import open_source, prepare

data, cache, how = sys.argv[1:]
build = prepare._build_text

def slow(files, folder, *more):
    (Path(cache) / f"made-{time.monotonic_ns()}").touch()
    time.sleep(600 if how == "dies" else 2)
    build(files, folder, *more)

prepare._build_text = slow
if how == "no locks":
    sys.modules["fcntl"] = None
print("here", flush=True)
sys.stdin.readline()  # until all have started
print(open_source([data], cache=Path(cache)).fingerprint)
"""


def start_making(*arguments):
    """A process that makes the tokens when it is told to go."""
    command = [sys.executable, "-c", MAKING, *map(str, arguments)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)


def go(process):
    assert process.stdout.readline() == "here\n"
    process.stdin.write("go\n")
    process.stdin.flush()


@pytest.mark.parametrize(("how", "made"), [("waits", 1), ("no locks", 3)])
def test_one_process_makes_the_tokens_and_the_others_wait(tmp_path, how, made):
    """Where files cannot be locked, each makes its own, which are the same."""
    data, cache = write(tmp_path, "a.jsonl", lines(["one", "two"])), tmp_path / "cache"
    cache.mkdir()
    several = [start_making(data, cache, how) for _ in range(3)]
    for process in several:
        go(process)
    said = {process.communicate(timeout=300)[0] for process in several}
    assert len(said) == 1 and not any(process.returncode for process in several)
    assert said == {f"{open_source([data]).fingerprint}\n"}
    assert len(list(cache.glob("made-*"))) == made
    left = [path.name for path in cache.iterdir() if not path.name.startswith("made-")]
    assert len(left) == 1 and not left[0].startswith(".")


def test_a_process_that_dies_lets_the_next_one_make_them(tmp_path):
    data, cache = write(tmp_path, "a.jsonl", lines(["one", "two"])), tmp_path / "cache"
    cache.mkdir()
    first = start_making(data, cache, "dies")
    go(first)
    while not list(cache.glob("made-*")):
        time.sleep(0.01)
        assert first.poll() is None
    second = start_making(data, cache, "waits")
    go(second)
    time.sleep(0.3)
    assert len(list(cache.glob("made-*"))) == 1  # control: it waits
    first.kill()
    first.communicate()
    assert second.communicate(timeout=300)[0] == f"{open_source([data]).fingerprint}\n"
    assert len(list(cache.glob("made-*"))) == 2
