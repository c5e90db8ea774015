"""
The classes of Hugging Face's transformers, of which nothing is imported: which one computes what a model of ours does, with
which config.json, and how its tensors are made of ours. hub.py reads and fetches their files, tools/export_hf.py writes them.

One table, FAMILIES, describes both directions: `views` finds each of their tensors as a view into one of ours, so that export
copies out of the views and import into them. Everything is read from the modeling files of transformers 5.23.
"""

import re
from collections.abc import Callable
from typing import NamedTuple

import torch

from configurator import InputError
from moe_model import build_model, config_to_dict
from nanomoe.tokenizer import GPT2_VOCAB


class Family(NamedTuple):
    name: str  # of the class
    model_type: str
    about: str
    needs: dict  # our option, or one of `facts`: the values with which the class computes the same, the first one to be advised
    fields: Callable  # our config to the class's own part of config.json
    names: dict | None = (
        None  # of our tensors (without their layer): theirs, whose rows make it up, {} for the expert
    )


# -----------------------------------------------------------------------------
# the classes, from transformers' modeling files


def gpt2_fields(c):
    return {
        "vocab_size": c.vocab_size,
        "n_positions": c.block_size,
        "n_embd": c.n_embd,
        "n_layer": c.n_layer,
        "n_head": c.n_head,
        "n_inner": c.mlp_hidden_dim,
        "layer_norm_epsilon": 1e-5,
        "activation_function": "gelu_new" if c.mlp == "gelu_tanh" else "gelu",
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "reorder_and_upcast_attn": False,
        "add_cross_attention": False,
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), c.dropout),
    }


def llama_fields(c):
    """What all later classes have in common."""
    return {
        "vocab_size": c.vocab_size,
        "max_position_embeddings": c.block_size,
        "hidden_size": c.n_embd,
        "num_hidden_layers": c.n_layer,
        "num_attention_heads": c.n_head,
        "num_key_value_heads": c.n_kv_head or c.n_head,
        "head_dim": c.head_dim,
        "intermediate_size": c.mlp_hidden_dim,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "attention_dropout": c.dropout,
        "attention_bias": c.bias,
    }


def moe_fields(c, experts="num_experts"):
    # a single gate of ours is never divided by itself
    return llama_fields(c) | {
        experts: c.num_experts,
        "num_experts_per_tok": c.top_k,
        "norm_topk_prob": renormalised(c),
    }


def renormalised(c):
    return c.norm_top_k and c.top_k > 1


def qwen_fields(c):
    return moe_fields(c) | {
        "moe_intermediate_size": c.expert_hidden_dim,
        "decoder_sparse_step": 1,
        "use_sliding_window": False,
        "mlp_only_layers": [i for i in range(c.n_layer) if not c.is_moe(i)],
    }


def qwen2_fields(c):
    return qwen_fields(c) | {
        "qkv_bias": False,
        "shared_expert_intermediate_size": c.num_shared_experts * c.expert_hidden_dim or 1,
    }


def glm4_fields(c):
    return moe_fields(c, "n_routed_experts") | {
        "moe_intermediate_size": c.expert_hidden_dim,
        "n_shared_experts": c.num_shared_experts,
        "first_k_dense_replace": sum(not c.is_moe(i) for i in range(c.n_layer)),
        "routed_scaling_factor": c.route_scale,
        "n_group": 1,
        "topk_group": 1,
        "use_qk_norm": c.qk_norm,
        "partial_rotary_factor": 1.0,
        "num_nextn_predict_layers": 0,
    }


