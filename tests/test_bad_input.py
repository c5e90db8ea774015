"""Bad input gives one clear line, loses nothing and never hangs.

The exit code is 2, or 1 for a file that cannot be read or written.
"""

import json
import pickle
import shutil

import numpy as np
import pytest
import torch

from nanomoe import checkpoint
from tests.helpers import Bomb, altered_train, fit_manifest, full, one_line, run_script, train

# settings that cannot work, each with its error
CONTRADICTIONS = [
    ({"n_head": 2, "n_embd": 33}, "n_embd (33) is not divisible by n_head (2)"),
    ({"n_head": 4, "n_embd": 64, "n_kv_head": 3}, "n_head (4) is not divisible by n_kv_head (3)"),
    ({"position": "rope", "n_head": 2, "n_embd": 6}, "rope needs an even n_embd / n_head"),
    ({"use_moe": True, "num_experts": 4, "top_k": 5}, "top_k (5) is larger than num_experts (4)"),
    ({"use_moe": True, "n_layer": 2, "num_dense_layers": 2}, "no layer is MoE"),
    (
        {"use_moe": True, "router_score": "sigmoid", "router_z_loss_coef": 0.1},
        "router_z_loss_coef needs router_score 'softmax', not 'sigmoid'",
    ),
    ({"dtype": "float16", "spike_guard": 6.0}, "spike_guard and parallel 'fsdp' need bfloat16"),
    ({"block_size": 100_000}, "block_size (100000)"),
    ({"block_size": 50_000}, "val.bin"),  # validation shorter than a block
    ({"dataset": "shakespear"}, "no dataset 'shakespear'"),
    ({"dataset": "text"}, "'text' is not prepared"),
    ({"device": "tpu"}, "device is 'tpu'"),
    ({"device": "cuda:abc"}, "device is 'cuda:abc'"),
    ({"device": "True"}, "device is 'True'"),
    ({"dtype": "int8"}, "dtype is 'int8'"),
    ({"compile": "maybe"}, "compile is 'maybe', expected one of True, False, auto"),
    ({"init_from": "resume"}, "no checkpoint"),
    ({"init_from": "upcycle"}, "upcycle_from"),
    ({"upcycle_from": "x"}, "upcycle_from is 'x'"),
    ({"init_from": "upcycle", "upcycle_from": "nowhere"}, "no checkpoint at nowhere"),
    ({"init_from": "nowhere"}, "no checkpoint at nowhere"),
]


@pytest.fixture
def copy(play, tmp_path):
    return shutil.copytree(play, tmp_path / "data")


@pytest.mark.parametrize("settings, words", CONTRADICTIONS)
def test_settings(settings, words, play, tmp_path):
    one_line(train(**{"dataset": play, "out_dir": tmp_path} | settings), 2, words)
    assert not list(tmp_path.iterdir())


def test_several_problems_are_reported_together(play, tmp_path):
    """Those of the run's settings and those of the model's, each in a line."""
    wrong = {"batch_size": 0, "weight_decay": "1e999", "lr_schedule": "linear", "top_k": 0}
    done = train(dataset=play, out_dir=tmp_path, use_moe=True, **wrong)
    assert done.returncode == 2 and sorted(done.stderr.splitlines()) == [
        "error: batch_size is 0, expected at least 1",
        "error: lr_schedule is 'linear', expected one of cosine, wsd",
        "error: top_k is 0, expected at least 1",
        "error: weight_decay is inf, expected a finite number",
    ]


def test_datasets_with_missing_parts(copy, tmp_path):
    run = {"dataset": copy, "out_dir": tmp_path / "out"}
    with open(copy / "val.bin", "r+b") as file:
        file.truncate(999)
    one_line(train(**run), 1, "val.bin is truncated: 999 bytes")
    (copy / "train.bin").unlink()
    one_line(train(**run), 2, "is not prepared", "data/text/prepare.py")


@pytest.mark.parametrize("processes", [1, full(2)])
def test_token_id_beyond_the_vocabulary(copy, tmp_path, processes):
    data = np.fromfile(copy / "train.bin", np.uint16)
    data[12345] = 999
    data.tofile(copy / "train.bin")
    done = train(dataset=copy, out_dir=tmp_path / "out", processes=processes)
    if processes == 1:
        one_line(done, 2, "train.bin holds token id 999, beyond the vocabulary")
    else:  # torchrun adds its own report, and its own exit code
        errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert done.returncode != 0 and len(errors) == 1 and "token id 999" in errors[0]


