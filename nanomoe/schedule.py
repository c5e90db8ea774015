"""
The learning rate of each step, from train.py's settings: linear warm-up, then a cosine or "wsd"
(warm-up, stable, decay). It depends on nothing else, so a resumed run needs no state for it.
"""

import math


def get_lr(settings, step, seconds=0.0):
    """The learning rate of a step, counted from 0. seconds: of training before it, which count in
    place of steps if max_seconds is set.

    'cosine' falls to min_lr over all of the run (Loshchilov & Hutter 2016, arXiv 1608.03983, eq.
    5); 'wsd' stays at the highest rate, then falls linearly over the last decay_share of the run
    (Hu et al. 2024, MiniCPM, arXiv 2404.06395, sec. 4; Hägele et al. 2024, arXiv 2405.18392)."""
    highest, lowest = settings["learning_rate"], settings["min_lr"]
    if not settings["decay_lr"]:
        return highest
    warmup = settings["warmup_iters"]
    warm = highest * min(1, (step + 1) / (warmup + 1))
    if settings["lr_schedule"] == "wsd":
        height = share_of_decay_left(settings, step, seconds)
        return min(warm, lowest + (highest - lowest) * height)
    if step < warmup:
        return warm
    progress = share_of_run(settings, step, seconds, warmup)
    return lowest + (highest - lowest) * 0.5 * (1 + math.cos(math.pi * progress))


def share_of_run(settings, step, seconds, first_step=0):
    """How much of the run is done, 0 to 1; first_step: where its steps begin to count."""
    if settings["max_seconds"]:
        return min(1, seconds / settings["max_seconds"])
    last = settings["lr_decay_iters"] or settings["max_iters"]
    if step >= last:
        return 1
    return (step - first_step) / (last - first_step)


def share_of_decay_left(settings, step, seconds):
    """Of the decay of 'wsd': 1 before it begins, 0 at its end."""
    left = 1 - share_of_run(settings, step, seconds)
    if left >= settings["decay_share"] - 1e-9:
        return 1
    return left / settings["decay_share"]


def has_decayed(settings, step, seconds):
    """Whether a step belongs to the decay of 'wsd'."""
    is_wsd = settings["decay_lr"] and settings["lr_schedule"] == "wsd"
    return is_wsd and share_of_decay_left(settings, step, seconds) < 1
