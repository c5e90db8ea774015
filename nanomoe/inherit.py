"""
What a run takes from the model that it begins with, a load.Checkpoint: settings, weights, its place
in the schedule, the state of the optimizer. mode: 'resume', 'fine-tune' or 'upcycle', see
init_from.py. The rule for each setting is its row in settings.py.
"""

import shlex
from collections.abc import Mapping

import torch

from configurator import InputError
from model import GPT, GPTConfig
from moe_model import MoEGPTConfig, build_config, config_to_dict
from nanomoe import checkpoint, load
from nanomoe.dataset import Dataset
from nanomoe.distributed import broadcast_from_rank0
from nanomoe.guard import StepGuard
from nanomoe.load import Checkpoint
from nanomoe.optim import load_optimizer_state
from nanomoe.schedule import Schedule
from nanomoe.settings import FIXED, NEW, SETTINGS, rule_for

# -----------------------------------------------------------------------------
# settings and schedule


def inherit_settings(settings: Mapping, given: Mapping, mode: str, source: Checkpoint) -> dict:
    """The settings with the checkpoint's in them, as the table says. Raises InputError for flags
    and files that contradict its model."""
    settings, model = dict(settings), config_to_dict(source.config)
    if mode == "upcycle":
        settings["use_moe"] = True
    if mode == "fine-tune" and settings["use_moe"] and not model["use_moe"]:
        raise InputError(
            f"{source.path} is a dense model: to make a MoE of it, use --init_from=upcycle "
            f"{shlex.quote(f'--upcycle_from={source.path}')}"
        )
    saved = model
    if mode == "resume":  # a new run has its own
        saved = {"optimizer": "adamw"} | source.settings | model  # once there was only AdamW
    wrong = []
    for key, value in settings.items():
        rule = rule_for(key, mode)
        if rule == NEW or key not in saved:
            continue
        if key not in given:
            settings[key] = saved[key]
        elif rule == FIXED and key in model and value != model[key]:
            wrong.append(
                f"{given[key]}: {key} = {value!r} contradicts the checkpoint {source.path}, where "
                f"{key} = {model[key]!r}; leave it out, or train a new model in another out_dir"
            )
        elif key == "optimizer" and value != saved[key]:
            dense = "" if model["use_moe"] else "--use_moe=False "
            wrong.append(
                f"{given[key]}: {source.path} was trained with optimizer {saved[key]!r}, not "
                f"{value!r}; leave it out, or start a new run with its weights: "
                f"--init_from=upcycle {shlex.quote(f'--upcycle_from={source.path}')} {dense}"
                "--out_dir=NEW"
            )
    if wrong:
        raise InputError("\n".join(sorted(wrong)))
    return settings


def what_changed(settings: Mapping, data: Dataset, resumed: Checkpoint) -> list[str]:
    """One line for the settings that differ from the checkpoint's and change what is learned, and
    one if its dataset is another text."""
    lines, changed = [], []
    old = resumed.settings | {"dtype": resumed.dtype or settings["dtype"]}
    for key, rule in SETTINGS.items():
        if rule.learned and key in old and settings[key] != old[key]:
            changed.append(f"{key} {settings[key]} instead of {old[key]}")
    if changed:
        lines.append(f"resumed with {', '.join(changed)}")
    if resumed.data and resumed.data != data.fingerprint():
        lines.append(
            f"the text of dataset '{settings['dataset']}' is not the one that {resumed.path} was "
            "trained on; it has the same tokenizer"
        )
    return lines


def follow_schedule(settings: Mapping, newest: Checkpoint) -> tuple[Checkpoint, str]:
    """The checkpoint from which a resumed run's learning rate does not jump, and a line that says
    what that means, or "".

    A run with lr_schedule 'wsd' that got longer goes back to its newest checkpoint from before
    the decay, unless init_from names another one. All ranks call it. Raises OSError if the
    checkpoint cannot be read."""
    if settings["eval_only"] or newest.step >= settings["max_iters"]:
        return newest, ""  # no step follows
    old, new = rates_after(newest, settings)
    if new > old and settings["init_from"] in ("resume", "auto"):
        earlier = newest_before_decay(settings["out_dir"], newest)
        before, after = rates_after(earlier, settings)
        if before == after:
            return earlier, (
                f"the run is longer than it was: from step {newest.step} it goes back to step "
                f"{earlier.step}, before its learning rate began to fall"
            )
    old, new = f"{old:.3e}", f"{new:.3e}"
    if old == new:
        return newest, ""
    return newest, (
        f"the learning rate jumps from {old} to {new}: this run had another schedule so far"
    )