@pytest.mark.full
@pytest.mark.parametrize(
    "settings, words",
    [
        ({"gradient_accumulation_steps": 3}, "is not divisible by the number of processes (2)"),
        ({"n_embd": 33}, "n_embd (33) is not divisible"),
        ({"out_dir": "README.md/out"}, "cannot be written"),
    ],
)
def test_under_torchrun_one_line_and_no_hang(settings, words, play, tmp_path):
    run = {"dataset": play, "out_dir": tmp_path / "out"}
    done = train(processes=2, timeout=60, **run | settings)
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode != 0 and len(lines) == 1 and words in lines[0], done.stderr


def test_out_dir_that_cannot_be_written(play, tmp_path):
    (tmp_path / "file").write_text("precious")
    done = train(dataset=play, out_dir=tmp_path / "file" / "out")
    one_line(done, 1, "out_dir", "cannot be written", "Not a directory")
    one_line(train(dataset=play, out_dir=tmp_path / "file"), 1, "cannot be written")
    assert (tmp_path / "file").read_text() == "precious"


def test_damaged_and_malicious_checkpoints(play, dense_run, tmp_path):
    out_dir = shutil.copytree(dense_run, tmp_path / "out")
    path = checkpoint.latest_good(out_dir)
    whole = (path / "model.safetensors").read_bytes()

    def resume():
        return train(dataset=play, out_dir=out_dir, init_from="resume", max_iters=40)

    (path / "model.safetensors").write_bytes(whole[:1000])
    one_line(run_script("sample.py", out_dir=out_dir), 1, str(path), "is damaged")
    one_line(resume(), 1, str(path), "is damaged")
    (path / "model.safetensors").write_bytes(whole)
    (path / "training.pt").write_bytes(pickle.dumps(Bomb()))
    one_line(resume(), 1, "training.pt is not as it was written")
    fit_manifest(path)  # by someone who made the manifest fit
    assert "executed" not in one_line(resume(), 2, "training.pt is refused").stdout
    torch.save({"model": Bomb()}, tmp_path / "ckpt.pt")
    done = one_line(run_script("sample.py", out_dir=tmp_path / "ckpt.pt"), 2, "ckpt.pt is refused")
    assert "executed" not in done.stdout


def test_a_dataset_with_a_larger_vocabulary_than_the_checkpoint(dense_run, copy, tmp_path):
    meta = json.loads((copy / "meta.json").read_text())
    meta |= {"vocab_size": 99, "chars": [chr(200 + i) for i in range(99)]}
    (copy / "meta.json").write_text(json.dumps(meta))
    out_dir = shutil.copytree(dense_run, tmp_path / "out")
    one_line(train(dataset=copy, out_dir=out_dir, init_from="resume"), 2, "99 token ids")
    one_line(run_script("sample.py", dataset=copy, out_dir=out_dir), 2, "99 token ids")


LARGE = {"batch_size": 3000, "block_size": 2000, "gradient_accumulation_steps": 5, "n_embd": 512}
LARGE_EVAL = {"eval_only": True, "batch_size": 800, "n_embd": 64, "mlp_dim": 40_000, "n_layer": 1}


@pytest.mark.parametrize(
    "large, gigabytes, advice",
    [
        (LARGE, 6, "--batch_size=1500 --gradient_accumulation_steps=10 instead of 3000 and 5"),
        full(
            LARGE_EVAL, 3, "--batch_size=400 --gradient_accumulation_steps=4 instead of 800 and 2"
        ),
    ],
    ids=["training", "evaluation"],
)
def test_out_of_memory_says_what_to_change(large, gigabytes, advice, play, tmp_path):
    limit = f"import resource\nresource.setrlimit(resource.RLIMIT_AS, 2 * ({gigabytes} * 2**30,))"
    script = altered_train(tmp_path / "limited.py", limit)
    done = train(script=script, **large, dataset=play, out_dir=tmp_path / "run")
    one_line(done, 1, f"out of memory: with {advice}")


@pytest.mark.parametrize("name, words", [("text", "'text' is taken"), ("..", "'..' is not a")])
def test_prepare_text(name, words, copy_of, tmp_path):
    """The other errors are in tests/test_preparing.py."""
    folder = copy_of("text")
    (tmp_path / "a.txt").write_text("some text")
    arguments = ["--input", tmp_path / "a.txt", f"--name={name}"]
    one_line(run_script(folder / "prepare.py", *arguments), 2, f"--name {words}")
    assert not list(folder.parent.rglob("train.bin"))
