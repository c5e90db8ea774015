"""
Which class of Hugging Face's transformers computes the same as a model of ours: its config.json,
and its tensors in terms of ours.

Nothing of transformers is imported. read.py reads and fetches models in this form, and
tools/export_hf.py writes them.

One table, FAMILIES, describes both directions. tensor_views() finds each of their tensors as a view
into one of ours, so export copies out of the views and import copies into them. All facts are read
from the modeling files of transformers 5.23.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from configurator import InputError
from moe_model import build_model, config_to_dict
from nanomoe.tokenizer import GPT2_VOCAB, Tokenizer


def no_extra_tensors(config):
    return {}


class Family(NamedTuple):
    name: str  # of the class
    model_type: str
    about: str  # which models it is for
    # {property: the values for which the class computes the same as we do, the advised one first};
    # the properties are our options and what properties() adds
    requires: dict
    fields: Callable  # our config -> the class's own part of config.json
    # our module or tensor, without its layer -> theirs, in the order of its rows
    tensor_names: dict = {}  # noqa: RUF012 (read only)
    # our config -> {name: shape} of the tensors that only they have; they stay zero
    extra_tensors: Callable = no_extra_tensors


# -----------------------------------------------------------------------------
# config.json of each class


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
        "resid_pdrop": c.dropout,
        "embd_pdrop": c.dropout,
        "attn_pdrop": c.dropout,
    }


def decoder_fields(c):
    """What all classes after GPT-2 share."""
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
        "rope_theta": 10000.0,  # transformers 4 reads it here, and has other defaults
        "attention_dropout": c.dropout,
        "attention_bias": c.bias,
    }


def llama_fields(c):
    return decoder_fields(c) | {"mlp_bias": c.bias}


def qwen3_fields(c):
    return decoder_fields(c) | {"use_sliding_window": False}


def gates_sum_to_1(c):
    """Our router never divides a single gate by itself: it would lose its gradient."""
    return c.norm_top_k and c.top_k > 1


def moe_fields(c):
    """What all classes with experts share."""
    return decoder_fields(c) | {
        "num_experts_per_tok": c.top_k,
        "norm_topk_prob": gates_sum_to_1(c),
    }


def balance_fields(c):
    """For training elsewhere: the coefficient of Switch's loss, and that it is added at all."""
    coefficient = c.expert_load_balance_loss_coef
    return {"router_aux_loss_coef": coefficient, "output_router_logits": coefficient > 0}


def mixtral_fields(c):
    return (
        moe_fields(c)
        | balance_fields(c)
        | {
            "num_local_experts": c.num_experts,
            "intermediate_size": c.expert_hidden_dim,
            "sliding_window": None,
        }
    )


def qwen3_moe_fields(c):
    return (
        moe_fields(c)
        | balance_fields(c)
        | {
            "num_experts": c.num_experts,
            "moe_intermediate_size": c.expert_hidden_dim,
            "decoder_sparse_step": 1,
            "use_sliding_window": False,
            "mlp_only_layers": [i for i in range(c.n_layer) if not c.is_moe(i)],
        }
    )


def qwen2_moe_fields(c):
    # a shared expert is always there, see qwen2_moe_extra_tensors
    shared_width = c.num_shared_experts * c.expert_hidden_dim or 1
    return qwen3_moe_fields(c) | {
        "qkv_bias": False,
        "shared_expert_intermediate_size": shared_width,
    }


def glm4_moe_fields(c):
    return moe_fields(c) | {
        "n_routed_experts": c.num_experts,
        "moe_intermediate_size": c.expert_hidden_dim,
        "n_shared_experts": c.num_shared_experts,
        "first_k_dense_replace": c.n_layer - len(moe_layers(c)),
        "routed_scaling_factor": c.route_scale,
        "n_group": 1,
        "topk_group": 1,
        "use_qk_norm": c.qk_norm,
        "partial_rotary_factor": 1.0,
        "num_nextn_predict_layers": 0,
    }


def remote_fields(c):
    return {
        "auto_map": {
            "AutoConfig": "modeling_nanomoe.NanoMoEConfig",
            "AutoModelForCausalLM": "modeling_nanomoe.NanoMoEForCausalLM",
        },
        "use_cache": False,
    }


