"""
A Mixture-of-Experts GPT: the MLP of some blocks becomes a router and a set of experts, of which each token visits
top_k. It knows nothing of the training loop.

Shapes, as suffixes of names:
    B  sequences    T  tokens of a sequence    N  tokens, B * T    D  width of the model (n_embd)
    E  experts      K  experts per token       H  hidden width of an expert
    M  assignments of a token to an expert, N * K, sorted by expert
"""

import math
from dataclasses import asdict, dataclass, fields
from typing import ClassVar, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from model import GPT, MLP, Block, GPTConfig, activate, fc_out_features


@dataclass
class MoEGPTConfig(GPTConfig):
    num_experts: int = 4
    top_k: int = 1
    expert_dim: int = 0  # H; 0: as wide as the dense MLP; -1: dense width / (top_k + num_shared_experts), see expert_hidden_dim
    num_shared_experts: int = 0  # experts that every token visits, without a gate
    moe_stride: int = 1  # every moe_stride-th block is MoE
    num_dense_layers: int = 0  # the first blocks stay dense
    router_score: str = "softmax"
    norm_top_k: bool = True  # gates of a token sum to 1; without effect for top_k = 1, see Router
    route_scale: float = 1.0  # factor of all gates
    expert_load_balance_loss_coef: float = 0.02
    balance_scope: str = (
        "global"  # the load in the balance loss: of a whole optimizer step, or of each micro-batch
    )
    router_bias_update_rate: float = 0.0  # loss-free balancing, see MoEGPT.update_balance
    router_z_loss_coef: float = 0.0
    router_jitter: float = (
        0.0  # in training, the router's input is multiplied by noise from 1 - jitter to 1 + jitter
    )
    capacity_factor: float = (
        0.0  # in training, an expert's most tokens of a sequence, over T * K / E; 0: no limit
    )
    expert_dropout: float = 0.0  # dropout inside the experts
    expert_impl: str = "auto"

    choices: ClassVar = GPTConfig.choices | {
        "router_score": ("softmax", "sigmoid"),
        "balance_scope": ("global", "micro"),
        "expert_impl": ("auto", "grouped", "split", "loop"),
    }
    at_least: ClassVar = GPTConfig.at_least | {
        "num_experts": 1,
        "top_k": 1,
        "expert_dim": -1,
        "num_shared_experts": 0,
        "moe_stride": 1,
        "num_dense_layers": 0,
        "expert_load_balance_loss_coef": 0,
        "router_bias_update_rate": 0,
        "router_z_loss_coef": 0,
        "capacity_factor": 0,
    }
    below_one = (*GPTConfig.below_one, "router_jitter", "expert_dropout")

    def problems(self):
        found = super().problems()
        if not 0 < self.route_scale < math.inf:
            found.append(f"route_scale is {self.route_scale}, expected more than 0")
        if self.top_k > self.num_experts >= 1:
            found.append(f"top_k ({self.top_k}) is larger than num_experts ({self.num_experts})")
        if self.router_z_loss_coef and self.router_score == "sigmoid":
            found.append(
                "router_z_loss_coef has no meaning with router_score 'sigmoid': it keeps a softmax's logits small"
            )
        if not found and not any(map(self.is_moe, range(self.n_layer))):
            found.append(
                f"no layer is MoE with n_layer {self.n_layer}, moe_stride {self.moe_stride}, "
                f"num_dense_layers {self.num_dense_layers}"
            )
        return found

    def is_moe(self, layer):
        return layer >= self.num_dense_layers and (layer + 1) % self.moe_stride == 0

    @property
    def expert_hidden_dim(self):
        """H. A width that does not divide evenly goes to the nearest multiple of 8, which grouped GEMMs need."""
        if self.expert_dim >= 0:
            return self.expert_dim or self.mlp_hidden_dim
        parts = self.top_k + self.num_shared_experts
        width = self.mlp_hidden_dim
        return width // parts if width % parts == 0 else max(8, 8 * round(width / parts / 8))


