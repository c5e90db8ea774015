"""The dense GPT: nanoGPT's names and sizes, and what every variant promises.

That it computes what GPT-2 does, and the modern parts what those of transformers do, is in
test_hf_load.py and test_hf_classes.py; that no token sees a later one, in test_sampling.py."""

import math

import pytest
import torch
import torch.nn.functional as F

from model import GPT, GPTConfig, cross_entropy
from moe_model import MoEGPT
from tests.helpers import MODERN, full, small_model, tokens

VARIANTS = [
    {},
    {"bias": False},
    {"norm": "rmsnorm"},
    {"position": "rope"},
    {"n_kv_head": 1},
    {"mlp": "swiglu"},
    {"mlp": "relu2"},
    {"qk_norm": True},
    {"tie_weights": False},
    MODERN | {"n_kv_head": 1, "bias": False},
]


def test_nanogpt_names_and_shapes():
    with torch.device("meta"):
        model = GPT(GPTConfig())
    shapes = {name: tuple(p.shape) for name, p in model.state_dict().items()}
    expected = {
        "transformer.wte.weight": (50304, 768),
        "transformer.wpe.weight": (1024, 768),
        "transformer.ln_f.weight": (768,),
        "transformer.ln_f.bias": (768,),
        "lm_head.weight": (50304, 768),
    }
    block = {"ln_1": (768,), "ln_2": (768,), "attn.c_attn": (2304, 768), "attn.c_proj": (768, 768)}
    block |= {"mlp.c_fc": (3072, 768), "mlp.c_proj": (768, 3072)}
    for i in range(12):
        for name, shape in block.items():
            expected[f"transformer.h.{i}.{name}.weight"] = shape
            expected[f"transformer.h.{i}.{name}.bias"] = shape[:1]
    assert shapes == expected
    # nanoGPT's optimizer states go by this order
    order = [name.removeprefix("transformer.") for name, _ in model.named_parameters()]
    assert order[:3] == ["wte.weight", "wpe.weight", "h.0.ln_1.weight"]
    assert order[-2:] == ["ln_f.weight", "ln_f.bias"]


def test_size_and_flops_of_gpt2():
    with torch.device("meta"):
        model = GPT(GPTConfig(vocab_size=50257, bias=True))
    # GPT-2 small, without wpe
    assert model.num_params() == model.num_active_params() == 124_439_808 - 1024 * 768
    matmuls = 12 * 12 * 768**2 + 50257 * 768
    assert model.flops_per_token() == 6 * matmuls + 12 * 12 * 768 * 1024


def test_mlp_width():
    for mlp, usual, rows in (("gelu", 128, 1), ("relu2", 128, 1), ("swiglu", 128, 2)):
        assert small_model(mlp=mlp).transformer.h[0].mlp.c_proj.weight.shape == (32, usual)
        wide, usual = (small_model(mlp=mlp, mlp_dim=dim, bias=False) for dim in (72, 64))
        assert wide.transformer.h[1].mlp.c_fc.weight.shape == (rows * 72, 32)
        assert wide.transformer.h[1].mlp.c_proj.weight.shape == (32, 72)
        more = 2 * 8 * 32 * (rows + 1)
        assert wide.num_params() - usual.num_params() == more
        assert wide.flops_per_token() - usual.flops_per_token() == 6 * more


@pytest.mark.parametrize("settings", VARIANTS, ids=str)
class TestVariants:
    def test_loss_at_init_is_ln_v(self, settings):
        idx = tokens(4, 17)
        _, loss = small_model(**settings)(idx[:, :-1], idx[:, 1:])
        assert abs(loss.item() - math.log(50)) < 0.1

    def test_activation_checkpointing_changes_nothing(self, settings):
        idx, results = tokens(2, 16), []
        for checkpointing in (False, True):
            model = small_model(**settings, gradient_checkpointing=checkpointing, dropout=0.1)
            torch.manual_seed(1)
            _, loss = model(idx, idx)
            loss.backward()
            results.append([loss, *(p.grad for p in model.parameters())])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)


