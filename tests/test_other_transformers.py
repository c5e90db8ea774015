"""What we export means the same to transformers 4 and 5."""

import inspect
import json
import os
import subprocess
import venv
from pathlib import Path

import pytest
import torch

from moe_model import build_config
from nanomoe import checkpoint
from nanomoe.hf.classes import FAMILIES, hf_config, matching_class
from tests.helpers import tokens
from tests.hf_models import MOE, VARIANTS, auto, export, write_checkpoint

MODELS = {name.split()[0]: settings for name, settings in VARIANTS.items()}
SIZES = {"n_embd": 32, "n_head": 2, "n_layer": 2, "block_size": 32, "vocab_size": 60}


def read(folders):
    """What the classes of this transformers make of all keys of the config.json in each folder."""
    import transformers

    files = [Path(folder, "config.json").read_text() for folder in folders]
    keys = {key for file in files for key in json.loads(file)} - {"rope_parameters", "dtype"}
    found = {}
    for folder in folders:
        c = transformers.AutoConfig.from_pretrained(folder)
        old = transformers.__version__.startswith("4.")
        rope = c.to_dict() if old else getattr(c, "rope_parameters", {})
        found[c.model_type] = {key: getattr(c, key, None) for key in keys}
        found[c.model_type]["rope_theta"] = rope.get("rope_theta")
    return found


def folders(tmp_path, **more):
    paths = []
    for name, settings in MODELS.items():
        config = build_config(SIZES | settings | more)
        family = matching_class(config)
        assert family.model_type == name
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(hf_config(config, family)))
        paths.append(str(tmp_path / name))
    assert {family.model_type for family in FAMILIES} == set(MODELS)
    return paths


@pytest.mark.parametrize("coefficient", [0.02, 0.0])
def test_the_balance_loss_goes_along(coefficient, tmp_path):
    found = read(folders(tmp_path, expert_load_balance_loss_coef=coefficient))
    for name in ("mixtral", "qwen2_moe", "qwen3_moe"):
        assert found[name]["router_aux_loss_coef"] == coefficient
        assert found[name]["output_router_logits"] == (coefficient > 0)


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "qwen3_moe"])
def test_generating_in_batches(name, tmp_path):
    """transformers adds the balance loss wherever it computes the model, and generates all the
    same."""
    export(MODELS[name], tmp_path / "hf")
    theirs = auto(tmp_path / "hf")
    idx, mask = tokens(2, 6), torch.ones(2, 6, dtype=torch.long)
    mask[0, :3] = 0
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    alone = theirs.generate(idx[1:], attention_mask=mask[1:], **options)
    both = theirs.generate(idx, attention_mask=mask, **options)
    assert both.shape == (2, 10) and both[1].equal(alone[0])
    assert theirs.generate(idx, num_beams=2, **options).shape == (2, 10)
    labels = {"input_ids": idx, "labels": idx}
    balanced, plain = theirs(**labels), theirs(**labels, output_router_logits=False)
    assert balanced.aux_loss > 0.9
    torch.testing.assert_close(balanced.loss, plain.loss + 0.02 * balanced.aux_loss)


@pytest.mark.full
def test_transformers_4_reads_the_same(tmp_path):
    """In an environment of its own, without torch."""
    venv.create(tmp_path / "venv", with_pip=True)
    python = str(tmp_path / "venv" / "bin" / "python")
    install = [python, "-m", "pip", "install", "-q", "transformers==4.57.3"]
    done = subprocess.run(install, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    paths = folders(tmp_path)
    imports = "import json, sys\nfrom pathlib import Path\n"
    source = f"{imports}{inspect.getsource(read)}print(json.dumps(read(sys.argv[1:])))"
    env = os.environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    done = subprocess.run(
        [python, "-c", source, *paths], capture_output=True, text=True, env=env, check=True
    )
    four, five = json.loads(done.stdout.splitlines()[-1]), read(paths)
    for name in MODELS:
        # what only one of them knows does not count
        both = {key for key in four[name] if None not in (four[name][key], five[name][key])}
        assert {k: four[name][k] for k in both} == {k: five[name][k] for k in both}
        assert name == "gpt2" or four[name]["rope_theta"] == 10000.0


@pytest.mark.parametrize("mask, mode", [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_files_have_the_mode_of_the_umask(mask, mode, tmp_path):
    before = os.umask(mask)
    try:
        write_checkpoint(tmp_path / "run", MOE)
        export(MOE, tmp_path / "hf")
    finally:
        os.umask(before)
    files = [*checkpoint.latest_good(tmp_path / "run").iterdir(), *(tmp_path / "hf").iterdir()]
    assert {oct(path.stat().st_mode & 0o777) for path in files} == {oct(mode)}, files