# -----------------------------------------------------------------------------
# tensors that a class has and we do not


def moe_layers(config):
    return [i for i in range(config.n_layer) if config.is_moe(i)]


def gpt2_extra_tensors(config):
    """GPT-2 has biases everywhere."""
    extra = {}
    if not config.bias:
        for name, shape in our_shapes(config).items():
            if ".h." in name or ".ln_f." in name:
                extra[name.removesuffix("weight") + "bias"] = shape[:1]
    return extra


def swiglu_shapes(name, width, hidden_dim):
    return {
        f"{name}.gate_proj.weight": (hidden_dim, width),
        f"{name}.up_proj.weight": (hidden_dim, width),
        f"{name}.down_proj.weight": (width, hidden_dim),
    }


def qwen2_moe_extra_tensors(config):
    """A shared expert has a gate; and a model without one gets one of width 1."""
    extra = {}
    for i in moe_layers(config):
        name = f"model.layers.{i}.mlp.shared_expert"
        extra[f"{name}_gate.weight"] = (1, config.n_embd)
        if not config.num_shared_experts:
            extra |= swiglu_shapes(name, config.n_embd, hidden_dim=1)
    return extra


def glm4_moe_extra_tensors(config):
    """A model without shared experts gets them with width 0."""
    extra = {}
    if not config.num_shared_experts:
        for i in moe_layers(config):
            name = f"model.layers.{i}.mlp.shared_experts"
            extra |= swiglu_shapes(name, config.n_embd, hidden_dim=0)
    return extra


# -----------------------------------------------------------------------------
# names of tensors. {} is the number of the expert. [] is for the router's state in training, which
# those classes do not have: matching_class() has seen that the bias is zero

LLAMA_NAMES = {
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
    "mlp.router.bias": [],
    "mlp.router.load": [],
    "mlp.experts.c_fc": [
        "block_sparse_moe.experts.{}.w1.weight",
        "block_sparse_moe.experts.{}.w3.weight",
    ],
    "mlp.experts.c_proj": ["block_sparse_moe.experts.{}.w2.weight"],
}
QWEN3_MOE_NAMES = LLAMA_NAMES | {
    "mlp.router.weight": ["mlp.gate.weight"],
    "mlp.router.bias": [],
    "mlp.router.load": [],
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
        requires=DENSE
        | {
            "norm": ["layernorm"],
            "position": ["learned"],
            "mlp": ["gelu", "gelu_tanh"],
            "n_kv_head": [0],
            "qk_norm": [False],
        },
        fields=gpt2_fields,
        extra_tensors=gpt2_extra_tensors,
    ),
    Family(
        name="LlamaForCausalLM",
        model_type="llama",
        about="RMSNorm, RoPE, SwiGLU",
        requires=MODERN | NO_QK_NORM | DENSE,
        fields=llama_fields,
        tensor_names=LLAMA_NAMES,
    ),
    Family(
        name="Qwen3ForCausalLM",
        model_type="qwen3",
        about="RMSNorm, RoPE, SwiGLU, QK-norm",
        requires=MODERN | QK_NORM | DENSE | {"bias": [False]},
        fields=qwen3_fields,
        tensor_names=LLAMA_NAMES,
    ),
    Family(
        name="MixtralForCausalLM",
        model_type="mixtral",
        about="softmax router, gates that sum to 1, no shared expert, all layers MoE",
        requires=SOFTMAX | NO_QK_NORM | NO_SHARED | {"all moe": [True], "gates sum to 1": [True]},
        fields=mixtral_fields,
        tensor_names=MIXTRAL_NAMES,
    ),
    Family(
        name="Qwen2MoeForCausalLM",
        model_type="qwen2_moe",
        about="softmax router, with a shared expert, dense layers, or gates as they are",
        requires=SOFTMAX | NO_QK_NORM,
        fields=qwen2_moe_fields,
        tensor_names=QWEN2_MOE_NAMES,
        extra_tensors=qwen2_moe_extra_tensors,
    ),
    Family(
        name="Qwen3MoeForCausalLM",
        model_type="qwen3_moe",
        about="softmax router, QK-norm, no shared expert",
        requires=SOFTMAX | QK_NORM | NO_SHARED,
        fields=qwen3_moe_fields,
        tensor_names=QWEN3_MOE_NAMES,
    ),
    Family(
        name="Glm4MoeForCausalLM",
        model_type="glm4_moe",
        about="sigmoid router, no dense layer after a MoE layer",
        requires=MOE
        | {
            "router_score": ["sigmoid"],
            "dense first": [True],
            "several experts": [True],
        },
        fields=glm4_moe_fields,
        tensor_names=GLM4_MOE_NAMES,
        extra_tensors=glm4_moe_extra_tensors,
    ),
)
# nanoMoE's own code, which tools/export_hf.py --remote_code=True copies beside the weights
REMOTE = Family(
    name="NanoMoEForCausalLM",
    model_type="nanomoe",
    about="nanoMoE's own code, beside the weights",
    requires={},
    fields=remote_fields,
)
# how to get a property that is not one option
ADVICE = {
    "all moe": "--moe_stride=1 --num_dense_layers=0",
    "dense first": "--moe_stride=1",
    "several experts": "--num_experts=2 or more",
    "gates sum to 1": "--norm_top_k=True with --top_k=2 or more",
    "router bias": "a router bias of zeros, which --router_bias_update_rate=0 leaves",
}


