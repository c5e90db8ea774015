"""Muon: every matrix is orthogonalised by itself, torch.optim.Muon gives the same, and AdamW trains
the rest. And an optimizer of one's own."""

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
    load_optimizer_state,
    num_moments,
    orthogonalize,
)
from nanomoe.settings import SETTINGS
from tests.helpers import (
    MODERN,
    MOE,
    ROOT,
    assert_same_run,
    full,
    losses,
    one_line,
    small_model,
    stepped,
    succeeded,
    tokens,
    train,
    weights,
)
from tests.test_bad_steps import NAN_GRADIENT, poisoned_train


def optimizer_of(model, name="muon", weight_decay=0.1):
    return build_optimizer(model, name, 1e-2, weight_decay, (0.9, 0.95), "cpu")


def muon_of(p, rows, rate=1e-2, weight_decay=0.1):
    group = {"params": [p], "rows": rows, "weight_decay": weight_decay}
    return Muon([group], lr=rate, fused=True)


def matrices(tensor, rows):
    """Those that are stacked, (E, out, in), and fused, `rows` of each, in a tensor."""
    parts = tensor.split(rows, dim=-2)
    return [matrix for part in parts for matrix in part.reshape(-1, *part.shape[-2:])]


@pytest.mark.parametrize(
    "shape, rows",
    [
        *(((1, *shape), shape[:1]) for shape in ((48, 32), (32, 48), (40, 40), (1, 24), (24, 1))),
        *(((3, *shape), shape[:1]) for shape in ((48, 32), (32, 48), (40, 40), (1, 24), (24, 1))),
        ((48, 32), (32, 8, 8)),  # queries, and fewer keys and values
        ((2, 48, 32), (24, 24)),  # experts' gates and up-projections
    ],
    ids=str,
)
def test_each_matrix_takes_the_steps_of_torchs_muon(shape, rows, monkeypatch):
    """torch's computes in float32 here: its iteration calls bfloat16() once."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)
    p = torch.nn.Parameter(torch.randn(shape))
    alone = [torch.nn.Parameter(matrix.detach().clone()) for matrix in matrices(p, rows)]
    ours = muon_of(p, rows)
    theirs = torch.optim.Muon(alone, lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for step in range(4):
        p.grad = torch.randn(shape, generator=torch.Generator().manual_seed(step))
        for q, grad in zip(alone, matrices(p.grad, rows), strict=True):
            q.grad = grad.clone()
        ours.step()
        theirs.step()
    for matrix, expected in zip(matrices(p, rows), alone, strict=True):
        torch.testing.assert_close(matrix, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("settings", [{}, MODERN, MODERN | {"n_kv_head": 1, "mlp": "relu2"}])
def test_a_models_matrices_are_cut_as_the_model_uses_them(settings):
    """What the split gives is what attention and SwiGLU compute with."""
    model = small_model(**MOE, num_shared_experts=1, num_dense_layers=1, **settings)
    groups = optimizer_of(model).param_groups
    rows_of = {p: group["rows"] for group in groups for p in group["params"]}
    c = model.config
    kv = (c.n_kv_head or c.n_head) * c.head_dim
    for name, p in model.named_parameters():
        if not is_hidden_matrix(name, p):
            expected = None
        elif name.endswith("attn.c_attn.weight"):
            expected = (c.n_embd, kv, kv)
        elif "c_fc" in name and c.mlp == "swiglu":
            expected = (p.shape[-2] // 2, p.shape[-2] // 2)
        else:
            expected = (p.shape[-2],)
        assert rows_of.pop(p) == expected, name
    assert not rows_of


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("moe", [{}, MOE | {"num_shared_experts": 1}], ids=["dense", "moe"])
def test_the_rest_is_trained_as_by_adamw(moe, bias):
    """Embeddings, head, norms, biases and routers: AdamW's own steps, and its weight decay."""
    model = small_model(bias=bias, tie_weights=False, **moe)
    twin = copy.deepcopy(model)
    ours, adamw = optimizer_of(model), optimizer_of(twin, "adamw")
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


