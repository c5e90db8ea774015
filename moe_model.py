"""
A Mixture-of-Experts GPT: the MLP of some blocks becomes a router and a set of experts, of which each token visits
top_k. It knows nothing of the training loop.

Shapes, as suffixes of names:
    N  tokens of the batch (B * T)      E  experts                  H  hidden width of one expert
    D  width of the model (n_embd)      K  experts per token (top_k)
"""

from dataclasses import asdict, dataclass, fields
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from model import GPT, MLP, Block, GPTConfig, activate, hidden_rows


@dataclass
class MoEGPTConfig(GPTConfig):
    num_experts: int = 4
    top_k: int = 1
    expert_load_balance_loss_coef: float = 0.02
    router_z_loss_coef: float = 0.0
    norm_top_k: bool = True  # gates of a token sum to 1; without effect for top_k = 1, see Router
    expert_dim: int = 0  # H; 0: as wide as the dense MLP; -1: dense width / (top_k + num_shared_experts)
    num_shared_experts: int = 0  # experts that every token visits, without a gate
    moe_stride: int = 1  # every moe_stride-th block is MoE
    num_dense_layers: int = 0  # the first blocks stay dense

    def problems(self):
        found = super().problems()
        found += [f"{name} is {getattr(self, name)}, expected at least {least}"
                  for name, least in (("num_experts", 1), ("top_k", 1), ("expert_dim", -1), ("num_shared_experts", 0),
                                      ("moe_stride", 1), ("num_dense_layers", 0),
                                      ("expert_load_balance_loss_coef", 0), ("router_z_loss_coef", 0))
                  if not getattr(self, name) >= least]
        if self.top_k > self.num_experts >= 1:
            found.append(f"top_k ({self.top_k}) is larger than num_experts ({self.num_experts})")
        if not found and not any(map(self.is_moe, range(self.n_layer))):
            found.append(f"no layer is MoE with n_layer {self.n_layer}, moe_stride {self.moe_stride}, "
                         f"num_dense_layers {self.num_dense_layers}")
        return found

    def is_moe(self, layer):
        return layer >= self.num_dense_layers and (layer + 1) % self.moe_stride == 0

    @property
    def expert_hidden_dim(self):
        """H. A width that does not divide evenly goes to the nearest multiple of 8, which grouped GEMMs need."""
        if self.expert_dim >= 0:
            return self.expert_dim or self.mlp_dim
        parts = self.top_k + self.num_shared_experts
        return self.mlp_dim // parts if self.mlp_dim % parts == 0 else max(8, 8 * round(self.mlp_dim / parts / 8))


class Routing(NamedTuple):
    """What a MoE block returns beside its output. A block that left this on itself instead would count twice under
    activation checkpointing, which runs it twice."""
    load_E: torch.Tensor  # share of the N * K assignments that each expert received; sums to 1
    balance_loss: torch.Tensor
    z_loss: torch.Tensor


class Router(nn.Module):
    """Chooses K of E experts for each token: a softmax over experts, its K largest, and their scores as gates."""

    def __init__(self, config):
        super().__init__()
        self.top_k, self.norm_top_k = config.top_k, config.norm_top_k
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.n_embd))

    def forward(self, x_ND):
        """x_ND to gate_NK (float32), expert_NK (int64), Routing."""
        # float32 also under autocast: in bfloat16 the scores are too coarse to train on (Fedus et al. 2021,
        # Switch Transformers, arXiv 2101.03961, table 2)
        with torch.autocast(x_ND.device.type, enabled=False):
            logit_NE = F.linear(x_ND.float(), self.weight.float())
            score_NE = logit_NE.softmax(dim=-1)
            gate_NK, expert_NK = score_NE.topk(self.top_k, dim=-1)
            # a single gate divided by itself is 1: the language-model loss would not reach the router
            if self.norm_top_k and self.top_k > 1:
                gate_NK = gate_NK / gate_NK.sum(dim=-1, keepdim=True)

            # Load-balance loss (Switch, eq. 4-6), with the load as a share of the N * K assignments, so that perfect
            # balance is 1 for every K. Only the mean score carries gradient: the load is a count.
            N, E = score_NE.shape
            load_E = F.one_hot(expert_NK, E).sum(dim=(0, 1)) / (N * self.top_k)
            balance_loss = E * (load_E * score_NE.mean(dim=0)).sum()
            # z-loss (Zoph et al. 2022, ST-MoE, arXiv 2202.08906, eq. 5): keeps router logits small
            z_loss = logit_NE.logsumexp(dim=-1).square().mean()
        return gate_NK, expert_NK, Routing(load_E, balance_loss, z_loss)


