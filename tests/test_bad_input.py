"""Bad input gives one clear line, loses nothing and never hangs.

The exit code is 2, or 1 for a file that cannot be read or written.
"""

import json
import pickle
import resource
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

from nanomoe import checkpoint
from tests.helpers import ROOT, SMALL, Bomb, fit_manifest, flags, full, one_line, run_script, train


@pytest.fixture
def copy(play, tmp_path):
    return shutil.copytree(play, tmp_path / "data")


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"use_moe": True, "top_k": 0}, ["top_k is 0"]),
        ({"use_moe": True, "num_experts": 0}, ["num_experts is 0"]),
        (
            {"use_moe": True, "num_experts": 4, "top_k": 5},
            ["top_k (5) is larger than num_experts (4)"],
        ),
        ({"n_embd": 33}, ["n_embd (33) is not divisible by n_head (2)"]),
        ({"batch_size": 0}, ["batch_size is 0"]),
        ({"max_iters": 0}, ["max_iters is 0"]),
        ({"learning_rate": "nan"}, ["learning_rate"]),
        ({"beta2": 1.0}, ["beta2 is 1.0"]),
        ({"block_size": 100_000}, ["train.bin", "block_size (100000)"]),
        (
            {"block_size": 50_000},
            ["val.bin", "block_size (50000)"],
        ),  # validation shorter than a block
        (
            {"dataset": "shakespear"},
            ["no dataset 'shakespear'", "plays_char", "data/text/prepare.py"],
        ),
        ({"dataset": "text"}, ["'text' is not prepared"]),
        ({"device": "tpu"}, ["device is 'tpu'"]),
        ({"dtype": "int8"}, ["dtype is 'int8'"]),
        ({"device": "cuda:abc"}, ["device is 'cuda:abc'"]),
        ({"device": "True"}, ["device is 'True'"]),
        ({"compile": "maybe"}, ["compile is 'maybe', expected one of True, False, auto"]),
        ({"seed": 2**64}, ["seed is"]),
        ({"weight_decay": "1e999"}, ["weight_decay is inf, expected a finite number"]),
        ({"use_moe": True, "router_bias_update_rate": "1e999"}, ["router_bias_update_rate is inf"]),
        (
            {"use_moe": True, "router_score": "sigmoid", "router_z_loss_coef": 0.1},
            ["router_z_loss_coef", "sigmoid"],
        ),
        ({"max_seconds": -1}, ["max_seconds is -1"]),
        ({"lr_schedule": "linear"}, ["lr_schedule is 'linear', expected one of cosine, wsd"]),
        ({"decay_share": -0.1}, ["decay_share is -0.1, expected at least 0"]),
        ({"decay_share": 1.5}, ["decay_share is 1.5, expected at most 1"]),
        ({"decay_share": "1e999"}, ["decay_share is inf, expected a finite number"]),
        ({"init_from": "resume"}, ["no checkpoint in"]),
        ({"init_from": "upcycle"}, ["upcycle_from"]),
        ({"upcycle_from": "x"}, ["upcycle_from is 'x'", "'scratch'"]),
        ({"init_from": "upcycle", "upcycle_from": "nowhere"}, ["no checkpoint at nowhere"]),
        ({"init_from": "nowhere"}, ["no checkpoint at nowhere"]),
    ],
)
def test_settings(settings, words, play, tmp_path):
    one_line(train(**{"dataset": play, "out_dir": tmp_path} | settings), 2, *words)
    assert not list(tmp_path.iterdir())