LLAMA = {
    "transformer.wte": "model.embed_tokens",
    "transformer.ln_f": "model.norm",
    "lm_head": "lm_head",
    "ln_1": "input_layernorm",
    "ln_2": "post_attention_layernorm",
    "attn.q_norm": "self_attn.q_norm",
    "attn.k_norm": "self_attn.k_norm",
    "attn.c_attn": "self_attn.q_proj self_attn.k_proj self_attn.v_proj",
    "attn.c_proj": "self_attn.o_proj",
    "mlp.c_fc": "mlp.gate_proj mlp.up_proj",
    "mlp.c_proj": "mlp.down_proj",
}
MIXTRAL = LLAMA | {
    "mlp.router": "block_sparse_moe.gate",
    "mlp.experts.c_proj": "block_sparse_moe.experts.{}.w2.weight",
    "mlp.experts.c_fc": "block_sparse_moe.experts.{}.w1.weight block_sparse_moe.experts.{}.w3.weight",
}
QWEN = LLAMA | {
    "mlp.router": "mlp.gate",
    "mlp.experts.c_proj": "mlp.experts.{}.down_proj.weight",
    "mlp.experts.c_fc": "mlp.experts.{}.gate_proj.weight mlp.experts.{}.up_proj.weight",
}
QWEN2 = QWEN | {
    "mlp.shared.c_fc": "mlp.shared_expert.gate_proj mlp.shared_expert.up_proj",
    "mlp.shared.c_proj": "mlp.shared_expert.down_proj",
}
GLM4 = QWEN | {
    "mlp.shared.c_fc": "mlp.shared_experts.gate_proj mlp.shared_experts.up_proj",
    "mlp.shared.c_proj": "mlp.shared_experts.down_proj",
    "mlp.router.bias": "mlp.gate.e_score_correction_bias",
}

DENSE = {"use_moe": (False,)}
GPT2 = DENSE | {
    "norm": ("layernorm",),
    "position": ("learned",),
    "mlp": ("gelu", "gelu_tanh"),
    "n_kv_head": (0,),
    "qk_norm": (False,),
}
MODERN = {"norm": ("rmsnorm",), "position": ("rope",), "mlp": ("swiglu",)}
MOE = MODERN | {"use_moe": (True,), "bias": (False,)}
SOFTMAX = MOE | {"router_score": ("softmax",), "route_scale": (1.0,), "router_bias": (False,)}
HEAD, NONE = {"qk_norm": (True,), "norm over width": (False,)}, {"qk_norm": (False,)}
ALONE = {"num_shared_experts": (0,)}
# facts that no single option says, and how to change them
ADVICE = {
    "norm over width": "--qk_norm_over=head",
    "all moe": "--moe_stride=1 --num_dense_layers=0",
    "dense first": "--moe_stride=1",
    "several": "--num_experts=2 or more",
    "renormalised": "--norm_top_k=True with --top_k=2 or more",
    "router_bias": "a router bias of zeros, which --router_bias_update_rate=0 leaves",
}

FAMILIES = (
    Family("GPT2LMHeadModel", "gpt2", "LayerNorm, learned positions, GELU", GPT2, gpt2_fields),
    Family(
        "LlamaForCausalLM",
        "llama",
        "RMSNorm, RoPE, SwiGLU",
        MODERN | NONE | DENSE,
        lambda c: llama_fields(c) | {"mlp_bias": c.bias},
        LLAMA,
    ),
    Family(
        "Qwen3ForCausalLM",
        "qwen3",
        "RMSNorm, RoPE, SwiGLU, QK-norm",
        MODERN | HEAD | DENSE | {"bias": (False,)},
        lambda c: llama_fields(c) | {"use_sliding_window": False},
        LLAMA,
    ),
    Family(
        "MixtralForCausalLM",
        "mixtral",
        "softmax router, gates that sum to 1, no shared expert, all layers MoE",
        SOFTMAX | NONE | ALONE | {"all moe": (True,), "renormalised": (True,)},
        lambda c: (
            moe_fields(c, "num_local_experts")
            | {"intermediate_size": c.expert_hidden_dim, "sliding_window": None}
        ),
        MIXTRAL,
    ),
    Family(
        "Qwen2MoeForCausalLM",
        "qwen2_moe",
        "softmax router, with a shared expert, dense layers, or gates as they are",
        SOFTMAX | NONE,
        qwen2_fields,
        QWEN2,
    ),
    Family(
        "Qwen3MoeForCausalLM",
        "qwen3_moe",
        "softmax router, QK-norm, no shared expert",
        SOFTMAX | HEAD | ALONE,
        qwen_fields,
        QWEN,
    ),
    Family(
        "OlmoeForCausalLM",
        "olmoe",
        "softmax router, QK-norm over the width, no shared expert, all layers MoE",
        SOFTMAX | ALONE | {"qk_norm": (True,), "qk_norm_over": ("width",), "all moe": (True,)},
        lambda c: moe_fields(c) | {"intermediate_size": c.expert_hidden_dim, "clip_qkv": None},
        QWEN,
    ),
    Family(
        "Glm4MoeForCausalLM",
        "glm4_moe",
        "sigmoid router, no dense layer behind one with experts",
        MOE
        | {
            "router_score": ("sigmoid",),
            "norm over width": (False,),
            "dense first": (True,),
            "several": (True,),
        },
        glm4_fields,
        GLM4,
    ),
)
# our own code, carried along by tools/export_hf.py --remote_code=True
REMOTE = Family(
    "NanoMoEForCausalLM",
    "nanomoe",
    "nanoMoE's own code, beside the weights",
    {},
    lambda c: {
        "auto_map": {
            "AutoConfig": "modeling_nanomoe.NanoMoEConfig",
            "AutoModelForCausalLM": "modeling_nanomoe.NanoMoEForCausalLM",
        },
        "use_cache": False,
    },
)


