"""What goes wrong in projects of this kind: one test per trap, named after it, for both implementations of the experts, both
kinds of router scores, and K = 1, 2, E.

Broken, at the end of the file, holds routers and models with these very faults; the last test sees every one of them caught.
"""

import contextlib
import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import moe_model
from model import MLP
from moe_model import Experts, MoEGPT, MoEGPTConfig, Router
from nanomoe import checkpoint
from nanomoe.device import peak_flops
from nanomoe.monitor import summarize
from tests.conftest import run_script, small_model, tokens, train

E = 4
VARIANTS = [
    {"use_moe": True, "num_experts": E, "top_k": k, "router_score": score, "expert_impl": impl}
    for impl in ("loop", "grouped", "split")
    for score in ("softmax", "sigmoid")
    for k in (1, 2, E)
]
every_variant = pytest.mark.parametrize(
    "variant", VARIANTS, ids=lambda v: "-".join(str(x) for x in list(v.values())[2:])
)
both_dtypes = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"]
)


def precision(dtype):
    return torch.autocast("cpu", dtype, enabled=dtype != torch.float32)


def routers(model):
    return [block.mlp.router for block in model.transformer.h]


def collapse(model):
    """Every token of layer i goes to experts i, ..., i + K - 1, as surely as can be."""
    for i, block in enumerate(model.transformer.h):
        block.ln_2.weight.data.zero_()
        block.ln_2.bias.data.fill_(1.0)  # the same input for every token
        block.mlp.router.weight.data.fill_(-1.0)
        for k in range(model.config.top_k):
            block.mlp.router.weight.data[(i + k) % E] = 1.0  # a logit of 32, the others have -32


def lively(model):
    """With experts that matter to the logits, as they do after some training."""
    for block in model.transformer.h:
        for p in block.mlp.experts.parameters():
            torch.nn.init.normal_(p, std=0.3)
    return model


def close(a, b, dtype=torch.float32):
    torch.testing.assert_close(a, b, atol=2e-5 if dtype == torch.float32 else 4e-2, rtol=0)


# -----------------------------------------------------------------------------
# the balance loss


@every_variant
@pytest.mark.parametrize("scope", ["micro", "global"])
def test_balance_loss_pooled_over_layers(variant, scope):
    """Layers that have each collapsed onto other experts score E / K. Pooled over layers, they would look balanced."""
    model, idx = small_model(**variant, n_layer=4, balance_scope=scope), tokens(2, 16)
    collapse(model)
    coef, K = model.config.expert_load_balance_loss_coef, variant["top_k"]
    for _ in range(2):  # the global scope knows the load from the step before
        objective = model(idx, idx)[1]
        model.update_balance(model.stats)
    torch.testing.assert_close(model.stats["balance_loss"], torch.full((4,), E / K))
    close(objective - model.stats["cross_entropy"], torch.tensor(coef * E / K))
    torch.testing.assert_close(
        model.stats["expert_count"].sum(0), torch.full((E,), 32.0 * K)
    )  # what a pooled loss would see


@every_variant
@pytest.mark.parametrize("n_layer", [1, 2, 6])
def test_balance_loss_grows_with_k_or_with_depth(variant, n_layer):
    """Perfect balance is 1 for every K and every depth."""
    model = small_model(**variant, n_layer=n_layer, expert_load_balance_loss_coef=1.0)
    for router in routers(model):
        router.weight.data.zero_()  # equal scores, P = 1 / E: the loss is 1 whatever the load
    objective = model(tokens(2, 16), tokens(2, 16))[1]
    close(objective - model.stats["cross_entropy"], torch.tensor(1.0))
    router = Router(
        MoEGPTConfig(
            n_embd=E,
            n_head=1,
            **{k: v for k, v in variant.items() if k != "use_moe"},
            balance_scope="micro",
        )
    )
    router.weight.data = torch.eye(E)
    # token n likes experts n, n + 1, ... in falling order: all experts are equally liked, and equally loaded
    routing = router(torch.stack([-torch.arange(float(E)).roll(n) for n in range(E)])[None])[2]
    close(routing.balance_loss, torch.tensor(1.0))


