"""Compressed files: of any case, broken off, refused, and in bounded memory."""

import bz2
import gzip
import io
import lzma
import os
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from transformer_vq.data import DataError, free_memory, load_bytes, open_binary, open_source
from transformer_vq.data import text_pieces as pieces
from transformer_vq.data.compressed import bare_name

TEXT = b"".join(b"%d. It was \xe2\x80\x94 long ago.\n" % i for i in range(3000))


def zipped(**members: bytes) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name.replace("_", "."), data)
    return content.getvalue()


COMPRESS = {
    ".gz": gzip.compress,
    ".GZ": gzip.compress,
    ".gzip": gzip.compress,
    ".zst": zstandard.compress,
    ".ZST": zstandard.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".Zip": lambda data: zipped(a_txt=data),
}


@pytest.mark.parametrize("suffix", COMPRESS)
def test_a_compressed_file_is_what_it_holds(tmp_path, suffix):
    path = tmp_path / f"BOOK.TXT{suffix}"
    path.write_bytes(COMPRESS[suffix](TEXT))
    assert load_bytes(path).tobytes() == TEXT
    assert not load_bytes(path).flags.writeable
    with open_binary(path) as file:
        assert b"".join(pieces(file, 1000)) == TEXT
    source = open_source([path])
    assert source.tokens.tobytes() == TEXT and not source.notes


def test_the_kind_of_a_compressed_file_is_that_of_what_is_in_it(tmp_path):
    line = b'{"text": "one"}\n'
    for name, content in {
        "X.JSONL.GZ": gzip.compress(line),
        "data.zip": zipped(a_jsonl=line),
    }.items():
        (tmp_path / name).write_bytes(content)
        assert open_source([tmp_path / name]).tokens.tobytes() == b"one"
    assert bare_name(tmp_path / "X.JSONL.GZ") == "x.jsonl"


@pytest.mark.parametrize("suffix", [".gz", ".zst", ".bz2", ".xz"])
def test_what_came_before_a_break_counts_and_the_break_counts_as_one(tmp_path, suffix):
    whole = COMPRESS[suffix](np.random.default_rng(0).bytes(1 << 20))
    cut = tmp_path / f"a{suffix}"
    cut.write_bytes(whole[: len(whole) * 19 // 20])
    with pytest.raises(DataError, match=rf"cannot read .*a{suffix}: .*end.* --on-error skip"):
        open_source([cut])
    alone = open_source([cut], on_error="skip")
    assert 800_000 < len(alone.tokens) < 1 << 20
    assert alone.notes[0].startswith(f"skipped 1 broken record: cannot read {cut}")
    (tmp_path / "b.txt").write_bytes(b"good")
    both = open_source([tmp_path], on_error="skip")
    assert len(both.starts) == 2 and both.num_bytes == len(alone.tokens) + 4
    assert both.notes[0].startswith("skipped 1 broken record: ")


def test_a_damaged_file_is_not_believed_up_to_the_damage(tmp_path):
    """It does not break off: what came before may be wrong too."""
    whole = bytearray(gzip.compress(TEXT))
    whole[-8] ^= 1  # of the checksum
    (path := tmp_path / "a.gz").write_bytes(whole)
    with pytest.raises(DataError, match="CRC check failed"):
        open_source([path], on_error="skip")


@pytest.mark.parametrize("suffix", [".txt", ".gz", ".bz2", ".xz", ".zst"])
def test_nothing_is_an_empty_document(tmp_path, suffix):
    (tmp_path / f"a{suffix}").write_bytes(COMPRESS[suffix](b"") if suffix != ".txt" else b"")
    (tmp_path / f"b{suffix}").touch()
    (tmp_path / "c.txt").write_text("text")
    assert open_source([tmp_path]).notes == ("left out 2 empty documents",)
    with pytest.raises(DataError, match="is empty: give a file with data in it"):
        open_source([tmp_path / f"a{suffix}"])


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("a.tgz", "a.tgz is an archive: unpack it"),
        ("a.TAR.GZ", "a.TAR.GZ is an archive: unpack it"),
        ("a.7z", "a.7z is an archive: unpack it"),
        ("a.txt.lz4", "is compressed in a way that is not read here: decompress it"),
        ("two.zip", r"two.zip holds 2 files, and only a .zip of one is read: unpack it"),
        ("packed.zip", "packed.zip holds a.gz, which is packed too"),
        ("locked.zip", "cannot read .*locked.zip: .*encrypted"),
        ("damaged.zip", "cannot read .*damaged.zip: File is not a zip file"),
    ],
)
def test_what_is_not_unpacked_here_is_refused(tmp_path, name, says):
    path = tmp_path / name
    locked = bytearray(zipped(a_txt=TEXT))
    locked[6] |= 1
    locked[locked.index(b"PK\1\2") + 8] |= 1
    path.write_bytes(
        {
            "two.zip": zipped(a_txt=TEXT, b_txt=TEXT),
            "packed.zip": zipped(a_gz=gzip.compress(TEXT)),
            "locked.zip": bytes(locked),
        }.get(name, b"nothing of that kind")
    )
    for read in (load_bytes, lambda path: open_source([path]), open_binary):
        with pytest.raises(DataError, match=says):
            read(path)
    (tmp_path / "good.txt").write_text("good")
    skipped = open_source([tmp_path], on_error="skip")
    assert skipped.tokens.tobytes() == b"good" and name in skipped.notes[0]


