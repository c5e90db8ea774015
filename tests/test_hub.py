"""Models of the hub: found in its cache, downloaded, or refused in one line."""

import http.server
import time
from pathlib import Path

import pytest
from huggingface_hub import constants, hf_hub_download

from nanomoe.hf import read
from nanomoe.load import load
from tests.dataset_hub import DatasetHub
from tests.helpers import one_line, run_script
from tests.hf_models import gpt2, outcome, same_logits, save_as_hub


def test_what_counts_as_a_name_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    for name in ("gpt2", "gpt2-xl", "openai-community/gpt2", "a-b/c.d_e-1", Path("org/model")):
        assert read.looks_like_hub_id(name), name
    for name in ("gpt3", "out/run", "a/b/c", "/a/b", "./a", "../a", "org/", "/org", "a/b c", ""):
        assert not read.looks_like_hub_id(name), name
    assert get("out/run") == "InputError: no checkpoint at out/run: no such file or folder"
    # which asks no one
    assert "InputError: no checkpoint at not/there-yet" in outcome(load, "not/there-yet")
    (tmp_path / "gpt2").mkdir()
    assert not read.looks_like_hub_id("gpt2")
    assert "InputError: no checkpoint in gpt2" in get("gpt2")


@pytest.fixture
def use_hub(monkeypatch, tmp_path):
    """A function that makes an address the hub, with a cache that is empty at first."""
    monkeypatch.setattr(read, "SECONDS", 2)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))

    def use(address, offline=False):
        url = address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)

    return use


def get(name):
    """A Checkpoint from the hub, or the error as text."""
    return outcome(load, name, on_hub=True)


def test_download_and_cache(use_hub, tmp_path):
    theirs = gpt2()
    tiny = save_as_hub(theirs, tmp_path / "tiny")
    (tiny / "README.md").write_text("not needed")
    gpt2(vocab_size=60).save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    pickled = save_as_hub(gpt2(), tmp_path / "pickled", ".bin")
    folders = {"tiny": tiny, "shards": tmp_path / "shards", "pickled": pickled}
    hub = DatasetHub({f"org/{name}": {"main": folder} for name, folder in folders.items()})
    use_hub(hub.address)
    # other programs fetch the config alone
    hf_hub_download("org/tiny", "config.json", cache_dir=tmp_path / "cache")
    same_logits(get("org/tiny").build_model().eval(), theirs)
    assert get("org/shards").config.vocab_size == 60
    assert get("org/pickled").startswith(
        "InputError: org/pickled on the hub is not a model of transformers: it has no config.json "
    )
    assert get("org/nothing") == (
        "InputError: no checkpoint at org/nothing: no such file or folder here, and no model "
        f"org/nothing on {hub.address}, or it is private (then run: hf auth login)"
    )
    assert "no model openai-community/gpt2-xl on" in get("gpt2-xl")
    assert not list((tmp_path / "cache").rglob("README*"))
    # After that no network is needed. But half a download does not count.
    use_hub("http://127.0.0.1:9")
    assert get("org/tiny").config.vocab_size == 50 and get("org/shards").config.vocab_size == 60
    next((tmp_path / "cache").rglob("snapshots/*/model-00002*")).unlink()
    assert get("org/shards").startswith("OSError: no checkpoint at org/shards")


def test_without_a_network(use_hub):
    # takes connections, answers nothing
    deaf = http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)
    for address in ("http://127.0.0.1:9", f"http://127.0.0.1:{deaf.server_port}"):
        use_hub(address)
        start = time.perf_counter()
        assert get("gpt2").startswith(
            "OSError: no checkpoint at gpt2: no such file or folder here, and "
            f"openai-community/gpt2 could not be fetched from {address} ("
        )
        assert time.perf_counter() - start < 10
    deaf.server_close()
    use_hub("http://127.0.0.1:9", offline=True)
    assert "org/name is not in the cache and HF_HUB_OFFLINE is set" in get("org/name")


def test_sample_without_a_network(tmp_path):
    env = {"HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path), "NO_PROXY": "127.0.0.1"}
    env["HF_ENDPOINT"] = "http://127.0.0.1:9"
    done = run_script("sample.py", init_from="gpt2", device="cpu", env=env)
    one_line(done, 1, "no checkpoint at gpt2", "could not be fetched from http://127.0.0.1:9")