@pytest.mark.parametrize("shape, rows", [((3, 16, 16), (16,)), ((24, 16), (8, 16))], ids=str)
def test_a_matrix_without_a_gradient_does_not_move(shape, rows):
    """As an expert without tokens: its old momentum is not blown up to a full update; weight decay,
    as with AdamW, goes on."""
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(shape))
    optimizer = muon_of(p, rows, rate=1e-2, weight_decay=0.1)
    for step in range(4):
        before = p.detach().clone()
        p.grad = torch.randn(shape)
        if step >= 2:
            matrices(p.grad, rows)[0].zero_()
        optimizer.step()
        moved = [matrix.abs().max() > 1e-4 for matrix in matrices(p - before * (1 - 1e-3), rows)]
        assert moved[0] == (step < 2) and all(moved[1:])


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
    optimizer = muon_of(p, grad.shape[-2:-1], rate=1.0, weight_decay=0.0)
    for _ in range(3):
        p.grad = grad.clone()
        optimizer.step()
    moved = (p - 1).norm(dim=(-2, -1))
    most = 3 * 1.3 * 0.2 * math.sqrt(max(grad.shape[-2:]) * min(grad.shape[-2:]))
    assert p.isfinite().all() and (moved <= most).all(), moved
    assert what == "zeros" or (moved >= 0.1).all(), moved


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
        optimizer = optimizer_of(models[-1])
        for _ in range(2):
            models[-1](tokens(2, 16), tokens(2, 16, seed=1))[1].backward()
            optimizer.step()
    for p, q in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(p, q, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", SETTINGS["optimizer"].limits["choices"])
@pytest.mark.parametrize("moe", [{}, MOE], ids=["dense", "moe"])
def test_it_keeps_as_many_moments_as_it_says(moe, name):
    model = small_model(**moe)
    optimizer = optimizer_of(model, name)
    model(tokens(2, 16), tokens(2, 16))[1].backward()
    optimizer.step()
    state = [value for entry in optimizer.state.values() for value in entry.values()]
    assert sum(value.numel() for value in state if value.dim()) == num_moments(model, name)


def test_what_the_run_sets_stays_when_a_state_is_loaded():
    """Betas, weight decay and rate are the new run's, the moments the old one's."""
    model, old = stepped(**MOE)
    new = build_optimizer(model, "adamw", 5e-3, 0.2, (0.8, 0.9), "cpu")
    load_optimizer_state(new, copy.deepcopy(old.state_dict()))
    decayed, others = new.param_groups
    assert (decayed["lr"], decayed["betas"]) == (5e-3, (0.8, 0.9))
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.2, 0.0)
    for p, entry in old.state.items():
        assert entry["exp_avg"].equal(new.state[p]["exp_avg"])


@pytest.mark.parametrize("moe", [{}, MOE], ids=["dense", "moe"])
def test_groups_do_not_depend_on_the_weight_decay(moe):
    """A run may be resumed with another one, or without."""
    model = small_model(bias=True, **moe)
    groups = (optimizer_of(model, weight_decay=decay).param_groups for decay in (0.1, 0.0))
    for a, b in zip(*groups, strict=True):
        assert a["rows"] == b["rows"] and all(map(torch.equal, a["params"], b["params"]))
        assert b["weight_decay"] == 0 and a["weight_decay"] in (0, 0.1)


def test_no_matrices_is_an_error():
    model = small_model()
    model.transformer.h = torch.nn.ModuleList()
    with pytest.raises(InputError, match="no matrices"):
        optimizer_of(model)
    assert any(is_matrix(name, p) for name, p in model.named_parameters())


