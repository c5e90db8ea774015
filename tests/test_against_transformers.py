"""Given equal weights, a MoE layer's output and gradients equal those of transformers' layers, to
1e-5. Whole models are compared in test_hf_classes.py."""

import importlib

import pytest
import torch

from tests.helpers import small_model

transformers = pytest.importorskip("transformers")

D, E, K, H = 32, 8, 3, 24
COMMON = {"hidden_size": D, "num_experts_per_tok": K, "num_attention_heads": 2}
# the number of experts and their width under all names
COMMON |= dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), E)
COMMON |= dict.fromkeys(("intermediate_size", "moe_intermediate_size"), H)
COMMON |= {"hidden_act": "silu", "norm_topk_prob": True}
# One group of experts is the same as no groups.
SIGMOID = {"n_group": 1, "topk_group": 1, "n_shared_experts": 2, "routed_scaling_factor": 2.5}
OUR_SIGMOID = {"router_score": "sigmoid", "num_shared_experts": 2, "route_scale": 2.5}
FREE = {"norm_topk_prob": False}
OUR_FREE = {"norm_top_k": False}
QWEN2 = FREE | {"shared_expert_intermediate_size": 2 * H}
# name: their layer, the settings of their config, ours
LAYERS = {
    "mixtral": ("MixtralSparseMoeBlock", {}, {}),
    "qwen2_moe": ("Qwen2MoeSparseMoeBlock", QWEN2, OUR_FREE | {"num_shared_experts": 2}),
    "qwen3_moe": ("Qwen3MoeSparseMoeBlock", {}, {}),
    "deepseek_v3": ("DeepseekV3MoE", SIGMOID, OUR_SIGMOID),
    "glm4_moe": ("Glm4MoeMoE", SIGMOID | FREE, OUR_SIGMOID | OUR_FREE),
}


def build_theirs(name):
    """Their layer, with weights that make experts and router matter."""
    layer, settings, _ = LAYERS[name]
    config = transformers.AutoConfig.for_model(name, **COMMON | settings)
    config._experts_implementation = "eager"
    module = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    theirs = getattr(module, layer)(config)
    generator = torch.Generator().manual_seed(0)
    for p in theirs.parameters():
        p.data = torch.randn(p.shape, generator=generator) * p.shape[-1] ** -0.5
    return theirs


@pytest.mark.parametrize("impl", ["loop", "grouped"])
@pytest.mark.parametrize("name", LAYERS)
def test_moe_layer(name, impl):
    theirs = build_theirs(name)
    settings = LAYERS[name][2] | {"num_experts": E, "top_k": K, "expert_dim": H}
    sizes = {"n_layer": 1, "n_embd": D, "mlp": "swiglu", "bias": False, "use_moe": True}
    ours = small_model(**sizes, **settings, expert_impl=impl).transformer.h[0].mlp
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
    is_gated = hasattr(theirs, "shared_expert")
    shared = theirs.shared_expert if is_gated else getattr(theirs, "shared_experts", None)
    if shared:
        state["shared.c_fc.weight"] = torch.cat((shared.gate_proj.weight, shared.up_proj.weight))
        state["shared.c_proj.weight"] = shared.down_proj.weight.detach().clone()
    if is_gated:  # by a sigmoid: of 0, so 1/2, which a doubled last matrix makes 1
        theirs.shared_expert_gate.weight.data.zero_()
        shared.down_proj.weight.data *= 2
    ours.load_state_dict({key: w.detach().clone() for key, w in state.items()})

    x = torch.randn(2, 13, D, generator=torch.Generator().manual_seed(1))
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    out, expected = ours(a)[0], theirs(b)
    expected = expected[0] if isinstance(expected, tuple) else expected
    weight = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    (out * weight).sum().backward()
    (expected * weight).sum().backward()
    pairs = [
        (out, expected),
        (a.grad, b.grad),
        (ours.router.weight.grad, theirs.gate.weight.grad),
        (ours.experts.c_fc.grad, theirs.experts.gate_up_proj.grad),
        (ours.experts.c_proj.grad, theirs.experts.down_proj.grad),
    ]
    if shared:
        factor = 2 if is_gated else 1
        pairs.append((ours.shared.c_proj.weight.grad, shared.down_proj.weight.grad * factor))
    for found, expected in pairs:
        scale = max(1.0, expected.abs().max().item())
        assert (found - expected).abs().max() <= 1e-5 * scale
