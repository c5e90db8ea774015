"""
How large the model is that settings describe, and the width that makes it as large as another.
"""

import torch

from configurator import InputError
from moe_model import build_config, build_model
from nanomoe.device import choose_device, choose_dtype, estimate_memory
from nanomoe.optim import num_moments

MATCHABLE = ("active_flops", "active_params", "total_params")


def sizes_of(settings: dict, vocab_size: int) -> dict[str, float]:
    """Sizes of the model that the settings describe: MATCHABLE (FLOPs per token), and "memory", the
    estimated bytes of training. Raises InputError."""
    try:
        with torch.device("meta"):
            model = build_model(build_config(settings | {"vocab_size": vocab_size}))
    except ValueError as error:
        raise InputError(str(error)) from None
    compute_dtype = choose_dtype(settings["dtype"], choose_device(settings["device"], try_it=False))
    moments = num_moments(model, settings["optimizer"])
    return {
        "active_flops": model.flops_per_token(),
        "active_params": model.num_active_params(),
        "total_params": model.num_params(),
        "memory": sum(estimate_memory(model, moments, settings["batch_size"], compute_dtype)),
    }


def solve_width(settings: dict, quantity: str, target: float, vocab_size: int) -> tuple[str, int]:
    """(name, value) of the width setting that brings a quantity closest to the target. It is a
    multiple of 8, which grouped GEMMs need, or from 1024 on of 64, which GPUs multiply well."""
    key = "expert_dim" if settings["use_moe"] else "mlp_dim"
    # every quantity grows linearly with the width
    low = sizes_of(settings | {key: 8}, vocab_size)[quantity]
    high = sizes_of(settings | {key: 16}, vocab_size)[quantity]
    width = 8 + 8 * (target - low) / (high - low)
    unit = 8 if width < 1024 else 64
    return key, max(8, unit * round(width / unit))
