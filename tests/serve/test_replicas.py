"""Several servers, one folder of states: replicas, devices, and one that ends."""

import signal
import threading
import time

import httpx
import pytest

from tests.serve.conftest import KEYS, Server, auth, complete, endless
from transformer_vq.serve.prompts import LOOK_AGAIN

pytestmark = pytest.mark.slow


def test_replicas_go_on_from_each_others_states(server, replica):
    """One folder, two processes, any balancer: a session is as if one server had it."""
    names = "alone", "shared"
    found = {name: [] for name in names}
    for turn in range(4):
        for name in names:
            asked = replica if name == "shared" and turn % 2 else server
            body = dict(prompt=f" turn {turn}", seed=turn, max_tokens=9, return_token_ids=True)
            before = {"state": name} if turn else {}
            answer = complete(asked, **body, **before, save_state=name, presence_penalty=0.5)
            found[name].append(answer.json()["choices"][0]["token_ids"])
    assert found["alone"] == found["shared"]

    def states(one, path="", method="GET"):
        return httpx.request(method, f"{one.url}/v1/states{path}", headers=auth(), timeout=60)

    listed = [states(one).json()["data"] for one in (server, replica)]
    assert listed[0] == listed[1] and {"id": "shared", "object": "state"} in listed[0]
    assert states(replica, "/alone", "DELETE").json()["deleted"]
    assert states(server, "/alone").status_code == 404

    # Both write one name, both read it: always whole, and in the end the same.
    def write(one, prompt):
        for _ in range(10):
            body = {"name": "race", "prompt": prompt}
            made = httpx.post(f"{one.url}/v1/states", json=body, headers=auth(), timeout=60)
            statuses.append(made.status_code)

    statuses = []
    write(server, "aaa")
    threads = [
        threading.Thread(target=write, args=given)
        for given in ((server, "aaa"), (replica, "bbbbb"), (server, "bbbbb"), (replica, "aaa"))
    ]
    for thread in threads:
        thread.start()
    tokens = set()
    while any(thread.is_alive() for thread in threads):
        for one in (server, replica):
            seen = states(one, "/race")
            statuses.append(seen.status_code)
            tokens.add(seen.json()["tokens"])
    assert set(statuses) == {200} and tokens == {3, 5}
    files = [states(one, "/race/file").content for one in (server, replica)]
    sizes = [states(one, "/race").json()["tokens"] for one in (server, replica)]
    assert files[0] == files[1] and sizes[0] == sizes[1]
    assert not list((server.folder / "states").rglob("*.new"))


def test_several_devices_share_the_slots(server, server_env, tmp_path):
    """The answers of one device; states go from one server to the other and back."""
    for name in ("run", "keys", "states"):
        (tmp_path / name).symlink_to(server.folder / name)
    flags = f"{server_env['XLA_FLAGS']} --xla_force_host_platform_device_count=2"
    shared = Server(tmp_path, {**server_env, "XLA_FLAGS": flags})
    try:
        shared.wait()
        found = []
        for one, other in ((server, shared), (shared, server)):
            body = dict(prompt=["It was", "a very", "long time"], max_tokens=20, seed=4)
            first = complete(one, **body, logprobs=2, cache="off").json()
            begun = complete(one, prompt="It was", max_tokens=9, seed=1, save_state="device").json()
            after = complete(other, state="device", prompt=" so", max_tokens=9, seed=2).json()
            found.append([c["text"] for a in (first, begun, after) for c in a["choices"]])
        assert found[0] == found[1] and len(set(found[0])) == 5
        assert "compil" not in shared.errors(since_ready=True).lower()
    finally:
        shared.close()


def wait_until_not_ready(server):
    while httpx.get(f"{server.url}/ready").status_code != 503:
        time.sleep(0.02)


def test_sigterm_drains_and_states_outlive_it(server, replica):
    """What runs is answered, nothing new is taken; another process goes on from the states, and
    knows the prompts."""
    known = "known to the first one"
    complete(server, prompt=known, max_tokens=1)
    settings = dict(seed=5, presence_penalty=0.5, repetition_penalty=1.2, return_token_ids=True)
    prompt = "It was the best of times"
    complete(server, prompt=prompt, **settings, max_tokens=12, save_state="kept")
    stream = endless(server, seed=1)
    stream.close()
    stream = server.client(max_retries=0).completions.create(
        model="run", prompt="x", max_tokens=20_000, stream=True
    )
    next(stream)
    server.process.send_signal(signal.SIGTERM)
    wait_until_not_ready(server)
    refused = complete(server, prompt="x")
    assert refused.status_code == 503 and "shutting down" in refused.text
    *_, last = stream
    assert last.choices[0].finish_reason == "length"
    assert server.process.wait(60) == 0
    time.sleep(LOOK_AGAIN)
    usage = complete(replica, prompt=known, max_tokens=1).json()["usage"]
    assert usage["prompt_tokens_details"] == {"cached_tokens": len(known)}
    usage = complete(replica, KEYS[1], prompt=known, max_tokens=1).json()["usage"]
    assert usage["prompt_tokens_details"] == {"cached_tokens": 0}
    whole = complete(replica, prompt=prompt, **settings, max_tokens=30).json()
    rest = complete(replica, prompt="", state="kept", **settings, max_tokens=18).json()
    expected = whole["choices"][0]["token_ids"]
    assert rest["choices"][0]["token_ids"] == expected[12:]
    held = endless(replica)
    replica.process.send_signal(signal.SIGTERM)
    wait_until_not_ready(replica)
    assert replica.process.poll() is None
    replica.process.send_signal(signal.SIGTERM)
    assert replica.process.wait(60) == 128 + signal.SIGTERM
    held.close()
