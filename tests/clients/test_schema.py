"""A fuzzer of APIs: whatever is asked, no answer is a fault or has another form than documented."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("schemathesis", reason="NOT TESTED: no schemathesis")

# Not that all is accepted that the schema allows: it knows nothing of the model and its vocabulary.
# Nor that all else is refused: a null counts as left out.
CHECKS = (
    "not_a_server_error,status_code_conformance,content_type_conformance,"
    "response_headers_conformance,response_schema_conformance,unsupported_method"
)


def test_as_documented(server, tmp_path):
    command = [Path(sys.executable).with_name("st"), "run", f"{server.address}/openapi.json"]
    command += ["--checks", CHECKS, "--max-examples", "40", "--request-timeout", "60"]
    command += ["--generation-deterministic", "--no-color"]
    command += ["--phases", "examples,coverage,fuzzing"]
    env = {**os.environ, "SCHEMATHESIS_HOOKS": str(Path(__file__).with_name("hooks.py"))}
    run = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-20_000:] + run.stderr