@every_variant
def test_balance_loss_can_be_gamed(variant):
    """Softmax: a constant added to all logits changes nothing. Sigmoid: at balanced load the loss is 1 whatever the shift,
    so shrinking all scores gains nothing."""
    config = MoEGPTConfig(
        n_embd=E,
        n_head=1,
        **{k: v for k, v in variant.items() if k != "use_moe"},
        balance_scope="micro",
    )
    router = Router(config)
    router.weight.data = torch.eye(E)
    balanced = torch.stack([-torch.arange(float(E)).roll(n) for n in range(E)])[None]
    logits = torch.randn(1, 64, E)
    for shift in (-20.0, -3.0, 5.0):
        close(router(balanced + shift)[2].balance_loss, torch.tensor(1.0))
        if variant["router_score"] == "softmax":
            close(router(logits + shift)[2].balance_loss, router(logits)[2].balance_loss)


# -----------------------------------------------------------------------------
# what may reach what


@every_variant
@pytest.mark.parametrize("norm_top_k", [True, False])
def test_top_1_renormalised(variant, norm_top_k):
    """The router gets a gradient from the language-model loss alone, also with K = 1, where dividing the gate by itself
    would cut it off. (With K = E and a softmax, renormalising changes nothing.)"""
    model = small_model(**variant, norm_top_k=norm_top_k, expert_load_balance_loss_coef=0.0)
    model(tokens(2, 16), tokens(2, 16))[1].backward()
    assert all(router.weight.grad.abs().max() > 1e-7 for router in routers(model))


@every_variant
@both_dtypes
@pytest.mark.parametrize("capacity_factor", [0.0, 0.5])
def test_future_leak(variant, dtype, capacity_factor):
    """Tokens from position t on change no logit before t, in training and in eval, with experts that drop tokens or not."""
    for mode in (True, False):
        model, idx = (
            lively(small_model(**variant, capacity_factor=capacity_factor)).train(mode),
            tokens(2, 16),
        )
        for router in routers(model):
            router.weight.data[0] = router.weight.data[
                1
            ]  # uneven loads, so that something is dropped
        other = idx.clone()
        other[:, 9:] = (other[:, 9:] + 1) % 50
        other[1] = (idx[1] + 7) % 50  # and a neighbour has no say at all
        with precision(dtype):
            close(model(idx, idx)[0][0, :9], model(other, other)[0][0, :9], dtype)
    if capacity_factor and variant["top_k"] < E:
        assert model.train()(idx, idx)[1].isfinite() and model.stats["dropped"].min() > 0.05


@every_variant
@both_dtypes
def test_batch_dependence(variant, dtype):
    """A sequence's logits do not depend on its neighbours in the batch."""
    model, idx = lively(small_model(**variant, capacity_factor=0.5)).eval(), tokens(5, 16)
    with precision(dtype):
        together = model(idx, idx)[0]
        for i in range(5):
            close(together[[i]], model(idx[[i]], idx[[i]])[0], dtype)


@every_variant
@both_dtypes
def test_noise_dropout_dropping_at_eval(variant, dtype):
    """Two evaluations are bit-equal, and equal those of a model without noise, dropout and limits."""
    noisy = {"router_jitter": 0.3, "expert_dropout": 0.3, "dropout": 0.3, "capacity_factor": 0.3}
    model, plain, idx = small_model(**variant, **noisy), small_model(**variant), tokens(2, 16)
    with precision(dtype):
        assert not model(idx, idx)[0].equal(model(idx, idx)[0])
        model.eval(), plain.eval()
        assert model(idx, idx)[0].equal(model(idx, idx)[0]) and model(idx, idx)[0].equal(
            plain(idx, idx)[0]
        )
        assert (model.stats["dropped"] == 0).all()