class Routing(NamedTuple):
    """What a MoE block returns beside its output; in `model.stats`, one of each per MoE layer. A block that left this on
    itself instead would count twice under activation checkpointing, which runs it twice."""

    balance_loss: torch.Tensor
    z_loss: torch.Tensor
    # the rest is for balancing and the log, without gradient
    expert_count: (
        torch.Tensor
    )  # (E,): how many of the N * K assignments each expert received, before any limit
    router_entropy: (
        torch.Tensor
    )  # of a token's scores, in nats: 0 = certain, ln E = undecided; mean over tokens
    first_gate: torch.Tensor  # gate of a token's first choice, before route_scale; mean over tokens
    logit_norm: torch.Tensor  # L2 norm of a token's router logits; mean over tokens
    dropped: torch.Tensor  # share of the assignments that found their expert full


class Router(nn.Module):
    """Chooses K of E experts for each token: its K best scores are the experts and their gates."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.n_embd))
        # what the last optimizer step left, see MoEGPT.update_balance: for the choice of experts, and for the balance loss
        self.register_buffer("bias", torch.zeros(config.num_experts))
        self.register_buffer("load", torch.full((config.num_experts,), 1 / config.num_experts))

    def forward(self, x, measured=True):
        """x (B, T, D) to gate_NK (float32), expert_NK (int64), Routing (None if not measured)."""
        # float32 also under autocast: in bfloat16 the scores are too coarse to train on (Fedus et al. 2021,
        # Switch Transformers, arXiv 2101.03961, table 2)
        with torch.autocast(x.device.type, enabled=False):
            return self.route(x.float(), measured)

    def route(self, x, measured=True):
        c, x_ND = self.config, x.flatten(0, 1)
        N, K, E = len(x_ND), c.top_k, c.num_experts
        if self.training and c.router_jitter:  # Switch, appendix
            x_ND = x_ND * torch.empty_like(x_ND).uniform_(1 - c.router_jitter, 1 + c.router_jitter)
        logit_NE = F.linear(x_ND, self.weight.float())
        if c.router_score == "softmax":
            score_NE = prob_NE = logit_NE.softmax(dim=-1)
        else:  # DeepSeek-V3 (arXiv 2412.19437, eq. 15)
            score_NE = logit_NE.sigmoid()
            prob_NE = score_NE / score_NE.sum(dim=-1, keepdim=True).clamp_min(1e-20)
        # the bias takes part in the choice alone, never in the gates (Wang et al. 2024, arXiv 2408.15664, eq. 3)
        expert_NK = (score_NE.detach() + self.bias).topk(K, dim=-1).indices
        if measured:
            chosen_NKE = expert_NK.unsqueeze(-1) == torch.arange(E, device=x.device)
            gate_NK = torch.where(chosen_NKE, score_NE.unsqueeze(1), 0.0).sum(
                dim=-1
            )  # a gather, its backward without atomics
        else:  # in sampling, where all of this takes a quarter of a token's time
            gate_NK = score_NE.gather(1, expert_NK)
        # a single gate divided by itself is 1: the language-model loss would not reach the router
        if c.norm_top_k and K > 1:
            gate_NK = gate_NK / gate_NK.sum(dim=-1, keepdim=True).clamp_min(1e-20)
        if not measured:
            return c.route_scale * gate_NK, expert_NK, None

        # Load-balance loss (Switch, eq. 4-6), with the load f as a share of the N * K assignments, so that perfect balance
        # is 1 for every K. Only the mean score carries gradient. The load of this micro-batch makes the loss depend on how
        # a step's batch is cut up (Qiu et al. 2025, arXiv 2501.11873); that of the whole step is known only at its end,
        # so the global loss takes that of the step before, which balances as well (measured, see assets/LOG.md).
        count_E = chosen_NKE.sum(dim=(0, 1)).float()
        load_E = self.load if c.balance_scope == "global" else count_E / (N * K)
        balance_loss = E * (load_E * prob_NE.mean(dim=0)).sum()
        # z-loss (Zoph et al. 2022, ST-MoE, arXiv 2202.08906, eq. 5): keeps router logits small
        z_loss = logit_NE.logsumexp(dim=-1).square().mean()

        kept_NK = torch.ones_like(expert_NK, dtype=torch.bool)
        if self.training and c.capacity_factor:
            # An expert takes the first ceil(capacity_factor T K / E) tokens of each sequence and drops the rest (Switch,
            # eq. 3, with single sequences as GShard's groups). Who is dropped depends on earlier tokens alone.
            chosen_BTE = chosen_NKE.any(dim=1).view(*x.shape[:2], E)
            full_BTE = chosen_BTE.cumsum(dim=1) > math.ceil(
                c.capacity_factor * x.shape[1] * K / E - 1e-9
            )
            kept_NK = ~(chosen_NKE & full_BTE.view(N, 1, E)).any(dim=-1)
        with torch.no_grad():
            routing = Routing(
                balance_loss,
                z_loss,
                count_E,
                torch.special.entr(prob_NE).sum(dim=-1).mean(),
                gate_NK[:, 0].mean(),
                logit_NE.norm(dim=-1).mean(),
                1 - kept_NK.float().mean(),
            )
        return c.route_scale * gate_NK * kept_NK, expert_NK, routing


def sort_by_expert(expert_NK, E):
    """The M assignments by expert, those of one expert in the tokens' order: order_M, which one comes m-th; inverse_M, where
    each one went; key_M, their experts (as small integers, which sort fastest); end_E, where each expert's rows end."""
    key_M, order_M = (
        expert_NK.flatten().to(torch.uint8 if E <= 256 else torch.int16).sort(stable=True)
    )
    inverse_M = torch.empty_like(order_M).scatter(
        0, order_M, torch.arange(len(order_M), device=order_M.device)
    )
    expert_E = torch.arange(E, device=key_M.device, dtype=torch.int32)
    return (
        order_M,
        inverse_M,
        key_M,
        torch.searchsorted(key_M.int(), expert_E, right=True, out_int32=True),
    )