def properties(config, weights):
    """What Family.requires asks about: all options, and what several of them mean together."""
    found = config_to_dict(config)
    if config.n_kv_head == config.n_head:
        found["n_kv_head"] = 0
    if found["use_moe"]:
        is_moe = [config.is_moe(i) for i in range(config.n_layer)]
        found["all moe"] = all(is_moe)
        found["dense first"] = is_moe == sorted(is_moe)  # False is less than True
        found["gates sum to 1"] = gates_sum_to_1(config)
        found["several experts"] = config.num_experts > 1
        biases = [p for name, p in weights.items() if name.endswith("router.bias")]
        found["router bias"] = any(bias.any().item() for bias in biases)
    return found


def matching_class(config, weights=None):
    """The Family of the class that computes the same as a model with this config and these weights.

    weights: {name: tensor}; without them the router's biases are taken to be zero. Raises
    InputError naming the nearest class, and what to change, if no class computes the same.
    """
    found = properties(config, weights or {})
    nearest, unmet = None, []
    for family in FAMILIES:
        if found["use_moe"] not in family.requires["use_moe"]:
            continue
        missing = [key for key, allowed in family.requires.items() if found[key] not in allowed]
        if nearest is None or len(missing) < len(unmet):
            nearest, unmet = family, missing
    if not unmet:
        return nearest
    advice = [ADVICE.get(key, f"--{key}={nearest.requires[key][0]}") for key in unmet]
    raise InputError(
        f"no class of transformers computes this model; the nearest is {nearest.name}, for models "
        f"trained with {' '.join(advice)}"
    )


def hf_config(config, family, tokenizer=None):
    """The config.json of an exported model, a dict.

    tokenizer: as a meta.json describes it, or None. transformers keeps the last key, 'nanomoe', as
    it is; read.py reads it back.
    """
    meta, end_of_text = None, None
    if tokenizer:
        kept = ("tokenizer", "vocab_size", "chars")  # a file lies beside config.json
        meta = {key: tokenizer[key] for key in kept if key in tokenizer}
        if meta["tokenizer"] == "gpt2":
            end_of_text = GPT2_VOCAB - 1
        elif meta["tokenizer"] == "bpe":
            end_of_text = Tokenizer(tokenizer).eot_token
    return {
        "architectures": [family.name],
        "model_type": family.model_type,
        "dtype": "float32",
        **family.fields(config),
        "tie_word_embeddings": config.tie_weights,
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
        "pad_token_id": None,
        "nanomoe": {"model": config_to_dict(config), "tokenizer": meta},
    }


# -----------------------------------------------------------------------------
# tensors


def our_shapes(config):
    """{name: shape} of our tensors. A language-model head that is the embedding is left out."""
    with torch.device("meta"):
        state = build_model(config).state_dict()
    if config.tie_weights:
        del state["lm_head.weight"]
    return {name: p.shape for name, p in state.items()}


