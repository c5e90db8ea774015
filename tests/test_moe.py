"""The MoE layer: which layers are MoE, sizes, what the router reports, options. The loop over
experts and the grouped GEMMs: equal values and gradients.

What the layer computes, and the traps, are in test_traps_*.py.
"""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch._dynamo.backends.common import aot_autograd

from moe_model import MoEGPTConfig, Router, choose_expert_impl, why_not_grouped
from tests.helpers import MOE, full, one_line, small_model, tokens, train
from tests.moe_layers import assert_equal, inputs, layer, values_and_gradients


def test_which_layers_are_moe():
    def layers(**settings):
        model = small_model(n_layer=6, **MOE, **settings)
        model(tokens(1, 8), tokens(1, 8))
        found = [i for i, block in enumerate(model.transformer.h) if hasattr(block.mlp, "router")]
        assert len(model.stats["expert_count"]) == len(found)
        return found

    assert layers() == [0, 1, 2, 3, 4, 5]
    assert layers(moe_stride=2) == [1, 3, 5]
    assert layers(num_dense_layers=1) == [1, 2, 3, 4, 5]
    assert layers(num_dense_layers=2, moe_stride=3) == [2, 5]


def test_expert_width():
    def width(**settings):
        config = MoEGPTConfig(n_embd=768, n_head=12, num_experts=8, **settings)
        return config.expert_hidden_dim

    assert width(top_k=1) == 3072 and width(top_k=2, expert_dim=-1) == 1536
    assert width(top_k=2, expert_dim=100) == 100
    assert width(top_k=7, num_shared_experts=1, expert_dim=-1, mlp="swiglu") == 256
    assert width(top_k=5, expert_dim=-1) == 616  # 614.4 to the nearest multiple of 8
    assert (
        width(top_k=2, expert_dim=-1, mlp_dim=1024) == 512 and width(top_k=1, mlp_dim=1024) == 1024
    )


@pytest.mark.parametrize("scope", ["global", "micro"])
def test_stats_of_a_known_routing(scope):
    """Router logits 3, 1, 0, 0 for every token. The balance loss takes the load of the whole step
    before, or that of this micro-batch."""
    sizes = {"n_embd": 4, "n_head": 1, "num_experts": 4, "top_k": 2, "norm_top_k": False}
    router = Router(MoEGPTConfig(**sizes, balance_scope=scope))
    router.weight.data = torch.eye(4)
    router.load = torch.tensor([0.7, 0.2, 0.1, 0.0])
    logit = torch.tensor([3.0, 1.0, 0.0, 0.0])
    routing, p = router(logit.expand(2, 5, 4))[2], logit.softmax(0)
    load = router.load if scope == "global" else torch.tensor([0.5, 0.5, 0.0, 0.0])
    expected = {
        "expert_count": torch.tensor([10.0, 10.0, 0.0, 0.0]),
        "balance_loss": 4 * (load * p).sum(),
        "z_loss": logit.logsumexp(0) ** 2,
        "router_entropy": -(p * p.log()).sum(),
        "first_gate": p[0],
        "logit_norm": torch.tensor(10.0).sqrt(),
        "dropped": torch.tensor(0.0),
    }
    assert expected.keys() <= set(routing._fields)
    for name, value in expected.items():
        torch.testing.assert_close(getattr(routing, name), value)


def test_router_jitter_and_route_scale():
    x = torch.randn(2, 8, 32)
    router = small_model(**MOE, router_jitter=0.1).transformer.h[0].mlp.router
    assert not router(x)[0].equal(router(x)[0])
    plain, scaled = (
        small_model(**MOE, **kw).transformer.h[0].mlp.router for kw in ({}, {"route_scale": 2.5})
    )
    torch.testing.assert_close(2.5 * plain(x)[0], scaled(x)[0])
    torch.testing.assert_close(plain(x)[0].sum(-1), torch.ones(16))


def test_expert_dropout():
    """Half of the hidden units, doubled: equal in the mean, and different each time."""
    moe = small_model(**MOE, expert_dropout=0.5, mlp="relu2").transformer.h[0].mlp
    x = torch.randn(1, 4, 32)
    many = torch.stack([moe(x)[0] for _ in range(1000)])
    expected = moe.eval()(x)[0]
    assert many.std(0).mean() > expected.abs().mean() / 5
    assert (many.mean(0) - expected).abs().mean() < expected.abs().mean() / 10