def facts(config, weights):
    """What a Family's needs are about: the options, those that say the same in two ways made equal, and what follows."""
    found = config_to_dict(config)
    found |= {
        "n_kv_head": config.n_kv_head % config.n_head,
        "norm over width": config.qk_norm and config.qk_norm_over == "width",
    }
    if found["use_moe"]:
        moe = [config.is_moe(i) for i in range(config.n_layer)]
        found |= {
            "all moe": all(moe),
            "dense first": moe == sorted(moe),
            "renormalised": renormalised(config),
            "several": config.num_experts > 1,
            "router_bias": any(
                p.any().item() for name, p in weights.items() if name.endswith("router.bias")
            ),
        }
    return found


def matching_class(config, weights=None):
    """The Family of the class that computes what a model with this config and these weights ({name: tensor}) does. Raises
    InputError that names the nearest one, and what to change."""
    found = facts(config, weights or {})
    unmet, family = min(
        (
            (
                [key for key, allowed in family.needs.items() if found.get(key) not in allowed],
                family,
            )
            for family in FAMILIES
            if found["use_moe"] in family.needs["use_moe"]
        ),
        key=lambda pair: len(pair[0]),
    )
    if unmet:
        raise InputError(
            f"no class of transformers computes this model; the nearest is {family.name}, trained with "
            + " ".join(ADVICE.get(key, f"--{key}={family.needs[key][0]}") for key in unmet)
        )
    return family


def hf_config(config, family, tokenizer=None):
    """The config.json of an exported model, a dict; tokenizer: as a meta.json describes it, or None. The last key, which
    transformers keeps as it is, is what hub.py reads back."""
    meta = tokenizer and {
        key: tokenizer[key] for key in ("tokenizer", "vocab_size", "chars") if key in tokenizer
    }
    end = GPT2_VOCAB - 1 if meta and meta["tokenizer"] == "gpt2" else None
    return {
        "architectures": [family.name],
        "model_type": family.model_type,
        "dtype": "float32",
        **family.fields(config),
        "tie_word_embeddings": config.tie_weights,
        "bos_token_id": end,
        "eos_token_id": end,
        "pad_token_id": None,
        "nanomoe": {"model": config_to_dict(config), "tokenizer": meta},
    }


# -----------------------------------------------------------------------------
# tensors


def our_shapes(config):
    """{name: shape} of our tensors; a head that is the embedding counts once."""
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in build_model(config).state_dict().items()}
    return {
        name: shape
        for name, shape in shapes.items()
        if name != "lm_head.weight" or not config.tie_weights
    }


