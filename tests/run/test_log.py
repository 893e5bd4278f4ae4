"""The lines of metrics.jsonl."""

import contextlib
import math
import shutil

import pytest

from transformer_vq.run.log import LogError, MetricsLog, damaged_lines, read_metrics


def test_metrics_log_drops_the_future(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert read_metrics(path) == []
    path.write_text('{"step": 1}\n{"step": 2, "validation_loss": 3.5}\n{"step": 3}\n{"st')
    assert [record["step"] for record in read_metrics(path)] == [1, 2, 3]
    with contextlib.closing(MetricsLog(path, 2)) as log:
        assert (log.validation_loss(2), log.validation_loss(1)) == (3.5, None)
        log.write({"step": 3, "loss": 0.5})
        assert read_metrics(path)[-1] == {"step": 3, "loss": 0.5}  # at once
    assert [record["step"] for record in read_metrics(path)] == [1, 2, 3]


GOOD = b'{"step": 1, "loss": 2.0}\n'
NOT_OURS = [
    b"\xff\xfe\x00",
    b"\0\0\0",
    b"{damaged",
    b"[1]",
    b"{}",
    b'{"step": "1"}',
    b'{"step": -1}',
    b'{"step": 1.5}',
    b'{"step": 1, "loss": "low"}',
    b'{"step": 1, "loss": 1e999999}'.replace(b"1e999999", b"1" + b"0" * 200),
    b'{"step": 1, "codebook_used_by_unit": [1, "2"]}',
    b'{"step": 1, "text": 5}',
    b"[" * 100_000,
]


@pytest.mark.parametrize("line", NOT_OURS, ids=range(len(NOT_OURS)))
def test_damaged_lines_are_left_out_and_put_aside(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(GOOD + line + b"\n" + GOOD.replace(b"1", b"2") + b"\xff torn")
    assert [record["step"] for record in read_metrics(path)] == [1, 2]
    assert damaged_lines(path) == f"line 2 of {path} is damaged"
    with contextlib.closing(MetricsLog(path, 1)) as log:
        assert log.notes == f"line 2 of {path} is damaged: put aside in metrics.jsonl.damaged"
        assert log.take_kept() == [{"step": 1, "loss": 2.0}]
    assert path.read_bytes() == GOOD and damaged_lines(path) == ""
    assert (tmp_path / "metrics.jsonl.damaged").read_bytes() == line + b"\n"


def test_what_is_not_finite_is_null_and_not_there(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with contextlib.closing(MetricsLog(path, 0)) as log:
        log.write({"step": 1, "loss": math.nan, "by_unit": [1.0], "mfu": math.inf})
    assert path.read_text() == '{"step": 1, "loss": null, "by_unit": [1.0], "mfu": null}\n'
    assert read_metrics(path) == [{"step": 1, "by_unit": [1.0]}]
    path.write_text('{"step": 1, "loss": NaN}\n')  # as an older version wrote it
    assert read_metrics(path) == [{"step": 1}] and damaged_lines(path) == ""


@pytest.mark.parametrize("moved", [True, False])
def test_a_file_that_went_is_not_written_on(tmp_path, moved):
    run = tmp_path / "run"
    run.mkdir()
    with contextlib.closing(MetricsLog(run / "metrics.jsonl", 0)) as log:
        log.write({"step": 1})
        run.rename(tmp_path / "moved") if moved else shutil.rmtree(run)
        with pytest.raises(LogError, match=r"run/metrics.jsonl has been removed, moved or"):
            log.write({"step": 2})
    assert not run.exists()