def their_names(name, family):
    """The names of the tensors that one of ours becomes, in the order of its rows."""
    layer, rest = "", name
    if name.startswith("transformer.h."):
        number, rest = name.removeprefix("transformer.h.").split(".", 1)
        layer = f"model.layers.{number}."
    if rest in family.tensor_names:
        return [layer + part for part in family.tensor_names[rest]]
    module, kind = rest.rsplit(".", 1)  # kind: weight or bias
    return [f"{layer}{part}.{kind}" for part in family.tensor_names[module]]


def tensor_views(name, tensor, config, family):
    """Yield (their name, view) for the parts of one of our tensors, in the shapes of theirs."""
    if family is REMOTE:
        yield f"model.{name}", tensor
        return
    if family.model_type == "gpt2":
        # GPT-2 keeps the matrices of its layers as (in, out)
        transposed = ".h." in name and tensor.dim() == 2
        yield name, tensor.T if transposed else tensor
        return
    names = their_names(name, family)
    if not names:
        return
    if "mlp.experts." in name:
        for e, expert in enumerate(tensor):
            for their, view in zip(names, expert.chunk(len(names)), strict=True):
                yield their.format(e), view
    elif "attn.c_attn" in name:
        kv_rows = (config.n_kv_head or config.n_head) * config.head_dim
        q_k_v = tensor.split([config.n_embd, kv_rows, kv_rows])
        yield from zip(names, q_k_v, strict=True)
    else:
        yield from zip(names, tensor.chunk(len(names)), strict=True)


def scale(their, family):
    """Their numbers divided by ours.

    Qwen2-MoE multiplies its shared expert by a gate, the sigmoid of 0 and so 1/2 in a model of
    ours; the expert's last matrix is doubled in turn.
    """
    if family.model_type == "qwen2_moe" and ".shared_expert.down_proj" in their:
        return 2
    return 1


def export_weights(config, family, weights):
    """Our {name: tensor} to theirs, in float32."""
    theirs = {}
    for their, shape in family.extra_tensors(config).items():
        theirs[their] = torch.zeros(tuple(shape))
    for name in our_shapes(config):
        for their, view in tensor_views(name, weights[name].float(), config, family):
            theirs[their] = (view * scale(their, family)).contiguous()
    return theirs


def what_is_wrong(their, p, shape):
    """A phrase about a tensor p of theirs that should have this shape, or None if it fits."""
    if p is None:
        return f"{their} is missing"
    if tuple(p.shape) != tuple(shape):
        return f"{their}: expected {tuple(shape)}, found {tuple(p.shape)}"
    if not p.is_floating_point():
        return f"{their}: expected floating-point numbers, found {p.dtype}"
    return None


def import_weights(config, family, theirs):
    """Their {name: tensor}, which is emptied, to ours, in float32.

    Raises InputError naming every tensor that is missing, unknown, of another shape, or not zero
    where it must be.
    """
    ours, wrong = {}, []
    for name, shape in our_shapes(config).items():
        # tensors that they lack start as in a new model: no bias, even loads
        initial = 1 / config.num_experts if name.endswith("router.load") else 0.0
        ours[name] = torch.full(tuple(shape), initial)
        for their, view in tensor_views(name, ours[name], config, family):
            p = theirs.pop(their, None)
            if problem := what_is_wrong(their, p, view.shape):
                wrong.append(problem)
            else:
                view.copy_(p).div_(scale(their, family))
    for their, shape in family.extra_tensors(config).items():
        p = theirs.pop(their, None)
        if problem := what_is_wrong(their, p, shape):
            wrong.append(problem)
        elif p.any():
            wrong.append(f"{their} is not zero")
    if config.tie_weights and "lm_head.weight" in theirs:
        head = theirs.pop("lm_head.weight")
        if not head.float().equal(ours["transformer.wte.weight"]):
            wrong.append("lm_head.weight is not the embedding, to which it is tied")
    wrong += [f"{their} is unknown" for their in sorted(theirs)]
    if wrong:
        raise InputError("; ".join(wrong))
    return ours
