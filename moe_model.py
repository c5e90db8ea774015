"""
A Mixture-of-Experts GPT: in MoE blocks (by default all) a router and E experts replace the MLP,
and each token visits K of the experts. This file knows nothing of the training loop.

Read it from top to bottom: config, router, load-balance loss, the loop over experts, the grouped
version of it, block, model. A MoE block, where a dense one has its MLP:

    x -> router -> scores -> top K -> gates      each token's K experts, and how much each counts
    x -> those K experts -> sum of gate times output (+ shared experts, without a gate) -> out

Shapes are suffixes of names:
    B  sequences        T  tokens of a sequence    N  tokens, B * T       D  model width (n_embd)
    E  experts          K  experts per token       H  hidden width of an expert
    M  assignments of a token to an expert, N * K, sorted by expert      L  MoE layers
"""

import math
from dataclasses import asdict, dataclass, fields
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from model import GPT, MLP, Block, GPTConfig, activate, fc_out_features, limited

# -----------------------------------------------------------------------------
# config


@dataclass
class MoEGPTConfig(GPTConfig):
    num_experts: int = limited(4, at_least=1)  # E
    top_k: int = limited(1, at_least=1)  # K
    expert_dim: int = limited(0, at_least=-1)  # H; 0 = the dense MLP's; -1: see expert_hidden_dim
    num_shared_experts: int = limited(0, at_least=0)  # that every token visits, without a gate
    moe_stride: int = limited(1, at_least=1)  # every moe_stride-th block is MoE
    num_dense_layers: int = limited(0, at_least=0)  # the first blocks stay dense
    router_score: str = limited("softmax", choices=("softmax", "sigmoid"))
    norm_top_k: bool = True  # the K gates of a token sum to 1 (for K > 1, see Router.gates)
    route_scale: float = limited(1.0, more_than=0)  # factor of all gates
    expert_load_balance_loss_coef: float = limited(0.02, at_least=0)
    # that loss's load: of the whole optimizer step, or of a 'micro' batch
    balance_scope: str = limited("global", choices=("global", "micro"))
    router_bias_update_rate: float = limited(0.0, at_least=0)  # see MoEGPT.update_balance
    router_z_loss_coef: float = limited(0.0, at_least=0)
    # in training, router inputs are multiplied by noise of 1 - jitter to 1 + jitter
    router_jitter: float = limited(0.0, at_least=0, less_than=1)
    # in training, see Router.within_capacity; 0 = no limit
    capacity_factor: float = limited(0.0, at_least=0)
    expert_dropout: float = limited(0.0, at_least=0, less_than=1)  # inside the experts
    # 'auto' = the faster one here
    expert_impl: str = limited("auto", choices=("auto", "grouped", "loop"))

    def problems(self):
        problems = super().problems()
        K, E = self.top_k, self.num_experts
        if K > E >= 1:
            problems.append(f"top_k ({K}) is larger than num_experts ({E})")
        if self.router_z_loss_coef and self.router_score == "sigmoid":
            problems.append(
                "router_z_loss_coef needs router_score 'softmax', not 'sigmoid': "
                "it keeps a softmax's logits small"
            )
        if not problems and not any(self.is_moe(layer) for layer in range(self.n_layer)):
            problems.append(
                f"no layer is MoE with n_layer {self.n_layer}, moe_stride {self.moe_stride}, "
                f"num_dense_layers {self.num_dense_layers}"
            )
        return problems

    def is_moe(self, layer):
        return layer >= self.num_dense_layers and (layer + 1) % self.moe_stride == 0

    @property
    def expert_hidden_dim(self):
        """H. With expert_dim -1 the dense width is split evenly among the experts that a token
        visits, so that active FLOPs equal the dense model's. A width that does not divide evenly
        goes to the nearest multiple of 8, which grouped GEMMs need."""
        if self.expert_dim >= 0:
            return self.expert_dim or self.mlp_hidden_dim
        visited = self.top_k + self.num_shared_experts
        if self.mlp_hidden_dim % visited == 0:
            return self.mlp_hidden_dim // visited
        return max(8, 8 * round(self.mlp_hidden_dim / visited / 8))


# -----------------------------------------------------------------------------
# router


