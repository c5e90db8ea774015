"""
Which class of Hugging Face's transformers computes the same as a model of ours: its config.json,
and its tensors in terms of ours.

One table, FAMILIES, describes both directions: write.py writes models in this form, read.py reads
them. their_tensors() finds each of their tensors as a view into one of ours, so export copies out
of the views and import copies into them. Nothing of transformers is imported: all facts are read
from the modeling files of its version 5.23.
"""

import re
from dataclasses import replace
from typing import NamedTuple

import torch

from configurator import InputError
from model import GPTConfig
from moe_model import build_model, config_to_dict
from nanomoe.tokenizer import Tokenizer

DROPOUT = {"attention_dropout": "dropout"}


class Family(NamedTuple):
    name: str  # of the class
    model_type: str
    about: str  # which models it is for
    # {property: the values for which the class computes the same as we do, the advised one first}
    requires: dict
    # the template of its own part of config.json; a string names the property of ours that is the
    # value there
    config: dict
    training: dict = DROPOUT  # the same for keys that change no logits
    # our module or tensor, without its layer -> theirs, in the order of its rows
    tensor_names: dict = {}  # noqa: RUF012
    # the class always has a shared expert: its width in a model of ours that has none
    empty_width: int | None = None


def properties(config, weights):
    """What a Family asks about: all our options, and what follows from them."""
    found = config_to_dict(config) | {
        "head_dim": config.head_dim,
        "mlp_hidden_dim": config.mlp_hidden_dim,
        "n_kv_head": 0 if config.n_kv_head == config.n_head else config.n_kv_head,
        "kv heads": config.n_kv_head or config.n_head,
        "activation": {"gelu_tanh": "gelu_new", "swiglu": "silu"}.get(config.mlp, config.mlp),
    }
    if found["use_moe"]:
        dense = [layer for layer in range(config.n_layer) if not config.is_moe(layer)]
        biases = [p for name, p in weights.items() if name.endswith("router.bias")]
        found |= {
            "expert_hidden_dim": config.expert_hidden_dim,
            "shared width": config.num_shared_experts * config.expert_hidden_dim or 1,
            "dense layers": len(dense),
            "which are dense": dense,
            "dense first": dense == list(range(len(dense))),
            "several experts": config.num_experts > 1,
            # our router never divides a single gate by itself: it would lose its gradient
            "gates sum to 1": config.norm_top_k and config.top_k > 1,
            "balance loss": config.expert_load_balance_loss_coef > 0,
            "router bias": any(bias.any().item() for bias in biases),
        }
    return found


# how to get a property that is not one option
ADVICE = {
    "dense layers": "--moe_stride=1 --num_dense_layers=0",
    "dense first": "--moe_stride=1",
    "several experts": "--num_experts=2 or more",
    "gates sum to 1": "--norm_top_k=True with --top_k=2 or more",
    "router bias": "a router bias of zeros, which --router_bias_update_rate=0 leaves",
}

# GPT-2's name of an activation: ours
ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}

# -----------------------------------------------------------------------------
# config.json of each class

GPT2 = {
    "vocab_size": "vocab_size",
    "n_positions": "block_size",
    "n_embd": "n_embd",
    "n_layer": "n_layer",
    "n_head": "n_head",
    "n_inner": "mlp_hidden_dim",
    "layer_norm_epsilon": 1e-5,
    "activation_function": "activation",
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "reorder_and_upcast_attn": False,
    "add_cross_attention": False,
}
# what all classes after GPT-2 share
DECODER = {
    "vocab_size": "vocab_size",
    "max_position_embeddings": "block_size",
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "num_key_value_heads": "kv heads",
    "head_dim": "head_dim",
    "intermediate_size": "mlp_hidden_dim",
    "hidden_act": "activation",
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "rope_theta": 10000.0,  # transformers 4 reads it here, and has other defaults
    "attention_bias": "bias",
}
MOE_DECODER = DECODER | {"num_experts_per_tok": "top_k", "norm_topk_prob": "gates sum to 1"}
MIXTRAL = MOE_DECODER | {
    "num_local_experts": "num_experts",
    "intermediate_size": "expert_hidden_dim",
    "sliding_window": None,
}
QWEN3_MOE = MOE_DECODER | {
    "num_experts": "num_experts",
    "moe_intermediate_size": "expert_hidden_dim",
    "decoder_sparse_step": 1,
    "use_sliding_window": False,
    "mlp_only_layers": "which are dense",
}
QWEN2_MOE = QWEN3_MOE | {"qkv_bias": False, "shared_expert_intermediate_size": "shared width"}
GLM4_MOE = MOE_DECODER | {
    "n_routed_experts": "num_experts",
    "moe_intermediate_size": "expert_hidden_dim",
    "n_shared_experts": "num_shared_experts",
    "first_k_dense_replace": "dense layers",
    "routed_scaling_factor": "route_scale",
    "n_group": 1,
    "topk_group": 1,
    "use_qk_norm": "qk_norm",
    "partial_rotary_factor": 1.0,
    "num_nextn_predict_layers": 0,
}
# the coefficient of Switch's loss, and that it is added at all
BALANCE = DROPOUT | {
    "router_aux_loss_coef": "expert_load_balance_loss_coef",
    "output_router_logits": "balance loss",
}

