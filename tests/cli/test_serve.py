"""`tvq serve` where it cannot: one sentence. What it does where it can: tests/serve."""

import builtins
import os
import re
import socket
import subprocess

import pytest

from tests.helpers import TVQ, fails, make_run
from transformer_vq import SamplingParams, generate, load

pytest.importorskip("fastapi", reason="NOT TESTED: the extra serve is not installed")


def test_without_its_libraries(capsys, monkeypatch, tmp_path):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "uvicorn":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    said = fails(capsys, 1, "serve", "--run", str(tmp_path))
    assert "tvq serve needs uvicorn, which is not installed: " in said
    assert "pip install 'transformer-vq[serve]'" in said


@pytest.mark.parametrize(
    ("options", "status", "words"),
    [
        (["--port", "70000"], 2, "--port is 70000: it must be a whole number from 0 to 2^16 - 1"),
        (["--slots", "0"], 2, "--slots is 0: it must be"),
        (
            ["--prompt-chunk", "17"],
            2,
            "--prompt-chunk is '17': it must be one of 16, 64, 256, 1024",
        ),
        (["--state-disk", "5"], 2, "--state-disk is 5: give --state-dir, where it is"),
        (["--exact", "--draft", "text"], 2, "--exact and --draft are both given: tokens that are"),
        (["--drain", "nan"], 2, "--drain is nan: it must be a number of seconds"),
        (["--far-cap", "-1"], 2, "--far-cap is -1"),
        (["--host", "192.0.2.1"], 1, "cannot listen at 192.0.2.1, port 8000"),
        (["--api-key-file", "EMPTY"], 1, "has no usable key: write one a line"),
        (["--api-key-file", "nothing"], 1, "--api-key-file nothing cannot be read (No such file"),
        (["--api-key-file", "PIPE"], 1, "--api-key-file PIPE is a pipe: give a file"),
        (["--api-key-file", "/dev/zero"], 1, "/dev/zero has more than 1,048,576 bytes"),
        (["--chat-template", "PIPE"], 1, "--chat-template PIPE is a pipe: give a file"),
    ],
)
def test_wrong_options(capsys, tmp_path, monkeypatch, options, status, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "EMPTY").write_text("\n \n")
    os.mkfifo(tmp_path / "PIPE")  # nobody writes to it: to read it is to wait for ever
    make = ["--run", "run"] if "--far-cap" not in options else ["--run", make_run(tmp_path / "r")]
    (tmp_path / "run").mkdir()
    port = ["--port", "0"] if "--far-cap" in options else []
    assert words in fails(capsys, status, "serve", *make, *port, *options)


@pytest.mark.slow
def test_drafts(tmp_path, user_env):
    """They change no token, and are used; nothing is compiled for them once it is ready."""
    httpx = pytest.importorskip("httpx")
    run = make_run(tmp_path / "run")
    arguments = ["--run", run, "--draft", "text", "--slots", "2"]
    arguments += ["--port", "0", "--prompt-chunk", "16"]
    env = {**user_env, "JAX_LOG_COMPILES": "1"}  # one device
    with (
        open(tmp_path / "err", "w+") as err,
        subprocess.Popen(
            [TVQ, "serve", *arguments], env=env, stdout=subprocess.PIPE, stderr=err, text=True
        ) as server,
    ):
        try:
            url = re.findall(r"http://\S+", server.stdout.readline())[0]
            before = os.path.getsize(tmp_path / "err")
            answers = []
            for logprobs in (None, 2):
                body = dict(prompt="It was. " * 5, max_tokens=300, temperature=0, seed=1)
                body |= dict(return_token_ids=True, logprobs=logprobs)
                answer = httpx.post(f"{url}/v1/completions", json=body, timeout=60).json()
                answers.append(answer["choices"][0]["token_ids"])
            metrics = dict(
                x.split()
                for x in httpx.get(f"{url}/metrics", timeout=60).text.splitlines()[2:]
                if x[0] != "#"
            )
        finally:
            server.kill()
    said = (tmp_path / "err").read_text()
    assert "Finished XLA compilation" in said[:before]
    assert "compil" not in said[before:].lower()
    plain = SamplingParams(max_tokens=300, temperature=0)
    assert answers == [generate(load(run)[0], ["It was. " * 5], plain)[0]] * 2
    assert 0 < float(metrics["tvq_right_guesses"]) <= float(metrics["tvq_guessed_tokens"])


def test_a_port_that_is_taken(capsys, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        said = fails(capsys, 1, "serve", "--run", str(tmp_path), "--port", port)
    assert f"cannot listen at 127.0.0.1, port {port}: Address already in use" in said


def test_runs_that_cannot_be_served(capsys, tmp_path):
    """Found while the server listens already; it ends by itself."""
    said = fails(capsys, 1, "serve", "--run", str(tmp_path / "nothing"))
    assert "there is no run folder" in said
    said = fails(capsys, 1, "serve", "--run", str(tmp_path), "--port", "0", "--slots", "12")
    assert "--slots is 12: it must be a multiple of the 8 devices that share the slots" in said
    said = fails(capsys, 1, "serve", "--run", str(tmp_path), "--port", "0", "--draft", "text")
    assert "--draft is for one device, and there are 8: leave it out, or let the process" in said
    pictures = make_run(tmp_path / "pictures", image_shape=(4, 4, 1))
    said = fails(capsys, 1, "serve", "--run", pictures, "--port", "0")
    assert f"the run in {pictures} draws pictures: tvq draw" in said
