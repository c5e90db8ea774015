"""A model of each kind that can be exported, and how ours and transformers' are compared."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from nanomoe import checkpoint
from nanomoe.hf import classes, write
from tests.helpers import small_model, tokens

transformers = pytest.importorskip("transformers")


MODERN = {
    "norm": "rmsnorm",
    "position": "rope",
    "mlp": "swiglu",
    "bias": False,
    "n_head": 4,
    "n_layer": 3,
}
MOE = MODERN | {"use_moe": True, "num_experts": 4, "top_k": 2, "expert_dim": 24}
SIGMOID = MOE | {"router_score": "sigmoid"}
CHARS = {"tokenizer": "char", "vocab_size": 50, "chars": [*"\n\t ", *map(chr, range(200, 247))]}
VARIANTS = {
    "gpt2": ("GPT2LMHeadModel", {}),
    "gpt2 tanh, no bias, untied": (
        "GPT2LMHeadModel",
        {"mlp": "gelu_tanh", "bias": False, "tie_weights": False, "mlp_dim": 40, "n_kv_head": 2},
    ),
    "llama": ("LlamaForCausalLM", MODERN | {"n_kv_head": 2}),
    "llama with biases, untied": (
        "LlamaForCausalLM",
        MODERN | {"bias": True, "tie_weights": False, "mlp_dim": 40},
    ),
    "qwen3": ("Qwen3ForCausalLM", MODERN | {"qk_norm": True, "n_kv_head": 1, "tie_weights": False}),
    "mixtral": ("MixtralForCausalLM", MOE | {"n_kv_head": 2, "tie_weights": False}),
    "mixtral, experts as wide as the MLP": (
        "MixtralForCausalLM",
        MOE | {"expert_dim": 0, "top_k": 3},
    ),
    "qwen2 free gates": ("Qwen2MoeForCausalLM", MOE | {"norm_top_k": False, "tie_weights": False}),
    "qwen2 K=1": ("Qwen2MoeForCausalLM", MOE | {"top_k": 1, "n_kv_head": 2}),
    "qwen2 shared 1, dense first": (
        "Qwen2MoeForCausalLM",
        MOE | {"num_shared_experts": 1, "num_dense_layers": 1, "mlp_dim": 40},
    ),
    "qwen2 shared 2, stride": (
        "Qwen2MoeForCausalLM",
        MOE | {"num_shared_experts": 2, "moe_stride": 2, "norm_top_k": False},
    ),
    "qwen3 moe": ("Qwen3MoeForCausalLM", MOE | {"qk_norm": True, "n_kv_head": 2}),
    "qwen3 moe K=1, stride": (
        "Qwen3MoeForCausalLM",
        MOE | {"qk_norm": True, "top_k": 1, "moe_stride": 2, "mlp_dim": 40},
    ),
    "qwen3 moe free gates, untied": (
        "Qwen3MoeForCausalLM",
        MOE | {"qk_norm": True, "norm_top_k": False, "tie_weights": False},
    ),
    "glm shared 2, dense first": (
        "Glm4MoeForCausalLM",
        SIGMOID
        | {"num_shared_experts": 2, "num_dense_layers": 2, "route_scale": 2.5, "n_kv_head": 2},
    ),
    "glm qk-norm": (
        "Glm4MoeForCausalLM",
        SIGMOID | {"qk_norm": True, "norm_top_k": False, "tie_weights": False},
    ),
    "glm K=1": (
        "Glm4MoeForCausalLM",
        SIGMOID | {"top_k": 1, "num_shared_experts": 1, "qk_norm": True},
    ),
}


def fill(model):
    """Random weights, so that every part matters; router biases too, where they are allowed."""
    generator = torch.Generator().manual_seed(0)
    for name, p in model.state_dict().items():
        if not name.endswith("router.load") and not (
            name.endswith("router.bias") and model.config.router_score == "softmax"
        ):
            scale = p.shape[-1] ** -0.5 if p.dim() > 1 and not name.endswith("bias") else 0.3
            p.copy_(
                scale * torch.randn(p.shape, generator=generator)
                + (p.dim() == 1 and name.endswith("weight"))
            )
    return model.eval()


def as_loaded(model, tokenizer=None):
    return checkpoint.Checkpoint(
        Path("test"), 7, model.config, {}, None, None, model.state_dict(), tokenizer=tokenizer
    )


def export(settings, folder, meta=None, remote=False):
    """Export a filled model; returns it and the largest difference of the logits."""
    model = fill(small_model(**settings))
    loaded = as_loaded(model)
    family = classes.REMOTE if remote else classes.matching_class(model.config, loaded.weights)
    return model, write.export(loaded, folder, family, meta)


def auto(folder, **options):
    """The model as transformers loads it, and what transformers reports about the tensors."""
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True, output_loading_info=True, **options
    )
    return theirs.eval(), {key: value for key, value in info.items() if value}


@torch.no_grad()
def same_logits(ours, theirs, most=1e-5):
    idx = tokens(4, ours.config.block_size, vocab_size=ours.config.vocab_size)
    found, expected = ours(idx, idx)[0], theirs(idx).logits
    assert (found - expected).abs().max() <= most * max(1, expected.abs().max())
    assert found.argmax(-1).equal(expected.argmax(-1))


def same_weights(loaded, model, ignoring="router.load"):
    weights = {
        name: p
        for name, p in model.state_dict().items()
        if name in classes.our_shapes(model.config)
    }
    assert loaded.config == model.config and set(loaded.weights) == set(weights)
    for name, p in weights.items():
        if name.endswith(ignoring):  # as at the start of a run
            p = torch.full_like(p, 1 / model.config.num_experts)
        assert loaded.weights[name].equal(p), name


def change(folder, **keys):
    file = folder / "config.json"
    settings = json.loads(file.read_text()) | keys
    file.write_text(json.dumps({key: value for key, value in settings.items() if value is not ...}))


# -----------------------------------------------------------------------------
# and back: OpenAI's GPT-2
def gpt2(**settings):
    torch.manual_seed(1)
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            **{"vocab_size": 50, "n_positions": 16, "n_embd": 32, "n_layer": 2, "n_head": 4}
            | settings
        )
    ).eval()
    for p in theirs.parameters():
        p.data = torch.randn(p.shape) * (p.shape[0] ** -0.5 if p.dim() > 1 else 0.3)
    return theirs


def save_as_hub(theirs, folder, suffix=".safetensors"):
    """As the hub's gpt2: no prefix, no head, with masks, and only the config keys of 2019."""
    weights = {
        name.removeprefix("transformer."): p.contiguous()
        for name, p in theirs.state_dict().items()
        if "lm_head" not in name
    }
    for i in range(theirs.config.n_layer):
        weights |= {
            f"h.{i}.attn.bias": torch.ones(1, 1, 16, 16).tril(),
            f"h.{i}.attn.masked_bias": torch.tensor(-1e4),
        }
    folder.mkdir()
    if suffix == ".bin":
        torch.save(
            weights | {"lm_head.weight": weights["wte.weight"]}, folder / "pytorch_model.bin"
        )
    else:
        save_file(weights, folder / "model.safetensors")
    c = theirs.config
    (folder / "config.json").write_text(
        json.dumps(
            {
                "activation_function": c.activation_function,
                "architectures": ["GPT2LMHeadModel"],
                "attn_pdrop": 0.1,
                "layer_norm_epsilon": 1e-05,
                "model_type": "gpt2",
                "n_ctx": 16,
                "n_embd": c.n_embd,
                "n_head": c.n_head,
                "n_layer": c.n_layer,
                "n_positions": 16,
                "task_specific_params": {},
                "vocab_size": c.vocab_size,
            }
        )
    )
    return folder


# -----------------------------------------------------------------------------
# the command
def write_checkpoint(folder, settings, **run):
    model = fill(small_model(**settings))
    weights = {
        name: p
        for name, p in model.state_dict().items()
        if name in classes.our_shapes(model.config)
    }
    folder.mkdir()
    checkpoint.write(
        folder,
        3,
        weights,
        {"optimizer": {}},
        {
            "step": 3,
            "model": classes.config_to_dict(model.config),
            "run": run,
            "val_loss": None,
            "best_val_loss": None,
            "seconds": 0,
        },
    )
    return model
