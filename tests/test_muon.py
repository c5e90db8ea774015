"""Muon: every matrix is orthogonalised by itself, torch.optim.Muon gives the same, and AdamW trains
the rest."""

import copy
import math
import re

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import train as script
from configurator import InputError, configure
from model import is_matrix
from moe_model import build_config, build_model
from nanomoe import checkpoint, optim
from nanomoe.load import load
from nanomoe.optim import (
    Muon,
    build_optimizer,
    is_hidden_matrix,
    num_moments,
    orthogonalize,
)
from tests.helpers import (
    MOE,
    ROOT,
    assert_same_run,
    losses,
    nanogpt_file,
    one_line,
    run_script,
    small_model,
    stepped,
    succeeded,
    tokens,
    train,
    weights,
)

MODERN = {"norm": "rmsnorm", "position": "rope", "mlp": "swiglu", "qk_norm": True}
BETAS = (0.9, 0.95)


def muon_of(p, rate=1e-2, weight_decay=0.1, rows=None):
    rows = rows or (p.shape[-2],)
    group = {"params": [p], "rows": rows, "weight_decay": weight_decay}
    return Muon([group], lr=rate, fused=True)


def torch_muon(params, monkeypatch, rate=1e-2, weight_decay=0.1):
    """torch's own, computing in float32: its iteration calls bfloat16() once."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)
    return torch.optim.Muon(
        params, lr=rate, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"
    )


def jordan(monkeypatch):
    """torch's coefficients, whichever we use."""
    monkeypatch.setattr(optim, "COEFFICIENTS", [(3.4445, -4.7750, 2.0315)] * 5)


def random_steps(ours, others, p, parts, steps=4):
    """Steps of both optimizers with the same gradients. parts(grad): those of the others."""
    for step in range(steps):
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step))
        for q, grad in zip(others.param_groups[0]["params"], parts(p.grad), strict=True):
            q.grad = grad.clone()
        ours.step()
        others.step()


@pytest.mark.parametrize("shape", [(48, 32), (32, 48), (40, 40), (1, 24), (24, 1)], ids=str)
@pytest.mark.parametrize("experts", [1, 3])
def test_each_expert_is_torchs_muon_on_its_slice(shape, experts, monkeypatch):
    jordan(monkeypatch)
    p = torch.nn.Parameter(torch.randn(experts, *shape))
    slices = [torch.nn.Parameter(p[e].detach().clone()) for e in range(experts)]
    random_steps(muon_of(p), torch_muon(slices, monkeypatch), p, torch.Tensor.unbind)
    for e in range(experts):
        torch.testing.assert_close(p[e], slices[e], atol=1e-5, rtol=0)


