"""Given equal weights, outputs and gradients equal those of Hugging Face's models, to 1e-5."""

import pytest
import torch

from tests.helpers import small_model, tokens

transformers = pytest.importorskip("transformers")

from transformers import (  # noqa: E402
    DeepseekV3Config,
    Glm4MoeConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
)
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE  # noqa: E402
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeMoE  # noqa: E402
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock  # noqa: E402
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock  # noqa: E402
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock  # noqa: E402

D, E, K, H = 32, 8, 3, 24
COMMON = {
    "hidden_size": D,
    "num_experts_per_tok": K,
    "hidden_act": "silu",
    "num_attention_heads": 2,
}
# One group of experts is the same as no groups. As many shared experts as ours has.
SIGMOID = {
    "num_local_experts": E,
    "n_routed_experts": E,
    "moe_intermediate_size": H,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 2,
    "routed_scaling_factor": 2.5,
}
OUR_SIGMOID = {"router_score": "sigmoid", "num_shared_experts": 2, "route_scale": 2.5}

# name: their module, their config, our settings
LAYERS = {
    "mixtral": (
        MixtralSparseMoeBlock,
        MixtralConfig(**COMMON, num_local_experts=E, intermediate_size=H),
        {},
    ),
    "qwen2_moe": (
        Qwen2MoeSparseMoeBlock,
        Qwen2MoeConfig(
            **COMMON,
            num_experts=E,
            moe_intermediate_size=H,
            shared_expert_intermediate_size=2 * H,
            norm_topk_prob=False,
        ),
        {"norm_top_k": False, "num_shared_experts": 2},
    ),
    "qwen3_moe": (
        Qwen3MoeSparseMoeBlock,
        Qwen3MoeConfig(**COMMON, num_experts=E, moe_intermediate_size=H, norm_topk_prob=True),
        {},
    ),
    "deepseek_v3": (
        DeepseekV3MoE,
        DeepseekV3Config(**COMMON, **SIGMOID, norm_topk_prob=True),
        OUR_SIGMOID,
    ),
    "glm4_moe": (
        Glm4MoeMoE,
        Glm4MoeConfig(**COMMON, **SIGMOID, norm_topk_prob=False),
        OUR_SIGMOID | {"norm_top_k": False},
    ),
}


def assert_close(found, expected):
    scale = max(1.0, expected.abs().max().item())
    assert (found - expected).abs().max() <= 1e-5 * scale


def fill(module):
    """Weights that make experts and routers matter."""
    generator = torch.Generator().manual_seed(0)
    for p in module.parameters():
        p.data = torch.randn(p.shape, generator=generator) * p.shape[-1] ** -0.5
    return module


def shared_weights(shared):
    return {
        "c_fc.weight": torch.cat((shared.gate_proj.weight, shared.up_proj.weight)),
        "c_proj.weight": shared.down_proj.weight,
    }