def test_a_run_keeps_its_optimizer(play, tmp_path):
    """Another one is an error whose advice works: a new run with the old one's weights."""
    old, new = tmp_path / "old", tmp_path / "new"
    run = MOE | {"dataset": play, "learning_rate": 1e-9, "min_lr": 0.0}
    succeeded(train(**run, out_dir=old, optimizer="muon", max_iters=2))
    again = run | {"out_dir": old, "init_from": "auto", "max_iters": 4}
    unknown = "optimizer is 'moun', expected one of adamw, muon"
    one_line(train(**run, out_dir=new, optimizer="moun"), 2, unknown)
    done = train(**again, optimizer="adamw")
    one_line(done, 2, "--optimizer=adamw", "'muon', not 'adamw'")
    flags = re.search("--init_from.*", done.stderr)[0].replace("NEW", str(new)).split()
    out = succeeded(train(*flags, **run, optimizer="adamw", max_iters=3))
    assert "starting with the weights of" in out and losses(new).keys() == {1, 2, 3}
    a, b = (weights(checkpoint.latest_good(path)) for path in (old, new))
    assert all(torch.allclose(a[name], b[name], atol=1e-6) for name in a if "load" not in name)
    # not given, it is the checkpoint's
    assert "after step 2" in succeeded(train(**again))
    assert load(old).settings["optimizer"] == "muon"


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


# -----------------------------------------------------------------------------
# an optimizer of one's own: Lion, as a user would add it. It has no `fused`, knows nothing of
# found_inf, and keeps a state of another form than AdamW's

# What goes into optim.py, the line in build_optimizer, and the name among the choices.
LION = """
import torch
from nanomoe import optim
from nanomoe.settings import SETTINGS


class Lion(torch.optim.Optimizer):
    def __init__(self, groups, lr, betas):
        super().__init__(groups, {"lr": lr, "betas": betas, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["steps"] = 0
                    state["momentum"] = torch.zeros_like(p)
                state["steps"] += 1
                beta1, beta2 = group["betas"]
                update = state["momentum"].lerp(p.grad, 1 - beta1).sign()
                p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update, alpha=group["lr"])
                state["momentum"].lerp_(p.grad, 1 - beta2)


build_optimizer = train.build_optimizer


def with_lion(model, name, learning_rate, weight_decay, betas, device_type):
    if name == "lion":
        return Lion(optim.decay_groups(model, weight_decay), learning_rate, betas)
    return build_optimizer(model, name, learning_rate, weight_decay, betas, device_type)


train.build_optimizer = with_lion
SETTINGS["optimizer"].limits["choices"] += ("lion",)
"""


@pytest.mark.parametrize("moe", [full({}, id="dense"), pytest.param(MOE, id="moe")])
def test_it_trains_skips_a_bad_step_and_resumes(moe, play, tmp_path):
    """The gradient of the third step is not finite."""
    script = poisoned_train(tmp_path / "lion.py", NAN_GRADIENT, [3], more=LION)
    run = moe | {"dataset": play, "optimizer": "lion", "learning_rate": 1e-3, "bias": True}
    run |= {"gradient_accumulation_steps": 1, "eval_interval": 1, "keep_last": 0}
    run |= {"script": script, "max_iters": 6}

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    out = succeeded(train(**run, out_dir=whole))
    assert out.count("skipped") == 1 and "step 3 skipped" in out
    log = losses(whole)
    assert log[6]["val_loss"] < log[1]["val_loss"] - 0.1
    step2, step3, step4 = (load(whole / str(step)) for step in (2, 3, 4))
    for name, p in step3.weights.items():
        assert "load" in name or p.equal(step2.weights[name]), name
    wte = "transformer.wte.weight"
    assert not step4.weights[wte].equal(step3.weights[wte])
    state = step4.training_state()["optimizer"]["state"]
    assert {entry["steps"] for entry in state.values()} == {3}

    succeeded(train(**run | {"max_iters": 4, "lr_decay_iters": 6}, out_dir=parts))
    resumed = train(**run, lr_decay_iters=0, init_from="resume", out_dir=parts)
    assert "after step 4" in succeeded(resumed)
    assert_same_run(parts, whole)
