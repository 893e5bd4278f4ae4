"""TensorBoard files hold what metrics.jsonl holds, after a resume too; so does Weights & Biases."""

import importlib.util
import struct
import sys
import types

import pytest

from transformer_vq.run.log import MetricsLog, read_metrics
from transformer_vq.show import trackers
from transformer_vq.show.trackers import TensorBoard, TrackerError, WandB

RECORDS = [
    {"step": 1, "seconds": 0.5, "loss": 2.5, "codebook_used_by_unit": [0.25, 0.5]},
    {"step": 2, "seconds": 1.0, "loss": 2.25, "codebook_used_by_unit": [0.5, 0.5]},
    {"step": 2, "seconds": 1.5, "validation_loss": 2.0},
    {"step": 3, "seconds": 2.0, "loss": 1.75, "codebook_used_by_unit": [0.75, 1.0]},
]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.json").write_text('{"config": {"d_model": 8}}')
    return tmp_path


def log(folder, step, records, *trackers):
    """A session that goes on from `step` and measures these records."""
    log = MetricsLog(folder / "metrics.jsonl", step)
    kept = log.take_kept()
    for tracker in trackers:
        tracker.start(folder, kept)
    for record in records:
        log.write(record)
        for tracker in trackers:
            tracker.record(record, True)
            tracker.record({"step": record["step"], "loss": 99.0}, False)  # not in metrics.jsonl
    for closed in (log, *trackers):
        closed.close()


def events(folder) -> list[tuple[str, int, float]]:
    """(name, step, value) of every scalar in the event files: records framed by length and CRC."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for path in sorted((folder / "tensorboard").iterdir()):
        content, at = path.read_bytes(), 0
        while at < len(content):
            (length,) = struct.unpack_from("<Q", content, at)
            event = Event.FromString(content[at + 12 : at + 12 + length])
            found += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
            at += 16 + length
    return found


def test_tensorboard_has_every_step_once(folder):
    pytest.importorskip("tensorboardX", reason="NOT TESTED: needs the extra tensorboard")
    expected = [
        *[("train/loss", 1, 2.5), ("train/loss", 2, 2.25), ("train/loss", 3, 1.75)],
        ("validation/loss", 2, 2.0),
        *[("codebook_used/unit_00", step, value) for step, value in ((1, 0.25), (2, 0.5))],
        ("codebook_used/unit_01", 3, 1.0),
    ]
    log(folder, 0, RECORDS, TensorBoard())
    whole = events(folder)
    assert set(expected) <= set(whole) and len(set(whole)) == len(whole) == 3 * 4 + 2
    lost = RECORDS[3] | {"loss": 9.0}
    log(folder, 2, [lost, {"step": 4, "loss": 9.0}], TensorBoard())
    assert ("train/loss", 3, 9.0) in events(folder)  # control
    log(folder, 2, RECORDS[3:], TensorBoard())  # resumed from step 2
    assert events(folder) == whole
    assert [r["step"] for r in read_metrics(folder / "metrics.jsonl")] == [1, 2, 2, 3]
    log(folder, 3, [])  # and a session without it, then with it again
    log(folder, 3, [{"step": 4, "loss": 1.5}])
    log(folder, 4, [], TensorBoard())
    assert events(folder) == [*whole, ("train/loss", 4, 1.5)]


class FakeWandB(types.ModuleType):
    """As wandb: a run continues at the step after its last, and takes steps in order only."""

    def __init__(self):
        super().__init__("wandb")
        self.given, self.logged = [], {}

    def init(self, **options):
        self.given.append(options)
        self.step = max(self.logged, default=-1) + 1
        return self

    def log(self, values, step):
        assert step >= self.step
        self.step = step
        self.logged.setdefault(step, {}).update(values)

    def finish(self):
        self.given.append("finished")


def test_wandb_continues_a_run(folder, monkeypatch):
    """Against a stand-in for the package: what it is given, in order."""
    fake = FakeWandB()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    log(folder, 0, RECORDS[:1])  # not yet
    log(folder, 1, RECORDS[1:], WandB("books"))
    whole = {step: dict(values) for step, values in fake.logged.items()}
    assert whole[2] == {
        "train/loss": 2.25,
        "train/seconds": 1.0,
        "codebook_used/unit_00": 0.5,
        "codebook_used/unit_01": 0.5,
        "validation/loss": 2.0,
        "validation/seconds": 1.5,
    }
    assert list(whole) == [1, 2, 3]
    log(folder, 2, [*RECORDS[3:], {"step": 4, "loss": 1.5}], WandB("books"))  # resumed
    assert fake.logged == whole | {4: {"train/loss": 1.5}}
    first, _, second, _ = fake.given
    assert first == second and first["resume"] == "allow" and first["project"] == "books"
    assert first["config"] == {"config": {"d_model": 8}} and first["dir"] == str(folder)


@pytest.mark.slow
def test_wandb_itself_offline(folder, monkeypatch):
    if not importlib.util.find_spec("wandb"):
        pytest.skip("NOT TESTED: needs the extra wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    log(folder, 0, RECORDS, WandB("books"))
    assert list((folder / "wandb").glob("offline-run-*/*.wandb"))


@pytest.mark.parametrize(
    ("make", "says"),
    [(TensorBoard, r"tensorboardX is not .*\[tensorboard\]"), (lambda: WandB("x"), r"\[wandb\]")],
)
def test_a_missing_package_is_told_at_once(make, says, monkeypatch):
    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(trackers.importlib, "import_module", missing)
    with pytest.raises(TrackerError, match=says):
        make()