@pytest.mark.parametrize("stacked", [False, True])
def test_each_part_of_a_fused_matrix_is_torchs_muon_on_it(stacked, monkeypatch):
    """Queries, and fewer keys and values; the same for gate and up-projection."""
    jordan(monkeypatch)
    rows = (32, 8, 8)
    p = torch.nn.Parameter(torch.randn(2, 48, 32) if stacked else torch.randn(48, 32))

    def parts(tensor):
        split = tensor.split(rows, dim=-2)
        return [matrix for part in split for matrix in part.reshape(-1, *part.shape[-2:])]

    alone = [torch.nn.Parameter(part.detach().clone()) for part in parts(p)]
    random_steps(muon_of(p, rows=rows), torch_muon(alone, monkeypatch), p, parts)
    for part, expected in zip(parts(p), alone, strict=True):
        torch.testing.assert_close(part, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("settings", [{}, MODERN, MODERN | {"n_kv_head": 1, "mlp": "relu2"}])
def test_a_models_matrices_are_cut_as_the_model_uses_them(settings):
    """What the split gives is what attention and SwiGLU compute with."""
    model = small_model(**MOE, num_shared_experts=1, num_dense_layers=1, **settings)
    rows_of = {}
    for group in build_optimizer(model, "muon", 1e-3, 0.1, BETAS, "cpu").param_groups:
        for p in group["params"]:
            rows_of[p] = group.get("rows")
    c = model.config
    for name, p in model.named_parameters():
        rows = rows_of.pop(p)
        if not is_hidden_matrix(name, p):
            assert rows is None, name
        elif name.endswith("attn.c_attn.weight"):
            kv = (c.n_kv_head or c.n_head) * c.head_dim
            assert rows == (c.n_embd, kv, kv)
        elif "c_fc" in name:
            half = p.shape[-2] // 2
            assert rows == ((half, half) if c.mlp == "swiglu" else (p.shape[-2],))
        else:
            assert rows == (p.shape[-2],)
    assert not rows_of


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("moe", [{}, MOE], ids=["dense", "moe"])
def test_the_rest_is_trained_as_by_adamw(moe, bias):
    """Embeddings, head, norms, biases and routers: AdamW's own steps, and its weight decay."""
    shared = {"num_shared_experts": 1} if moe else {}
    model = small_model(bias=bias, tie_weights=False, **moe, **shared)
    twin = copy.deepcopy(model)
    ours = build_optimizer(model, "muon", 1e-2, 0.1, BETAS, "cpu")
    adamw = build_optimizer(twin, "adamw", 1e-2, 0.1, BETAS, "cpu")
    torch.manual_seed(0)
    for _ in range(3):
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        ours.step()
        adamw.step()
        ours.zero_grad()
    kinds = set()
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        by_muon = name.startswith("transformer.h.") and p.dim() >= 2
        by_muon &= "router" not in name and not name.endswith("bias")
        kinds.add(by_muon)
        assert by_muon == is_hidden_matrix(name, p)
        assert torch.equal(p, q) != by_muon, name
    assert kinds == {False, True}


def test_permuted_experts_get_permuted_updates():
    torch.manual_seed(0)
    order = torch.tensor([2, 0, 3, 1])
    p = torch.nn.Parameter(torch.randn(4, 24, 16))
    q = torch.nn.Parameter(p.detach()[order])
    first, second = muon_of(p), muon_of(q)
    for _ in range(3):
        p.grad = torch.randn_like(p)
        q.grad = p.grad[order]
        first.step()
        second.step()
    torch.testing.assert_close(q, p[order], atol=1e-6, rtol=0)


def test_an_expert_without_tokens_does_not_move():
    """Its old momentum is not blown up to a full update; weight decay, as with AdamW, goes on."""
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(3, 16, 16))
    optimizer = muon_of(p, rate=1e-2, weight_decay=0.1)
    for step in range(4):
        before = p.detach().clone()
        p.grad = torch.randn_like(p)
        if step >= 2:
            p.grad[1] = 0
        optimizer.step()
        moved = (p - before * (1 - 1e-3)).abs().amax(dim=(1, 2)) > 1e-4
        assert moved.tolist() == [True, step < 2, True]


SPECIAL = {
    "zeros": torch.zeros(2, 8, 12),
    "tiny": 1e-30 * torch.randn(2, 8, 12),
    "subnormal": torch.full((2, 8, 12), 1e-42),
    "huge": 1e30 * torch.randn(2, 8, 12),
    "largest": torch.full((2, 8, 12), 3e38),
    "rank 1": torch.randn(2, 8, 1) @ torch.randn(2, 1, 12),
    "one entry": torch.zeros(2, 8, 12).index_fill(2, torch.tensor([3]), 1.0),
    "E = 1": torch.randn(1, 8, 12),
    "H = 1": torch.randn(2, 1, 12),
    "1 x 1": torch.randn(1, 1),
}


@pytest.mark.parametrize("what", SPECIAL)
def test_strange_gradients_give_finite_updates(what):
    grad = SPECIAL[what]
    p = torch.nn.Parameter(torch.ones_like(grad))
    optimizer = muon_of(p, rate=1.0, weight_decay=0.0)
    for _ in range(3):
        p.grad = grad.clone()
        optimizer.step()
    moved = (p - 1).norm(dim=(-2, -1))
    assert p.isfinite().all()
    most = 3 * 1.3 * 0.2 * math.sqrt(max(grad.shape[-2:]) * min(grad.shape[-2:]))
    assert (moved <= most).all(), moved
    if what != "zeros":
        assert (moved >= 0.1).all(), moved


def test_tiny_and_huge_gradients_give_the_same_update():
    grad = torch.randn(2, 8, 12)
    updates = [grad.clone(), 1e-30 * grad, 1e30 * grad]
    orthogonalize(updates)
    for other in updates[1:]:
        torch.testing.assert_close(other, updates[0], atol=1e-4, rtol=0)