class Experts(nn.Module):
    """E MLPs, their weights stacked: one (E, out, in) parameter per matrix."""

    def __init__(self, config):
        super().__init__()
        E, D, H = config.num_experts, config.n_embd, config.expert_hidden_dim
        rows = hidden_rows(config.mlp, H)
        self.kind = config.mlp
        self.c_fc = nn.Parameter(torch.empty(E, rows, D))
        self.c_proj = nn.Parameter(torch.empty(E, D, H))
        self.c_fc_bias = nn.Parameter(torch.empty(E, rows)) if config.bias else None
        self.c_proj_bias = nn.Parameter(torch.empty(E, D)) if config.bias else None

    # torch.compile would break its graph at every expert here, because how many tokens it gets is known only at run time
    @torch.compiler.disable
    def forward(self, x_ND, gate_NK, expert_NK):
        """Sum over a token's K experts of gate times expert(x), (N, D): a plain loop over the experts."""
        out_ND = torch.zeros_like(x_ND)
        weights = [self.c_fc, self.c_fc_bias, self.c_proj, self.c_proj_bias]
        if torch.is_autocast_enabled(x_ND.device.type):  # cast once, where autocast would for every expert anew
            dtype = torch.get_autocast_dtype(x_ND.device.type)
            x_ND, *weights = (t.to(dtype) if t is not None else None for t in (x_ND, *weights))
        # unbind and not indexing: its backward is one stack, where E indexings would each make an (E, out, in) of zeros
        weights = [w.unbind() if w is not None else [None] * len(self.c_fc) for w in weights]
        for e, (c_fc, c_fc_bias, c_proj, c_proj_bias) in enumerate(zip(*weights, strict=True)):
            # an expert without tokens multiplies zero rows, so its weights get a gradient of zeros and not None
            token, choice = torch.where(expert_NK == e)
            gate = gate_NK[token, choice]
            if x_ND.device.type == "cpu":
                # oneDNN compiles a kernel for every new number of rows, which costs more than the product itself:
                # round the number up with rows of gate 0, which add nothing to values or gradients
                pad = (0, -len(token) % 64)
                token, gate = F.pad(token, pad), F.pad(gate, pad)
            h = activate(F.linear(x_ND.index_select(0, token), c_fc, c_fc_bias), self.kind)
            y = F.linear(h, c_proj, c_proj_bias) * gate.unsqueeze(1)
            out_ND.index_add_(0, token, y.to(out_ND.dtype))
        return out_ND


class MoE(nn.Module):
    """Stands where a dense block has its MLP."""

    def __init__(self, config):
        super().__init__()
        self.router = Router(config)
        self.experts = Experts(config)
        # the sum of n ungated experts is one MLP n times as wide (Dai et al. 2024, DeepSeekMoE, arXiv 2401.06066)
        self.shared = None
        if config.num_shared_experts:
            self.shared = MLP(config, config.num_shared_experts * config.expert_hidden_dim)
        self.dropout = config.dropout

    def forward(self, x):
        """x (B, T, D) to (B, T, D) and Routing."""
        x_ND = x.flatten(0, 1)
        gate_NK, expert_NK, routing = self.router(x_ND)
        out = F.dropout(self.experts(x_ND, gate_NK, expert_NK).view_as(x), self.dropout, self.training)
        if self.shared is not None:
            out = out + self.shared(x)
        return out, routing