def test_targets_of_minus_one_are_ignored():
    model, idx = small_model(), tokens(1, 16)
    targets = idx.clone()
    targets[:, 5:] = -1
    torch.testing.assert_close(model(idx, targets)[1], model(idx[:, :5], idx[:, :5])[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_loss_of_a_large_vocabulary_goes_in_chunks(dtype):
    """Equal to torch's in value and gradient. Of the logits' size, it keeps only the logits."""
    torch.manual_seed(0)
    logits = torch.randn(300, 50304).mul(3).to(dtype).requires_grad_()
    targets = torch.randint(50304, (300,))
    targets[[0, 7, 299]] = -1
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        loss = cross_entropy(logits, targets)
    assert max(t.numel() for t in kept) == logits.numel()
    assert all(t.data_ptr() == logits.data_ptr() for t in kept if t.numel() >= logits.numel() / 10)
    (grad,) = torch.autograd.grad(3 * loss, logits)
    wanted = F.cross_entropy(logits.float(), targets, ignore_index=-1)
    (wanted_grad,) = torch.autograd.grad(3 * wanted, logits)
    torch.testing.assert_close(loss, wanted, atol=1e-5, rtol=0)
    close = 1e-6 if dtype == torch.float32 else 1e-5
    assert grad.dtype == dtype and (grad - wanted_grad).abs().max() <= close
    assert grad.abs().sum() > 1 and (grad[[0, 7, 299]] == 0).all()


@pytest.mark.parametrize(
    "settings",
    [
        full({}),
        full({"gradient_checkpointing": True}),
        {"use_moe": True, "expert_impl": "grouped"},
        {"use_moe": True, "expert_impl": "loop", "gradient_checkpointing": True},
    ],
    ids=str,
)
def test_compiled_in_parts(settings):
    """The same loss and gradients. All blocks share one compilation, without a graph break."""
    model, idx = small_model(n_layer=3, **settings), tokens(2, 16)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    found = []
    for compiled in (False, True):
        if compiled:
            model.compile_parts(backend="aot_eager")
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(idx, idx)[1]
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters())])
    for a, b in zip(*found, strict=True):
        assert (a - b).abs().max() <= 2e-2 * a.abs().max()
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    # a block, the head, the loss; the loop over experts is not compiled: there each block is cut
    assert graphs == 3 or (settings.get("expert_impl") == "loop" and 3 < graphs < 9), graphs


def test_init_scale():
    """Residual projections are scaled by 1 / sqrt(2 n_layer), stacked ones too."""
    for settings in ({}, {"use_moe": True, "num_experts": 3, "num_shared_experts": 1}):
        model = small_model(n_embd=128, n_layer=8, **settings)
        for name, p in model.named_parameters():
            if p.dim() >= 2 and not name.endswith("bias"):
                expected = 0.02 / 4 if "c_proj" in name else 0.02
                assert abs(p.std() / expected - 1) < 0.1, name
            elif name.endswith("bias"):
                assert (p == 0).all(), name


def test_config_names_every_problem():
    choices = "expected one of gelu, gelu_tanh, swiglu, relu2"
    with pytest.raises(ValueError, match=f"block_size is 0.*mlp is 'tanh', {choices}"):
        GPTConfig(block_size=0, mlp="tanh")
    not_divisible = r"n_embd \(30\) is not .* n_head \(4\).*n_head \(4\) is not .* n_kv_head \(3\)"
    with pytest.raises(ValueError, match=not_divisible):
        GPTConfig(n_embd=30, n_head=4, n_kv_head=3)
    with pytest.raises(ValueError, match="longer than block_size"):
        small_model()(tokens(1, 17))


@pytest.mark.parametrize("use_moe", [False, True])
def test_what_a_model_returns(use_moe):
    """The same for both classes; its stats keep no graph alive."""
    model, idx = small_model(use_moe=use_moe), tokens(2, 16)
    logits, loss = model(idx, idx)
    assert type(model) is (MoEGPT if use_moe else GPT)
    assert logits.shape == (2, 16, 50) and loss.dim() == 0 and model(idx)[1] is None
    assert not any(value.requires_grad for value in model.stats.values())


@pytest.mark.parametrize("settings", [{"use_moe": True}, {"position": "rope", "qk_norm": True}])
def test_weights_in_bfloat16_without_autocast(settings):
    """As transformers may load an exported model."""
    model, idx = small_model(**settings), tokens(2, 8)
    loss = model(idx, idx)[1].item()
    assert model.bfloat16()(idx, idx)[1].item() == pytest.approx(loss, rel=0.02)