@pytest.mark.parametrize("impl", ["loop", "grouped"])
@pytest.mark.parametrize("name", LAYERS)
def test_moe_layer(name, impl):
    module, config, settings = LAYERS[name]
    config._experts_implementation = "eager"
    theirs = fill(module(config))
    ours = (
        small_model(
            n_layer=1,
            n_embd=D,
            mlp="swiglu",
            bias=False,
            use_moe=True,
            num_experts=E,
            top_k=K,
            expert_dim=H,
            expert_impl=impl,
            **settings,
        )
        .transformer.h[0]
        .mlp
    )
    # every weight of ours, named as theirs; a state dict, so a missing one is an error
    state = {
        "router.weight": theirs.gate.weight,
        "experts.c_fc": theirs.experts.gate_up_proj,
        "experts.c_proj": theirs.experts.down_proj,
        "router.bias": torch.zeros(E),
        "router.load": torch.ones(E) / E,
    }
    if hasattr(theirs.gate, "e_score_correction_bias"):
        theirs.gate.e_score_correction_bias.copy_(torch.linspace(-0.3, 0.3, E))
        state["router.bias"] = theirs.gate.e_score_correction_bias
    if hasattr(theirs, "shared_experts"):
        state |= {f"shared.{key}": w for key, w in shared_weights(theirs.shared_experts).items()}
    if hasattr(
        theirs, "shared_expert"
    ):  # gated by a sigmoid: of 0, so 1/2, which a doubled last matrix makes 1
        theirs.shared_expert_gate.weight.data.zero_()
        state |= {f"shared.{key}": w for key, w in shared_weights(theirs.shared_expert).items()}
        theirs.shared_expert.down_proj.weight.data *= 2
        state["shared.c_proj.weight"] = theirs.shared_expert.down_proj.weight / 2
    ours.load_state_dict({key: w.detach().clone() for key, w in state.items()})

    x = torch.randn(2, 13, D, generator=torch.Generator().manual_seed(1))
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    out, expected = ours(a)[0], theirs(b)
    expected = expected[0] if isinstance(expected, tuple) else expected
    assert_close(out, expected)
    weight = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    (out * weight).sum().backward()
    (expected * weight).sum().backward()
    assert_close(a.grad, b.grad)
    assert_close(ours.router.weight.grad, theirs.gate.weight.grad)
    assert_close(ours.experts.c_fc.grad, theirs.experts.gate_up_proj.grad)
    assert_close(ours.experts.c_proj.grad, theirs.experts.down_proj.grad)
    if name == "qwen2_moe":
        assert_close(ours.shared.c_proj.weight.grad, theirs.shared_expert.down_proj.weight.grad * 2)
    elif ours.shared is not None:
        assert_close(ours.shared.c_proj.weight.grad, theirs.shared_experts.down_proj.weight.grad)


def same_logits(ours, theirs):
    idx = tokens(3, 16)
    with torch.no_grad():
        assert_close(ours.eval()(idx, idx)[0], theirs.eval()(idx).logits)
    assert ours(idx, idx)[0].argmax(-1).equal(theirs(idx).logits.argmax(-1))


def test_gpt2():
    """The dense model in its default form. Theirs stores its linear weights transposed."""
    theirs = fill(
        GPT2LMHeadModel(
            GPT2Config(
                vocab_size=50,
                n_positions=16,
                n_embd=32,
                n_layer=2,
                n_head=2,
                activation_function="gelu",
            )
        )
    )
    ours, weights = small_model(bias=True), theirs.state_dict()
    for name, p in ours.state_dict().items():
        theirs_p = weights[name]
        p.copy_(
            theirs_p.T
            if name.split(".")[-2] in ("c_attn", "c_proj", "c_fc") and p.dim() == 2
            else theirs_p
        )
    same_logits(ours, theirs)


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_modern_dense(kind):
    """RMSNorm, RoPE, grouped-query attention, SwiGLU, untied embeddings; for Qwen3 QK-norm, too."""
    sizes = {
        "vocab_size": 50,
        "hidden_size": 32,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 16,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    }
    config, cls = {
        "llama": (LlamaConfig, LlamaForCausalLM),
        "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    }[kind]
    theirs = fill(cls(config(**sizes)))
    ours = small_model(
        norm="rmsnorm",
        position="rope",
        mlp="swiglu",
        bias=False,
        n_head=4,
        n_kv_head=2,
        tie_weights=False,
        qk_norm=kind == "qwen3",
    )
    state = {
        "transformer.wte.weight": theirs.model.embed_tokens.weight,
        "transformer.ln_f.weight": theirs.model.norm.weight,
        "lm_head.weight": theirs.lm_head.weight,
    }
    for i, layer in enumerate(theirs.model.layers):
        attn = layer.self_attn
        block = {
            "ln_1.weight": layer.input_layernorm.weight,
            "ln_2.weight": layer.post_attention_layernorm.weight,
            "attn.c_attn.weight": torch.cat(
                (attn.q_proj.weight, attn.k_proj.weight, attn.v_proj.weight)
            ),
            "attn.c_proj.weight": attn.o_proj.weight,
            **{f"mlp.{key}": w for key, w in shared_weights(layer.mlp).items()},
        }
        if kind == "qwen3":
            block |= {
                "attn.q_norm.weight": attn.q_norm.weight,
                "attn.k_norm.weight": attn.k_norm.weight,
            }
        state |= {f"transformer.h.{i}.{key}": w for key, w in block.items()}
    ours.load_state_dict(state)
    same_logits(ours, theirs)