@pytest.mark.parametrize("shape", [(3, 64, 96), (3, 96, 64), (64, 64)], ids=str)
def test_an_update_is_nearly_orthogonal_and_of_adamws_size(shape):
    torch.manual_seed(0)
    update = torch.randn(shape)
    u, _, v = torch.linalg.svd(update, full_matrices=False)
    orthogonalize([update])
    scale = 0.2 * math.sqrt(max(shape[-2:]))
    values = torch.linalg.svdvals(update) / scale
    values = values[..., : int(0.95 * values.shape[-1])]  # a square matrix's last ones are near 0
    assert 0.6 < values.min() and values.max() < 1.3
    cosine = (update * (u @ v)).sum() / (update.norm() * (u @ v).norm())
    assert cosine > 0.95
    assert 0.15 < update.square().mean().sqrt() < 0.25


def test_large_parameters_take_the_same_step_alone(monkeypatch):
    models = []
    for large in (2**30, 1):
        monkeypatch.setattr(optim, "LARGE", large)
        models.append(small_model(**MOE, **MODERN))
        optimizer = build_optimizer(models[-1], "muon", 1e-2, 0.1, BETAS, "cpu")
        for _ in range(2):
            models[-1](tokens(2, 16), tokens(2, 16, seed=1))[1].backward()
            optimizer.step()
    for p, q in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(p, q, atol=1e-6, rtol=0)


@pytest.mark.parametrize("rows", [(8, 8, 8), (8, 16)])
def test_a_part_without_a_gradient_does_not_move(rows):
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(24, 16))
    optimizer = muon_of(p, weight_decay=0.0, rows=rows)
    for step in range(3):
        before = p.detach().clone()
        p.grad = torch.randn_like(p)
        if step > 0:
            p.grad[:8] = 0
        optimizer.step()
        moved = [part.abs().max() > 1e-4 for part in (p - before).split(rows)]
        assert moved == [step == 0] + [True] * (len(rows) - 1)


def test_found_inf_skips_a_step():
    """As StepGuard uses it: weights and state stay as they are, to the bit."""
    model = small_model(**MOE)
    optimizer = build_optimizer(model, "muon", 1e-2, 0.1, BETAS, "cpu")

    def step(bad):
        model(tokens(2, 16), tokens(2, 16, seed=1))[1].backward()
        if bad:
            for p in model.parameters():
                p.grad.view(-1)[0] = math.nan
        optimizer.found_inf = torch.tensor(float(bad))
        optimizer.step()
        optimizer.zero_grad()
        state = [value for entry in optimizer.state.values() for value in entry.values()]
        return [tensor.clone() for tensor in (*model.parameters(), *state)]

    step(False)
    before = step(False)
    assert all(map(torch.equal, before, step(True)))
    assert not any(map(torch.equal, before[:3], step(False)[:3]))


def test_state_is_saved_and_loaded_to_the_bit():
    model = small_model(**MOE, **MODERN)
    optimizer = build_optimizer(model, "muon", 1e-2, 0.1, BETAS, "cpu")

    def step(model, optimizer, seed):
        model(tokens(2, 16, seed=seed), tokens(2, 16, seed=seed))[1].backward()
        optimizer.step()
        optimizer.zero_grad()

    step(model, optimizer, 0)
    twin = copy.deepcopy(model)
    resumed = build_optimizer(twin, "muon", 1e-2, 0.1, BETAS, "cpu")
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for seed in (1, 2):
        step(model, optimizer, seed)
        step(twin, resumed, seed)
    assert all(map(torch.equal, model.parameters(), twin.parameters()))


@pytest.mark.parametrize("moe", [{}, MOE], ids=["dense", "moe"])
def test_it_keeps_as_many_moments_as_it_says(moe):
    model = small_model(**moe)
    for name in ("adamw", "muon"):
        twin = copy.deepcopy(model)
        optimizer = build_optimizer(twin, name, 1e-2, 0.1, BETAS, "cpu")
        twin(tokens(2, 16), tokens(2, 16))[1].backward()
        optimizer.step()
        kept = 0
        for entry in optimizer.state.values():
            kept += sum(value.numel() for value in entry.values() if value.dim())
        assert kept == num_moments(twin, name)


def test_groups_do_not_depend_on_the_weight_decay():
    """A run may be resumed with another one, or without."""
    for moe in ({}, MOE):
        model = small_model(bias=True, **moe)
        with_decay, without = (
            build_optimizer(model, "muon", 1e-3, d, BETAS, "cpu") for d in (0.1, 0.0)
        )
        for a, b in zip(with_decay.param_groups, without.param_groups, strict=True):
            assert a["rows"] == b["rows"] and all(map(torch.equal, a["params"], b["params"]))
            assert b["weight_decay"] == 0 and a["weight_decay"] in (0, 0.1)


