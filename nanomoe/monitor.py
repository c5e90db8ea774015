"""
What a run tells about itself: a model's `stats` as numbers for a log, where one stopped being finite, which steps leap.
"""

import torch
from torch.utils._pytree import tree_leaves


def summarize(stats, batches=1):
    """A model's `stats`, summed over micro-batches and processes, `batches` in all, as plain numbers for a log.

    A dense model's is {"loss"}, the cross-entropy. A MoE model adds balance_loss and z_loss (means over layers); lists over
    its layers of what else is in Routing, and expert_load, a list of E shares; max_vio, how far the busiest expert's
    load lies above the mean load, over the mean (Wang et al. 2024, arXiv 2408.15664, sec. 4.1): the worst layer's
    and the layers' mean; dead_experts, those without a token; and collapsed_layers, see below.
    """
    total = {name: value.cpu() for name, value in stats.items()}
    stats = {name: value / batches for name, value in total.items()}
    summary = {"loss": stats.pop("cross_entropy").item()}
    if stats:
        summary |= {name: stats.pop(name).mean().item() for name in ("balance_loss", "z_loss")}
        stats.pop("expert_count")
        count = total["expert_count"].sum(dim=1, keepdim=True)
        load = total["expert_count"] / count
        E, dead = load.shape[1], (load == 0).sum(dim=1)
        vio = load.max(dim=1).values * E - 1
        # collapsed: half of a layer's experts or more get nothing, or the load's perplexity, the number of equally busy
        # experts that would be as uneven, is below a quarter of E; a few tokens for each tell nothing
        collapsed = (count[:, 0] >= 4 * E) & (
            ((2 * dead >= E) & (dead > 0)) | (torch.special.entr(load).sum(dim=1).exp() < E / 4)
        )
        summary |= {
            "max_vio": vio.max().item(),
            "max_vio_mean": vio.mean().item(),
            "dead_experts": dead.sum().item(),
            "collapsed_layers": collapsed.nonzero().flatten().tolist(),
        }
        summary |= {name: [round(x, 4) for x in value.tolist()] for name, value in stats.items()}
        summary["expert_load"] = [[round(share, 5) for share in layer] for layer in load.tolist()]
    return summary


def console_line(entry, max_iters, left):
    """A log entry in short; left: seconds to the end of the run."""
    parts = [
        f"step {entry['step']}/{max_iters}",
        f"loss {entry['loss']:.4f}",
        f"lr {entry['lr']:.2e}",
        f"{entry['ms']:,.0f} ms",
        f"{entry['tokens_per_s']:,.0f} tokens/s",
    ]
    if entry["mfu"]:
        parts.append(f"mfu {entry['mfu']:.1%}")
    if "max_vio" in entry:
        parts.append(
            f"balance {entry['balance_loss']:.3f}, maxvio {entry['max_vio']:.2f}, dead {entry['dead_experts']}"
        )
    return " | ".join([*parts, f"{left // 60:.0f}m{left % 60:02.0f}s left"])


def watch_for_non_finite(model):
    """Watch what every module of a model puts out in training; a list to which the name of one is added whenever that holds
    a NaN or an infinity. Inner modules come before those that hold them. Slow: it waits for the device after each one."""
    found = []

    def watch(name):
        def look(module, args, output):
            if model.training and not all(
                t.isfinite().all() for t in tree_leaves(output) if torch.is_tensor(t)
            ):
                found.append(name)

        return look

    for name, module in model.named_modules():
        if name:
            module.register_forward_hook(watch(name))
    return found


class StepGuard:
    """Tells which steps are to be skipped: those whose loss or gradient norm is not finite, and, if `sigmas` is not 0, those
    where one lies more than so many standard deviations above the mean of the last `window` good steps, after OLMo-core's
    SkipStepOptimizer. It stays on the device until report()."""

    def __init__(self, sigmas, max_bad_steps, device, window=128):
        self.sigmas, self.max_bad_steps, self.window = sigmas, max_bad_steps, window
        self.seen = torch.zeros(
            window, 2, device=device
        )  # loss and norm; row i % window is that of the i-th good step
        self.count = torch.zeros((), dtype=torch.int64, device=device)
        self.bad, self.in_a_row = [], 0  # of the steps since the last report

    def check(self, loss, norm):
        """Scalar tensors, the same ones on all processes, to a bool tensor. A good step enters the window."""
        bad = ~torch.stack((loss, norm)).isfinite().all()
        if self.sigmas:
            known = (torch.arange(self.window, device=self.seen.device) < self.count).unsqueeze(1)
            n = self.count.clamp(2, self.window)
            mean = (self.seen * known).sum(dim=0) / n
            std = (((self.seen - mean) * known).square().sum(dim=0) / (n - 1)).sqrt()
            high = torch.stack((loss, norm)) > mean + self.sigmas * std
            bad |= high.any() & (self.count >= self.window // 2)
            row = (
                torch.arange(self.window, device=self.seen.device) == self.count % self.window
            ) & ~bad
            self.seen = torch.where(row.unsqueeze(1), torch.stack((loss, norm)), self.seen)
            self.count += ~bad
        self.bad.append(bad)
        return bad

    def report_skipped(self, done, scaler, say):
        """Say a line for each bad step since the last report; `done` is the number of the last step. Raises FloatingPointError
        after more than max_bad_steps in a row."""
        words = "is not finite" + " or leaps up" * bool(self.sigmas)
        # while a float16 run's scaler still has a scale to lower, that is what it does in such steps
        normal = scaler.is_enabled() and scaler.get_scale() > 1
        for step, bad in enumerate(torch.stack(self.bad).tolist(), done - len(self.bad) + 1):
            self.in_a_row = self.in_a_row + 1 if bad and not normal else 0
            if bad:
                say(
                    f"step {step}: skipped, for a loss or gradient that {words}; weights and optimizer stay as they were"
                )
            if self.in_a_row > self.max_bad_steps:
                raise FloatingPointError(
                    f"{self.in_a_row} steps in a row had a loss or gradient that {words}; a lower "
                    "learning_rate, or --debug_nans to find the first such activation; the last "
                    "checkpoints are good"
                )
        self.bad = []

    def state_dict(self):
        return {"seen": self.seen, "count": self.count}

    def load_state_dict(self, state):
        self.seen.copy_(state["seen"])
        self.count.copy_(state["count"])
