"""Models of transformers are read; what cannot be read is refused by name."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from nanomoe.hf import classes, write
from nanomoe.load import find, load
from tests.helpers import Bomb, needs_gpt2_tokenizer, run_script, succeeded
from tests.hf_models import VARIANTS, change, export, gpt2, outcome, same_logits, save_as_hub

FORMS = {  # how it is saved, and how it differs from OpenAI's
    "hub": {},
    "bin": {},
    "file": {"activation_function": "gelu"},
    "shards": {"tie_word_embeddings": False},
    "saved": {"activation_function": "gelu_pytorch_tanh", "n_inner": 72},
}


@pytest.mark.parametrize("form", FORMS)
def test_import_gpt2(form, tmp_path):
    theirs = gpt2(**FORMS[form])
    where = folder = tmp_path / "gpt2"
    if form in ("shards", "saved"):
        theirs.save_pretrained(folder, **{"max_shard_size": "20KB"} if form == "shards" else {})
        assert len(list(folder.glob("*.safetensors"))) > 1 or form != "shards"
    else:
        save_as_hub(theirs, folder, ".bin" if form == "bin" else ".safetensors")
        where = folder / "model.safetensors" if form == "file" else folder
    found = load(where)
    c = found.config
    assert c.mlp == ("gelu" if form == "file" else "gelu_tanh")
    assert c.vocab_size == 50 and c.dropout == 0
    assert found.tokenizer is None and found.training_file is None and found.step == 0
    same_logits(found.build_model().eval(), theirs)
    # nanoGPT's names are OpenAI's, with transposed matrices, so its checkpoints compute the same
    expected = theirs.state_dict()
    for name, p in found.weights.items():
        is_transposed = name.endswith(("c_attn.weight", "c_fc.weight", "c_proj.weight"))
        assert p.equal(expected[name].T if is_transposed else expected[name]), name
    assert find(where) == where


def test_sample_from_gpt2_and_export_it_again(tmp_path):
    needs_gpt2_tokenizer()
    theirs = gpt2(vocab_size=50257, n_embd=8, n_layer=1)
    folder = save_as_hub(theirs, tmp_path / "gpt2")
    sampling = {"start": "To be", "num_samples": 1, "max_new_tokens": 5, "device": "cpu"}
    done = run_script("sample.py", init_from=folder, **sampling)
    assert succeeded(done).startswith("To be")
    found = load(folder)
    assert found.tokenizer == {"tokenizer": "gpt2", "vocab_size": 50257}
    family = classes.matching_class(found.config, found.weights)
    write.export(found, tmp_path / "again", family)
    back = load(tmp_path / "again")
    assert back.config == found.config
    assert all(p.equal(found.weights[name]) for name, p in back.weights.items())


def test_a_padded_vocabulary_stays(tmp_path):
    theirs = gpt2(vocab_size=50304, n_embd=8, n_layer=1)
    found = load(save_as_hub(theirs, tmp_path / "padded"))
    assert found.config.vocab_size == 50304
    assert found.tokenizer == {"tokenizer": "gpt2", "vocab_size": 50257}


# -----------------------------------------------------------------------------
# bad input


def refused(path, *words, error="InputError"):
    """A model is refused, in one line that names it, with these words."""
    found = outcome(load, path)
    assert found.startswith(f"{error}: ") and str(path) in found
    for word in words:
        assert word in found, (word, found)


# what is changed in config.json, and what the refusal says
GPT2 = [
    ({"model_type": "opt"}, "its model_type is 'opt', expected 'gpt2' or a model that tools/exp"),
    (
        {"activation_function": "relu", "layer_norm_epsilon": 1e-6},
        "activation_function is 'relu', expected one of gelu, gelu_new",
        "layer_norm_epsilon is 1e-06, expected 1e-05",
    ),
    (
        {"scale_attn_by_inverse_layer_idx": True, "scale_attn_weights": False},
        "scale_attn_by_inverse_layer_idx is True",
        "scale_attn_weights is False",
    ),
    ({"reorder_and_upcast_attn": True}, "reorder_and_upcast_attn is True, expected False"),
    ({"n_head": 5}, "n_embd (32) is not divisible by n_head (5)"),
    ({"n_head": "4"}, "cannot be read"),
    ({"n_embd": None, "vocab_size": 1.5}, "n_embd is None, expected a whole", "_size is 1.5"),
    ({"n_embd": ...}, "config.json has no 'n_embd'"),
    ({"n_embd": 4_000_000}, "cannot be read: "),  # 192 TB for one matrix
    ({"vocab_size": 10**30}, "cannot be read: "),
    ({"n_ctx": ..., "n_positions": ...}, "config.json has no 'n_ctx'"),
    (
        {"vocab_size": 60, "n_layer": 1},
        "transformer.wte.weight: expected (60, 32), found (50, 32)",
        "transformer.h.1.attn.c_attn.weight is unknown",
        "transformer.h.1.ln_2.bias is unknown",
    ),
    (
        {"n_inner": 64},
        "h.0.mlp.c_fc.weight: expected (32, 64), found (32, 128)",
        "h.1.mlp.c_proj.weight: expected (64, 32)",
        "h.1.mlp.c_fc.bias: expected (64,), found (128,)",
    ),
    (
        {"n_layer": 3, "tie_word_embeddings": False},
        "transformer.h.2.ln_1.weight is missing",
        "h.2.mlp.c_proj.bias is missing",
        "lm_head.weight is missing",
    ),
]
LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}
EXPORTED = [
    (
        {"rms_norm_eps": 1e-6, "num_experts_per_tok": 1, "tie_word_embeddings": True},
        "rms_norm_eps is 1e-06, expected 1e-05",
        "num_experts_per_tok is 1, expected 2",
        "tie_word_embeddings is True, expected False",
    ),
    (
        {"rope_parameters": LINEAR},
        "rope_type is 'linear', expected 'default'",
        "rope_theta is 500000.0, expected 10000.0",
    ),
    ({"rope_scaling": {"rope_type": "yarn"}}, "rope_type is 'yarn'"),
    ({"model_type": "mistral"}, "model_type is 'mistral'"),
    ({"hidden_act": ...}, "hidden_act is None, expected 'silu'"),
    ({"num_local_experts": 5}, "num_experts is 5, expected 4"),
    ({"nanomoe": {}}, "config.json has no 'model'"),
    ({"nanomoe": {"model": {"n_layer": 0}}}, "n_layer is 0"),
    ({"nanomoe": 3}, "cannot be read"),
]


@pytest.mark.parametrize("edits", [GPT2, EXPORTED], ids=["GPT-2", "an export"])
def test_a_config_that_was_edited(edits, tmp_path):
    folder = tmp_path / "hf"
    if edits is GPT2:
        save_as_hub(gpt2(), folder)
    else:
        export(VARIANTS["mixtral"], folder)
    config = (folder / "config.json").read_text()
    for keys, *words in edits:
        (folder / "config.json").write_text(config)
        change(folder, **keys)
        refused(folder, *words)


def test_damaged_files(tmp_path):
    folder = tmp_path / "gpt2"
    gpt2().save_pretrained(folder, max_shard_size="20KB")
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:100])
    refused(folder, f"{shard.name} is damaged", error="OSError")
    shard.unlink()
    refused(folder, f"{shard.name} is missing", error="OSError")
    (folder / "model.safetensors.index.json").write_text("{}")
    refused(folder, "index.json is damaged", error="OSError")
    for file in folder.glob("model*"):
        file.unlink()
    refused(folder, "it has no weights, expected model.safetensors")
    torch.save({"wte.weight": Bomb()}, folder / "pytorch_model.bin")
    refused(folder, "pytorch_model.bin is refused")
    torch.save({"wte.weight": 3}, folder / "pytorch_model.bin")
    refused(folder, "pytorch_model.bin contains objects that are not tensors")
    for text in ("{", "[]", "[" * 100_000):
        (folder / "config.json").write_text(text)
        refused(folder, "config.json is damaged", error="OSError")
    save_file({"a": torch.ones(1)}, tmp_path / "alone.safetensors")
    refused(tmp_path / "alone.safetensors", "needs its config.json beside it")


def test_integers_and_an_untied_head_are_refused(tmp_path):
    folder = save_as_hub(gpt2(), tmp_path / "gpt2")
    weights = load_file(folder / "model.safetensors")
    weights["h.1.mlp.c_fc.weight"] = weights["h.1.mlp.c_fc.weight"].to(torch.int8)
    weights["lm_head.weight"] = weights["wte.weight"] + 1
    save_file(weights, folder / "model.safetensors")
    refused(
        folder,
        "c_fc.weight: expected floating-point numbers, found torch.int8; lm_head.weight is not "
        "the embedding, to which it is tied",
    )
