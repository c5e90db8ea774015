"""
Where a run begins: with new weights, where an earlier start of it ended, or with the weights of another model. What train.py's
init_from means is decided here.
"""

import os
from dataclasses import fields

from configurator import InputError
from model import GPTConfig
from moe_model import MoEGPTConfig, build_config, config_to_dict
from nanomoe import checkpoint, upcycle
from nanomoe.run_dir import last_torchrun_ids

# what belongs to a start and its machine, and not to the run, which keeps its other settings when it is resumed
PER_LAUNCH = {
    "init_from",
    "upcycle_from",
    "out_dir",
    "device",
    "dtype",
    "compile",
    "parallel",
    "backend",
    "async_save",
}
# of the model, how to compute it and to fit the memory at hand, which a run may change
FREE = {"gradient_checkpointing", "expert_impl"}
# and what is of its training, which a new run with the weights of another model may choose, too
TRAINING_ONLY = FREE | {
    "dropout",
    "expert_load_balance_loss_coef",
    "balance_scope",
    "router_bias_update_rate",
    "router_z_loss_coef",
    "router_jitter",
    "capacity_factor",
    "expert_dropout",
    "block_size",
}


def resolve_init_from(settings, launchers):
    """The path to start from, or None; and whether the weights alone are wanted, for what the settings make of them. A run that
    torchrun has restarted goes on, however it began. Raises InputError, OSError."""
    init_from, out_dir, source = (
        settings["init_from"],
        settings["out_dir"],
        settings["upcycle_from"],
    )
    if source and os.path.realpath(source) == os.path.realpath(out_dir):
        raise InputError(
            f"upcycle_from and out_dir are the same, {out_dir}: the new run needs a place of its own"
        )
    restarted = not set(launchers).isdisjoint(last_torchrun_ids(out_dir))
    if init_from == "resume" or ((init_from == "auto" or restarted) and checkpoint.exists(out_dir)):
        return checkpoint.latest_good(out_dir), False
    if init_from == "upcycle" and not source:
        raise InputError(
            "init_from is 'upcycle', but upcycle_from does not say from which dense model"
        )
    if source and init_from not in ("upcycle", "auto"):
        raise InputError(
            f"upcycle_from is '{source}', which needs init_from 'upcycle' or 'auto', not '{init_from}'"
        )
    if source:
        return checkpoint.latest_good(source, on_hub=True), True
    return (
        None if init_from in ("scratch", "auto") else checkpoint.latest_good(init_from, on_hub=True)
    ), False


def inherit_settings(source, settings, given, weights_only):
    """Give the settings, a dict, what they have to have because of a Checkpoint: of its model what they do not say, and, where
    a run goes on, all else that was its. Raises InputError for flags or files that contradict the model."""
    model, free = config_to_dict(source.config), FREE
    if (
        weights_only and settings["upcycle_from"] and not model["use_moe"]
    ):  # a MoE is made of it, if nothing else is said
        settings["use_moe"] = settings["use_moe"] or "use_moe" not in given
        free = (
            TRAINING_ONLY
            | {"use_moe"}
            | {f.name for f in fields(MoEGPTConfig)} - {f.name for f in fields(GPTConfig)}
        )
    elif weights_only:
        free = TRAINING_ONLY
        if settings["use_moe"] and not model["use_moe"]:
            raise InputError(
                f"{source.path} is a dense model: to make a MoE of it, use --init_from=upcycle --upcycle_from="
                f"{source.path}"
            )
    found = [
        f"{given[key]}: {key} = {settings[key]!r} contradicts the checkpoint {source.path}, where {key} = "
        f"{model[key]!r}; leave it out, or train anew in another out_dir"
        for key in sorted(set(model) & set(given) - free)
        if settings[key] != model[key]
    ]
    if found:
        raise InputError("\n".join(found))
    if not weights_only:
        settings.update(
            {
                k: v
                for k, v in source.settings.items()
                if k in settings and k not in PER_LAUNCH and k not in given
            }
        )
    # a new run has the defaults for how it is trained; but a MoE is balanced as it was, and the context is as long as it was
    kept = {"block_size"} | (TRAINING_ONLY - FREE - {"dropout"} if model["use_moe"] else set())
    settings.update(
        {
            k: v
            for k, v in model.items()
            if k in settings and (k not in free or k in kept - set(given))
        }
    )


def model_config_for(source, settings, weights_only):
    """The config of the model that a start from a Checkpoint has, for settings that took it over. Raises InputError if its
    weights cannot become that model's, ValueError for a config that cannot be."""
    c = source.config
    if not weights_only:
        for key in FREE & set(config_to_dict(c)):
            setattr(c, key, settings[key])
        return c
    config = build_config(settings | {"vocab_size": c.vocab_size})
    if config.position == "learned" and config.block_size > c.block_size:
        raise InputError(
            f"block_size is {config.block_size}, but {source.path} has positions for {c.block_size} only"
        )
    if isinstance(config, MoEGPTConfig) and not isinstance(c, MoEGPTConfig):
        upcycle.group_size(c, config)
    elif settings["upcycle_from"] and isinstance(c, MoEGPTConfig):
        raise InputError(f"upcycle_from is {source.path}, which is a MoE already")
    return config


def adapt_weights(source, config, settings):
    """Make the weights of a Checkpoint those of another config: positions beyond block_size cut off, and a dense model
    upcycled. Returns a line about what was made, or None."""
    dense, source.config = source.config, config
    if config.position == "learned":
        source.weights["transformer.wpe.weight"] = source.weights["transformer.wpe.weight"][
            : config.block_size
        ]
    if not isinstance(config, MoEGPTConfig) or isinstance(dense, MoEGPTConfig):
        return None
    G, noise, why = (
        upcycle.group_size(dense, config),
        settings["upcycle_noise"],
        upcycle.inexact_reason(config),
    )
    source.weights = upcycle.upcycle(source.weights, dense, config, noise, settings["seed"])
    made = (
        f"groups of {G} that have the dense MLP's hidden units between them"
        if G > 1
        else "copies of the dense MLP"
    )
    first = f"not what the dense model does: {why}" if why else "what the dense model does"
    return (
        f"upcycled {source.path}: in {sum(map(config.is_moe, range(config.n_layer)))} layers {config.num_experts} experts, "
        f"{made}; at first it computes {first}"
        + f", but for noise of {noise} standard deviations"
        * bool(noise)
    )
