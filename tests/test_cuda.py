"""
Models and optimizers on each device: what a GPU computes, and how.

Each test runs on the CPU, too, so that it is tested itself where there is no GPU. Whole runs are in
test_cuda_runs.py. On a GPU: pytest -n 0 tests/test_cuda.py tests/test_cuda_runs.py
"""

import math

import pytest
import torch
from torch._dynamo.utils import counters
from torch.profiler import ProfilerActivity, profile

from moe_model import Router
from nanomoe.device import autocast, peak_flops
from nanomoe.optim import build_optimizer
from tests.helpers import full, small_model, tokens
from tests.moe_layers import inputs, layer, values_and_gradients

MOE = {"use_moe": True, "num_experts": 8, "top_k": 2, "n_embd": 64}
MODERN = {"norm": "rmsnorm", "position": "rope", "n_kv_head": 1, "mlp": "swiglu", "qk_norm": True}
MODELS = {
    "dense": {"n_embd": 64},
    "moe": MOE | {"bias": True},
    "modern moe": MOE | MODERN | {"num_shared_experts": 1, "router_score": "sigmoid"},
    "capacity": MOE | {"capacity_factor": 1.0, "expert_load_balance_loss_coef": 0.1},
}
ON_CPU_FULL = pytest.mark.parametrize("device", [full("cpu"), "cuda"], indirect=True)


def loss_logits_and_gradients(model, device, dtype):
    model.to(device)
    idx = tokens(4, 17).to(device)
    with autocast(device, dtype):
        logits, loss = model(idx[:, :-1], idx[:, 1:])
    assert loss.dtype == torch.float32
    loss.backward()
    named = {"loss": loss, "logits": logits}
    named |= {name: p.grad for name, p in model.named_parameters()}
    return {name: value.detach().double().cpu() for name, value in named.items()}


def by_position(self, score_NE):
    """A choice that no rounding changes."""
    N, E = score_NE.shape
    first_N1 = torch.arange(N, device=score_NE.device).unsqueeze(1)
    return (first_N1 + torch.arange(self.config.top_k, device=score_NE.device)) % E


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-4), ("bfloat16", 2e-2)])
@pytest.mark.parametrize("name", MODELS)
def test_loss_logits_and_gradients(device, name, dtype, tolerance, monkeypatch):
    """Those of the plain loop on the CPU, in float32."""
    if dtype == "bfloat16":
        monkeypatch.setattr(Router, "choose", by_position)
    impl = {} if name == "dense" else {"expert_impl": "loop"}
    reference = small_model(**MODELS[name] | impl)
    wanted = loss_logits_and_gradients(reference, torch.device("cpu"), "float32")
    found = loss_logits_and_gradients(small_model(**MODELS[name]), device, dtype)
    for key, value in wanted.items():
        error = (found[key] - value).norm() / value.norm()
        assert error <= tolerance, f"{key}: {error:.1e}"


@ON_CPU_FULL  # tests/test_moe.py is quicker there
@pytest.mark.parametrize("load", ["as it comes", "all on one", "one is silent"])
@pytest.mark.parametrize("E, K", [(3, 1), (3, 3), (8, 2), (16, 1), (64, 8)])
def test_grouped_equals_loop(device, E, K, load):
    """In float32; and in bfloat16 it is as near to float32 as the loop is."""
    sizes = {"num_experts": E, "top_k": K, "n_embd": 64, "expert_dim": 128, "bias": True}
    sizes["balance_scope"] = "micro"
    loop, grouped = layer(sizes, "loop"), layer(sizes, "grouped")
    x = inputs(sizes, (2, 100), load, 0, loop, grouped).to(device)
    exact = values_and_gradients(loop.to(device), x, torch.float32)
    found = values_and_gradients(grouped.to(device), x, torch.float32)
    for wanted, value in zip(exact.values(), found.values(), strict=True):
        assert (value - wanted).norm() <= 1e-4 * wanted.norm()
    rough = values_and_gradients(loop, x, torch.bfloat16)
    found = values_and_gradients(grouped, x, torch.bfloat16)
    three = (exact.values(), rough.values(), found.values())
    for wanted, other, value in zip(*three, strict=True):
        errors = [(tensor.float() - wanted).norm() for tensor in (other, value)]
        assert errors[1] <= 2 * errors[0] + 5e-3 * wanted.norm()