@every_variant
@both_dtypes
def test_silent_expert(variant, dtype):
    """An expert without tokens has a gradient of zeros, not None and not NaN, and a step leaves everything finite."""
    model = small_model(**variant)
    for router in routers(model):
        router.bias.data[3] = -10.0  # never chosen while there is another
    with precision(dtype):
        loss = model(tokens(2, 16), tokens(2, 16))[1]
    loss.backward()
    for block in model.transformer.h:
        for p in block.mlp.experts.parameters():
            assert (p.grad[3] == 0).all() or variant["top_k"] == E
            assert (p.grad[:3] != 0).any() and p.grad.isfinite().all()
    model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu").step()
    assert loss.isfinite() and all(p.isfinite().all() for p in model.parameters())


def test_silent_expert_does_not_hang_ddp(play, tmp_path):
    done = train(
        dataset=play,
        out_dir=tmp_path,
        processes=2,
        use_moe=True,
        num_experts=64,
        top_k=1,
        batch_size=1,
        block_size=16,
    )
    assert done.returncode == 0, done.stderr
    assert "dead 0" not in done.stdout.split("step 1/2")[1].splitlines()[0]


@every_variant
@both_dtypes
def test_validation_loss_includes_auxiliaries(variant, dtype):
    """In eval mode the loss is the cross-entropy, to the last bit."""
    z_loss = 0.0 if variant["router_score"] == "sigmoid" else 1.0
    model = small_model(
        **variant, expert_load_balance_loss_coef=1.0, router_z_loss_coef=z_loss, dropout=0.3
    )
    idx = tokens(2, 16)
    with precision(dtype):
        logits, loss = model.eval()(idx, idx)
        assert (
            loss
            == F.cross_entropy(logits.float().flatten(0, 1), idx.flatten())
            == model.stats["cross_entropy"]
        )
        objective = model.train()(idx, idx)[1]
    stats = model.stats
    close(
        objective,
        stats["cross_entropy"] + stats["balance_loss"].mean() + z_loss * stats["z_loss"].mean(),
    )


@every_variant
def test_state_leaks_from_sampling_into_training(variant):
    """generate() between two steps changes no loss."""

    def losses(sampling):
        model = small_model(**variant, dropout=0.1, router_jitter=0.1, router_bias_update_rate=0.1)
        optimizer, found = model.configure_optimizers(0.1, 1e-2, (0.9, 0.95), "cpu"), []
        torch.manual_seed(1)
        for _ in range(3):
            loss = model(tokens(2, 16), tokens(2, 16))[1]
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            stats = model.stats
            if sampling:
                model.generate(tokens(1, 4), 4)
            model.update_balance(stats)
            found.append(loss.item())
        return found

    assert losses(True) == losses(False)


# -----------------------------------------------------------------------------
# loss-free balancing


@every_variant
def test_bias_leaks_into_gates(variant):
    """Given the choice, the gates are independent of the bias, and the choice depends on it."""
    router = routers(small_model(**variant, norm_top_k=False))[0]
    x = torch.randn(2, 16, 32)
    score = F.linear(x.flatten(0, 1), router.weight)
    score = score.softmax(-1) if variant["router_score"] == "softmax" else score.sigmoid()
    _, before, _ = router(x)
    router.bias.data = torch.tensor([0.0, 0.7, 0.1, -0.5])
    gate, expert, routing = router(x)
    close(gate, score.gather(1, expert))
    assert (expert == 1).any(dim=1).all() and (variant["top_k"] == E or not before.equal(expert))
    assert not router.bias.requires_grad
    close(routing.balance_loss, torch.tensor(1.0))  # P knows nothing of it, either