class Routing(NamedTuple):
    """Each MoE block returns it with its output; `model.stats` stacks them, a row per MoE layer. A
    block never stores it: with gradient checkpointing its forward runs twice, and would count
    twice."""

    # losses, with gradient; the log has their means over layers
    balance_loss: torch.Tensor
    z_loss: torch.Tensor
    # the rest is for balancing and for the log, without gradient. All but expert_count are means
    # over tokens: the log averages them over micro-batches and processes
    expert_count: torch.Tensor  # (E,): assignments each expert received, before any capacity limit
    router_entropy: torch.Tensor  # of a token's scores, mean: 0 = certain, ln E = undecided
    first_gate: torch.Tensor  # gate of a token's first choice, before route_scale; mean
    logit_norm: torch.Tensor  # L2 norm of a token's router logits; mean
    dropped: torch.Tensor  # share of the assignments that a capacity limit dropped


class Router(nn.Module):
    """Chooses K of E experts for each token, and how much each of them counts."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.n_embd))
        # MoEGPT.update_balance sets both after each optimizer step
        self.register_buffer("bias", torch.zeros(config.num_experts))
        self.register_buffer("load", torch.full((config.num_experts,), 1 / config.num_experts))

    def forward(self, x, with_stats=True):
        """x (B, T, D) to gate_NK (float32), expert_NK (int64) and Routing (None without stats)."""
        # float32 also under autocast: bfloat16 scores are too coarse to train on
        # (Fedus et al. 2021, Switch Transformers, arXiv 2101.03961, table 2)
        with torch.autocast(x.device.type, enabled=False):
            return self.route(x.float(), with_stats)

    def route(self, x, with_stats=True):
        B, T, _ = x.shape
        logit_NE = self.logits(x.flatten(0, 1))
        score_NE, prob_NE = self.scores(logit_NE)
        expert_NK = self.choose(score_NE)
        gate_NK = self.gates(score_NE.gather(1, expert_NK))
        if not with_stats:  # in sampling the statistics would take a quarter of a token's time
            return self.config.route_scale * gate_NK, expert_NK, None

        chosen_NE = torch.zeros_like(score_NE, dtype=torch.bool).scatter(1, expert_NK, True)
        kept_NK = self.within_capacity(chosen_NE.view(B, T, -1), expert_NK)
        count_E = chosen_NE.sum(dim=0).float()
        balance_loss = load_balance_loss(self.load_for_loss(count_E), prob_NE)
        with torch.set_grad_enabled(self.config.router_z_loss_coef > 0):  # else it is only logged
            z_loss = router_z_loss(logit_NE)
        with torch.no_grad():
            routing = Routing(
                balance_loss=balance_loss,
                z_loss=z_loss,
                expert_count=count_E,
                router_entropy=torch.special.entr(prob_NE).sum(dim=-1).mean(),
                first_gate=gate_NK[:, 0].mean(),
                logit_norm=logit_NE.norm(dim=-1).mean(),
                dropped=1 - kept_NK.float().mean(),
            )
        return self.config.route_scale * gate_NK * kept_NK, expert_NK, routing

    def logits(self, x_ND):
        if self.training and self.config.router_jitter:  # Switch, appendix
            low, high = 1 - self.config.router_jitter, 1 + self.config.router_jitter
            x_ND = x_ND * torch.empty_like(x_ND).uniform_(low, high)
        return F.linear(x_ND, self.weight.float())

    def scores(self, logit_NE):
        """Returns (scores, probabilities); a token's probabilities sum to 1."""
        if self.config.router_score == "softmax":
            score_NE = logit_NE.softmax(dim=-1)
            return score_NE, score_NE
        if self.config.router_score == "sigmoid":  # DeepSeek-V3 (arXiv 2412.19437, eq. 15)
            score_NE = logit_NE.sigmoid()
            return score_NE, score_NE / score_NE.sum(dim=-1, keepdim=True).clamp_min(1e-20)
        raise ValueError(f"router_score {self.config.router_score!r} has no branch")

    def choose(self, score_NE):
        """expert_NK, the best one first. The balancing bias takes part in this choice alone, never
        in the gates (Wang et al. 2024, arXiv 2408.15664, eq. 3)."""
        return (score_NE.detach() + self.bias).topk(self.config.top_k, dim=-1).indices

    def gates(self, score_NK):
        """The chosen experts' scores as gates. A single gate is never divided by itself: it would
        be 1, and the language-model loss would not reach the router."""
        if self.config.norm_top_k and self.config.top_k > 1:
            return score_NK / score_NK.sum(dim=-1, keepdim=True).clamp_min(1e-20)
        return score_NK

    def load_for_loss(self, count_E):
        """load_E, each expert's share of the assignments. 'micro': of this micro-batch, which
        depends on how a step's batch is cut up (Qiu et al. 2025, arXiv 2501.11873). 'global': of
        the whole step before this one, whose own load is known only at its end; it balances as
        well (measured, see assets/LOG.md)."""
        if self.config.balance_scope == "global":
            return self.load
        return count_E / count_E.sum()

    def within_capacity(self, chosen_BTE, expert_NK):
        """kept_NK, bool. With a capacity_factor an expert takes only the first
        ceil(capacity_factor * T * K / E) tokens of each sequence in training and drops the rest
        (Switch, eq. 3, with single sequences as GShard's groups). So what is dropped depends on
        earlier tokens of the same sequence alone."""
        if not self.training or not self.config.capacity_factor:
            return torch.ones_like(expert_NK, dtype=torch.bool)
        T, E = chosen_BTE.shape[1:]
        # - 1e-9, because rounding would lift a product over its integer: 1.1 * 100 / 10 > 11
        capacity = math.ceil(self.config.capacity_factor * T * expert_NK.shape[1] / E - 1e-9)
        kept_BTE = chosen_BTE.cumsum(dim=1) <= capacity
        return kept_BTE.flatten(0, 1).gather(1, expert_NK)


