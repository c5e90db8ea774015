"""
Optimizers: AdamW, and Muon for the matrices of the blocks. build_optimizer makes the one that the
settings name, with weight decay on matrices and embeddings, none on biases and norms.

Any torch optimizer works. config/README.md says how to add one of your own.

Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon): before each step the momentum of every
weight matrix is made orthogonal, so that all its directions move by the same amount.

It trains the matrices of the blocks but the router's; AdamW trains everything else. A stacked
(E, out, in) parameter is E matrices, and a fused one, as queries, keys and values are, is several
too: each is made orthogonal by itself. torch.optim.Muon takes single matrices only.
"""

import math
from collections import defaultdict

import torch

from configurator import InputError
from model import GPT, GPTConfig, is_matrix

MOMENTUM = 0.95
# a, b, c of each Newton-Schulz iteration a X + b (X X^T) X + c (X X^T)^2 X
COEFFICIENTS = [(3.4445, -4.7750, 2.0315)] * 5
LARGE = 2**17  # parameters of more elements take their step alone, which saves memory


def build_optimizer(
    model: GPT,
    name: str,
    learning_rate: float,
    weight_decay: float,
    betas: tuple[float, float],
    device_type: str,
) -> torch.optim.Optimizer:
    """The optimizer of this name. Raises InputError for a model without matrices for Muon."""
    # on mps the fused one ignores found_inf, by which a step is skipped
    options = {"lr": learning_rate, "betas": betas, "fused": device_type in ("cuda", "cpu")}
    if name == "muon":
        return Muon(muon_groups(model, weight_decay), **options)
    if name == "adamw":
        return torch.optim.AdamW(decay_groups(model, weight_decay), **options)
    raise ValueError(f"optimizer {name!r} has no line in build_optimizer")


def decay_groups(model: GPT, weight_decay: float) -> list[dict]:
    """Parameter groups with and without weight decay. Names decide, not the number of dimensions:
    stacked expert matrices are matrices, and stacked biases are biases."""
    decayed, others = [], []
    for name, p in model.named_parameters():
        if is_matrix(name, p):
            decayed.append(p)
        else:
            others.append(p)
    groups = [{"params": decayed, "weight_decay": weight_decay}]
    if others:
        groups.append({"params": others, "weight_decay": 0.0})
    return groups


def num_moments(model: GPT, name: str) -> int:
    """How many numbers the optimizer of this name keeps for the next step: AdamW two for each
    parameter, Muon one for each of its matrices; of another it is a guess. They decide what is said
    about memory and whether the disk is large enough."""
    total = 0
    for param_name, p in model.named_parameters():
        by_muon = name == "muon" and is_hidden_matrix(param_name, p)
        total += p.numel() if by_muon else 2 * p.numel()
    return total


# -----------------------------------------------------------------------------
# resuming; FSDP


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Load an optimizer's state_dict of full tensors; each rank keeps the shards that its
    parameters need. What a run sets, like betas and weight decay, stays. Raises ValueError,
    LookupError or TypeError for one that does not fit."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    groups = []
    for saved, own in zip(state["param_groups"], optimizer.param_groups, strict=True):
        groups.append(saved | {key: value for key, value in own.items() if key != "params"})
    if hasattr(params[0], "full_tensor"):
        for number, entry in state["state"].items():
            for name, value in entry.items():
                if torch.is_tensor(value) and value.dim():
                    entry[name] = shard_like(params[number], value)
    optimizer.load_state_dict(state | {"param_groups": groups})


