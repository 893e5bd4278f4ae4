"""Two real processes on loopback, four virtual devices each, draw what one process draws."""

import json
import os
import socket
import subprocess
import sys
import textwrap

import numpy as np

import test_sample

PROGRAM = """
    import faulthandler, json, sys
    faulthandler.dump_traceback_later(500, exit=True)  # where it hangs, if it does
    import jax
    index, port, folder = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=index)
    assert (jax.process_count(), jax.device_count(), jax.local_device_count()) == (2, 8, 4)

    sys.path.insert(0, folder)
    import test_sample as t
    from jax.experimental.multihost_utils import process_allgather

    out = {"rows": []}
    for name, key in (("number", t.KEY), ("key", jax.random.key(t.KEY + 1))):
        tokens = t.sample_op(t.SampleConfig(t.BATCH, t.LENGTH, 0.8), t.EOS, t.MODEL, key)
        assert not tokens.is_fully_addressable
        local = [shard.index[0].indices(t.BATCH)[:2] for shard in tokens.addressable_shards]
        out["rows"].append([min(local)[0], max(local)[1]])
        out[name] = process_allgather(tokens, tiled=True).tolist()
    try:
        t.sample_op(t.SampleConfig(4, t.LENGTH), t.EOS, t.MODEL, 0)
    except ValueError as error:
        out["error"] = str(error)
    print(json.dumps(out))
"""


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def run_two(env):
    """What both processes print."""
    flags = f"{env['XLA_FLAGS']} --xla_force_host_platform_device_count=4"
    port, folder = str(free_port()), os.path.dirname(__file__)
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(PROGRAM), str(index), port, folder],
            env={**env, "XLA_FLAGS": flags},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    try:
        done = [process.communicate(timeout=600) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (_, errors) in zip(processes, done, strict=True):
        assert process.returncode == 0, errors[-3000:]
    return [json.loads(output.splitlines()[-1]) for output, _ in done]


def test_two_processes_draw_what_one_draws(user_env):
    first, second = run_two(user_env)
    half = test_sample.BATCH // 2
    assert first.pop("rows") == [[0, half]] * 2  # each holds its own half of the rows
    assert second.pop("rows") == [[half, 2 * half]] * 2
    assert first == second
    assert "multiple of the 8 devices" in first["error"]
    one = test_sample.draw_sequences(0.8)
    np.testing.assert_array_equal(first["number"], one)
    other = test_sample.draw_sequences(0.8, test_sample.KEY + 1)
    np.testing.assert_array_equal(first["key"], other)
    assert not np.array_equal(one[:half], one[half:])  # control: the halves differ