# -----------------------------------------------------------------------------
# names of tensors. {} is the number of the expert

LLAMA_NAMES = {
    # the router's state in training, which those classes do not have: matching_class() has seen
    # that the bias is zero
    "mlp.router.bias": [],
    "mlp.router.load": [],
    "transformer.wte": ["model.embed_tokens"],
    "transformer.ln_f": ["model.norm"],
    "lm_head": ["lm_head"],
    "ln_1": ["input_layernorm"],
    "ln_2": ["post_attention_layernorm"],
    "attn.q_norm": ["self_attn.q_norm"],
    "attn.k_norm": ["self_attn.k_norm"],
    "attn.c_attn": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "attn.c_proj": ["self_attn.o_proj"],
    "mlp.c_fc": ["mlp.gate_proj", "mlp.up_proj"],
    "mlp.c_proj": ["mlp.down_proj"],
}
MIXTRAL_NAMES = LLAMA_NAMES | {
    "mlp.router.weight": ["block_sparse_moe.gate.weight"],
    "mlp.experts.c_fc": [
        "block_sparse_moe.experts.{}.w1.weight",
        "block_sparse_moe.experts.{}.w3.weight",
    ],
    "mlp.experts.c_proj": ["block_sparse_moe.experts.{}.w2.weight"],
}
QWEN3_MOE_NAMES = LLAMA_NAMES | {
    "mlp.router.weight": ["mlp.gate.weight"],
    "mlp.experts.c_fc": ["mlp.experts.{}.gate_proj.weight", "mlp.experts.{}.up_proj.weight"],
    "mlp.experts.c_proj": ["mlp.experts.{}.down_proj.weight"],
}
QWEN2_MOE_NAMES = QWEN3_MOE_NAMES | {
    "mlp.shared.c_fc": ["mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj"],
    "mlp.shared.c_proj": ["mlp.shared_expert.down_proj"],
}
GLM4_MOE_NAMES = QWEN3_MOE_NAMES | {
    "mlp.router.bias": ["mlp.gate.e_score_correction_bias"],
    "mlp.shared.c_fc": ["mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj"],
    "mlp.shared.c_proj": ["mlp.shared_experts.down_proj"],
}


# -----------------------------------------------------------------------------
# the classes

DENSE = {"use_moe": [False]}
CLASSIC = {"norm": ["layernorm"], "position": ["learned"], "mlp": ["gelu", "gelu_tanh"]}
MODERN = {"norm": ["rmsnorm"], "position": ["rope"], "mlp": ["swiglu"]}
MOE = MODERN | {"use_moe": [True], "bias": [False]}
SOFTMAX = MOE | {"router_score": ["softmax"], "route_scale": [1.0], "router bias": [False]}
QK_NORM = {"qk_norm": [True]}
NO_QK_NORM = {"qk_norm": [False]}
NO_SHARED = {"num_shared_experts": [0]}

