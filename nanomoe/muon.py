"""
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
from model import is_matrix
from nanomoe.distributed import shard_like

MOMENTUM = 0.95
# a, b, c of each Newton-Schulz iteration a X + b (X X^T) X + c (X X^T)^2 X
COEFFICIENTS = [(3.4445, -4.7750, 2.0315)] * 5
LARGE = 2**17  # parameters of more elements take their step alone, which saves memory


def configure_muon(model, weight_decay, learning_rate, betas, device_type):
    """As GPT.configure_optimizers. Raises InputError for a model without matrices for Muon."""
    groups = {}
    for name, p in model.named_parameters():
        rows = fused_rows(model.config, name, p) if is_hidden_matrix(name, p) else None
        new = {"params": [], "rows": rows, "weight_decay": weight_decay * is_matrix(name, p)}
        groups.setdefault((rows, is_matrix(name, p)), new)["params"].append(p)
    if not any(rows for rows, _ in groups):
        raise InputError("optimizer is 'muon', but the model has no matrices for it; use 'adamw'")
    return Muon(groups.values(), learning_rate, betas, fused=device_type in ("cuda", "cpu"))


def is_hidden_matrix(name, p):
    """Whether Muon trains a parameter: the matrices between the hidden layers."""
    return name.startswith("transformer.h.") and is_matrix(name, p) and ".router." not in name


def fused_rows(config, name, p):
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
