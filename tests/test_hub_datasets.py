"""openwebtext and fineweb_edu from a hub, which here is a server on this machine."""

import os
import signal

import pytest

from nanomoe.dataset import Dataset
from tests.dataset_hub import DatasetHub
from tests.helpers import full, needs_gpt2_tokenizer, one_line, succeeded, until
from tests.preparing import decode, digest, prepare, recorded, start
from tests.test_documents import write_parquet

TEXTS = [f"Document {i}." + " Some words" * (i % 50) for i in range(6000)]


def write_parts(folder, name):
    """The texts as three parquet files. name: theirs, with a place for the number."""
    for part in range(3):
        path = folder / name.format(part)
        path.parent.mkdir(parents=True, exist_ok=True)
        columns = {"text": TEXTS[part * 2000 : part * 2000 + 2000]}
        write_parquet(path, columns, row_group_size=500)
    return folder


def with_script(folder):
    (folder / "main").mkdir(parents=True)
    (folder / "main" / "openwebtext.py").write_text("raise SystemExit('a dataset script ran')\n")
    return folder / "main"


@pytest.fixture
def serve(tmp_path):
    """A function that starts a hub with openwebtext; returns the environment of its users."""
    needs_gpt2_tokenizer()

    def start(revisions, **options):
        hub = DatasetHub({"Skylion007/openwebtext": revisions}, **options)
        env = {"HF_ENDPOINT": hub.address, "NO_PROXY": "127.0.0.1", "HF_HUB_OFFLINE": "0"}
        return env | {"HF_HOME": str(tmp_path / "hf")}

    return start


def revisions(form, root):
    """What a hub has of openwebtext, in one of the forms that its repository has or had."""
    if form == "plain":
        return {"main": write_parts(root, "plain_text/train-{:05}-of-00003.parquet")}
    split = "train" if form == "converted" else "partial-train"
    converted = write_parts(root / "converted", f"plain_text/{split}/{{:04}}.parquet")
    return {"main": with_script(root), "refs/convert/parquet": converted}


@pytest.mark.parametrize("form", [full("plain"), "converted"])
def test_openwebtext(form, serve, copy_of, tmp_path):
    """As parquet; or with a dataset script, which `datasets` refuses to run, and a conversion."""
    folder = copy_of("openwebtext")
    succeeded(prepare(folder, "--processes=1", **serve(revisions(form, tmp_path / "repo"))))
    train, val = decode(folder, "train"), decode(folder, "val")
    assert val.split("<|endoftext|>") == [*TEXTS[::2000], ""]
    assert train.split("<|endoftext|>") == [t for i, t in enumerate(TEXTS) if i % 2000] + [""]
    assert Dataset(folder, 8).meta["source"] == "hub:Skylion007/openwebtext/default"


@pytest.mark.full
def test_a_part_of_openwebtext(serve, copy_of, tmp_path):
    """Of large datasets the hub converts only the first part. That is not taken for the whole."""
    folder = copy_of("openwebtext")
    env = serve(revisions("partial", tmp_path / "repo"))
    words = "only the first part of it as parquet (3 files at refs/convert/parquet)"
    one_line(prepare(folder, **env), 1, words, "--documents=N takes the first N")
    succeeded(prepare(folder, "--documents=4500", **env))
    assert decode(folder, "train").count("<|endoftext|>") == 4497


@pytest.mark.parametrize(
    "form, words",
    [
        ("no conversion", "RevisionNotFound"),
        full("an empty one", "no parquet"),
        full("no hub", "Couldn't reach"),
    ],
)
def test_what_cannot_be_read_from_the_hub(form, words, serve, copy_of, tmp_path):
    (tmp_path / "empty").mkdir()
    repo = {"main": with_script(tmp_path / "repo")}
    if form == "an empty one":
        repo["refs/convert/parquet"] = tmp_path / "empty"
    env = serve(repo) | ({"HF_HUB_OFFLINE": "1"} if form == "no hub" else {})
    done = prepare(copy_of("openwebtext"), **env)
    words = ["could not read hub:", words, "--files reads your own copy of it"]
    one_line(done, 1, *words, "data/fineweb_edu/prepare.py prepares a similar dataset")


@pytest.mark.full
def test_a_killed_stream_goes_on(serve, copy_of, tmp_path):
    """And every other answer of the hub breaks off, which huggingface_hub asks for again."""
    folder = copy_of("openwebtext", changed=True)
    env = serve(revisions("plain", tmp_path / "repo"), break_after=10_000)
    succeeded(prepare(folder, **env))
    expected = digest(folder)
    (folder / "meta.json").unlink()
    process = start(folder, env=env)
    until(lambda: recorded(folder) > 2000)
    os.kill(process.pid, signal.SIGSTOP)
    documents = recorded(folder)
    process.kill()
    process.communicate()
    assert 2000 < documents < 6000
    assert f"continuing after {documents:,} documents" in succeeded(prepare(folder, **env))
    assert digest(folder) == expected