FAMILIES = (
    Family(
        name="GPT2LMHeadModel",
        model_type="gpt2",
        about="LayerNorm, learned positions, GELU",
        requires=CLASSIC | NO_QK_NORM | DENSE | {"n_kv_head": [0]},
        config=GPT2,
        training=dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), "dropout"),
    ),
    Family(
        name="LlamaForCausalLM",
        model_type="llama",
        about="RMSNorm, RoPE, SwiGLU",
        requires=MODERN | NO_QK_NORM | DENSE,
        config=DECODER | {"mlp_bias": "bias"},
        tensor_names=LLAMA_NAMES,
    ),
    Family(
        name="Qwen3ForCausalLM",
        model_type="qwen3",
        about="RMSNorm, RoPE, SwiGLU, QK-norm",
        requires=MODERN | QK_NORM | DENSE | {"bias": [False]},
        config=DECODER | {"use_sliding_window": False},
        tensor_names=LLAMA_NAMES,
    ),
    Family(
        name="MixtralForCausalLM",
        model_type="mixtral",
        about="softmax router, gates that sum to 1, no shared expert, all layers MoE",
        requires=SOFTMAX | NO_QK_NORM | NO_SHARED | {"dense layers": [0], "gates sum to 1": [True]},
        config=MIXTRAL,
        training=BALANCE,
        tensor_names=MIXTRAL_NAMES,
    ),
    Family(
        name="Qwen2MoeForCausalLM",
        model_type="qwen2_moe",
        about="softmax router, with a shared expert, dense layers, or gates as they are",
        requires=SOFTMAX | NO_QK_NORM,
        config=QWEN2_MOE,
        training=BALANCE,
        tensor_names=QWEN2_MOE_NAMES,
        empty_width=1,
    ),
    Family(
        name="Qwen3MoeForCausalLM",
        model_type="qwen3_moe",
        about="softmax router, QK-norm, no shared expert",
        requires=SOFTMAX | QK_NORM | NO_SHARED,
        config=QWEN3_MOE,
        training=BALANCE,
        tensor_names=QWEN3_MOE_NAMES,
    ),
    Family(
        name="Glm4MoeForCausalLM",
        model_type="glm4_moe",
        about="sigmoid router, no dense layer after a MoE layer",
        requires=MOE
        | {"router_score": ["sigmoid"], "dense first": [True], "several experts": [True]},
        config=GLM4_MOE,
        tensor_names=GLM4_MOE_NAMES,
        empty_width=0,
    ),
)
AUTO_MAP = {
    "AutoConfig": "modeling_nanomoe.NanoMoEConfig",
    "AutoModelForCausalLM": "modeling_nanomoe.NanoMoEForCausalLM",
}
# nanoMoE's own code, which tools/export_hf.py --remote_code=True copies beside the weights
REMOTE = Family(
    name="NanoMoEForCausalLM",
    model_type="nanomoe",
    about="nanoMoE's own code, beside the weights",
    requires={},
    config={},
    training={"auto_map": AUTO_MAP, "use_cache": False},
)


def matching_class(config: GPTConfig, weights: dict | None = None) -> Family:
    """The Family of the class that computes the same as a model with this config and these weights.

    weights: {name: tensor}; without them the router's biases are taken to be zero. Raises
    InputError naming the nearest class, and what to change, if no class computes the same."""
    found = properties(config, weights or {})
    unmet_by = []
    for family in FAMILIES:
        if found["use_moe"] in family.requires["use_moe"]:
            unmet = [key for key, allowed in family.requires.items() if found[key] not in allowed]
            unmet_by.append((unmet, family))
    unmet, nearest = min(unmet_by, key=lambda pair: len(pair[0]))
    if not unmet:
        return nearest
    advice = [ADVICE.get(key, f"--{key}={nearest.requires[key][0]}") for key in unmet]
    raise InputError(
        f"no class of transformers computes this model; the nearest is {nearest.name}, for models "
        f"trained with {' '.join(advice)}"
    )


def fill(template, config):
    """A template of config.json with our properties in their places."""
    found = properties(config, {})
    return {key: found[v] if isinstance(v, str) else v for key, v in template.items()}


def class_config(config: GPTConfig, family: Family) -> dict:
    """The part of config.json that decides what transformers computes."""
    tied = {"tie_word_embeddings": config.tie_weights}
    return {"model_type": family.model_type} | fill(family.config, config) | tied


def hf_config(config: GPTConfig, family: Family, tokenizer: dict | None = None) -> dict:
    """The config.json of an exported model.

    tokenizer: as a meta.json describes it, or None. transformers keeps the last key, 'nanomoe', as
    it is; read.py reads it back."""
    meta, end_of_text = None, None
    if tokenizer:
        kept = ("tokenizer", "vocab_size", "chars")  # a file lies beside config.json
        meta = {key: tokenizer[key] for key in kept if key in tokenizer}
        end_of_text = Tokenizer(tokenizer).eot_token
    return {
        "architectures": [family.name],
        "dtype": "float32",
        **class_config(config, family),
        **fill(family.training, config),
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
        "pad_token_id": None,
        "nanomoe": {"model": config_to_dict(config), "tokenizer": meta},
    }


# -----------------------------------------------------------------------------
# tensors


def our_shapes(config: GPTConfig) -> dict:
    """{name: shape} of our tensors. A language-model head that is the embedding is left out."""
    with torch.device("meta"):
        state = build_model(config).state_dict()
    if config.tie_weights:
        del state["lm_head.weight"]
    return {name: p.shape for name, p in state.items()}


def their_tensors(config, family, ours):
    """{their name: a view into one of ours}. ours: {name: tensor}."""
    theirs = {}
    for name, tensor in ours.items():
        theirs |= parts_of(name, tensor, config, family)
    return theirs