@pytest.mark.parametrize(
    ("what", "content"),
    [
        ("a gzip file", gzip.compress(TEXT)),
        ("text in UTF-16", TEXT.decode().encode("utf-16")),
        ("text in UTF-32", TEXT.decode().encode("utf-32")),
        ("a HEIC picture or a film", b"\0\0\0\x18ftypheic" + TEXT),
        ("a tar archive", bytes(257) + b"ustar" + TEXT),
        ("an array of NumPy", b"\x93NUMPY\x01\0" + TEXT),
    ],
)
def test_bytes_of_what_looks_like_something_else_are_read_with_a_word(tmp_path, what, content):
    (path := tmp_path / "book").write_bytes(content)
    assert open_source([path]).notes == (
        f"read the bytes of what looks like {what}, not what is in it: {path}",
    )
    path.write_bytes(TEXT)  # control
    assert open_source([path]).notes == ()


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.gz", "a.parquet", "a.png", "a.npz",
                                  "a-idx3-ubyte"])  # fmt: skip
def test_a_pipe_is_refused_at_once(tmp_path, name):
    os.mkfifo(path := tmp_path / name)
    with pytest.raises(DataError, match=r"is not a regular file: copy its content to one"):
        open_source([path])


BOMB = """
import resource, sys
from pathlib import Path
from transformer_vq.data import DataError, load_bytes, open_binary, text_pieces
import numpy, zstandard
limit = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + (250 << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
path = Path(sys.argv[1])
with open_binary(path) as file:
    print(sum(map(len, text_pieces(file))))
try:
    load_bytes(path)
except DataError as error:
    print(error)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="memory is limited on Linux")
def test_a_bomb_goes_through_in_bounded_memory_or_is_refused(tmp_path):
    """20 kB with 640 MiB inside, in 250 MiB."""
    path, block = tmp_path / "bomb.zst", bytes(1 << 24)
    with path.open("wb") as file, zstandard.ZstdCompressor().stream_writer(file) as writer:
        for _ in range(40):
            writer.write(block)
    done = subprocess.run([sys.executable, "-c", BOMB, path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    size, sentence = done.stdout.splitlines()
    assert int(size) == 40 << 24
    assert "bomb.zst holds more than" in sentence and "too much for the memory" in sentence


def test_no_more_than_is_allowed_is_read(tmp_path):
    for suffix, content in {".txt": TEXT, ".gz": gzip.compress(TEXT)}.items():
        (path := tmp_path / f"a{suffix}").write_bytes(content)
        assert len(load_bytes(path, max_bytes=len(TEXT))) == len(TEXT)
        with pytest.raises(DataError, match=f"holds more than {len(TEXT) - 1:,} bytes"):
            load_bytes(path, max_bytes=len(TEXT) - 1)
    assert free_memory() > 1 << 20


@settings(deadline=None, max_examples=40)
@given(st.sampled_from([".gz", ".zst", ".bz2", ".xz", ".Zip"]), st.integers(0), st.integers(1, 255))
def test_any_damage_is_a_data_error(tmp_path_factory, suffix, place, change):
    content = bytearray(COMPRESS[suffix](TEXT))
    content[place % len(content)] ^= change
    path = tmp_path_factory.mktemp("damaged") / f"a{suffix}"
    path.write_bytes(content)
    try:
        content = load_bytes(path).tobytes()
    except DataError:
        return
    assert content == TEXT or suffix == ".zst"  # which has no checksum, if not asked for
