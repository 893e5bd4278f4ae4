"""Pictures of runs, whatever the environment says to the library that draws them."""

import subprocess
import sys

DRAW = """
import sys
from pathlib import Path
from transformer_vq.show.figures import learning_curve
records = [{"step": 1, "bpb": 3.0}, {"step": 2, "bpb": 2.5, "validation_bpb": 2.9}]
learning_curve(records, Path(sys.argv[1]), levels={"xz": 2.0}, test=2.5)
"""


def test_a_curve_is_drawn_by_what_a_notebook_starts(tmp_path, user_env):
    """It names a backend that may not be installed; and here no home folder can be written to."""
    env = {
        **user_env,
        "MPLBACKEND": "of_a_notebook",
        "HOME": "/proc",
        "TMPDIR": str(tmp_path),
    }
    for name in ("MPLCONFIGDIR", "XDG_CONFIG_HOME", "XDG_CACHE_HOME"):
        env.pop(name, None)
    command = [sys.executable, "-c", DRAW, str(tmp_path / "curve.png")]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stderr, done.stdout) == (0, "", "")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