def newest_before_decay(out_dir, newest):
    """The newest good Checkpoint of out_dir from before its decay; `newest` if there is none."""
    path = broadcast_from_rank0(lambda: checkpoint.latest_good_before_decay(out_dir, newest.step))
    return load.read(path) if path else newest


def rates_after(source, settings):
    """The learning rate of the step after a Checkpoint: in the schedule of the run that wrote it,
    and in that of these settings. Equal if its run may go on with them."""
    old = settings | {"lr_schedule": "cosine", "max_seconds": 0.0} | source.settings
    step, seconds = source.step, source.seconds
    rate = Schedule.of(settings).lr(step, seconds)
    endless = Schedule.of(old | {"decay_share": 0.0})
    if source.before_decay and rate == endless.lr(step, seconds):
        return rate, rate  # all rates so far are those of a longer run, too
    return Schedule.of(old).lr(step, seconds), rate


# -----------------------------------------------------------------------------
# model and training state


def model_config(settings: Mapping, mode: str, source: Checkpoint) -> GPTConfig:
    """The config of the run's model, for settings that it has inherited. Raises InputError if the
    checkpoint's weights cannot become that model's, and ConfigError for settings that make no
    model."""
    old = source.config
    config = build_config(settings | {"vocab_size": old.vocab_size})
    if config.position == "learned" and config.block_size > old.block_size:
        raise InputError(
            f"block_size is {config.block_size}, but {source.path} has positions for "
            f"{old.block_size} tokens"
        )
    if mode == "upcycle":
        from nanomoe import upcycle  # late: only for those who use it

        upcycle.group_size(old, config)
    return config


def tokenizer_problems(dataset: str, data: Dataset, source: Checkpoint) -> list[str]:
    """Why the checkpoint's model cannot be trained on a dataset."""
    ids, rows = data.vocab_size, source.config.vocab_size
    if ids > rows:
        return [f"dataset '{dataset}' has {ids} token ids, the checkpoint's model {rows}"]
    if not source.same_tokenizer(data.meta):
        return [f"dataset '{dataset}' uses another tokenizer than {source.path} was trained with"]
    return []


def inherit_model(config: GPTConfig, mode: str, source: Checkpoint, seed: int) -> tuple[GPT, str]:
    """A model with this config and the checkpoint's weights, which it then no longer has; and a
    line that says where they come from."""
    dense, line = source.config, f"starting with the weights of {source.path}"
    if mode == "resume":
        line = f"resuming from {source.path} after step {source.step}"
    positions = source.weights.get("transformer.wpe.weight")
    if mode != "resume" and positions is not None:  # those beyond block_size go
        source.weights["transformer.wpe.weight"] = positions[: config.block_size]
    if isinstance(config, MoEGPTConfig) and not isinstance(dense, MoEGPTConfig):
        from nanomoe import upcycle  # late: only for those who use it

        source.weights = upcycle.upcycle(source.weights, dense, config, seed)
        line = f"upcycled {source.path}: {upcycle.describe(dense, config)}"
    source.config = config
    model = source.build_model()
    source.weights = None  # frees their memory
    return model, line


def restore_training_state(
    resumed: Checkpoint,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    guard: StepGuard,
) -> None:
    """Load what a checkpoint holds beside the weights. Raises OSError if it does not fit."""
    state = resumed.training_state()
    try:
        load_optimizer_state(optimizer, state["optimizer"])
        if state.get("scaler"):
            scaler.load_state_dict(state["scaler"])
        if state.get("guard"):
            guard.load_state_dict(state["guard"])
    except (ValueError, LookupError, TypeError) as error:
        raise OSError(f"checkpoint {resumed.path} is damaged: {error}") from None
