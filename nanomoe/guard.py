"""
Which steps of the optimizer are skipped, and where a number stopped being finite.
"""

from collections.abc import Callable

import torch
from torch.utils._pytree import tree_leaves

from nanomoe.distributed import print0

MAX_SKIPPED_IN_A_ROW = 10


class StepGuard:
    """Judges which steps are bad: those whose loss or gradient norm is not finite; and, if `sigmas`
    is not 0, those where one of them is more than this many standard deviations above the mean of
    the last `window` good steps (OLMo-core's SkipStepOptimizer). Nothing waits for the device until
    report_skipped()."""

    def __init__(self, sigmas: float, device: torch.device, window: int = 128):
        self.sigmas = sigmas
        self.window = window
        # loss and norm of the last good steps: that of the i-th one is in row i % window
        self.seen = torch.zeros(window, 2, device=device)
        self.count = torch.zeros((), dtype=torch.int64, device=device)
        self.skipped = []  # of the steps since the last report
        self.in_a_row = 0

    def is_bad(self, loss: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
        """Whether a step with this loss and gradient norm has to be skipped, a bool tensor on the
        device. loss, norm: scalar tensors, alike on all ranks, so all skip the same steps. A good
        step enters the window."""
        both = torch.stack((loss, norm))
        bad = ~both.isfinite().all()
        if self.sigmas:
            bad |= self.is_spike(both)
            row = torch.arange(self.window, device=both.device) == self.count % self.window
            self.seen = torch.where((row & ~bad).unsqueeze(1), both, self.seen)
            self.count += ~bad
        self.skipped.append(bad)
        return bad

    def is_spike(self, both):
        """With fewer than half a window of good steps nothing counts as a spike."""
        filled = torch.arange(self.window, device=both.device) < self.count
        filled = filled.unsqueeze(1)
        n = self.count.clamp(2, self.window)
        mean = (self.seen * filled).sum(dim=0) / n
        variance = ((self.seen - mean) * filled).square().sum(dim=0) / (n - 1)
        high = both > mean + self.sigmas * variance.sqrt()
        return high.any() & (self.count >= self.window // 2)

    def report_skipped(
        self, step: int, scaler: torch.amp.GradScaler, find_layer: Callable = lambda: None
    ) -> None:
        """Say one line for each step skipped since the last report; `step` is the number of the
        last one. find_layer() names the first layer whose output is not finite, or None; it is
        called if the last step was skipped. Raises FloatingPointError after more than
        MAX_SKIPPED_IN_A_ROW skipped steps in a row."""
        why = "loss or gradient not finite"
        if self.sigmas:
            why += " (or a spike)"
        # while a float16 scaler can still lower its scale, skipped steps are how it does so
        normal = scaler.is_enabled() and scaler.get_scale() > 1
        first = step - len(self.skipped) + 1
        skipped = torch.stack(self.skipped).tolist()
        self.skipped = []
        layer = find_layer() if skipped[-1] else None
        where = f"; the first output that is not finite is that of {layer}" if layer else ""
        for number, bad in enumerate(skipped, first):
            self.in_a_row = self.in_a_row + 1 if bad and not normal else 0
            if bad:
                print0(
                    f"step {number} skipped: {why}; weights unchanged"
                    + (where if number == step else "")
                )
            if self.in_a_row > MAX_SKIPPED_IN_A_ROW:
                raise FloatingPointError(
                    f"{self.in_a_row} steps in a row had a {why}{where}; the last checkpoints are "
                    "good; try a lower learning_rate"
                )

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {"seen": self.seen, "count": self.count}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self.seen.copy_(state["seen"])
        self.count.copy_(state["count"])


@torch.no_grad()
def first_non_finite_layer(model: torch.nn.Module, forward: Callable) -> str | None:
    """The name of the first module whose output in forward(), which runs the model, has a NaN or
    an infinity; None if there is none. Inner modules come before those that hold them."""
    found = []

    def watch(name):
        def look(module, args, output):
            tensors = [t for t in tree_leaves(output) if torch.is_tensor(t)]
            if not all(t.isfinite().all() for t in tensors):
                found.append(name)

        return look

    hooks = []
    for name, module in model.named_modules():
        if name:
            hooks.append(module.register_forward_hook(watch(name)))
    try:
        with torch.compiler.set_stance("force_eager"):  # compiled code runs no hooks
            forward()
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else None
