"""A model of each kind that can be exported, and how ours and transformers' are compared."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from configurator import InputError
from moe_model import config_to_dict
from nanomoe import checkpoint
from nanomoe.hf import classes, write
from nanomoe.load import Checkpoint
from tests.helpers import small_model, tokens

transformers = pytest.importorskip("transformers")


MODERN = {"norm": "rmsnorm", "position": "rope", "mlp": "swiglu", "bias": False}
MODERN |= {"n_head": 4, "n_layer": 3}
MOE = MODERN | {"use_moe": True, "num_experts": 4, "top_k": 2, "expert_dim": 24}
SIGMOID = MOE | {"router_score": "sigmoid"}
CHARS = {"tokenizer": "char", "vocab_size": 50, "chars": [*"\n\t ", *map(chr, range(200, 247))]}
QK_NORM = {"qk_norm": True}
UNTIED = {"tie_weights": False}
# name, which begins with the model_type: our settings
VARIANTS = {
    "gpt2 tanh, no bias, untied": UNTIED
    | {"mlp": "gelu_tanh", "bias": False, "mlp_dim": 40, "n_kv_head": 2},
    "llama with biases": MODERN | UNTIED | {"bias": True, "mlp_dim": 40},
    "qwen3": MODERN | QK_NORM | UNTIED | {"n_kv_head": 1},
    "mixtral": MOE | UNTIED | {"n_kv_head": 2},
    "qwen2_moe K=1": MOE | {"top_k": 1, "n_kv_head": 2},
    "qwen2_moe shared 1, dense first": MOE
    | {"num_shared_experts": 1, "num_dense_layers": 1, "mlp_dim": 40},
    "qwen3_moe K=1, stride": MOE | QK_NORM | {"top_k": 1, "moe_stride": 2, "mlp_dim": 40},
    "glm4_moe shared 2, dense first": SIGMOID
    | {"num_shared_experts": 2, "num_dense_layers": 2, "route_scale": 2.5, "n_kv_head": 2},
    "glm4_moe qk-norm": SIGMOID | QK_NORM | UNTIED | {"norm_top_k": False},
}
# their siblings, for the full set
MORE_VARIANTS = {
    "gpt2": {},
    "llama": MODERN | {"n_kv_head": 2},
    "mixtral as wide as the MLP": MOE | {"expert_dim": 0, "top_k": 3},
    "qwen2_moe free gates": MOE | UNTIED | {"norm_top_k": False},
    "qwen2_moe shared 2, stride": MOE
    | {"num_shared_experts": 2, "moe_stride": 2, "norm_top_k": False},
    "qwen3_moe": MOE | QK_NORM | {"n_kv_head": 2},
    "qwen3_moe free gates": MOE | QK_NORM | UNTIED | {"norm_top_k": False},
    "glm4_moe K=1": SIGMOID | QK_NORM | {"top_k": 1, "num_shared_experts": 1},
}


def fill(model):
    """Random weights, so that every part matters; router biases too, where they are allowed."""
    generator = torch.Generator().manual_seed(0)
    for name, p in model.state_dict().items():
        softmax_bias = name.endswith("router.bias") and model.config.router_score == "softmax"
        if name.endswith("router.load") or softmax_bias:
            continue
        is_matrix = p.dim() > 1 and not name.endswith("bias")
        p.copy_(torch.randn(p.shape, generator=generator))
        p *= p.shape[-1] ** -0.5 if is_matrix else 0.3
        if p.dim() == 1 and name.endswith("weight"):  # of a norm
            p += 1
    return model.eval()


def our_weights(model):
    """{name: tensor} of a model, without a head that is the embedding."""
    names = classes.our_shapes(model.config)
    return {name: p for name, p in model.state_dict().items() if name in names}


def export(settings, folder, meta=None, remote=False):
    """Export a filled model; returns it and the largest difference of the logits."""
    model = fill(small_model(**settings))
    weights = model.state_dict()
    loaded = Checkpoint(Path("test"), 7, model.config, {}, None, None, weights)
    family = classes.REMOTE if remote else classes.matching_class(model.config, weights)
    return model, write.export(loaded, folder, family, meta)


def outcome(function, *args, **options):
    """What a function returns; or its error, in one line, as text."""
    try:
        return function(*args, **options)
    except (InputError, OSError) as error:
        assert "\n" not in str(error)
        return f"{type(error).__name__}: {error}"


def auto(folder, **options):
    """The model as transformers loads it. It has no complaints about the tensors."""
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True, output_loading_info=True, **options
    )
    assert not any(info.values()), info
    return theirs.eval()


@torch.no_grad()
def same_logits(ours, theirs, most=1e-5):
    idx = tokens(4, ours.config.block_size, vocab_size=ours.config.vocab_size)
    found, expected = ours(idx, idx)[0], theirs(idx).logits
    assert (found - expected).abs().max() <= most * max(1, expected.abs().max())
    assert found.argmax(-1).equal(expected.argmax(-1))


def same_weights(loaded, model, ignoring="router.load"):
    weights = our_weights(model)
    assert loaded.config == model.config and set(loaded.weights) == set(weights)
    for name, p in weights.items():
        if name.endswith(ignoring):  # as at the start of a run
            p = torch.full_like(p, 1 / model.config.num_experts)
        assert loaded.weights[name].equal(p), name


def change(folder, **keys):
    """Change a folder's config.json; a key whose value is ... goes."""
    file = folder / "config.json"
    settings = json.loads(file.read_text()) | keys
    file.write_text(json.dumps({key: value for key, value in settings.items() if value is not ...}))


def gpt2(**settings):
    """A small GPT-2 of transformers."""
    sizes = {"vocab_size": 50, "n_positions": 16, "n_embd": 32, "n_layer": 2, "n_head": 4}
    torch.manual_seed(1)
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes | settings)).eval()
    for p in theirs.parameters():
        p.data = torch.randn(p.shape) * (p.shape[0] ** -0.5 if p.dim() > 1 else 0.3)
    return theirs


def save_as_hub(theirs, folder, suffix=".safetensors"):
    """As the hub's gpt2: no prefix, no head, with masks, and only the config keys of 2019."""
    weights = {}
    for name, p in theirs.state_dict().items():
        if "lm_head" not in name:
            weights[name.removeprefix("transformer.")] = p.contiguous()
    for i in range(theirs.config.n_layer):
        weights[f"h.{i}.attn.bias"] = torch.ones(1, 1, 16, 16).tril()
        weights[f"h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
    folder.mkdir()
    if suffix == ".bin":
        weights["lm_head.weight"] = weights["wte.weight"]
        torch.save(weights, folder / "pytorch_model.bin")
    else:
        save_file(weights, folder / "model.safetensors")
    keys = ("activation_function", "n_embd", "n_head", "n_layer", "vocab_size")
    config = {key: getattr(theirs.config, key) for key in keys}
    config |= {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "attn_pdrop": 0.1}
    config |= {"layer_norm_epsilon": 1e-05, "n_ctx": 16, "n_positions": 16}
    config["task_specific_params"] = {}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_checkpoint(folder, settings, **run):
    """A run's folder with one checkpoint, of a filled model, which is returned."""
    model = fill(small_model(**settings))
    facts = {"step": 3, "model": config_to_dict(model.config), "run": run, "seconds": 0}
    facts |= {"val_loss": None, "best_val_loss": None}
    folder.mkdir()
    checkpoint.write(folder, 3, our_weights(model), {"optimizer": {}}, facts)
    return model