def test_no_matrices_is_an_error():
    model = small_model()
    model.transformer.h = torch.nn.ModuleList()
    with pytest.raises(InputError, match="no matrices"):
        build_optimizer(model, "muon", 1e-3, 0.1, BETAS, "cpu")
    assert any(is_matrix(name, p) for name, p in model.named_parameters())


@pytest.mark.parametrize("settings", [{}, MOE], ids=["dense", "moe"])
def test_a_run_keeps_its_optimizer(settings, play, tmp_path):
    """Another one is an error whose advice works: a new run with the old one's weights."""
    run = settings | {"dataset": play, "learning_rate": 1e-9, "min_lr": 0.0}
    succeeded(train(**run, out_dir=tmp_path / "old", optimizer="muon", max_iters=2))
    again = run | {"out_dir": tmp_path / "old", "init_from": "auto", "max_iters": 4}
    done = one_line(
        train(**again, optimizer="adamw"), 2, "--optimizer=adamw", "'muon', not 'adamw'"
    )
    flags = re.search("--init_from.*", done.stderr)[0].replace("NEW", str(tmp_path / "new")).split()
    out = succeeded(train(*flags, **run, optimizer="adamw", max_iters=3))
    assert "starting with the weights of" in out and losses(tmp_path / "new").keys() == {1, 2, 3}
    a, b = (weights(checkpoint.latest_good(tmp_path / name)) for name in ("old", "new"))
    assert all(torch.allclose(a[name], b[name], atol=1e-6) for name in a if "load" not in name)
    # not given, it is the checkpoint's
    assert "after step 2" in succeeded(train(**again))
    assert load(tmp_path / "old").settings["optimizer"] == "muon"


def test_a_checkpoint_without_the_setting_is_adamws(play, tmp_path):
    """Those of earlier versions and of nanoGPT."""
    model, optimizer = stepped(vocab_size=64, block_size=32)
    nanogpt_file(tmp_path / "ckpt.pt", model, optimizer)
    run = {"init_from": "resume", "dataset": play, "out_dir": tmp_path, "max_iters": 3}
    one_line(run_script("train.py", **run, optimizer="muon"), 2, "'adamw', not 'muon'")
    out = succeeded(run_script("train.py", **run, optimizer="adamw", eval_iters=1, batch_size=2))
    assert "ckpt.pt after step 2" in out


def test_an_unknown_optimizer_is_one_line(play, tmp_path):
    done = train(dataset=play, out_dir=tmp_path, optimizer="moun")
    one_line(done, 2, "optimizer is 'moun', expected one of adamw, muon")


@pytest.mark.parametrize("settings", [{}, MOE | {"dropout": 0.1}], ids=["dense", "moe"])
def test_a_resumed_run_equals_one_that_never_stopped(settings, play, tmp_path):
    run = settings | {"dataset": play, "optimizer": "muon", "max_iters": 6, "eval_interval": 3}
    succeeded(train(**run, out_dir=tmp_path / "whole"))
    succeeded(train(**run | {"max_iters": 3, "lr_decay_iters": 6}, out_dir=tmp_path / "parts"))
    run |= {"init_from": "resume", "lr_decay_iters": 0}
    assert "after step 3" in succeeded(train(**run, out_dir=tmp_path / "parts"))
    assert_same_run(tmp_path / "parts", tmp_path / "whole")


@pytest.mark.parametrize(
    "config, most", [("train_plays_char_moe", 0.70), ("train_gpt2_moe_muon", 0.02)]
)
def test_share_of_the_flops(config, most):
    """Relative to a step's forward and backward: below 2% at GPT-2's size. A small model's step
    has few tokens for its matrices, so its share is larger."""
    settings, _ = configure(dict(vars(script)), [str(ROOT / "config" / f"{config}.py")])
    vocab_size = 50304 if settings["dataset"] == "openwebtext" else 128
    with torch.device("meta"):
        model = build_model(build_config(settings | {"vocab_size": vocab_size}))
    optimizer = build_optimizer(model, "muon", 1e-3, 0.1, (0.9, 0.95), "meta")
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    with FlopCounterMode(display=False) as counted:
        optimizer.step()
    sequences = settings["batch_size"] * settings["gradient_accumulation_steps"]
    of_the_model = model.flops_per_token() * sequences * settings["block_size"]
    share = counted.get_total_flops() / of_the_model
    assert 0.5 * most < share < most