@ON_CPU_FULL
@pytest.mark.parametrize("name", ["dense", "moe", "modern moe"])
def test_compiled_once(device, name, monkeypatch):
    """Each part of a model is one graph, and its loss and gradients are those without compiling. A
    further step or evaluation compiles nothing."""
    monkeypatch.setattr(Router, "choose", by_position)
    settings = MODELS[name] if name == "dense" else MODELS[name] | {"expert_impl": "grouped"}
    torch._dynamo.reset()
    plain = loss_logits_and_gradients(small_model(**settings), device, "bfloat16")
    model = small_model(**settings)
    # on a CPU only what comes before the code generation: that would take half a minute
    backend = "inductor" if device.type == "cuda" else "aot_eager"
    model.compile_parts(fullgraph=True, backend=backend)
    found = loss_logits_and_gradients(model, device, "bfloat16")
    for key, value in plain.items():
        assert (found[key] - value).norm() <= 3e-2 * value.norm(), key

    def run(steps):
        for _ in range(steps):
            step(model, device)
        model.eval()
        with torch.no_grad(), autocast(device, "bfloat16"):
            model(tokens(4, 16).to(device), tokens(4, 16).to(device))
        model.train()

    run(1)
    compiled = counters["stats"]["unique_graphs"]
    assert compiled
    run(10)
    assert counters["stats"]["unique_graphs"] == compiled


def step(model, device, dtype="bfloat16"):
    idx = tokens(4, 17).to(device)
    with autocast(device, dtype):
        loss = model(idx[:, :-1], idx[:, 1:])[1]
    loss.backward()
    model.update_balance(model.stats)
    return loss


@pytest.mark.parametrize("compiled", [False, full(True)])
def test_no_row_is_added_with_atomics(device, compiled):
    """Read from what the device has run, forward and backward."""
    settings = {"bias": True, "expert_impl": "grouped", "router_bias_update_rate": 1e-3}
    model = small_model(**MOE | settings).to(device)
    torch._dynamo.reset()
    if compiled:
        model.compile_parts(fullgraph=True)
    step(model, device)
    activities = [ProfilerActivity.CPU]
    activities += [ProfilerActivity.CUDA] * (device.type == "cuda")
    with profile(activities=activities) as trace:
        step(model, device)
    names = [event.key for event in trace.key_averages()]
    assert any("grouped_mm" in name for name in names)
    for bad in ("index_put", "indexing_backward", "index_add", "scatter_reduce"):
        assert not [name for name in names if bad in name]


def weights_and_state(model, optimizer):
    state = [value for entry in optimizer.state.values() for value in entry.values()]
    return [tensor.clone() for tensor in (*model.parameters(), *state)]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_optimizers(device, optimizer):
    """The fused ones of each device take the CPU's steps. Where found_inf says that a gradient is
    not finite, weights and state stay as they are, to the bit."""
    models = []
    for where in (torch.device("cpu"), device):
        model = small_model(**MOE).to(where)
        opt = build_optimizer(model, optimizer, 1e-2, 0.1, (0.9, 0.95), where.type)
        assert opt.defaults["fused"]
        generator = torch.Generator().manual_seed(0)
        for found_inf in (0.0, 1.0, 0.0):
            for p in model.parameters():
                p.grad = torch.randn(p.shape, generator=generator).to(where)
                p.grad.view(-1)[0] += math.inf if found_inf else 0.0
            opt.found_inf = torch.tensor(found_inf, device=where)
            opt.grad_scale = torch.ones((), device=where)
            before = weights_and_state(model, opt)
            opt.step()
            same = [*map(torch.equal, before, weights_and_state(model, opt))]
            assert all(same) if found_inf else not any(same)
        models.append(model)
    # on a GPU Muon's iterations are in bfloat16; its update is 0.2 * sqrt(larger side) at most
    tolerance = 0.02 if optimizer == "muon" and device.type == "cuda" else 1e-5
    for (name, a), b in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert (a - b.cpu()).abs().max() <= tolerance, name


def test_peak_flops(device):
    if device.type == "cpu":
        assert peak_flops(device) is None
        return
    name = torch.cuda.get_device_name(device)
    if peak_flops(device) is None:
        pytest.skip(f"{name} is not in nanomoe/device.py's PEAK_FLOPS")
    a = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    fastest = math.inf
    for _ in range(5):
        start.record()
        a @ a
        end.record()
        torch.cuda.synchronize()
        fastest = min(fastest, start.elapsed_time(end) / 1e3)
    measured = 2 * 8192**3 / fastest
    assert measured < 1.1 * peak_flops(device), f"{name}: {measured / 1e12:.0f} TFLOP/s"
