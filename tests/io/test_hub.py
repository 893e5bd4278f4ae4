"""Models on the Hugging Face Hub, of which only a cache on the disk is asked here."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import hub_cache
from transformer_vq.errors import UserError
from transformer_vq.io.export import FILES
from transformer_vq.io.hub import HubError, local_folder


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """A home of the library that nothing is fetched into."""
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path


def test_a_folder_is_itself(tmp_path):
    assert local_folder(str(tmp_path)) == local_folder(tmp_path) == tmp_path
    with pytest.raises(UserError, match="--run is empty"):
        local_folder("", "--run")


def test_what_is_kept_is_found(offline):
    snapshot = hub_cache(offline, {"config.json": b"{}"}, revision="v1")
    assert local_folder("hf:owner/name@v1") == snapshot
    assert local_folder(Path("hf:owner/name@v1")) == snapshot
    for other in ("hf:owner/name", "hf:owner/other@v1"):
        with pytest.raises(HubError, match=rf"^cannot get {other}: \w[^\n]*$"):
            local_folder(other)


def test_the_environment_says_where(user_env, tmp_path):
    snapshot = hub_cache(tmp_path, {"config.json": b"{}"})
    code = "from transformer_vq.io.hub import local_folder; print(local_folder('hf:owner/name'))"
    env = {**user_env, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", code]
    found = subprocess.run(command, env=env, check=True, capture_output=True, text=True)
    assert found.stdout.strip() == str(snapshot)


def test_only_files_of_a_model_are_fetched(monkeypatch, tmp_path):
    hub = pytest.importorskip("huggingface_hub")
    asked = []
    monkeypatch.setattr(
        hub, "snapshot_download", lambda *a, **k: asked.append((a, k)) or str(tmp_path)
    )
    assert local_folder("hf:owner/name@v1") == tmp_path
    ((name,), options) = asked[0]
    assert name == "owner/name" and options == {"revision": "v1", "allow_patterns": list(FILES)}
    assert not any(file.endswith((".py", ".bin", ".pt", ".pkl")) for file in FILES)


@pytest.mark.parametrize("name", ["hf:", "hf:name", "hf:a/b/c", "hf:a/b@", "hf:a/b c", "hf:../b/c"])
def test_names_that_are_none(name):
    with pytest.raises(HubError, match=r"it must be hf:OWNER/NAME or hf:OWNER/NAME@REVISION"):
        local_folder(name)


def test_without_the_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(HubError, match=r"pip install 'transformer-vq\[hub\]'"):
        local_folder("hf:owner/name")