def tensor_views(name, tensor, config, family):
    """Yield (their name, view) for the parts of one of our tensors, in the shape in which they have it."""
    if (
        not family.names
    ):  # theirs are ours, of which GPT-2's Conv1D keeps the layers' matrices as (in, out)
        transposed = family.model_type == "gpt2" and ".h." in name and tensor.dim() == 2
        yield ("model." if family is REMOTE else "") + name, tensor.T if transposed else tensor
        return
    layer, stem = re.fullmatch(r"(transformer\.h\.\d+\.)?(.*)", name).groups()
    base, kind = (stem, "") if stem in family.names else stem.rsplit(".", 1)
    if (base, kind) == ("mlp.router", "bias") or stem == "mlp.router.load":
        return  # state of the training, of which these classes know nothing: matching_class() has seen that the bias is zero
    theirs = [
        (layer or "").replace("transformer.h", "model.layers") + part + (kind and "." + kind)
        for part in family.names[base].split()
    ]
    for e, part in enumerate(tensor) if "experts" in base else [("", tensor)]:
        q, kv = config.n_embd, (config.n_kv_head or config.n_head) * config.head_dim
        rows = (q, kv, kv) if len(theirs) == 3 else len(part) // len(theirs)
        yield from (
            (their.format(e), view) for their, view in zip(theirs, part.split(rows), strict=True)
        )


def scale(their, family):
    """Their numbers over ours: a shared expert of Qwen2-MoE's has a gate, which is a half where its weights are zero."""
    return 2 if family.model_type == "qwen2_moe" and ".shared_expert.down_proj" in their else 1


def constant_zero_tensors(config, family):
    """{name: shape} of tensors that these classes have, we do not, and that are zero."""
    if family.model_type == "gpt2" and not config.bias:
        return {
            name.removesuffix("weight") + "bias": shape[:1]
            for name, shape in our_shapes(config).items()
            if ".h." in name or ".ln_f." in name
        }
    found, D = {}, config.n_embd
    for i in range(config.n_layer) if family.model_type in ("qwen2_moe", "glm4_moe") else ():
        if config.is_moe(i):
            prefix, H = f"model.layers.{i}.mlp.shared_expert", int(family.model_type == "qwen2_moe")
            if H:
                found[f"{prefix}_gate.weight"] = (1, D)
            if not config.num_shared_experts:  # these have one all the same: of width 1, or of none
                found |= {
                    f"{prefix}{'s' * (1 - H)}.{part}_proj.weight": shape
                    for part, shape in (("gate", (H, D)), ("up", (H, D)), ("down", (D, H)))
                }
    return found


def export_weights(config, family, weights):
    """Our {name: tensor} to theirs, float32."""
    found = {
        name: torch.zeros(tuple(shape))
        for name, shape in constant_zero_tensors(config, family).items()
    }
    for name in our_shapes(config):
        for their, view in tensor_views(name, weights[name].float(), config, family):
            found[their] = (view * scale(their, family)).contiguous()
    return found


def import_weights(config, family, found):
    """Their {name: tensor}, which is emptied, to ours, float32. Raises InputError that names all that are missing, unknown, of
    another shape, or not zero where they have to be."""
    ours, wrong = {}, []

    def take(their, shape):
        p = found.pop(their, None)
        if p is not None and tuple(p.shape) == tuple(shape) and p.is_floating_point():
            return p
        wrong.append(
            f"{their} is missing"
            if p is None
            else f"{their}: expected {tuple(shape)}, found {tuple(p.shape)}"
            + f" of {p.dtype}" * (not p.is_floating_point())
        )

    for name, shape in our_shapes(config).items():
        # what has no tensor of theirs is as at the start of a run: no bias, even loads
        ours[name] = torch.full(
            tuple(shape), 1 / config.num_experts if name.endswith("router.load") else 0.0
        )
        for their, view in tensor_views(name, ours[name], config, family):
            if (p := take(their, view.shape)) is not None:
                view.copy_(p).div_(scale(their, family))
    wrong += [
        f"{their} is not zero"
        for their, shape in constant_zero_tensors(config, family).items()
        if (p := take(their, shape)) is not None and p.any()
    ]
    head = found.pop("lm_head.weight", None) if config.tie_weights else None
    if head is not None and not head.float().equal(ours["transformer.wte.weight"]):
        wrong.append("lm_head.weight is not the embedding, to which it is tied")
    wrong += [f"{their} is unknown" for their in sorted(found)]
    if wrong:
        raise InputError("; ".join(wrong))
    return ours