class MoveRows(torch.autograd.Function):
    """Rows of tokens (N, width) to rows of assignments (M, width), sorted by expert; or back, a token's K rows summed. Both
    are gathers, and each is the other's backward. Autograd's own backward would add up rows with atomics: slowly, and in
    an order that changes from run to run."""

    @staticmethod
    def forward(ctx, x, order_M, inverse_M, K, back):
        ctx.save_for_backward(order_M, inverse_M)
        ctx.K, ctx.back = K, back
        if not back:
            return F.embedding(order_M // K, x)
        if (
            x.device.type == "cpu" and not torch.compiler.is_compiling()
        ):  # ten times as fast as what the compiler fuses
            return F.embedding_bag(inverse_M.view(-1, K), x, mode="sum")
        return x[inverse_M].view(-1, K, x.shape[1]).sum(dim=1)

    @staticmethod
    def backward(ctx, grad):
        return MoveRows.apply(grad, *ctx.saved_tensors, ctx.K, not ctx.back), None, None, None, None


class Experts(nn.Module):
    """E MLPs, their weights stacked: one (E, out, in) parameter per matrix."""

    def __init__(self, config):
        super().__init__()
        E, D, H = config.num_experts, config.n_embd, config.expert_hidden_dim
        rows = fc_out_features(config.mlp, H)
        self.config = config
        self.c_fc = nn.Parameter(torch.empty(E, rows, D))
        self.c_proj = nn.Parameter(torch.empty(E, D, H))
        self.c_fc_bias = nn.Parameter(torch.empty(E, rows)) if config.bias else None
        self.c_proj_bias = nn.Parameter(torch.empty(E, D)) if config.bias else None

    def forward(self, x_ND, gate_NK, expert_NK):
        """Sum over a token's K experts of gate times expert(x), (N, D)."""
        weights = [self.c_fc, self.c_fc_bias, self.c_proj, self.c_proj_bias]
        if torch.is_autocast_enabled(
            x_ND.device.type
        ):  # cast once, where autocast would for every expert anew
            dtype = torch.get_autocast_dtype(x_ND.device.type)
            x_ND, *weights = (t.to(dtype) if t is not None else None for t in (x_ND, *weights))
        impl, _ = choose_impl(
            self.config,
            x_ND.device.type,
            x_ND.dtype,
            torch.compiler.is_compiling(),
            expert_NK.numel(),
        )
        return getattr(self, impl)(x_ND, gate_NK, expert_NK, *weights)

    def activate(self, h):
        return F.dropout(activate(h, self.config.mlp), self.config.expert_dropout, self.training)

    # torch.compile would break its graph at every expert here, because how many tokens it gets is known only at run time
    @torch.compiler.disable
    def loop(self, x_ND, gate_NK, expert_NK, *weights):
        """The reference: one expert after the other, each on the tokens that chose it."""
        out_ND = torch.zeros_like(x_ND)
        # an expert without tokens multiplies zero rows, so its weights get a gradient of zeros and not None
        busy = (
            range(len(self.c_fc)) if torch.is_grad_enabled() else set(expert_NK.flatten().tolist())
        )
        for e, (c_fc, c_fc_bias, c_proj, c_proj_bias) in enumerate(self.each(weights)):
            if e not in busy:
                continue
            token, choice = torch.where(expert_NK == e)
            h = self.activate(F.linear(x_ND.index_select(0, token), c_fc, c_fc_bias))
            y = F.linear(h, c_proj, c_proj_bias) * gate_NK[token, choice].to(x_ND.dtype).unsqueeze(
                1
            )
            out_ND.index_add_(0, token, y)
        return out_ND

    def each(self, weights):
        """The weights of one expert after the other. unbind and not indexing: its backward is one stack, where E indexings
        would each make an (E, out, in) of zeros."""
        return zip(
            *(w.unbind() if w is not None else [None] * len(self.c_fc) for w in weights),
            strict=True,
        )

    def grouped(self, x_ND, gate_NK, expert_NK, *weights):
        """All experts at once, on rows sorted by expert. Neither the shapes nor the host depend on who chose whom."""
        K = expert_NK.shape[1]
        order_M, inverse_M, key_M, end_E = sort_by_expert(expert_NK, len(self.c_fc))
        x_MD = MoveRows.apply(x_ND, order_M, inverse_M, K, False)
        gate_M1 = MoveRows.apply(gate_NK.reshape(-1, 1), order_M, inverse_M, 1, False).to(
            x_ND.dtype
        )
        y_MD = self.multiply(x_MD, gate_M1, key_M, end_E, *weights)
        return MoveRows.apply(y_MD, order_M, inverse_M, K, True)

    def multiply(self, x_MD, gate_M1, key_M, end_E, c_fc, c_fc_bias, c_proj, c_proj_bias):
        h_MH = F.grouped_mm(x_MD, c_fc.transpose(1, 2), offs=end_E)
        if (
            c_fc_bias is not None
        ):  # as a product with the one-hot choice, whose backward is a product, too
            one_hot_ME = (key_M.unsqueeze(1) == torch.arange(len(c_fc), device=x_MD.device)).to(
                x_MD.dtype
            )
            h_MH = h_MH + one_hot_ME @ c_fc_bias
        # gating the hidden units and not the outputs: the same product, and no output has to be kept for the gate's gradient
        y_MD = F.grouped_mm(self.activate(h_MH) * gate_M1, c_proj.transpose(1, 2), offs=end_E)
        return y_MD if c_proj_bias is None else y_MD + (one_hot_ME * gate_M1) @ c_proj_bias

    @torch.compiler.disable
    def split(self, x_ND, gate_NK, expert_NK, *weights):
        """The same for a CPU: one expert after the other, whose rows stay in the cache from one operation to the next."""
        K = expert_NK.shape[1]
        order_M, inverse_M, key_M, end_E = sort_by_expert(expert_NK, len(self.c_fc))
        gate_M = gate_NK.to(x_ND.dtype).flatten().gather(0, order_M)
        count_E = end_E.diff(prepend=end_E.new_zeros(1))
        # oneDNN compiles a kernel for every new number of rows of bfloat16, which costs more than the product itself: round
        # the numbers up with rows of gate 0, which add nothing to values or gradients
        pad_E = -count_E % (64 if x_ND.dtype == torch.bfloat16 else 1)
        sizes = (count_E + pad_E).tolist()
        to_M = (
            torch.arange(len(key_M), device=key_M.device) + (pad_E.cumsum(0) - pad_E)[key_M.int()]
        )
        order_M, gate_M = (t.new_zeros(sum(sizes)).scatter(0, to_M, t) for t in (order_M, gate_M))
        inverse_M = to_M[inverse_M]
        x_MD = MoveRows.apply(x_ND, order_M, inverse_M, K, False)
        y_MD = torch.cat(self.one_by_one(x_MD.split(sizes), gate_M.split(sizes), weights))
        return MoveRows.apply(y_MD, order_M, inverse_M, K, True)

    def one_by_one(self, x_MD, gate_M, weights):
        """Lists with an item for each expert: its rows and their gates, to its outputs times gates."""
        return [
            F.linear(self.activate(F.linear(x, c_fc, c_fc_bias)), c_proj, c_proj_bias)
            * gate.unsqueeze(1)
            for x, gate, (c_fc, c_fc_bias, c_proj, c_proj_bias) in zip(
                x_MD, gate_M, self.each(weights), strict=True
            )
        ]


def choose_impl(config, device_type, dtype, compiled, assignments):
    """'loop', 'grouped' or 'split' for so many assignments of tokens to experts, and, where config.expert_impl asks for
    'grouped' in vain, the reason (else None)."""
    # measured on CPUs (assets/LOG.md): split is the fastest from about 64 rows per expert on, with fewer, as in sampling,
    # grouped is; on GPUs grouped_mm is one kernel for bfloat16 from sm_90 on, elsewhere it waits for the host as split does
    fast = (
        dtype == torch.bfloat16
        if device_type == "cuda"
        else not compiled and assignments < 64 * config.num_experts
    )
    wanted = config.expert_impl
    if (
        device_type == "cpu" and wanted == "auto" and assignments == config.top_k
    ):  # of one token, in sampling
        wanted = "loop"
    if wanted in ("loop", "split") or (wanted == "auto" and not fast):
        return "loop" if wanted == "loop" else "split", None
    widths, unit = (config.n_embd, config.expert_hidden_dim), 16 // dtype.itemsize
    obstacle = next(
        (
            why
            for wrong, why in (
                (
                    device_type not in ("cuda", "cpu")
                    or dtype not in (torch.float32, torch.bfloat16),
                    f"torch has no grouped GEMM for {dtype} on {device_type}",
                ),
                (
                    compiled and dtype != torch.bfloat16,
                    f"torch compiles grouped GEMMs of bfloat16 only, not {dtype}",
                ),
                (
                    any(width % unit for width in widths),
                    f"it needs multiples of {unit}, but n_embd and expert_dim are {widths}",
                ),
                (config.num_experts >= 1024, "grouped GEMMs take less than 1024 experts"),
            )
            if wrong
        ),
        None,
    )
    return "split" if obstacle else "grouped", obstacle if wanted == "grouped" else None


class MoE(nn.Module):
    """Stands where a dense block has its MLP."""

    def __init__(self, config):
        super().__init__()
        self.router = Router(config)
        self.experts = Experts(config)
        # the sum of n ungated experts is one MLP n times as wide (Dai et al. 2024, DeepSeekMoE, arXiv 2401.06066)
        width = config.num_shared_experts * config.expert_hidden_dim
        self.shared = MLP(config, width) if width else None
        self.dropout = config.dropout

    def forward(self, x, measured=True):
        """x (B, T, D) to (B, T, D) and Routing (None if not measured)."""
        gate_NK, expert_NK, routing = self.router(x, measured)
        out = F.dropout(
            self.experts(x.flatten(0, 1), gate_NK, expert_NK).view_as(x),
            self.dropout,
            self.training,
        )
        return (out if self.shared is None else out + self.shared(x)), routing


class MoEBlock(Block):
    def __init__(self, config):
        super().__init__(config)
        self.mlp = MoE(config)

    def forward(self, x, rope=None, past=None):
        x = x + self.attn(self.ln_1(x), rope, past)
        y, routing = self.mlp(self.ln_2(x), measured=past is None)
        return x + y, routing


class MoEGPT(GPT):
    """GPT with experts. Same calls and same two return values; `stats` also holds, as tensors with one row per MoE layer,
    what Routing lists."""

    def build_block(self, layer):
        return MoEBlock(self.config) if self.config.is_moe(layer) else Block(self.config)

    def forward(self, idx, targets=None, cache=None):
        x, rope = self.embed(idx, cache[0].length if cache else 0)
        routings = []
        for layer in range(self.config.n_layer):
            x = self.run_block(layer, x, rope, cache)
            if self.config.is_moe(layer):
                x, routing = x
                routings.append(routing)
        logits, loss = self.logits_and_loss(x, targets)
        if loss is not None:
            routing = Routing(*(torch.stack(parts) for parts in zip(*routings, strict=True)))
            self.stats = {
                "cross_entropy": loss.detach(),
                **{k: v.detach() for k, v in routing._asdict().items()},
            }
            if self.training:
                # each layer's own loss, then the mean: loads pooled over layers look balanced when every layer has
                # collapsed, each onto another expert
                c = self.config
                loss = (
                    loss
                    + c.expert_load_balance_loss_coef * routing.balance_loss.mean()
                    + c.router_z_loss_coef * routing.z_loss.mean()
                )
        return logits, loss

    @torch.no_grad()
    def update_balance(self, stats, skipped=False):
        """Keep the step's load for the next step's balance loss. With router_bias_update_rate, balance without a loss: add
        the rate to the bias of every expert below the mean load, take it from those above (Wang et al. 2024, arXiv
        2408.15664, algorithm 1), and centre. Counts are whole numbers: how a batch was cut up changes no sum or sign."""
        count = stats["expert_count"]  # (MoE layers, E)
        total, skipped = (
            count.sum(dim=1, keepdim=True),
            torch.as_tensor(skipped, device=count.device),
        )
        step = self.config.router_bias_update_rate * (total - count * count.shape[1]).sign()
        routers = [block.mlp.router for block in self.transformer.h if isinstance(block, MoEBlock)]
        for router, load_E, step_E in zip(routers, count / total, step, strict=True):
            router.load.copy_(torch.where(skipped, router.load, load_E))
            if self.config.router_bias_update_rate:
                bias = router.bias + step_E
                router.bias.copy_(torch.where(skipped, router.bias, bias - bias.mean()))

    def remarks(self, device_type, dtype, compiled):
        impl, obstacle = choose_impl(
            self.config, device_type, dtype, compiled, self.config.block_size * self.config.top_k
        )
        return [f"expert_impl is '{impl}' instead of 'grouped': {obstacle}"] if obstacle else []

    def active_numel(self, name, p):
        return (
            p.numel() * self.config.top_k // self.config.num_experts
            if ".experts." in f".{name}"
            else p.numel()
        )


def build_config(settings):
    """Settings, of which the model's own count, to GPTConfig, or with use_moe MoEGPTConfig. ValueError: all that is wrong."""
    cls = MoEGPTConfig if settings.get("use_moe") else GPTConfig
    return cls(**{f.name: settings[f.name] for f in fields(cls) if f.name in settings})


def build_model(config):
    """The one place that chooses the class: GPT for a GPTConfig, MoEGPT for a MoEGPTConfig."""
    return MoEGPT(config) if isinstance(config, MoEGPTConfig) else GPT(config)


def config_to_dict(config):
    """The inverse of build_config: plain JSON."""
    return {"use_moe": isinstance(config, MoEGPTConfig), **asdict(config)}
