"""tools/export_hf.py as a user runs it."""

import json
import shutil
import sys

import pytest

from configurator import InputError
from nanomoe.load import load
from tests.helpers import MACBETH, ROOT, one_line, run_module, run_script, succeeded
from tests.hf_models import MOE, outcome, same_weights, write_checkpoint
from tools import export_hf


@pytest.fixture
def command(monkeypatch, capsys):
    """A function that calls export_hf.main() with arguments; returns its output or its error."""

    def call(*arguments):
        for key in ("out_dir", "folder", "dataset"):
            monkeypatch.setattr(export_hf, key, "")
        monkeypatch.setattr(export_hf, "remote_code", False)
        monkeypatch.setattr(sys, "argv", ["export_hf", *map(str, arguments)])
        error = outcome(export_hf.main)
        out, err = capsys.readouterr()
        assert not err
        return error or out

    return call


def names(folder):
    return {path.name for path in folder.iterdir()}


WITHOUT_TOKENIZER = {"config.json", "generation_config.json", "model.safetensors"}


def test_command(play, tmp_path, command):
    data = shutil.copytree(play, tmp_path / "data")
    out, hf, moved = tmp_path / "out", tmp_path / "new" / "hf", tmp_path / "moved"
    chars = json.loads((data / "meta.json").read_text())["chars"]
    model = write_checkpoint(out, MOE | {"vocab_size": len(chars)}, dataset=str(data))
    done = run_module("tools.export_hf", out, hf)
    lines = succeeded(done).splitlines()
    assert done.stderr == "" and len(lines) == 3
    assert "after 3 steps: MixtralForCausalLM (softmax router" in lines[0]
    assert "differ by" in lines[1]
    assert lines[2].startswith(f"{hf}: 0.") and lines[2].endswith("with the tokenizer 'char'")
    assert names(hf) == WITHOUT_TOKENIZER | {"tokenizer.json", "tokenizer_config.json"}
    found = load(hf)
    same_weights(found, model)
    assert found.tokenizer == {"tokenizer": "char", "vocab_size": len(chars), "chars": chars}
    sampling = {"start": MACBETH[:20], "num_samples": 1, "max_new_tokens": 5, "device": "cpu"}
    done = run_script("sample.py", init_from=hf, **sampling)
    assert succeeded(done).startswith(MACBETH[:20])
    before = {path: path.stat().st_mtime_ns for path in hf.iterdir()}
    assert "new/hf exists and is not an empty folder: choose another name" in command(out, hf)
    assert before == {path: path.stat().st_mtime_ns for path in hf.iterdir()}
    # without its dataset, and into a folder that is there but empty
    shutil.move(data, moved)
    (tmp_path / "empty").mkdir()
    printed = command(out, tmp_path / "empty")
    assert "without a tokenizer: " in printed and "there is no dataset" in printed
    assert "--dataset=" in printed and names(tmp_path / "empty") == WITHOUT_TOKENIZER
    assert "with the tokenizer 'char'" in command(out, tmp_path / "named", f"--dataset={moved}")
    error = command(out, tmp_path / "bad", "--dataset=nothing")
    assert error.startswith("InputError: there is no dataset 'nothing'")
    meta = {"tokenizer": "byte", "vocab_size": 256, "dtype": "uint16"}
    (moved / "meta.json").write_text(json.dumps(meta))
    error = command(out, tmp_path / "bad", f"--dataset={moved}")
    assert "has 256 token ids, the model of" in error
    assert not list(tmp_path.glob("bad*"))


def test_command_says_no(tmp_path, command):
    for arguments, words in (
        ([], "expected a checkpoint and a new folder"),
        (["a"], "expected a checkpoint"),
        (["a", "b", "c"], "unexpected argument 'c': expected out_dir and folder"),
        (["a", ROOT / "README.md"], "is not an empty folder"),
        (["nowhere", tmp_path / "hf"], "no checkpoint at nowhere"),
    ):
        found = command(*arguments)
        assert found.startswith("InputError: ") and words in found
    write_checkpoint(tmp_path / "out", {"use_moe": True})
    done = run_module("tools.export_hf", tmp_path / "out", tmp_path / "hf")
    advice = "--norm=rmsnorm --position=rope --mlp=swiglu"
    one_line(done, 2, advice, "or export it with --remote_code=True")
    assert names(tmp_path) == {"out"}
    printed = command(tmp_path / "out", tmp_path / "hf", "--remote_code=True")
    assert "NanoMoEForCausalLM" in printed
    assert "came without a tokenizer; or name a dataset" in printed
    code = {path.name for path in (tmp_path / "hf").glob("*.py")}
    assert code == {"modeling_nanomoe.py", "model.py", "moe_model.py"}


def test_transformers_is_needed(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(InputError, match="pip install transformers"):
        export_hf.import_transformers()