def test_bad_config_is_refused():
    """Every value out of range is named; tests/test_bad_input.py has those that do not go
    together."""
    wrong = {
        "num_experts": (0, "at least 1"),
        "top_k": (0, "at least 1"),
        "expert_dim": (-2, "at least -1"),
        "moe_stride": (0, "at least 1"),
        "expert_load_balance_loss_coef": (-1.0, "at least 0"),
        "router_z_loss_coef": (float("nan"), "a finite number"),
        "router_score": ("softplus", "one of softmax, sigmoid"),
        "balance_scope": ("batch", "one of global, micro"),
        "expert_impl": ("fast", "one of auto, grouped, loop"),
        "route_scale": (0.0, "more than 0"),
        "capacity_factor": (-1.0, "at least 0"),
        "router_bias_update_rate": (-1e-3, "at least 0"),
        "expert_dropout": (1.0, "at least 0 and less than 1"),
        "router_jitter": (-0.1, "at least 0"),
    }
    with pytest.raises(ValueError) as error:
        small_model(**MOE | {name: value for name, (value, _) in wrong.items()})
    for name, (value, expected) in wrong.items():
        assert f"{name} is {value!r}, expected {expected}" in str(error.value)


# -----------------------------------------------------------------------------
# two implementations


@st.composite
def cases(draw):
    E = draw(st.integers(1, 9))
    sizes = {
        "num_experts": E,
        "top_k": draw(st.integers(1, E)),
        "n_embd": 8 * draw(st.integers(1, 5)),
        "expert_dim": 8 * draw(st.integers(1, 6)),
        "mlp": draw(st.sampled_from(["gelu", "swiglu", "relu2"])),
        "bias": draw(st.booleans()),
        "router_score": draw(st.sampled_from(["softmax", "sigmoid"])),
        "norm_top_k": draw(st.booleans()),
        "num_shared_experts": draw(st.integers(0, 2)),
        "route_scale": draw(st.sampled_from([1.0, 2.5])),
        "capacity_factor": draw(st.sampled_from([0.0, 0.5, 1.0])),
        "balance_scope": "micro",
    }
    load = draw(st.sampled_from(["as it comes", "all on one", "ties", "one is silent"]))
    shape = (draw(st.integers(1, 3)), draw(st.integers(1, 40)))
    return sizes, shape, load, draw(st.integers(0, 99))


CHECKS = [HealthCheck.too_slow]
examples = settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=CHECKS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@examples
@given(case=cases())
def test_both_are_equal(dtype, case):
    loop, grouped = (layer(case[0], impl, seed=case[3]) for impl in ("loop", "grouped"))
    x = inputs(*case, loop, grouped)
    wanted = values_and_gradients(loop, x, dtype)
    assert_equal(values_and_gradients(grouped, x, dtype), wanted, dtype)