def parts_of(name, tensor, config, family):
    """{their name: view} for one of our tensors, whose rows may be several of theirs."""
    if family is REMOTE:
        return {f"model.{name}": tensor}
    if family.model_type == "gpt2":  # it keeps the matrices of its layers as (in, out)
        return {name: tensor.T if ".h." in name and tensor.dim() == 2 else tensor}
    number, rest = re.fullmatch(r"(?:transformer\.h\.(\d+)\.)?(.+)", name).groups()
    layer = f"model.layers.{number}." if number else ""
    names = family.tensor_names.get(rest)
    if names is None:
        module, kind = rest.rsplit(".", 1)  # kind: weight or bias
        names = [f"{their}.{kind}" for their in family.tensor_names[module]]
    if "experts.c_" in rest:  # (E, out, in)
        parts = [part for expert in tensor for part in expert.chunk(len(names))]
        names = [their.format(e) for e in range(len(tensor)) for their in names]
    elif "c_attn" in rest:
        kv_rows = (tensor.shape[0] - config.n_embd) // 2
        parts = tensor.split([config.n_embd, kv_rows, kv_rows])
    else:
        parts = tensor.chunk(len(names)) if names else ()
    return {layer + their: part for their, part in zip(names, parts, strict=True)}


def extra_tensors(config, family):
    """{name: zeros} of the tensors that only they have."""
    if family.model_type == "gpt2":  # it has biases everywhere
        ours, full = our_shapes(config), our_shapes(replace(config, bias=True))
        return {name: torch.zeros(shape) for name, shape in full.items() if name not in ours}
    zeros, D, H = {}, config.n_embd, family.empty_width
    for i in range(config.n_layer):
        if H is None or not config.is_moe(i):
            continue
        if family.model_type == "qwen2_moe":  # it multiplies its shared expert by a gate
            zeros[f"model.layers.{i}.mlp.shared_expert_gate.weight"] = torch.zeros(1, D)
        if not config.num_shared_experts:
            shared = f"transformer.h.{i}.mlp.shared"
            zeros |= parts_of(f"{shared}.c_fc.weight", torch.zeros(2 * H, D), config, family)
            zeros |= parts_of(f"{shared}.c_proj.weight", torch.zeros(D, H), config, family)
    return zeros


def scale(their, family):
    """Their numbers divided by ours. Qwen2-MoE's gate of the shared expert is the sigmoid of 0, so
    1/2, in a model of ours; the expert's last matrix is doubled in turn."""
    is_doubled = family.model_type == "qwen2_moe" and ".shared_expert.down_proj" in their
    return 2 if is_doubled else 1


def export_weights(config: GPTConfig, family: Family, weights: dict) -> dict:
    """Our {name: tensor} to theirs, in float32."""
    ours = {name: weights[name].float() for name in our_shapes(config)}
    theirs = their_tensors(config, family, ours) | extra_tensors(config, family)
    return {their: (view * scale(their, family)).contiguous() for their, view in theirs.items()}


def import_weights(config: GPTConfig, family: Family, theirs: dict) -> dict:
    """Their {name: tensor}, which is emptied, to ours, in float32.

    Raises InputError naming every tensor that is missing, unknown, of another shape, or not zero
    where it must be."""
    # tensors that they lack start as in a new model: no bias, even loads
    ours = {name: torch.zeros(shape) for name, shape in our_shapes(config).items()}
    for name in ours:
        if name.endswith("router.load"):
            ours[name].fill_(1 / config.num_experts)
    zeros, wrong = extra_tensors(config, family), []
    for their, view in (their_tensors(config, family, ours) | zeros).items():
        p = theirs.pop(their, None)
        if p is None:
            wrong.append(f"{their} is missing")
        elif p.shape != view.shape:
            wrong.append(f"{their}: expected {tuple(view.shape)}, found {tuple(p.shape)}")
        elif not p.is_floating_point():
            wrong.append(f"{their}: expected floating-point numbers, found {p.dtype}")
        else:
            view.copy_(p).div_(scale(their, family))
    wrong += [f"{their} is not zero" for their, view in zeros.items() if view.any()]
    if config.tie_weights and "lm_head.weight" in theirs:
        head = theirs.pop("lm_head.weight")
        if not head.float().equal(ours["transformer.wte.weight"]):
            wrong.append("lm_head.weight is not the embedding, to which it is tied")
    wrong += [f"{their} is unknown" for their in sorted(theirs)]
    if wrong:
        raise InputError("; ".join(wrong))
    return ours