def test_no_cuda(play, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("this machine has cuda")
    one_line(
        train(dataset=play, out_dir=tmp_path, device="cuda"),
        2,
        "device is 'cuda'",
        "sees 0 cuda devices",
    )
    one_line(run_script("sample.py", out_dir=tmp_path, device="cuda"), 2, "device is 'cuda'")


def test_several_problems_are_reported_together(play, tmp_path):
    done = train(
        dataset=play,
        out_dir=tmp_path,
        batch_size=0,
        n_embd=33,
        use_moe=True,
        top_k=9,
        learning_rate=-1,
    )
    assert done.returncode == 2
    for words in ("batch_size is 0", "n_embd (33)", "top_k (9)", "learning_rate is -1.0"):
        assert words in done.stderr


def test_missing_train_bin(copy, tmp_path):
    (copy / "train.bin").unlink()
    one_line(
        train(dataset=copy, out_dir=tmp_path / "out"), 2, "is not prepared", "data/text/prepare.py"
    )


def test_truncated_val_bin(copy, tmp_path):
    with open(copy / "val.bin", "r+b") as file:
        file.truncate(999)
    one_line(train(dataset=copy, out_dir=tmp_path / "out"), 1, "val.bin is truncated: 999 bytes")


@pytest.mark.parametrize("processes", [1, full(2)])
def test_token_id_beyond_the_vocabulary(copy, tmp_path, processes):
    data = np.fromfile(copy / "train.bin", np.uint16)
    data[12345] = 999
    data.tofile(copy / "train.bin")
    done = train(dataset=copy, out_dir=tmp_path / "out", processes=processes)
    if processes == 1:
        one_line(done, 2, "train.bin holds token id 999, beyond the vocabulary")
    else:  # torchrun adds its own report, and its own exit code
        assert (
            done.returncode != 0
            and done.stderr.count("error: ") == 1
            and "token id 999" in done.stderr
        )


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"gradient_accumulation_steps": 3}, "is not divisible by the number of processes (2)"),
        full({"n_embd": 33}, "n_embd (33) is not divisible"),
        full({"out_dir": "README.md/out"}, "cannot be written"),
    ],
)
def test_under_torchrun_one_line_and_no_hang(settings, words, play, tmp_path):
    run = {"dataset": play, "out_dir": tmp_path / "out"}
    done = train(processes=2, timeout=60, **run | settings)
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode != 0 and len(lines) == 1 and words in lines[0], done.stderr


def test_config_file_with_a_syntax_error(tmp_path):
    (tmp_path / "c.py").write_text("batch_size = 4\nn_layer = = 2\n")
    one_line(run_script("train.py", str(tmp_path / "c.py")), 2, "c.py, line 2", "SyntaxError")


def test_out_dir_that_cannot_be_written(play, tmp_path):
    (tmp_path / "file").write_text("precious")
    one_line(
        train(dataset=play, out_dir=tmp_path / "file" / "out"),
        1,
        "out_dir",
        "cannot be written",
        "Not a directory",
    )
    one_line(train(dataset=play, out_dir=tmp_path / "file"), 1, "cannot be written")
    assert (tmp_path / "file").read_text() == "precious"


def test_damaged_and_malicious_checkpoints(play, tmp_path):
    out_dir = tmp_path / "out"
    assert train(dataset=play, out_dir=out_dir).returncode == 0
    path = checkpoint.latest_good(out_dir)
    whole = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(whole[:1000])
    one_line(run_script("sample.py", out_dir=out_dir), 1, str(path), "is damaged")
    one_line(train(dataset=play, out_dir=out_dir, init_from="resume"), 1, str(path), "is damaged")
    (path / "model.safetensors").write_bytes(whole)
    (path / "training.pt").write_bytes(pickle.dumps(Bomb()))
    one_line(
        train(dataset=play, out_dir=out_dir, init_from="resume"),
        1,
        "training.pt is not as it was written",
    )
    fit_manifest(path)  # by someone who made the manifest fit
    done = one_line(
        train(dataset=play, out_dir=out_dir, init_from="resume"), 2, "training.pt is refused"
    )
    assert "executed" not in done.stdout
    torch.save({"model": Bomb()}, tmp_path / "ckpt.pt")
    done = one_line(run_script("sample.py", out_dir=tmp_path / "ckpt.pt"), 2, "ckpt.pt is refused")
    assert "executed" not in done.stdout