@pytest.mark.parametrize("rows", [1, 2, 63, 64, 65])
def test_rows_that_are_rounded_up_add_nothing(rows):
    """In bfloat16 on a CPU the loop pads an expert's rows: with any number of them it computes what
    each token alone would get."""
    moe = layer({"num_experts": 2, "top_k": 1, "n_embd": 16, "expert_dim": 16}, "loop")
    x = torch.randn(1, rows, 16, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        together = moe(x)[0]
        alone = torch.cat([moe(x[:, [i]])[0] for i in range(rows)], dim=1)
    assert (together - alone).abs().max() <= 2e-2 * alone.abs().max()


@pytest.mark.parametrize("impl", ["loop", "grouped"])
@examples
@given(case=cases())
def test_renaming_experts_changes_nothing(impl, case):
    sizes, shape, load, seed = case
    if load == "ties":  # who wins a tie is decided by the number
        load = "as it comes"
    one, other = layer(sizes, impl, seed), layer(sizes, impl, seed)
    x = inputs(sizes, shape, load, seed, one, other)
    order = torch.randperm(sizes["num_experts"], generator=torch.Generator().manual_seed(seed))
    for name, p in other.state_dict().items():
        if "shared" not in name:
            p.copy_(p[order])
    torch.testing.assert_close(one(x)[0], other(x)[0], atol=2e-5, rtol=1e-4)


# -----------------------------------------------------------------------------
# compiled

SIGMOID = {"router_score": "sigmoid", "router_bias_update_rate": 1e-3, "capacity_factor": 1.0}
COMPILED = [
    full({"top_k": 1}),
    {"top_k": 2, "mlp": "swiglu", "num_shared_experts": 1},
    full({"top_k": 4, "bias": False} | SIGMOID),
]
# no rows added with atomics, no shapes or branches that depend on the routing
BAD = ("index_add", "index_put", "scatter_add", "scatter_reduce", "nonzero", "bincount")
BAD += ("_local_scalar_dense", "aten.item")


@pytest.mark.parametrize("more", COMPILED, ids=str)
def test_grouped_compiles_to_one_graph_of_gathers(more):
    """Forward and backward, read from the graphs that the compiler gets; no graph break."""
    graphs = []

    def keep(graph, example_inputs):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    model = small_model(use_moe=True, num_experts=4, expert_impl="grouped", n_embd=64, **more)
    idx, backend = tokens(2, 16), aot_autograd(fw_compiler=keep, bw_compiler=keep)
    with torch.autocast("cpu", torch.bfloat16):
        eager = model(idx, idx)[1]
        shape = model.stats["expert_count"].shape
        loss = torch.compile(model, backend=backend, fullgraph=True)(idx, idx)[1]
    loss.backward()
    torch.testing.assert_close(loss, eager, atol=1e-3, rtol=0)
    assert model.stats["expert_count"].shape == shape and len(graphs) == 2
    ops = [node for graph in graphs for node in graph.graph.nodes if node.op == "call_function"]
    names = [str(node.target) for node in ops]
    # per layer: two forward, four backward
    assert sum("grouped_mm" in name for name in names) == 2 * 6
    for node, name in zip(ops, names, strict=True):
        assert not any(bad in name for bad in BAD) or adds_no_rows(node), name
        if "scatter" in name:  # of single numbers only
            assert node.meta["val"].dim() == 1 or node.meta["val"].shape[-1] <= 4, node


def adds_no_rows(node):
    """Whether this is the gradient of the embeddings, no part of the experts, or that of the
    chosen scores, (N, E), where no two numbers meet."""
    return node.meta["val"].shape in {(50, 64), (16, 64), (32, 4)}


@pytest.mark.full  # the first compilation takes most of a minute
@pytest.mark.parametrize("impl", ["loop", "grouped"])
def test_inductor_gives_the_same_loss_and_gradients(impl):
    torch._dynamo.reset()
    model = small_model(use_moe=True, num_experts=4, top_k=2, expert_impl=impl, bias=False)
    idx = tokens(2, 16)
    results = []
    for run in (model, torch.compile(model, fullgraph=impl == "grouped")):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = run(idx, idx)[1]
        loss.backward()
        results.append([loss.detach(), *(p.grad.clone() for p in model.parameters())])
    for a, b in zip(*results, strict=True):
        assert (a - b).abs().max() <= 5e-2 * b.abs().max()


# -----------------------------------------------------------------------------
# which implementation runs


def config_of(**sizes):
    return MoEGPTConfig(n_embd=64, n_head=2, **({"expert_dim": 32} | sizes))


def pick(device_type, dtype, compiled=False, assignments=10**6, **sizes):
    return choose_expert_impl(config_of(**sizes), device_type, dtype, compiled, assignments)


BF16, FP32 = torch.bfloat16, torch.float32


def test_auto_picks_the_faster_one():
    for case in ((False,), (True,), (True, 2)):
        assert pick("cuda", BF16, *case) == "grouped"
    assert pick("cpu", FP32) == "grouped" and pick("cpu", FP32, True) == "loop"
    assert pick("cpu", BF16) == pick("cuda", FP32) == pick("mps", FP32) == "loop"
    assert pick("cpu", BF16, True, 2) == pick("cpu", FP32, assignments=1) == "loop"
    # a few tokens, as in sampling: less than 64 for each of the 4 experts; but not a single one
    assert pick("cpu", BF16, assignments=256) == "loop"
    assert pick("cpu", BF16, assignments=255) == "grouped"
    assert pick("cpu", BF16, assignments=1) == "loop"
    for impl in ("loop", "grouped"):  # what was asked for runs
        assert pick("cuda", BF16, expert_impl=impl) == pick("cpu", FP32, expert_impl=impl) == impl


@pytest.mark.parametrize(
    "device_type, dtype, compiled, sizes, reason",
    [
        ("mps", FP32, False, {}, "no grouped GEMM"),
        ("cuda", torch.float16, False, {}, "no grouped GEMM"),
        ("cpu", FP32, True, {}, "bfloat16 only"),
        ("cuda", BF16, False, {"expert_dim": 36}, "multiples of 8"),
        ("cpu", FP32, False, {"expert_dim": 34}, "multiples of 4"),
        ("cuda", BF16, False, {"num_experts": 1024}, "1024"),
    ],
)
def test_obstacles_of_grouped(device_type, dtype, compiled, sizes, reason):
    assert reason in why_not_grouped(config_of(**sizes), device_type, dtype, compiled)
    for assignments in (2, 10**6):
        assert pick(device_type, dtype, compiled, assignments, **sizes) == "loop"


def test_a_grouped_that_cannot_run_is_an_error_before_the_start(play, tmp_path):
    run = {"dataset": play, "use_moe": True, "top_k": 2, "expert_dim": 30}
    done = train(out_dir=tmp_path / "run", expert_impl="grouped", **run)
    words = "expert_impl 'grouped' cannot run: it needs multiples of 4"
    one_line(done, 2, words, "'auto' can")
    assert not (tmp_path / "run").exists()
    assert train(out_dir=tmp_path / "auto", **run).returncode == 0
