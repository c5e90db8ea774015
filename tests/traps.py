"""What the tests of the traps share: variants of the model, and models with the faults.

A trap is something that goes wrong in projects of this kind. Each has one test of its name in
test_traps_balance.py, test_traps_flow.py or test_traps_training.py. Each of these files ends with
a list: a fault of `Broken`, and the test that has to catch it.
"""

import math

import pytest
import torch
import torch.nn.functional as F

import moe_model
from moe_model import Experts, MoEGPT, Router

E = 4
VARIANTS = [
    {"use_moe": True, "num_experts": E, "top_k": k, "router_score": score, "expert_impl": impl}
    for impl in ("loop", "grouped")
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
    """In layer i, send every token to experts i, ..., i + K - 1, with near certainty."""
    for i, block in enumerate(model.transformer.h):
        block.ln_2.weight.data.zero_()
        block.ln_2.bias.data.fill_(1.0)  # the same input for every token
        block.mlp.router.weight.data.fill_(-1.0)
        for k in range(model.config.top_k):
            block.mlp.router.weight.data[(i + k) % E] = 1.0  # a logit of 32, the others have -32


def lively(model):
    """Make the experts matter to the logits, as they do after some training."""
    for block in model.transformer.h:
        for p in block.mlp.experts.parameters():
            torch.nn.init.normal_(p, std=0.3)
    return model


def close(a, b, dtype=torch.float32):
    torch.testing.assert_close(a, b, atol=2e-5 if dtype == torch.float32 else 4e-2, rtol=0)


# -----------------------------------------------------------------------------
# broken on purpose
class Broken:
    """Faults seen in projects of this kind, as classes that replace the right ones."""

    class PooledBalanceLoss(MoEGPT):
        """Adds counts and scores up over layers, and takes one loss of the sums."""

        def forward(self, idx, targets=None, kv_cache=None):
            logits, loss = super().forward(idx, targets, kv_cache)
            if loss is not None and self.training:
                load = self.stats["expert_count"].sum(0) / self.stats["expert_count"].sum()
                pooled = E * (load * load).sum()
                coef = self.config.expert_load_balance_loss_coef
                loss = self.stats["cross_entropy"] + coef * pooled
                self.stats["balance_loss"] = pooled.expand(len(self.stats["balance_loss"]))
            return logits, loss

    class AuxiliariesAtEval(MoEGPT):
        def forward(self, idx, targets=None, kv_cache=None):
            logits, loss = super().forward(idx, targets, kv_cache)
            if loss is not None and not self.training:
                loss = loss + 0.01 * self.stats["balance_loss"].mean()
            return logits, loss

    class RenormalisedTop1(Router):
        def route(self, x, with_stats=True):
            gate, expert, routing = super().route(x, with_stats)
            return gate / gate.sum(-1, keepdim=True), expert, routing

    class SumOverK(Router):
        """The load as a share of tokens, not of assignments: balance is K."""

        def route(self, x, with_stats=True):
            gate, expert, routing = super().route(x, with_stats)
            balance_loss = routing.balance_loss * self.config.top_k
            return gate, expert, routing._replace(balance_loss=balance_loss)

    class UnnormalisedSigmoid(Router):
        def route(self, x, with_stats=True):
            gate, expert, routing = super().route(x, with_stats)
            score = F.linear(x.flatten(0, 1), self.weight).sigmoid()
            load = routing.expert_count / routing.expert_count.sum()
            return gate, expert, routing._replace(balance_loss=E * (load * score.mean(0)).sum())

    class BatchwiseCapacity(Router):
        """Ranks tokens over the whole batch by gate, so later tokens push earlier ones out."""

        def route(self, x, with_stats=True):
            factor, self.config.capacity_factor = self.config.capacity_factor, 0.0
            gate, expert, routing = super().route(x, with_stats)
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
        def route(self, x, with_stats=True):
            was, self.training = self.training, True
            try:
                return super().route(x, with_stats)
            finally:
                self.training = was

    class BiasInGates(Router):
        def route(self, x, with_stats=True):
            gate, expert, routing = super().route(x, with_stats)
            return gate + self.bias[expert], expert, routing

    class HalfPrecision(Router):
        def forward(self, x, with_stats=True):
            return self.route(x.bfloat16().float() if x.dtype == torch.bfloat16 else x, with_stats)

        def route(self, x, with_stats=True):
            gate, expert, routing = super().route(x, with_stats)
            return gate.bfloat16(), expert, routing

    class LostToken(Experts):
        """Loses the last row of the sorted assignments."""

        def forward(self, x_ND, gate_NK, expert_NK):
            kept = torch.ones(expert_NK.numel(), dtype=torch.bool)
            kept[expert_NK.flatten().argsort(stable=True)[-1]] = False
            return super().forward(x_ND, gate_NK * kept.view_as(expert_NK), expert_NK)

    class NoGradientForSilentExperts(Experts):
        def forward(self, x_ND, gate_NK, expert_NK):
            for p in self.parameters():
                if p.requires_grad and not getattr(p, "hooked", False):
                    p.register_hook(lambda grad: torch.where(grad == 0, math.nan, grad))
                    p.hooked = True
            return super().forward(x_ND, gate_NK, expert_NK)

    class CountsTwice(MoEGPT):
        """As counts kept by a hook on the router, which activation checkpointing runs twice."""

        def forward(self, idx, targets=None, kv_cache=None):
            out = super().forward(idx, targets, kv_cache)
            if self.config.gradient_checkpointing:
                self.stats["expert_count"] = 2 * self.stats["expert_count"]
            return out

    class AllExpertsActive(MoEGPT):
        def active_numel(self, name, p):
            return p.numel()

    class SamplingCounts(MoEGPT):
        """generate() moves the global random state, as it would by drawing from it."""

        def generate(self, *args, **kwargs):
            torch.rand(1)
            return super().generate(*args, **kwargs)


def caught(*rows):
    """A test of rows: a fault, the test that has to catch it, and that test's arguments."""

    @pytest.mark.parametrize("row", rows, ids=lambda row: f"{row[0].__name__}-{row[1].__name__}")
    def test(row, monkeypatch):
        broken, trap, *arguments = row
        monkeypatch.setattr(moe_model, broken.__base__.__name__, broken)
        with pytest.raises(AssertionError):
            trap(*arguments)

    return test


SOFTMAX_1, SOFTMAX_2 = VARIANTS[0], VARIANTS[1]
SIGMOID_2, GROUPED_2 = VARIANTS[4], VARIANTS[7]
