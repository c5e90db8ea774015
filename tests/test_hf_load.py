"""Models of transformers are read; what cannot be read is refused by name."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from configurator import InputError
from nanomoe.hf import classes, write
from nanomoe.load import find, load
from tests.helpers import Bomb, needs_gpt2_tokenizer, run_script
from tests.hf_models import VARIANTS, change, export, gpt2, same_logits, save_as_hub


@pytest.mark.parametrize(
    "form", ["hub", "bin", "saved", "shards", "file", "gelu", "untied", "inner"]
)
def test_import_gpt2(form, tmp_path):
    theirs = gpt2(
        **{
            "gelu": {"activation_function": "gelu"},
            "untied": {"tie_word_embeddings": False},
            "inner": {"n_inner": 72},
            "saved": {"activation_function": "gelu_pytorch_tanh"},
        }.get(form, {})
    )
    folder = where = tmp_path / "gpt2"
    if form in ("hub", "bin", "file"):
        save_as_hub(theirs, folder, ".bin" if form == "bin" else ".safetensors")
        where = folder / "model.safetensors" if form == "file" else folder
    else:
        theirs.save_pretrained(folder, **{"max_shard_size": "20KB"} if form == "shards" else {})
        assert len(list(folder.glob("*.safetensors"))) > 1 or form != "shards"
    found = load(where)
    assert (
        found.config.mlp == ("gelu" if form == "gelu" else "gelu_tanh")
        and found.config.vocab_size == 50
    )
    assert (
        found.tokenizer is None
        and not found.has_training_state
        and found.step == 0
        and found.config.dropout == 0
    )
    same_logits(found.build_model().eval(), theirs)
    assert find(where) == where


def test_sample_from_gpt2_and_export_it_again(tmp_path):
    needs_gpt2_tokenizer()
    theirs = gpt2(vocab_size=50257, n_embd=8, n_layer=1)
    folder = save_as_hub(theirs, tmp_path / "gpt2")
    done = run_script(
        "sample.py", init_from=folder, start="To be", num_samples=1, max_new_tokens=5, device="cpu"
    )
    assert done.returncode == 0 and done.stdout.startswith("To be"), done.stderr
    found = load(folder)
    assert found.tokenizer == {"tokenizer": "gpt2", "vocab_size": 50257}
    padded = load(save_as_hub(gpt2(vocab_size=50304, n_embd=8), tmp_path / "padded"))
    assert padded.config.vocab_size == 50304 and padded.tokenizer == found.tokenizer
    write.export(found, tmp_path / "again", classes.matching_class(found.config, found.weights))
    back = load(tmp_path / "again")
    assert back.config == found.config and all(
        p.equal(found.weights[name]) for name, p in back.weights.items()
    )


# -----------------------------------------------------------------------------
# bad input
@pytest.mark.parametrize(
    "keys, words",
    [
        (
            {"model_type": "opt"},
            ["its model_type is 'opt'", "expected 'gpt2' or a model that tools/export_hf.py wrote"],
        ),
        (
            {
                "activation_function": "relu",
                "scale_attn_by_inverse_layer_idx": True,
                "layer_norm_epsilon": 1e-6,
                "scale_attn_weights": False,
            },
            [
                "activation_function is 'relu', expected one of gelu, gelu_new",
                "layer_norm_epsilon is 1e-06, expected 1e-05",
                "scale_attn_by_inverse_layer_idx is True",
                "scale_attn_weights is False",
            ],
        ),
        ({"reorder_and_upcast_attn": True}, ["reorder_and_upcast_attn is True, expected False"]),
        ({"n_head": 5}, ["n_embd (32) is not divisible by n_head (5)"]),
        ({"n_head": "4"}, ["cannot be read"]),
        (
            {"n_embd": None, "vocab_size": 1.5},
            ["n_embd is None, expected a whole number", "vocab_size is 1.5"],
        ),
        ({"n_embd": ...}, ["config.json has no 'n_embd'"]),
        ({"n_ctx": ..., "n_positions": ...}, ["config.json has no 'n_ctx'"]),
        (
            {"vocab_size": 60, "n_layer": 1},
            [
                "transformer.wte.weight: expected (60, 32), found (50, 32)",
                "transformer.h.1.attn.c_attn.weight is unknown",
                "transformer.h.1.ln_2.bias is unknown",
            ],
        ),
        (
            {"n_inner": 64},
            [
                "h.0.mlp.c_fc.weight: expected (32, 64), found (32, 128)",
                "h.1.mlp.c_proj.weight: expected (64, 32)",
                "h.1.mlp.c_fc.bias: expected (64,), found (128,)",
            ],
        ),
        (
            {"n_layer": 3, "tie_word_embeddings": False},
            [
                "transformer.h.2.ln_1.weight is missing",
                "h.2.mlp.c_proj.bias is missing",
                "lm_head.weight is missing",
            ],
        ),
    ],
)
def test_other_architectures_and_tensors(keys, words, tmp_path):
    folder = save_as_hub(gpt2(), tmp_path / "gpt2")
    change(folder, **keys)
    with pytest.raises(InputError) as error:
        load(folder)
    for word in (str(folder), *words):
        assert word in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "keys, words",
    [
        (
            {"rms_norm_eps": 1e-6, "num_experts_per_tok": 1},
            ["rms_norm_eps is 1e-06, expected 1e-05", "num_experts_per_tok is 1, expected 2"],
        ),
        (
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}},
            [
                "rope_type is 'linear', expected 'default'",
                "rope_theta is 500000.0, expected 10000.0",
            ],
        ),
        ({"rope_scaling": {"rope_type": "yarn"}}, ["rope_type is 'yarn'"]),
        ({"model_type": "mistral"}, ["model_type is 'mistral'"]),
        ({"hidden_act": ...}, ["hidden_act is None, expected 'silu'"]),
        ({"num_local_experts": 5}, ["num_experts is 5, expected 4"]),
        ({"nanomoe": {}}, ["config.json has no 'model'"]),
        ({"nanomoe": {"model": {"n_layer": 0}}}, ["n_layer is 0"]),
        ({"nanomoe": 3}, ["cannot be read"]),
    ],
)
def test_an_export_that_was_edited(keys, words, tmp_path):
    export(VARIANTS["mixtral"][1], tmp_path / "hf")
    change(tmp_path / "hf", **keys)
    with pytest.raises(InputError) as error:
        load(tmp_path / "hf")
    for word in words:
        assert word in str(error.value)


def test_damaged_files(tmp_path):
    folder = tmp_path / "gpt2"
    gpt2().save_pretrained(folder, max_shard_size="20KB")
    shard = sorted(folder.glob("*.safetensors"))[1]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:100])
    with pytest.raises(OSError, match=f"{shard.name} is damaged"):
        load(folder)
    shard.unlink()
    with pytest.raises(OSError, match=f"{shard.name} is missing"):
        load(folder)
    (folder / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(OSError, match=r"index.json is damaged"):
        load(folder)
    for file in folder.glob("model*"):
        file.unlink()
    with pytest.raises(InputError, match=r"it has no weights, expected model.safetensors"):
        load(folder)
    torch.save({"wte.weight": Bomb()}, folder / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"pytorch_model.bin is refused"):
        load(folder)
    torch.save({"wte.weight": 3}, folder / "pytorch_model.bin")
    with pytest.raises(
        InputError, match=r"pytorch_model.bin contains objects that are not tensors"
    ):
        load(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(OSError, match=r"config.json is damaged"):
        load(folder)
    save_file({"a": torch.ones(1)}, tmp_path / "alone.safetensors")
    with pytest.raises(InputError, match=r"needs its config.json beside it"):
        load(tmp_path / "alone.safetensors")


def test_integers_and_an_untied_head_are_refused(tmp_path):
    folder = save_as_hub(gpt2(), tmp_path / "gpt2")
    weights = load_file(folder / "model.safetensors")
    weights["h.1.mlp.c_fc.weight"] = weights["h.1.mlp.c_fc.weight"].to(torch.int8)
    weights["lm_head.weight"] = weights["wte.weight"] + 1
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(
        InputError,
        match=r"c_fc.weight: expected .*, found torch.int8; lm_head.weight is not the embedding",
    ):
        load(folder)