# -----------------------------------------------------------------------------
# losses of the router


def load_balance_loss(load_E, prob_NE):
    """Switch's load-balance loss (eq. 4-6): E * sum over experts of load times mean probability.

    load_E is each expert's share of the N * K assignments, so perfect balance is 1 for every K.
    Only the probabilities carry gradient."""
    return len(load_E) * (load_E * prob_NE.mean(dim=0)).sum()


def router_z_loss(logit_NE):
    """Keeps router logits small (Zoph et al. 2022, ST-MoE, arXiv 2202.08906, eq. 5)."""
    return logit_NE.logsumexp(dim=-1).square().mean()


# -----------------------------------------------------------------------------
# experts


class ExpertWeights(NamedTuple):
    """The stacked weights of E experts, or those of one."""

    c_fc: torch.Tensor  # (E, out, D)
    c_fc_bias: torch.Tensor | None  # (E, out)
    c_proj: torch.Tensor  # (E, D, H)
    c_proj_bias: torch.Tensor | None  # (E, D)

    def to(self, dtype):
        return ExpertWeights(*(p if p is None else p.to(dtype) for p in self))

    def unstack(self):
        """A list with the ExpertWeights of each. It uses unbind, whose backward is one stack; the
        backward of indexing would make an (E, out, in) of zeros for each expert."""
        E = len(self.c_fc)
        parts = ([None] * E if p is None else p.unbind() for p in self)
        return [ExpertWeights(*one) for one in zip(*parts, strict=True)]


