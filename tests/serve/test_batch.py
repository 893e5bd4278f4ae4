"""`tvq batch` as a process that is killed, and goes on."""

import json
import subprocess
import time

import pytest

pytest.importorskip("fastapi", reason="NOT TESTED: the extra serve is not installed")

from tests.helpers import TVQ, make_run

COUNT = 120
FLAG = "--xla_force_host_platform_device_count"


def answers_in(path):
    """The answers by their ids, without the time: none is there twice."""
    found = {}
    for line in path.read_text().splitlines():
        value = json.loads(line)
        assert value["custom_id"] not in found
        value["response"]["body"].pop("created", None)
        found[value["custom_id"]] = value
    return found


@pytest.mark.slow
def test_killed_is_unbroken(tmp_path, server_env):
    """SIGKILL three times: no answer is lost, doubled, or another one. Nor in two shares, of which
    one has two devices."""
    env = {**server_env, "JAX_LOG_COMPILES": "0"}
    make_run(tmp_path / "run")
    rows = [
        {"custom_id": f"q{i}", "body": {"prompt": "x" * (i % 40), "max_tokens": 30 + i % 50}}
        for i in range(COUNT)
    ]
    rows[5]["body"]["top_k"] = -1
    requests = tmp_path / "requests.jsonl"
    requests.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def start(out, *options, devices=1):
        given = ["--run", tmp_path / "run", "--input", requests, "--out", tmp_path / out]
        given += ["--exact", "--slots", 2, "--prompt-chunk", 16, *options]
        return subprocess.Popen(
            [TVQ, "batch", *map(str, given)],
            env={**env, "XLA_FLAGS": f"{env['XLA_FLAGS']} {FLAG}={devices}"},
            stdout=subprocess.PIPE,
            text=True,
        )

    whole = start("whole")
    said, _ = whole.communicate()
    assert whole.returncode == 0
    assert said == f"120 requests are answered in {tmp_path}/whole, 1 of them with an error\n"
    expected = answers_in(tmp_path / "whole")
    assert set(expected) == {f"q{i}" for i in range(COUNT)}
    texts = {json.dumps(x["response"]["body"].get("choices")) for x in expected.values()}
    assert len(texts) == COUNT  # each has its own seed

    broken = tmp_path / "broken"
    for least in (10, 40, 80):
        process = start("broken")
        while process.poll() is None and (
            not broken.exists() or broken.read_bytes().count(b"\n") < least
        ):
            time.sleep(0.01)
        process.kill()
        process.communicate()
        assert process.returncode == -9  # it had not ended by itself
    last = start("broken")
    said, _ = last.communicate()
    assert last.returncode == 0 and " of 120 requests are answered in" in said
    assert answers_in(broken) == expected

    for devices, share in ((1, "0/2"), (2, "1/2")):
        part = start("part.jsonl", "--shard", share, devices=devices)
        said, _ = part.communicate()
        assert part.returncode == 0 and "60 requests are answered in" in said
    parts = [answers_in(tmp_path / f"part-{i}-of-2.jsonl") for i in range(2)]
    assert not parts[0].keys() & parts[1].keys() and parts[0] | parts[1] == expected
