"""loaders/hub.py: directories as they are, repositories through the download cache, and no network in any test."""

import os
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants, errors
from huggingface_hub.utils import are_progress_bars_disabled

from loaders import hub
from loaders.errors import CheckpointError
from loaders.hub import resolve

COMMIT = "0123456789abcdef0123456789abcdef01234567"
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A download cache with owner/name in it, and the library offline. Its snapshot directory."""
    repo = tmp_path / "cache" / "models--owner--name"
    snapshot = repo / "snapshots" / COMMIT
    for folder in (snapshot, repo / "refs", repo / "blobs"):
        folder.mkdir(parents=True)
    (repo / "refs" / "main").write_text(COMMIT)
    (repo / "refs" / "v1").write_text(COMMIT)
    (snapshot / "config.json").write_text("{}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return snapshot


@pytest.fixture
def download(cache, monkeypatch):
    """Stands in for snapshot_download: records its arguments; raises `download.error` if there is one."""
    class Download:
        error = None
        calls = ()

        def __call__(self, repo_id, **options):
            self.calls = (*self.calls, (repo_id, options, are_progress_bars_disabled()))
            if self.error:
                raise self.error
            return str(cache)

    stand_in = Download()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", stand_in)
    return stand_in


# --- local

def test_an_existing_directory_wins(tmp_path, download, monkeypatch):
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert resolve("owner/name") == Path("owner/name")
    assert resolve(tmp_path / "owner") == tmp_path / "owner"
    assert resolve(str(tmp_path)) == tmp_path
    assert resolve("~/owner") == tmp_path / "owner"
    assert resolve(".") == Path(".")
    assert download.calls == ()


@pytest.mark.parametrize("name", ["./absent", "../absent", "/absent/model", "~/absent", "a/b/c", "absent", "", "owner/",
                                  "owner/na me", "owner/name@", ".hidden/name", "-owner/name"])
def test_what_looks_local_is_not_downloaded(name, download):
    with pytest.raises(CheckpointError, match="no such directory, nor a name like owner/name") as caught:
        resolve(name)
    assert str(caught.value).startswith(repr(name))
    assert download.calls == ()


def test_a_file_is_no_directory(tmp_path, download):
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"")
    with pytest.raises(CheckpointError, match="is a file, expected a checkpoint directory; try "):
        resolve(file)
    assert download.calls == ()


# --- the cache

@pytest.mark.parametrize("name", ["owner/name", "owner/name@main", "owner/name@v1", f"owner/name@{COMMIT}"])
def test_offline_and_cached(cache, name):
    assert resolve(name) == cache


@pytest.mark.parametrize("name", ["owner/other", "owner/name@v2"])
def test_offline_and_not_cached(cache, name):
    with pytest.raises(CheckpointError, match=r"owner/.*not whole in the download cache \(.*cache\), and "
                                              "HF_HUB_OFFLINE is set; unset it to download"):
        resolve(name)


def test_the_environment_is_respected(cache):
    """As a user sets it: HF_HUB_OFFLINE and HF_HUB_CACHE are read when the library is first imported."""
    code = "from loaders.hub import resolve; import sys; print(resolve(sys.argv[1]))"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(cache.parents[2]), "PYTHONPATH": str(ROOT)}
    found = subprocess.run([sys.executable, "-c", code, "owner/name"], env=environment, capture_output=True, text=True)
    assert (found.stdout.strip(), found.stderr) == (str(cache), "")


# --- downloads

def test_what_is_asked_for(download):
    resolve("owner/name@refs/pr/1")
    (repo_id, options, _), = download.calls
    assert (repo_id, options["revision"]) == ("owner/name", "refs/pr/1")
    wanted = list(huggingface_hub.utils.filter_repo_objects(
        ["model-00001-of-00002.safetensors", "model.safetensors.index.json", "config.json", "generation_config.json",
         "tokenizer.json", "tokenizer.model", "chat_template.jinja", "pytorch_model.bin", "README.md", "model.gguf",
         "original/params.json", "onnx/model.safetensors"],
        allow_patterns=options["allow_patterns"], ignore_patterns=options["ignore_patterns"]))
    assert wanted == ["model-00001-of-00002.safetensors", "model.safetensors.index.json", "config.json",
                      "generation_config.json", "tokenizer.json", "tokenizer.model", "chat_template.jinja"]


@pytest.mark.parametrize("is_offline", [True, False])
def test_the_library_is_told_to_stay_offline(download, monkeypatch, is_offline):
    """By argument too: huggingface_hub 1.33 with HF_HUB_OFFLINE alone asks for the files of a commit all the same."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", is_offline)
    resolve(f"owner/name@{COMMIT}")
    assert download.calls[0][1]["local_files_only"] == is_offline


@pytest.mark.parametrize(("progress", "is_terminal", "is_quiet"), [
    (True, True, False), (True, False, True), (False, True, True), (False, False, True)])
def test_progress_bars(download, monkeypatch, progress, is_terminal, is_quiet):
    monkeypatch.setattr(hub.sys, "stderr", type("Stream", (), {"isatty": lambda self: is_terminal})())
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", None)
    before = are_progress_bars_disabled()
    resolve("owner/name", progress=progress)
    assert download.calls[0][2] == is_quiet
    assert are_progress_bars_disabled() == before


def error_of(kind, text="first line\nsecond line"):
    """An instance without the HTTP response that its constructor wants."""
    error = kind.__new__(kind)
    error.args = (text,)
    return error


@pytest.mark.parametrize(("kind", "expected"), [
    (errors.GatedRepoError, r"owner/name: asks for a licence.*https://huggingface\.co/owner/name, then `hf auth"),
    (errors.RepositoryNotFoundError, "owner/name: no such directory here, and no such repository.*check the name"),
    (errors.RevisionNotFoundError, "owner/name: has no revision v9; expected a branch, a tag or a commit"),
    (errors.HfHubHTTPError, "owner/name: the download failed: HfHubHTTPError"),
    (ConnectionError, "owner/name: the download failed: ConnectionError: first line; what has arrived is kept"),
    (OSError, "owner/name: the download failed: OSError: first line"),
])
def test_failures_say_what_to_do(download, kind, expected):
    download.error = error_of(kind)
    before = are_progress_bars_disabled()
    with pytest.raises(CheckpointError, match=expected) as caught:
        resolve("owner/name@v9")
    assert "\n" not in str(caught.value)
    assert are_progress_bars_disabled() == before


def test_no_network(download, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    download.error = error_of(errors.LocalEntryNotFoundError)
    with pytest.raises(CheckpointError, match=r"huggingface\.co cannot be reached; check the network \(first line\)"):
        resolve("owner/name")