class Experts(nn.Module):
    """E MLPs, their weights stacked: one (E, out, in) parameter per matrix."""

    def __init__(self, config):
        super().__init__()
        E, D, H = config.num_experts, config.n_embd, config.expert_hidden_dim
        out_features = fc_out_features(config.mlp, H)
        self.config = config
        self.c_fc = nn.Parameter(torch.empty(E, out_features, D))
        self.c_proj = nn.Parameter(torch.empty(E, D, H))
        self.c_fc_bias = nn.Parameter(torch.empty(E, out_features)) if config.bias else None
        self.c_proj_bias = nn.Parameter(torch.empty(E, D)) if config.bias else None

    def forward(self, x_ND, gate_NK, expert_NK):
        """Sum over a token's K experts of gate times expert(x), (N, D)."""
        weights = ExpertWeights(self.c_fc, self.c_fc_bias, self.c_proj, self.c_proj_bias)
        device_type = x_ND.device.type
        if torch.is_autocast_enabled(device_type):
            # cast once: autocast does not reach grouped_mm, and would cast again for each expert
            dtype = torch.get_autocast_dtype(device_type)
            x_ND, weights = x_ND.to(dtype), weights.to(dtype)
        compiled = torch.compiler.is_compiling()
        impl = choose_expert_impl(self.config, device_type, x_ND.dtype, compiled, expert_NK.numel())
        run = self.grouped if impl == "grouped" else self.loop
        return run(x_ND, gate_NK, expert_NK, weights)

    # torch.compile would break its graph at every expert, whose token count only the run tells
    @torch.compiler.disable
    def loop(self, x_ND, gate_NK, expert_NK, weights):
        """The reference: one expert after the other, each on the tokens that chose it."""
        out_ND = torch.zeros_like(x_ND)
        experts = weights.unstack()
        # in training all run: one without tokens multiplies zero rows, so that its weights get a
        # gradient of zeros and not None
        chosen = range(len(experts))
        if not torch.is_grad_enabled():
            chosen = sorted(set(expert_NK.flatten().tolist()))
        for e in chosen:
            # its tokens, and the gate of each
            token, choice = torch.where(expert_NK == e)
            gate = gate_NK[token, choice].to(x_ND.dtype)
            token, gate = round_up_rows(token, gate)
            # its MLP on them
            w = experts[e]
            h = self.hidden(F.linear(x_ND.index_select(0, token), w.c_fc, w.c_fc_bias))
            y = F.linear(h, w.c_proj, w.c_proj_bias) * gate.unsqueeze(1)
            # its part of their outputs
            out_ND.index_add_(0, token, y)
        return out_ND

    def hidden(self, h):
        h = activate(h, self.config.mlp)
        return F.dropout(h, self.config.expert_dropout, self.training)

    def grouped(self, x_ND, gate_NK, expert_NK, w):
        """All experts at once, on rows sorted by expert. All shapes are fixed whatever the
        routing, so the host never waits for the device."""
        E, K = len(w.c_fc), expert_NK.shape[1]
        # rows in the experts' order
        key_M, order_M, inverse_M, end_E = sort_by_expert(expert_NK, E)
        x_MD = GatherForExperts.apply(x_ND, order_M, inverse_M, K)
        gate_M1 = GatherForExperts.apply(gate_NK.reshape(-1, 1), order_M, inverse_M, 1)
        # the experts' MLPs
        h_MH = F.grouped_mm(x_MD, w.c_fc.transpose(1, 2), offs=end_E)
        if w.c_fc_bias is not None:  # grouped_mm takes no bias; as a product it needs no atomics
            expert_E = torch.arange(E, device=key_M.device)
            one_hot_ME = (key_M.unsqueeze(1) == expert_E).to(x_MD.dtype)
            h_MH = h_MH + one_hot_ME @ w.c_fc_bias
        y_MD = F.grouped_mm(self.hidden(h_MH), w.c_proj.transpose(1, 2), offs=end_E)
        if w.c_proj_bias is not None:
            y_MD = y_MD + one_hot_ME @ w.c_proj_bias
        # back in the tokens' order, and summed over a token's experts
        return SumOverChoices.apply(y_MD * gate_M1.to(y_MD.dtype), order_M, inverse_M, K)


def round_up_rows(token, gate):
    """Pad an expert's rows to a multiple of 64 where that is faster, with token 0 and gate 0: they
    add nothing. On CPUs oneDNN compiles a bfloat16 kernel for every new number of rows, which
    costs more than the product itself."""
    if token.device.type != "cpu" or gate.dtype != torch.bfloat16 or len(token) == 1:
        return token, gate
    padding = (0, -len(token) % 64)
    return F.pad(token, padding), F.pad(gate, padding)


def sort_by_expert(expert_NK, E):
    """The M assignments sorted by expert, those of one expert in the tokens' order.

    key_M: their experts, as small integers, which sort fastest. order_M: which assignment comes
    m-th. inverse_M: where each assignment went. end_E: where each expert's rows end, int32."""
    small = torch.uint8 if E <= 256 else torch.int16
    key_M, order_M = expert_NK.flatten().to(small).sort(stable=True)
    position_M = torch.arange(len(order_M), device=order_M.device)
    inverse_M = torch.empty_like(order_M).scatter(0, order_M, position_M)
    expert_E = torch.arange(E, device=key_M.device, dtype=torch.int32)
    end_E = torch.searchsorted(key_M.int(), expert_E, right=True, out_int32=True)
    return key_M, order_M, inverse_M, end_E