def shard_like(p: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """This rank's part of a full tensor, cut as FSDP has cut the parameter p."""
    from torch.distributed.tensor import distribute_tensor  # late: only for FSDP

    value = value.to(p.device)
    # a clone, or the shard would keep the full tensor alive
    return distribute_tensor(value, p.device_mesh, p.placements, src_data_rank=None).clone()


# -----------------------------------------------------------------------------
# Muon


def muon_groups(model: GPT, weight_decay: float) -> list[dict]:
    """Parameter groups for Muon. Raises InputError for a model without matrices for it."""
    groups = {}
    for name, p in model.named_parameters():
        rows = fused_rows(model.config, name, p) if is_hidden_matrix(name, p) else None
        new = {"params": [], "rows": rows, "weight_decay": weight_decay * is_matrix(name, p)}
        groups.setdefault((rows, is_matrix(name, p)), new)["params"].append(p)
    if not any(rows for rows, _ in groups):
        raise InputError("optimizer is 'muon', but the model has no matrices for it; use 'adamw'")
    return list(groups.values())


def is_hidden_matrix(name: str, p: torch.Tensor) -> bool:
    """Whether Muon trains a parameter: the matrices between the hidden layers."""
    return name.startswith("transformer.h.") and is_matrix(name, p) and ".router." not in name


def fused_rows(config: GPTConfig, name: str, p: torch.Tensor) -> tuple[int, ...]:
    """How many rows each of the matrices has that are fused into one parameter."""
    rows = p.shape[-2]
    if name.endswith("attn.c_attn.weight"):
        kv_rows = (config.n_kv_head or config.n_head) * config.head_dim
        return (rows - 2 * kv_rows, kv_rows, kv_rows)  # queries, keys, values
    gate_and_up = "c_fc" in name and config.mlp == "swiglu"
    return (rows // 2, rows // 2) if gate_and_up else (rows,)


class Muon(torch.optim.AdamW):
    """Muon for parameter groups with "rows" (see fused_rows), AdamW for those where it is None.

    Muon's update is 0.2 * sqrt(larger side) times an orthogonal matrix. It is as large as AdamW's
    updates usually are, so one learning rate and one weight decay suit both (Liu et al. 2025,
    arXiv 2502.16982, sec. 2.2). A matrix whose gradient is zero, as that of an expert without
    tokens, does not move: what is left of its momentum would be blown up to full size.
    `found_inf` skips a step as in torch's fused AdamW, and the host does not wait."""

    def __setstate__(self, state):
        torch.optim.Optimizer.__setstate__(self, state)  # AdamW's wants its own state everywhere

    @torch.no_grad()
    def step(self):
        small = []
        for group in self.param_groups:
            for p in group["params"]:
                if group["rows"] and p.grad is not None:
                    if p.numel() > LARGE:
                        self.muon_step([(p, group)])
                    else:
                        small.append((p, group))
        self.muon_step(small)
        super().step()  # AdamW leaves parameters without gradients alone

    def muon_step(self, params_and_groups):
        """Muon's step for parameters, whose matrices of one shape are one batch."""
        found_inf = getattr(self, "found_inf", None)
        keep = 1.0 if found_inf is None else 1.0 - found_inf  # 0 if this step is skipped
        updates, matrices = [], []
        for p, group in params_and_groups:
            update = self.momentum_update(p, group["rows"], keep)
            updates.append(update)
            matrices += update.split(group["rows"], dim=-2)
        orthogonalize(matrices)
        for (p, group), update in zip(params_and_groups, updates, strict=True):
            if update.shape != local(p).shape:
                update = local(shard_like(p, update))
            local(p).mul_(1 - group["lr"] * group["weight_decay"] * keep)
            local(p).sub_(update, alpha=group["lr"])
            p.grad = None

    def momentum_update(self, p, rows, keep):
        """A parameter's Nesterov momentum, (out, in) or (E, out, in), in place of its gradient."""
        state = self.state[p]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(p)
        grad, momentum = local(p.grad), local(state["momentum_buffer"])
        if torch.is_tensor(keep):
            grad.masked_fill_(keep == 0, 0.0)  # times 0, a NaN would stay NaN
        row_sums = whole_matrices(p.grad.abs().sum(dim=-1, keepdim=True))
        momentum.lerp_(grad, keep * (1 - MOMENTUM))
        grad.lerp_(momentum, MOMENTUM)
        update = whole_matrices(p.grad)
        for matrix, sums in zip(update.split(rows, -2), row_sums.split(rows, -2), strict=True):
            matrix.mul_(sums.sum(dim=-2, keepdim=True) > 0)  # only those with a gradient
        return update


def local(tensor):
    """A tensor, or this process's shard of one that FSDP has cut."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def whole_matrices(tensor):
    """A tensor; if FSDP has cut it, gathered; or this process's shard of experts cut by E."""
    if not hasattr(tensor, "full_tensor"):
        return tensor
    cut_by_E = tensor.dim() == 3 and tensor.placements[0].is_shard(0)
    return tensor.to_local() if cut_by_E else tensor.full_tensor()


def orthogonalize(updates):
    """Turn each matrix of (out, in) or (E, out, in) tensors, in place, into 0.2 * sqrt(larger side)
    times the nearest orthogonal one."""
    batches = defaultdict(list)  # matrices of one shape, or its transpose, are one batch
    for update in updates:
        wide = update if update.shape[-2] <= update.shape[-1] else update.mT
        batches[wide.shape[-2:]].append(wide)
    for shape, batch in batches.items():
        x = torch.cat([wide.reshape(-1, *shape) for wide in batch])
        x = newton_schulz(x).mul_(0.2 * math.sqrt(max(shape)))
        for wide in batch:
            result, x = x.tensor_split([wide.numel() // shape.numel()])
            wide.copy_(result.view_as(wide))


def newton_schulz(x):
    """Roughly the nearest orthogonal matrices to those of x (batch, out, in), out <= in."""
    x = x / x.abs().amax(dim=(-2, -1), keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp_min(1.0)
    if x.is_cuda:  # on a CPU it is no faster at these sizes
        x = x.bfloat16()
    for a, b, c in COEFFICIENTS:
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x
