"""
How long a run is, and its learning rate. Nothing else knows where a warm-up ends or a decay begins.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

from configurator import InputError

LENGTHS = ("max_iters", "max_tokens", "max_epochs")  # settings that say how many steps a run has


@dataclass(frozen=True)
class Schedule:
    """The fields are settings of train.py. Steps are counted from 0; seconds are those of training.

    After a linear warm-up the learning rate falls to min_lr, which it reaches at lr_decay_iters,
    or, with max_seconds, at the end of that time. 'cosine' falls from the end of the warm-up on.
    'wsd' stays constant, then falls in a line over the last decay_share (Hu et al. 2024, MiniCPM,
    arXiv 2404.06395; Hägele et al. 2024, arXiv 2405.18392); where warm-up and decay overlap, the
    smaller of the two rates holds."""

    learning_rate: float
    min_lr: float
    warmup_iters: int
    max_iters: int
    max_seconds: float = 0.0
    decay_lr: bool = True
    lr_schedule: str = "cosine"
    decay_share: float = 0.2
    lr_decay_iters: int = 0

    @classmethod
    def of(cls, settings: Mapping) -> "Schedule":
        return cls(**{f.name: settings[f.name] for f in fields(cls) if f.name in settings})

    @property
    def decay_end(self) -> int:
        """The step at which min_lr is reached."""
        return self.lr_decay_iters or self.max_iters

    def lr(self, step: int, seconds: float = 0.0) -> float:
        """The learning rate of a step that begins after these seconds."""
        if not self.decay_lr:
            return self.learning_rate
        warmup = self.learning_rate * (step + 1) / (self.warmup_iters + 1)
        fall = self.learning_rate - self.min_lr
        if self.lr_schedule == "wsd":
            now, end = (step, self.decay_end)
            if self.max_seconds:
                now, end = (seconds, self.max_seconds)
            share_left = max(0, end - now) / end  # of the run
            kept = min(1, share_left / self.decay_share) if self.decay_share else 1
            return min(warmup, self.learning_rate - fall * (1 - kept))
        if step < self.warmup_iters:
            return warmup
        if self.max_seconds:
            progress = min(1, seconds / self.max_seconds)
        elif step < self.decay_end:
            progress = (step - self.warmup_iters) / (self.decay_end - self.warmup_iters)
        else:
            progress = 1
        return self.min_lr + fall * 0.5 * (1 + math.cos(math.pi * progress))

    def before_decay(self, step: int, seconds: float = 0.0) -> bool:
        """Whether a step of a 'wsd' run has the rate that it would have in a run of any length."""
        if self.lr_schedule != "wsd":
            return False
        endless = replace(self, decay_share=0.0)
        return self.lr(step, seconds) == endless.lr(step, seconds)

    def is_over(self, step: int, seconds: float) -> bool:
        """Whether the run ends after this many steps and seconds."""
        return step >= self.max_iters or 0 < self.max_seconds <= seconds

    def seconds_left(self, step: int, seconds: float, seconds_per_step: float) -> float:
        if self.max_seconds:
            return max(0.0, self.max_seconds - seconds)
        return (self.max_iters - step) * seconds_per_step

    def notes(self) -> list[str]:
        """Sentences that say what this schedule never reaches."""
        if not self.decay_lr:
            return []
        wsd, never_falls = self.lr_schedule == "wsd", False
        end, warmup, share = self.decay_end, self.warmup_iters, self.decay_share
        never_reaches = f"the learning rate never reaches {self.learning_rate}"
        lines = []
        if warmup >= self.max_iters:
            lines.append(f"warmup_iters is {warmup} of {self.max_iters} steps: {never_reaches}")
        elif self.max_seconds:
            pass  # how many steps there will be is not known
        elif not wsd and 0 < self.lr_decay_iters <= warmup:
            lines.append(
                f"lr_decay_iters ({end}) ends before the warm-up of {warmup} steps: the learning "
                "rate then falls at once"
            )
        elif wsd and warmup > (1 - share) * end:
            lines.append(
                f"warm-up ({warmup} steps) and decay ({share} of {end}) overlap: {never_reaches}"
            )
        elif wsd and 0 < share * end < 1:
            lines.append(
                f"decay_share is {share} of {end} steps, less than one step: the learning rate "
                "never falls"
            )
        elif end > self.max_iters:
            lines.append(
                f"lr_decay_iters is {end} of {self.max_iters} steps: the learning rate never "
                f"reaches {self.min_lr}"
            )
        never_falls = wsd and share == 0
        if self.min_lr > self.learning_rate and not never_falls:
            lines.append(
                f"min_lr ({self.min_lr}) is above learning_rate ({self.learning_rate}): it rises"
            )
        return lines


def run_length(
    settings: Mapping, given: Mapping, windows_per_epoch: int, steps: int = 0, sequences: int = 0
) -> dict:
    """The run's length in steps: the values of LENGTHS, of which one of the last two is not 0 if it
    says how long the run is.

    given: for each setting that was set, the flag or file that set it. windows_per_epoch: of the
    training data. steps, sequences: what a resumed run has done.
    Raises InputError if several say how long the run is."""
    by_files = [name for name in LENGTHS if name in given and settings[name]]
    by_flags = [name for name in by_files if given[name].startswith("--")]
    named = by_flags or by_files  # flags go first
    if len(named) > 1:
        raise InputError(f"{' and '.join(named)} say how long the run is: give one of them")
    inherited = [name for name in LENGTHS[1:] if settings[name]]
    length = (named or inherited or ["max_iters"])[0]
    found = {"max_iters": settings["max_iters"], "max_tokens": 0, "max_epochs": 0.0}
    if length == "max_iters":
        return found
    wanted = settings["max_tokens"] / settings["block_size"]  # sequences
    if length == "max_epochs":
        wanted = settings["max_epochs"] * windows_per_epoch
    sequences_per_step = settings["gradient_accumulation_steps"] * settings["batch_size"]
    left = max(0, math.ceil((wanted - sequences) / sequences_per_step))
    return found | {"max_iters": steps + left, length: settings[length]}