class MoEBlock(Block):
    def __init__(self, config):
        super().__init__(config)
        self.mlp = MoE(config)

    def forward(self, x, rope=None):
        x = x + self.attn(self.ln_1(x), rope)
        y, routing = self.mlp(self.ln_2(x))
        return x + y, routing


class MoEGPT(GPT):
    """GPT with experts. Same calls and same two return values; `stats` also holds balance_loss and z_loss (means over
    the MoE layers, 1 = perfect balance) and expert_load (MoE layers, E), the shares of each layer's assignments."""

    def build_block(self, layer):
        return MoEBlock(self.config) if self.config.is_moe(layer) else Block(self.config)

    def forward(self, idx, targets=None):
        x, rope = self.embed(idx)
        routings = []
        for block in self.transformer.h:
            x = self.run_block(block, x, rope)
            if isinstance(block, MoEBlock):
                x, routing = x
                routings.append(routing)
        logits, loss = self.head(x, targets)
        if loss is not None:
            # each layer's own loss, then the mean: loads pooled over layers look balanced when every layer has
            # collapsed, each onto another expert
            load, balance_loss, z_loss = (torch.stack(parts) for parts in zip(*routings, strict=True))
            balance_loss, z_loss = balance_loss.mean(), z_loss.mean()
            self.stats = {"cross_entropy": loss.detach(), "balance_loss": balance_loss.detach(),
                          "z_loss": z_loss.detach(), "expert_load": load}
            if self.training:
                c = self.config
                loss = loss + c.expert_load_balance_loss_coef * balance_loss + c.router_z_loss_coef * z_loss
        return logits, loss

    def active_numel(self, name, p):
        stacked = ".experts." in f".{name}"
        return p.numel() * self.config.top_k // self.config.num_experts if stacked else p.numel()


def summarize_routing(stats):
    """A model's `stats`, averaged over micro-batches and processes, as plain numbers for a log.

    A dense model's is {"loss"}, the cross-entropy. A MoE model adds its losses, max_vio, how far the busiest expert's
    load lies above the mean load, over the mean (Wang et al. 2024, arXiv 2408.15664, sec. 4.1): the worst layer's
    and the layers' mean; dead_experts, those without a token; and collapsed_layers, see below.
    """
    summary = {"loss": stats["cross_entropy"].item()}
    if "expert_load" in stats:
        load = stats["expert_load"]  # (MoE layers, E), each row sums to 1
        E, dead = load.shape[1], (load == 0).sum(dim=1)
        vio = load.max(dim=1).values * E - 1
        # collapsed: half of a layer's experts or more get nothing, or the load's perplexity, the number of equally busy
        # experts that would be as uneven, is below a quarter of E
        collapsed = ((2 * dead >= E) & (dead > 0)) | (torch.special.entr(load).sum(dim=1).exp() < E / 4)
        summary |= {"balance_loss": stats["balance_loss"].item(), "z_loss": stats["z_loss"].item(),
                    "max_vio": vio.max().item(), "max_vio_mean": vio.mean().item(), "dead_experts": dead.sum().item(),
                    "collapsed_layers": collapsed.nonzero().flatten().tolist()}
    return summary


def build_config(settings):
    """A dict of settings (what it has beyond the model's own is ignored) to GPTConfig, or with use_moe MoEGPTConfig.

    Raises ValueError naming everything that is wrong.
    """
    cls = MoEGPTConfig if settings.get("use_moe") else GPTConfig
    return cls(**{f.name: settings[f.name] for f in fields(cls) if f.name in settings})


def build_model(config):
    """The one place that chooses the class: GPT for a GPTConfig, MoEGPT for a MoEGPTConfig."""
    return MoEGPT(config) if isinstance(config, MoEGPTConfig) else GPT(config)


def config_dict(config):
    """The inverse of build_config: plain JSON."""
    return {"use_moe": isinstance(config, MoEGPTConfig), **asdict(config)}