@pytest.mark.parametrize(
    "variant",
    [
        {"router_score": "softmax", "top_k": 1},
        {"router_score": "sigmoid", "top_k": 2, "expert_impl": "grouped"},
    ],
    ids=str,
)
def test_bias_updated_per_micro_step_or_in_eval(variant, play, tmp_path):
    """1 x 8 sequences, 2 x 4 accumulated, 2 ranks x 4: same bias, same loss, same weights; and eval changes none of them."""
    runs = {"1x8": (1, 8, 1), "2x4": (2, 4, 1), "2 ranks": (2, 4, 2), "with eval": (2, 4, 1)}
    found = {}
    for name, (accumulation, batch_size, processes) in runs.items():
        done = train(
            dataset=play,
            out_dir=tmp_path / name,
            processes=processes,
            use_moe=True,
            num_experts=8,
            **variant,
            batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            max_iters=5,
            learning_rate=1e-4,
            router_bias_update_rate=1e-2,
            expert_load_balance_loss_coef=0.1,
            eval_interval=1 if name == "with eval" else 100,
        )
        assert done.returncode == 0, done.stderr
        found[name] = load_file(tmp_path / name / "step-00000005" / "model.safetensors")
    bias = [p for name, p in found["1x8"].items() if name.endswith("router.bias")]
    assert all(b.abs().max() >= 9.99e-3 and abs(b.sum()) < 1e-6 for b in bias)
    for name, weights in found.items():
        for key, value in weights.items():
            torch.testing.assert_close(
                value,
                found["1x8"][key],
                atol=1e-6,
                rtol=0,
                msg=lambda m, n=name, k=key: f"{n} {k} {m}",
            )


def test_bias_evens_out_the_load():
    """Alone, without a balance loss: an expert that most tokens like at first gets no more than its share in the end."""
    config = MoEGPTConfig(
        n_embd=16,
        n_head=1,
        num_experts=8,
        top_k=2,
        vocab_size=8,
        block_size=8,
        n_layer=1,
        router_bias_update_rate=2e-3,
    )
    torch.manual_seed(0)
    model = MoEGPT(config)
    router = model.transformer.h[0].mlp.router
    router.weight.data *= 20
    x = (torch.randn(2048, 16) + router.weight.data[0])[None]
    loads = []
    for _ in range(500):
        count = router(x)[2].expert_count
        model.update_balance({"expert_count": count[None]})
        loads.append(count.max() / count.mean())
    assert loads[0] > 3 and loads[-1] < 1.15


# -----------------------------------------------------------------------------
# the machinery around


@every_variant
@both_dtypes
def test_activation_checkpointing_counts_or_routes_twice(variant, dtype):
    """Same loss, gradients and counts as without it."""
    idx, results = tokens(2, 16), []
    for checkpointing in (False, True):
        model = small_model(
            **variant,
            gradient_checkpointing=checkpointing,
            dropout=0.1,
            router_jitter=0.1,
            expert_dropout=0.1,
            balance_scope="micro",
        )
        torch.manual_seed(1)
        with precision(dtype):
            loss = model(idx, idx)[1]
        loss.backward()
        results.append([loss, *model.stats.values(), *(p.grad for p in model.parameters())])
    assert model.stats["expert_count"].sum() == 2 * 32 * variant["top_k"]
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@every_variant
def test_half_precision_router(variant):
    """Router logits, scores and gates are float32 under autocast."""
    router, x = routers(small_model(**variant))[0], torch.randn(1, 9, 32).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        gate, expert, routing = router(x)
    assert gate.dtype == torch.float32 and all(value.dtype == torch.float32 for value in routing)
    for a, b in zip(
        (gate, expert, *routing), (*router(x.float())[:2], *router(x.float())[2]), strict=True
    ):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)


def test_resume_ignores_moe_arguments(play, tmp_path):
    """The checkpoint's model wins, and a flag that contradicts it is an error naming both values."""
    moe = {
        "use_moe": True,
        "num_experts": 8,
        "top_k": 2,
        "router_score": "sigmoid",
        "router_bias_update_rate": 0.01,
    }
    assert train(dataset=play, out_dir=tmp_path, **moe).returncode == 0
    small = {
        "dataset": play,
        "out_dir": tmp_path,
        "init_from": "resume",
        "max_iters": 3,
        "device": "cpu",
    }
    for key, value in (
        ("num_experts", 16),
        ("top_k", 1),
        ("router_score", "softmax"),
        ("use_moe", False),
    ):
        done = run_script("train.py", **small, **{key: value})
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
        assert all(repr(x) in done.stderr for x in (value, moe[key])), done.stderr
    done = run_script("train.py", **small)  # none of it given again
    assert done.returncode == 0, done.stderr
    config = checkpoint.load(tmp_path).build_model().config
    assert all(getattr(config, key) == value for key, value in moe.items() if key != "use_moe")


