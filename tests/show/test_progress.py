"""What a run shows on the terminal."""

import io

import pytest

from transformer_vq.show.console import Console
from transformer_vq.show.progress import Progress, duration


@pytest.mark.parametrize("terminal", [True, False])
def test_progress(tmp_path, terminal):
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=120, legacy_windows=False)
    record = {"loss": 1.5, "bpb": 2.164, "tokens_per_second": 512.0, "codebook_used": 0.5}
    record["seconds"] = 83.0
    progress = Progress(100, 1024, console=console)
    progress.start(tmp_path, [{"step": 20, "validation_loss": 1.5, "validation_bpb": 2.1640}])
    progress.say("resuming at [step] 39")
    progress.record({"step": 40, **record}, True)
    progress.saved(40)
    progress.record({"step": 41, **record}, False)
    progress.record({"step": 41, "validation_loss": 1.25, "validation_bpb": 1.8034}, True)
    progress.close()
    text = out.getvalue()
    wanted = ["resuming at [step] 39", "1.5000", "2.1640", "512", "tokens/s", "codes", "50%"]
    assert all(part in text for part in [*wanted, "step 41: validation loss 1.2500, 1.8034 bpb"])
    assert ("step 40/100  loss 1.5000  bpb 2.1640" in text) != terminal  # not shown when it is over
    assert ("2:00 left" in text) != terminal
    for part in ("1:58 left", " 41/100  41%", "validation 1.8034 bpb, the best", "checkpoint 40"):
        assert (part in text) == terminal


@pytest.mark.parametrize("terminal", [True, False])
def test_a_terminal_breaks_lines_between_words(terminal):
    out, line = io.StringIO(), "the warm-up takes 50 updates and the run has 20"
    console = Console(file=out, force_terminal=terminal, width=20, legacy_windows=False)
    progress = Progress(1, 1, console=console, reword=lambda text: text.replace("-up", ""))
    progress.say(line)
    printed = [part.strip() for part in out.getvalue().splitlines()]
    assert " ".join(printed) == "the warm takes 50 updates and the run has 20"
    assert len(printed) == (3 if terminal else 1)


def test_duration():
    assert [duration(s) for s in (0.4, 65, 3600, 90_061)] == ["0:00", "1:05", "1:00:00", "25:01:01"]


@pytest.mark.parametrize(("width", "columns"), [(120, 10), (80, 9), (40, 4), (16, 2)])
def test_no_number_of_the_live_view_is_cut(tmp_path, width, columns):
    """A terminal that has no room for all columns gets fewer, and those whole."""
    names = ("loss", "bpb", "grad_norm", "learning_rate", "tokens_per_second", "gflops", "mfu")
    names += ("codebook_used", "codebook_perplexity", "far_mass")
    record = {name: 0.5 for name in names} | {"tokens_per_second": 5812.0, "learning_rate": 4e-3}
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=width, legacy_windows=False)
    progress = Progress(100, 1024, console=console)
    progress.start(tmp_path, [])
    progress.record({"step": 40, "seconds": 83.0, **record}, True)
    progress.close()
    shown = [line for line in out.getvalue().splitlines() if "bpb" in line][-1]
    labels = ["loss", "bpb", "grad norm", "rate", "tokens/s", "GFLOP/s", "MFU", "codes"]
    labels += ["perplexity", "far mass"]
    assert [label for label in labels if label in shown] == labels[:columns]
    assert "0.5000" in out.getvalue() and ("4.0e-03" in out.getvalue()) == (columns > 3)