# The next two are gathers, and each is the other's backward. Autograd's own backward would add up
# rows with atomics: slowly, and in an order that changes from run to run.


class GatherForExperts(torch.autograd.Function):
    """Rows of tokens (N, width) to rows of assignments (M, width), sorted by expert."""

    @staticmethod
    def forward(ctx, x, order_M, inverse_M, K):
        ctx.save_for_backward(order_M, inverse_M)
        ctx.K = K
        return F.embedding(order_M // K, x)

    @staticmethod
    def backward(ctx, grad):
        return SumOverChoices.apply(grad, *ctx.saved_tensors, ctx.K), None, None, None


class SumOverChoices(torch.autograd.Function):
    """Rows of assignments (M, width) to rows of tokens (N, width): a token's K rows summed."""

    @staticmethod
    def forward(ctx, y, order_M, inverse_M, K):
        ctx.save_for_backward(order_M, inverse_M)
        ctx.K = K
        if y.device.type == "cpu" and not torch.compiler.is_compiling():
            # ten times as fast as the line below
            return F.embedding_bag(inverse_M.view(-1, K), y, mode="sum")
        return y[inverse_M].view(-1, K, y.shape[1]).sum(dim=1)

    @staticmethod
    def backward(ctx, grad):
        return GatherForExperts.apply(grad, *ctx.saved_tensors, ctx.K), None, None, None


def choose_expert_impl(config, device_type, dtype, compiled, assignments):
    """'loop' or 'grouped': config.expert_impl, or for 'auto' the faster one, as measured on CPUs
    (assets/LOG.md). dtype: that of the experts' inputs. assignments: N * K."""
    if config.expert_impl != "auto":
        return config.expert_impl
    if why_not_grouped(config, device_type, dtype, compiled):
        return "loop"
    if device_type == "cuda":  # one kernel in bfloat16; in float32 torch loops, too
        return "grouped" if dtype == torch.bfloat16 else "loop"
    if compiled or assignments <= config.top_k:  # a single token
        return "loop"
    # a CPU's bfloat16 products are slow for numbers of rows that it has not met before
    few = assignments < 64 * config.num_experts
    return "grouped" if few or dtype == torch.float32 else "loop"


def expert_impl_problem(config, device_type, dtype, compiled):
    """Why the implementation that config.expert_impl asks for cannot run there, or None."""
    if not isinstance(config, MoEGPTConfig) or config.expert_impl != "grouped":
        return None
    reason = why_not_grouped(config, device_type, dtype, compiled)
    return f"expert_impl 'grouped' cannot run: {reason}; 'auto' can" if reason else None


def why_not_grouped(config, device_type, dtype, compiled):
    """Why `grouped` cannot run there, or None."""
    if device_type not in ("cuda", "cpu") or dtype not in (torch.float32, torch.bfloat16):
        return f"torch has no grouped GEMM for {dtype} on {device_type}"
    if compiled and dtype != torch.bfloat16:
        return f"torch compiles grouped GEMMs of bfloat16 only, not {dtype}"
    unit = 16 // dtype.itemsize
    widths = (config.n_embd, config.expert_hidden_dim)
    if any(width % unit for width in widths):
        return f"it needs multiples of {unit}, but n_embd and expert_dim are {widths}"
    if config.num_experts >= 1024:
        return "grouped GEMMs take fewer than 1024 experts"
    return None


# -----------------------------------------------------------------------------
# block and model


class MoE(nn.Module):
    """Router, experts and shared experts, where a dense block has its MLP."""

    def __init__(self, config):
        super().__init__()
        self.router = Router(config)
        self.experts = Experts(config)
        # n ungated experts sum to one MLP n times as wide (DeepSeekMoE, Dai et al. 2024,
        # arXiv 2401.06066)
        shared_dim = config.num_shared_experts * config.expert_hidden_dim
        self.shared = MLP(config, shared_dim) if shared_dim else None
        self.dropout = config.dropout

    def forward(self, x, with_stats=True):
        """x (B, T, D) to (B, T, D) and Routing (None without stats)."""
        gate_NK, expert_NK, routing = self.router(x, with_stats)
        out = self.experts(x.flatten(0, 1), gate_NK, expert_NK).view_as(x)
        out = F.dropout(out, self.dropout, self.training)
        if self.shared is not None:
            out = out + self.shared(x)
        return out, routing


class MoEBlock(Block):
    def __init__(self, config):
        super().__init__(config)
        self.mlp = MoE(config)

    def forward(self, x, rope=None, kv_cache=None):
        x = x + self.attn(self.ln_1(x), rope, kv_cache)
        y, routing = self.mlp(self.ln_2(x), with_stats=kv_cache is None)
        return x + y, routing


class MoEGPT(GPT):
    """GPT with experts: the same calls and return values. `stats` also holds what Routing lists,
    as tensors with one row per MoE layer."""

    def build_block(self, layer):
        return MoEBlock(self.config) if self.config.is_moe(layer) else Block(self.config)

    def forward(self, idx, targets=None, kv_cache=None):
        x, rope = self.embed(idx, kv_cache)
        routings = []
        for layer in range(self.config.n_layer):
            x = self.run_block(layer, x, rope, kv_cache)
            if self.config.is_moe(layer):
                x, routing = x
                routings.append(routing)
        logits, loss = self.logits_and_loss(x, targets)
        if loss is not None:
            # all layers' as one, a row per MoE layer
            routing = Routing(*map(torch.stack, zip(*routings, strict=True)))
            self.stats = {"cross_entropy": loss.detach()}
            self.stats |= {name: value.detach() for name, value in routing._asdict().items()}
            if self.training:
                loss = loss + self.auxiliary_loss(routing)
        return logits, loss

    def auxiliary_loss(self, routing):
        """Each layer's own loss, then the mean. Loads pooled over layers would look balanced when
        every layer has collapsed, each onto another expert."""
        balance_loss = self.config.expert_load_balance_loss_coef * routing.balance_loss.mean()
        return balance_loss + self.config.router_z_loss_coef * routing.z_loss.mean()

    @torch.no_grad()
    def update_balance(self, stats, skipped=False):
        """Keep the step's load for the next step's balance loss.

        With router_bias_update_rate, balance without a loss (Wang et al. 2024, arXiv 2408.15664,
        algorithm 1): add the rate to the bias of every expert below the mean load, take it from
        those above, and centre. Counts are integers, so the result does not depend on the size of
        a micro-batch."""
        count_LE = stats["expert_count"]
        total_L1 = count_LE.sum(dim=1, keepdim=True)
        load_LE = count_LE / total_L1
        # +1 for an expert below the mean, -1 above; times E, so that all numbers are integers
        direction_LE = (total_L1 - count_LE * count_LE.shape[1]).sign()
        skipped = torch.as_tensor(skipped, device=count_LE.device)
        routers = [b.mlp.router for b in self.transformer.h if isinstance(b, MoEBlock)]
        for router, load_E, direction_E in zip(routers, load_LE, direction_LE, strict=True):
            router.load.copy_(torch.where(skipped, router.load, load_E))
            if self.config.router_bias_update_rate:
                bias = router.bias + self.config.router_bias_update_rate * direction_E
                router.bias.copy_(torch.where(skipped, router.bias, bias - bias.mean()))

    def active_numel(self, name, p):
        if ".experts." in f".{name}":
            return p.numel() * self.config.top_k // self.config.num_experts
        return p.numel()


def build_config(settings):
    """Settings, a dict, to a MoEGPTConfig with use_moe, else a GPTConfig. Keys that are no part of
    it are ignored. Raises ConfigError with all that is wrong."""
    cls = MoEGPTConfig if settings.get("use_moe") else GPTConfig
    return cls(**{f.name: settings[f.name] for f in fields(cls) if f.name in settings})


def config_to_dict(config):
    """The inverse of build_config: plain JSON."""
    return {"use_moe": isinstance(config, MoEGPTConfig), **asdict(config)}


def build_model(config):
    """The one place that chooses the class: MoEGPT for a MoEGPTConfig, else GPT."""
    return MoEGPT(config) if isinstance(config, MoEGPTConfig) else GPT(config)