@every_variant
def test_mfu_with_all_experts(variant):
    """FLOPs count the active experts only: more experts cost their rows of the router, nothing else. No MFU without a GPU
    that is known."""
    few, many = small_model(**variant), small_model(**variant | {"num_experts": 64})
    assert many.flops_per_token() - few.flops_per_token() == 6 * 2 * 60 * 32
    dense = small_model()
    if variant["top_k"] == 1:
        assert few.flops_per_token() == dense.flops_per_token() + 6 * 2 * E * 32
    assert peak_flops(torch.device("cpu")) is None


@every_variant
@pytest.mark.parametrize("mlp", ["gelu", "swiglu", "relu2"])
def test_stacked_weights_missed(variant, mlp):
    """A stacked (E, out, in) parameter is E matrices in initialisation and weight decay, a stacked (E, out) bias no matrix."""
    model = small_model(**variant, mlp=mlp, n_embd=128, n_layer=8)
    dense = small_model(mlp=mlp, n_embd=128, n_layer=8)
    for block, twin in zip(model.transformer.h, dense.transformer.h, strict=True):
        for name in ("c_fc", "c_proj"):
            stacked, matrix = getattr(block.mlp.experts, name), getattr(twin.mlp, name).weight
            assert stacked.shape == (E, *matrix.shape)
            for expert in stacked:
                assert (
                    abs(expert.std() / matrix.std() - 1) < 0.03
                    and abs(expert.mean()) < matrix.std() / 20
                )
            assert not getattr(block.mlp.experts, f"{name}_bias").any()
        assert abs(block.mlp.router.weight.std() / 0.02 - 1) < 0.15
    assert abs(model.transformer.h[0].mlp.experts.c_proj.std() / (0.02 / math.sqrt(16)) - 1) < 0.02
    decayed, rest = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu").param_groups
    names = {id(p): name for name, p in model.named_parameters()}
    assert (decayed["weight_decay"], rest["weight_decay"]) == (0.1, 0.0)
    rest = {names[id(p)] for p in rest["params"]}
    assert {name for name in names.values() if ".experts." in name and name not in rest} == {
        f"transformer.h.{i}.mlp.experts.{name}" for i in range(8) for name in ("c_fc", "c_proj")
    }
    assert all("router.weight" not in name for name in rest)


@pytest.mark.parametrize("impl", ["loop", "grouped", "split"])
@pytest.mark.parametrize("mlp", ["gelu", "swiglu", "relu2"])
def test_e_1(impl, mlp):
    """One expert equals the dense MLP with the same weights."""
    model = small_model(use_moe=True, num_experts=1, top_k=1, expert_impl=impl, mlp=mlp)
    moe, dense = model.transformer.h[0].mlp, MLP(model.config)
    for p in moe.experts.parameters():
        torch.nn.init.normal_(p, std=0.2)
    dense.load_state_dict(
        {
            name.replace("_bias", ".bias") if "bias" in name else f"{name}.weight": p[0]
            for name, p in moe.experts.state_dict().items()
        }
    )
    x = torch.randn(2, 5, 32)
    close(moe(x)[0], dense(x))


