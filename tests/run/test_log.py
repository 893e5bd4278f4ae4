"""The lines of metrics.jsonl."""

import contextlib

from transformer_vq.run.log import MetricsLog, read_metrics


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