def test_sample(play, tmp_path):
    out_dir = tmp_path / "out"
    shutil.copytree(play, tmp_path / "data")
    assert train(dataset=tmp_path / "data", out_dir=out_dir).returncode == 0
    one_line(run_script("sample.py", out_dir=tmp_path / "nowhere"), 2, "no checkpoint at")
    one_line(run_script("sample.py", out_dir=tmp_path), 2, "no checkpoint in")
    one_line(
        run_script("sample.py", out_dir=out_dir, start="Straße €"),
        2,
        "outside the vocabulary: 'ß' '€'",
    )
    one_line(run_script("sample.py", out_dir=out_dir, start=""), 2, "the prompt is empty")
    one_line(run_script("sample.py", out_dir=out_dir, start="FILE:nothing.txt"), 1, "nothing.txt")
    one_line(run_script("sample.py", out_dir=out_dir, temperature=-1), 2, "temperature is -1.0")
    shutil.move(tmp_path / "data", tmp_path / "moved")
    for dataset in ("", tmp_path / "moved"):  # the checkpoint has its tokenizer
        done = run_script("sample.py", out_dir=out_dir, dataset=dataset, max_new_tokens=5)
        assert done.returncode == 0, done.stderr
    done = run_script("sample.py", out_dir=out_dir, dataset=tmp_path / "data")
    one_line(done, 2, str(tmp_path / "data"))


def test_a_dataset_with_a_larger_vocabulary_than_the_checkpoint(play, copy, tmp_path):
    assert train(dataset=play, out_dir=tmp_path / "out").returncode == 0
    meta = json.loads((copy / "meta.json").read_text())
    (copy / "meta.json").write_text(
        json.dumps(meta | {"vocab_size": 99, "chars": [chr(200 + i) for i in range(99)]})
    )
    one_line(train(dataset=copy, out_dir=tmp_path / "out", init_from="resume"), 2, "99 token ids")
    one_line(run_script("sample.py", dataset=copy, out_dir=tmp_path / "out"), 2, "99 token ids")


@pytest.mark.parametrize(
    "large, gigabytes, advice",
    [
        (
            {
                "batch_size": 3000,
                "block_size": 2000,
                "gradient_accumulation_steps": 5,
                "n_embd": 512,
            },
            6,
            "--batch_size=1500 --gradient_accumulation_steps=10 instead of 3000 and 5",
        ),
        full(
            {"eval_only": True, "batch_size": 800, "n_embd": 64, "mlp_dim": 40_000, "n_layer": 1},
            3,
            "--batch_size=400 --gradient_accumulation_steps=4 instead of 800 and 2",
        ),
    ],
    ids=["training", "evaluation"],
)
def test_out_of_memory_says_what_to_change(large, gigabytes, advice, play, tmp_path):
    def limit():
        resource.setrlimit(resource.RLIMIT_AS, (gigabytes * 2**30, gigabytes * 2**30))

    command = [
        sys.executable,
        str(ROOT / "train.py"),
        *flags(**SMALL | large, dataset=play, out_dir=tmp_path),
    ]
    done = subprocess.run(
        command, preexec_fn=limit, capture_output=True, text=True, cwd=ROOT, timeout=240
    )
    one_line(done, 1, f"out of memory: with {advice}")


@pytest.mark.parametrize(
    "arguments, content, words",
    [
        ([], "", "there is no text"),
        ([], " \n\n", "there is no text"),
        (["--val_fraction=2"], "some text", "--val_fraction is 2.0"),
        (["--name=text"], "some text", "--name 'text' is taken"),
        (["--name=../x"], "some text", "--name '../x'"),
        (["--name=.."], "some text", "--name '..'"),
        ([], "x", "is empty"),
    ],
)
def test_prepare_text(arguments, content, words, tmp_path):
    (tmp_path / "a.txt").write_text(content)
    name = [] if any("--name" in a for a in arguments) else [f"--name=test-{tmp_path.name}"]
    one_line(
        run_script("data/text/prepare.py", "--input", str(tmp_path / "a.txt"), *arguments, *name),
        2,
        words,
    )
    assert not (ROOT / "data" / f"test-{tmp_path.name}" / "train.bin").exists()
    shutil.rmtree(ROOT / "data" / f"test-{tmp_path.name}", ignore_errors=True)