@every_variant
@both_dtypes
def test_dropless_against_capacity(variant, dtype):
    """A capacity that nothing exceeds equals no limit; one below drops the right tokens."""
    idx, results = tokens(2, 16), []
    for capacity_factor in (0.0, float(E)):
        model = small_model(**variant, capacity_factor=capacity_factor)
        with precision(dtype):
            logits, loss = model(idx, idx)
        loss.backward()
        assert (model.stats["dropped"] == 0).all()
        results.append([logits, loss, *(p.grad for p in model.parameters())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)
    # of each sequence, an expert keeps its first ceil(0.5 * T * K / E) tokens
    router, x = routers(small_model(**variant, capacity_factor=0.5))[0], torch.randn(3, 16, 32)
    gate, expert, routing = router(x)
    full, left = router.eval()(x)[0], math.ceil(0.5 * 16 * variant["top_k"] / E)
    expected, dropped = full.clone(), 0
    for sequence in range(3):
        used = [0] * E
        for n in range(16 * sequence, 16 * sequence + 16):
            for k in range(variant["top_k"]):
                used[expert[n, k]] += 1
                if used[expert[n, k]] > left:
                    expected[n, k], dropped = 0.0, dropped + 1
    assert dropped > 0
    close(gate, expected)
    close(routing.dropped, torch.tensor(dropped / gate.numel()))


@every_variant
@both_dtypes
@pytest.mark.parametrize("shape", [(1, 1), (1, 3), (3, 1), (5, 13)], ids=str)
def test_ties_k_e_single_tokens_and_odd_sizes(variant, dtype, shape):
    for sizes in ({}, {"n_embd": 36, "n_head": 3, "expert_dim": 20}):
        model = small_model(**variant, **sizes, capacity_factor=1.0)
        routers(model)[0].weight.data.zero_()  # every expert ties with every other
        with precision(dtype):
            loss = model(tokens(*shape), tokens(*shape))[1]
        loss.backward()
        assert loss.isfinite() and all(p.grad.isfinite().all() for p in model.parameters())
        assert model.stats["expert_count"].sum() == 2 * shape[0] * shape[1] * variant["top_k"]
        assert summarize(model.stats)["loss"] > 0


# "sample.py on its own checkpoints" is tests/test_train.py::test_every_config_trains_two_steps_and_samples


# -----------------------------------------------------------------------------
# every token reaches its experts, on both implementations


@every_variant
@both_dtypes
def test_lost_token(variant, dtype):
    """The experts' output is every expert on every token, weighted by a gate that is 0 where the token does not go."""
    model = small_model(**variant)
    moe, x = model.transformer.h[0].mlp, torch.randn(3, 7, 32)
    for p in moe.experts.parameters():
        torch.nn.init.normal_(p, std=0.1)
    gate, expert, _ = moe.router(x)
    with precision(dtype):
        out = moe.experts(x.flatten(0, 1), gate, expert)
    w = moe.experts
    h = F.gelu(x.flatten(0, 1) @ w.c_fc.transpose(1, 2) + w.c_fc_bias[:, None])
    y = h @ w.c_proj.transpose(1, 2) + w.c_proj_bias[:, None]
    gate_NE = torch.zeros(21, E).scatter(1, expert, gate)
    close(out.float(), torch.einsum("ne,end->nd", gate_NE, y), dtype)


# -----------------------------------------------------------------------------
# broken on purpose


class Broken:
    """Faults seen in projects of this kind, each with what replaces the right code."""

    class PooledBalanceLoss(MoEGPT):
        """Counts and scores added up over layers, and one loss of the sums."""

        def forward(self, idx, targets=None):
            logits, loss = super().forward(idx, targets)
            if loss is not None and self.training:
                load = self.stats["expert_count"].sum(0) / self.stats["expert_count"].sum()
                pooled = E * (load * load).sum()
                loss = (
                    self.stats["cross_entropy"] + self.config.expert_load_balance_loss_coef * pooled
                )
                self.stats["balance_loss"] = pooled.expand(len(self.stats["balance_loss"]))
            return logits, loss

    class AuxiliariesAtEval(MoEGPT):
        def forward(self, idx, targets=None):
            logits, loss = super().forward(idx, targets)
            return logits, loss + 0.01 * self.stats[
                "balance_loss"
            ].mean() if loss is not None and not self.training else loss

    class RenormalisedTop1(Router):
        def route(self, x, measured=True):
            gate, expert, routing = super().route(x, measured)
            return gate / gate.sum(-1, keepdim=True), expert, routing

    class SumOverK(Router):
        """The load as a share of tokens, not of assignments: balance is K."""

        def route(self, x, measured=True):
            gate, expert, routing = super().route(x, measured)
            return (
                gate,
                expert,
                routing._replace(balance_loss=routing.balance_loss * self.config.top_k),
            )

    class UnnormalisedSigmoid(Router):
        def route(self, x, measured=True):
            gate, expert, routing = super().route(x, measured)
            score = F.linear(x.flatten(0, 1), self.weight).sigmoid()
            load = routing.expert_count / routing.expert_count.sum()
            return gate, expert, routing._replace(balance_loss=E * (load * score.mean(0)).sum())

    class BatchwiseCapacity(Router):
        """Over the whole batch, the surest tokens first: later tokens push earlier ones out."""

        def route(self, x, measured=True):
            factor, self.config.capacity_factor = self.config.capacity_factor, 0.0
            gate, expert, routing = super().route(x, measured)
            self.config.capacity_factor = factor
            if self.training and factor:
                limit = math.ceil(factor * expert.numel() / E)
                kept = torch.zeros(gate.numel(), dtype=torch.bool)
                for e in range(E):
                    surest = (gate * (expert == e)).flatten().argsort(descending=True)
                    kept[surest[: min(limit, int((expert == e).sum()))]] = True
                gate = gate * kept.view_as(gate)
                routing = routing._replace(dropped=1 - kept.float().mean())
            return gate, expert, routing

    class LimitAtEval(Router):
        def route(self, x, measured=True):
            was, self.training = self.training, True
            try:
                return super().route(x, measured)
            finally:
                self.training = was

    class BiasInGates(Router):
        def route(self, x, measured=True):
            gate, expert, routing = super().route(x, measured)
            return gate + self.bias[expert], expert, routing

    class HalfPrecision(Router):
        def forward(self, x, measured=True):
            return self.route(x.bfloat16().float() if x.dtype == torch.bfloat16 else x, measured)

        def route(self, x, measured=True):
            gate, expert, routing = super().route(x, measured)
            return gate.bfloat16(), expert, routing

    class LostToken(Experts):
        """The last row of the sorted assignments falls off."""

        def forward(self, x_ND, gate_NK, expert_NK):
            last = expert_NK.flatten().argsort(stable=True)[-1]
            kept = (
                torch.ones(expert_NK.numel(), dtype=torch.bool)
                .index_fill(0, last, False)
                .view_as(expert_NK)
            )
            return super().forward(x_ND, gate_NK * kept, expert_NK)

    class NoGradientForSilentExperts(Experts):
        def forward(self, x_ND, gate_NK, expert_NK):
            for p in self.parameters():
                if p.requires_grad and not getattr(p, "hooked", False):
                    p.register_hook(lambda grad: torch.where(grad == 0, math.nan, grad))
                    p.hooked = True
            return super().forward(x_ND, gate_NK, expert_NK)

    class CountsTwice(MoEGPT):
        """Counts kept by a hook on the router, which activation checkpointing runs twice."""

        def __init__(self, config):
            super().__init__(config)
            self.seen = 0
            for router in routers(self):
                router.register_forward_hook(
                    lambda m, args, out: setattr(self, "seen", self.seen + out[2].expert_count)
                )

        def forward(self, idx, targets=None):
            self.seen = 0
            out = super().forward(idx, targets)
            stats = self.stats

            def late(grad):
                stats["expert_count"].copy_(self.seen.expand_as(stats["expert_count"]))

            if out[1] is not None and out[1].requires_grad:
                self.transformer.wte.weight.register_hook(late)
            return out

    class AllExpertsActive(MoEGPT):
        def active_numel(self, name, p):
            return p.numel()

    class StackedBiasDecayed(MoEGPT):
        def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
            groups = [
                {
                    "params": [p for p in self.parameters() if p.dim() >= 2],
                    "weight_decay": weight_decay,
                },
                {"params": [p for p in self.parameters() if p.dim() < 2], "weight_decay": 0.0},
            ]
            return torch.optim.AdamW(groups, lr=learning_rate, betas=betas)

    class SamplingCounts(MoEGPT):
        """generate() moves the global random state, as it would by drawing from it."""

        def generate(self, *args, **kwargs):
            torch.rand(1)
            return super().generate(*args, **kwargs)


@contextlib.contextmanager
def replaced(broken):
    """The broken class in the place of the right one."""
    base = next(cls for cls in broken.__mro__[1:] if cls in (MoEGPT, Router, Experts))
    old = getattr(moe_model, base.__name__)
    here = globals()
    setattr(moe_model, base.__name__, broken)
    here[base.__name__] = broken
    try:
        yield
    finally:
        setattr(moe_model, base.__name__, old)
        here[base.__name__] = old


SOFTMAX_1, SOFTMAX_2 = VARIANTS[0], VARIANTS[1]
SIGMOID_2, GROUPED_2 = VARIANTS[4], VARIANTS[7]
CAUGHT = [
    (Broken.PooledBalanceLoss, lambda: test_balance_loss_pooled_over_layers(SOFTMAX_1, "micro")),
    (Broken.PooledBalanceLoss, lambda: test_balance_loss_pooled_over_layers(SIGMOID_2, "global")),
    (Broken.SumOverK, lambda: test_balance_loss_grows_with_k_or_with_depth(SOFTMAX_2, 2)),
    (Broken.UnnormalisedSigmoid, lambda: test_balance_loss_can_be_gamed(SIGMOID_2)),
    (Broken.RenormalisedTop1, lambda: test_top_1_renormalised(SOFTMAX_1, True)),
    (Broken.BatchwiseCapacity, lambda: test_future_leak(SOFTMAX_1, torch.float32, 0.5)),
    (Broken.BatchwiseCapacity, lambda: test_future_leak(GROUPED_2, torch.float32, 0.5)),
    (Broken.BatchwiseCapacity, lambda: test_future_leak(GROUPED_2, torch.bfloat16, 0.5)),
    (Broken.BatchwiseCapacity, lambda: test_dropless_against_capacity(SOFTMAX_1, torch.float32)),
    (Broken.LimitAtEval, lambda: test_noise_dropout_dropping_at_eval(SOFTMAX_2, torch.float32)),
    (Broken.LimitAtEval, lambda: test_noise_dropout_dropping_at_eval(GROUPED_2, torch.bfloat16)),
    (Broken.NoGradientForSilentExperts, lambda: test_silent_expert(SOFTMAX_2, torch.float32)),
    (
        Broken.AuxiliariesAtEval,
        lambda: test_validation_loss_includes_auxiliaries(SOFTMAX_2, torch.float32),
    ),
    (Broken.SamplingCounts, lambda: test_state_leaks_from_sampling_into_training(SOFTMAX_1)),
    (Broken.BiasInGates, lambda: test_bias_leaks_into_gates(SOFTMAX_2)),
    (Broken.BiasInGates, lambda: test_bias_leaks_into_gates(SIGMOID_2)),
    (
        Broken.CountsTwice,
        lambda: test_activation_checkpointing_counts_or_routes_twice(SOFTMAX_2, torch.float32),
    ),
    (Broken.HalfPrecision, lambda: test_half_precision_router(SOFTMAX_2)),
    (Broken.AllExpertsActive, lambda: test_mfu_with_all_experts(SOFTMAX_2)),
    (Broken.StackedBiasDecayed, lambda: test_stacked_weights_missed(SOFTMAX_2, "gelu")),
    (Broken.LostToken, lambda: test_lost_token(SOFTMAX_2, torch.float32)),
    (Broken.LostToken, lambda: test_lost_token(GROUPED_2, torch.bfloat16)),
    (Broken.LostToken, lambda: test_batch_dependence(SOFTMAX_1, torch.float32)),
    (Broken.LostToken, lambda: test_batch_dependence(GROUPED_2, torch.bfloat16)),
    (Broken.LostToken, lambda: test_e_1("grouped", "gelu")),
]


@pytest.mark.parametrize(
    "broken, trap", CAUGHT, ids=[f"{broken.__name__}-{i}" for i, (broken, _) in enumerate(CAUGHT)]
)
def test_broken_variants_are_caught(broken, trap):
    trap()
    with replaced(broken), pytest.raises(AssertionError):
        trap()
