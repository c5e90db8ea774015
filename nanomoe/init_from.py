"""
Where a run begins: with new weights, where it stopped, or with the weights of another model.

--init_from and --upcycle_from choose one of four modes:
    scratch    new weights
    resume     the same run, from the newest good checkpoint of out_dir, or from any checkpoint of
               train.py or nanoGPT. It takes the weights with the routers' bias and load, the
               optimizer, scaler and spike guard, the step, and the seconds and best loss so far;
               the order of batches and dropout follow from seed and step
    fine-tune  a new run with the weights of a Hugging Face model, or of upcycle_from when that is
               the same kind of model, dense or MoE
    upcycle    a new run with the weights of upcycle_from, a dense model, made into a MoE's
nanomoe/settings.py says which settings come from the checkpoint.
"""

import contextlib
import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from configurator import InputError
from model import GPT, ConfigError, GPTConfig
from moe_model import (
    MoEGPTConfig,
    build_config,
    build_model,
    config_to_dict,
    expert_impl_problem,
)
from nanomoe import checkpoint
from nanomoe.checkpoint import Checkpoint
from nanomoe.dataset import Dataset, pad_vocab_size
from nanomoe.device import choose_compile, choose_dtype
from nanomoe.distributed import broadcast_from_rank0, first_of_ranks, world_size
from nanomoe.guard import StepGuard
from nanomoe.optim import load_optimizer_state
from nanomoe.schedule import Schedule, run_length
from nanomoe.settings import FIXED, NEW, SETTINGS, notes, problems, rule_for


@dataclass
class Start:
    """How a run begins."""

    mode: str  # 'scratch', 'resume', 'fine-tune' or 'upcycle'
    source: Checkpoint | None = None  # where its weights come from

    @property
    def resumed(self) -> Checkpoint | None:
        """The checkpoint whose run goes on."""
        return self.source if self.mode == "resume" else None


@dataclass
class Plan:
    """All that a start decides, before anything is built or written."""

    settings: dict  # train.py's, with what the run inherits, its length and its dtype
    start: Start
    data: Dataset
    config: GPTConfig  # of the model
    schedule: Schedule
    lines: list[str]  # to say before the first step


# -----------------------------------------------------------------------------
# which start


def choose_start(settings: Mapping, given: Mapping, restarted: bool = False) -> Start:
    """The Start that the settings ask for. All ranks call it.

    given: for each setting that was set, the flag or file that set it. restarted: whether torchrun
    has started a run in out_dir again, which resumes whatever init_from says.
    Raises InputError, and OSError for files that cannot be read."""
    while True:
        path, take_weights = broadcast_from_rank0(lambda: find_source(settings, restarted))
        if path is None:
            return Start("scratch")
        from nanomoe import load  # late: a run from scratch reads no model

        source = load.read(path)
        # if the run that wrote it has removed it before all ranks had read it, they look again
        if not first_of_ranks(True if source is None else None):
            break
    mode = "resume"
    if take_weights or source.training_file is None:
        mode = "fine-tune"
        wants_moe = settings["use_moe"] or "use_moe" not in given
        if settings["upcycle_from"] and wants_moe and not is_moe(source.config):
            mode = "upcycle"
    return Start(mode, source)


def find_source(settings, restarted):
    """Returns (checkpoint path or None, whether to take only its weights)."""
    init_from, out_dir = settings["init_from"], settings["out_dir"]
    upcycle_from = settings["upcycle_from"]
    if not out_dir:
        raise InputError("out_dir is empty")
    if upcycle_from and os.path.realpath(upcycle_from) == os.path.realpath(out_dir):
        raise InputError(
            f"upcycle_from and out_dir are both {out_dir}; give the new run another out_dir"
        )
    if init_from == "scratch" and not upcycle_from and not restarted:
        return None, False
    from nanomoe import load  # late: a run from scratch reads no model

    if init_from == "resume":
        return load.find(out_dir), False
    if init_from == "auto" or restarted:
        with contextlib.suppress(InputError):  # there is none
            return load.find(out_dir), False
    if init_from == "upcycle" and not upcycle_from:
        raise InputError("init_from is 'upcycle': set upcycle_from to a dense model")
    if upcycle_from and init_from not in ("upcycle", "auto"):
        raise InputError(
            f"upcycle_from is '{upcycle_from}': set init_from to 'upcycle' or 'auto', "
            f"not '{init_from}'"
        )
    if upcycle_from:
        return load.find(upcycle_from, on_hub=True), True
    if init_from in ("scratch", "auto"):
        return None, False
    return load.find(init_from, on_hub=True), False


def is_moe(config):
    return isinstance(config, MoEGPTConfig)


# -----------------------------------------------------------------------------
# what the run takes from it


def make_plan(settings: Mapping, given: Mapping, start: Start, device: torch.device) -> Plan:
    """Decide all that follows from the settings, the start, the data and the device. Changes none
    of them, and writes nothing. All ranks call it.

    Raises one InputError with all problems, one per line; OSError for files that cannot be read.
    """
    settings = inherit_settings(settings, given, start)
    wrong = problems(settings, world_size)
    data = config = None
    try:
        build_config(settings)  # first: a Dataset needs a valid block_size
        data = Dataset(settings["dataset"], settings["block_size"], settings["seed"])
        config = model_config(settings, start, pad_vocab_size(data.vocab_size))
        if start.source:
            wrong += tokenizer_problems(settings["dataset"], data, start.source)
        if not wrong:
            settings |= length_of(settings, given, data, start)
            settings["dtype"] = compute_dtype(settings["dtype"], start.resumed, device)
            wrong = problems(settings, world_size)  # with this dtype
            wrong += device_problems(settings, config, device)
    except ConfigError as error:
        wrong += error.problems
    except InputError as error:
        wrong.append(str(error))
    if wrong:
        raise InputError("\n".join(wrong))
    earlier, line = follow_schedule(start, settings)
    if earlier is not start:
        start = earlier
        settings |= length_of(settings, given, data, start)
    return Plan(
        settings=settings,
        start=start,
        data=data,
        config=config,
        schedule=Schedule.of(settings),
        lines=lines_to_say(settings, given, start, data, line),
    )


def length_of(settings, given, data, start):
    done = progress(start.resumed, settings)
    return run_length(settings, given, data.windows_per_epoch, *done)


def device_problems(settings, config, device):
    """What this device cannot do, as sentences. Raises InputError as choose_compile does."""
    compiled = choose_compile(settings["compile"], device)
    dtype = getattr(torch, settings["dtype"])
    problem = expert_impl_problem(config, device.type, dtype, compiled)
    return [problem] if problem else []


def lines_to_say(settings, given, start, data, line_on_schedule):
    """What the user should know before the first step."""
    lines = []
    for name in ("max_tokens", "max_epochs"):
        if settings[name]:
            lines.append(f"{name} {settings[name]:,} is {settings['max_iters']:,} steps")
    if line_on_schedule:
        lines.append(line_on_schedule)
    resumed = start.resumed
    steps, seconds = (resumed.step, resumed.seconds) if resumed else (0, 0.0)
    for line in notes(settings, given, data, world_size, steps, seconds):
        lines.append(f"note: {line}")
    if resumed and not settings["eval_only"]:
        lines += what_changed(resumed, settings, data)
    return lines


def inherit_settings(settings: Mapping, given: Mapping, start: Start) -> dict:
    """The settings with those of the start's checkpoint in them, as the table says. Raises
    InputError for flags and files that contradict its model."""
    settings, source, mode = dict(settings), start.source, start.mode
    if source is None:
        return settings
    model = config_to_dict(source.config)
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


def progress(resumed: Checkpoint | None, settings: Mapping) -> tuple[int, int]:
    """The steps that the run has done, and the training sequences that it has seen. Older
    checkpoints do not say the second: it is as many as their settings make of their steps."""
    if resumed is None:
        return 0, 0
    if resumed.sequences is not None:
        return resumed.step, resumed.sequences
    old = settings | resumed.settings
    sequences = resumed.step * old["batch_size"] * old["gradient_accumulation_steps"]
    return resumed.step, sequences


def compute_dtype(name, resumed, device):
    """The precision to compute in. With 'auto' a resumed run keeps the precision it had, if the
    type of device is the same."""
    if name == "auto" and resumed and resumed.device == device.type:
        return resumed.dtype
    return broadcast_from_rank0(lambda: choose_dtype(name, device))


def tokenizer_problems(dataset, data, source):
    """Why a model from a Checkpoint cannot be trained on a Dataset, as a list."""
    ids, rows = data.vocab_size, source.config.vocab_size
    if ids > rows:
        return [f"dataset '{dataset}' has {ids} token ids, the checkpoint's model {rows}"]
    if not source.same_tokenizer(data.meta):
        return [f"dataset '{dataset}' uses another tokenizer than {source.path} was trained with"]
    return []


def what_changed(resumed, settings, data):
    """One line for the settings that differ from a resumed Checkpoint's and change what is learned,
    and one if its dataset is another text."""
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


def follow_schedule(start: Start, settings: Mapping) -> tuple[Start, str]:
    """The start from which a resumed run's learning rate does not jump, and a line that says what
    that means, or "".

    A run with lr_schedule 'wsd' that got longer goes back to its newest checkpoint from before
    the decay, unless init_from names another one. All ranks call it. Raises OSError if the
    checkpoint cannot be read."""
    newest = start.resumed
    if newest is None or settings["eval_only"] or newest.step >= settings["max_iters"]:
        return start, ""  # no step follows
    old, new = rates_after(newest, settings)
    if new > old and settings["init_from"] in ("resume", "auto"):
        earlier = newest_before_decay(settings["out_dir"], newest)
        before, after = rates_after(earlier, settings)
        if before == after:
            return Start("resume", earlier), (
                f"the run is longer than it was: from step {newest.step} it goes back to step "
                f"{earlier.step}, before its learning rate began to fall"
            )
    old, new = f"{old:.3e}", f"{new:.3e}"
    if old == new:
        return start, ""
    return start, (
        f"the learning rate jumps from {old} to {new}: this run had another schedule so far"
    )


def newest_before_decay(out_dir, newest):
    """The newest good Checkpoint of out_dir from before its decay; `newest` if there is none."""
    path = broadcast_from_rank0(lambda: checkpoint.latest_good_before_decay(out_dir, newest.step))
    return checkpoint.read(path) if path else newest


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
# its model


def model_config(settings: Mapping, start: Start, vocab_size: int) -> GPTConfig:
    """The config of the run's model, for settings that it has inherited. vocab_size: of a new
    model. Raises InputError if the checkpoint's weights cannot become that model's, and
    ConfigError for settings that make no model."""
    if start.source is None:
        return build_config(settings | {"vocab_size": vocab_size})
    old = start.source.config
    config = build_config(settings | {"vocab_size": old.vocab_size})
    if config.position == "learned" and config.block_size > old.block_size:
        raise InputError(
            f"block_size is {config.block_size}, but {start.source.path} has positions for "
            f"{old.block_size} tokens"
        )
    if start.mode == "upcycle":
        from nanomoe import upcycle  # late: only for those who use it

        upcycle.group_size(old, config)
    return config


def initial_model(plan: Plan) -> tuple[GPT, str]:
    """The run's model on the CPU, the same weights on every device and rank; and a line that says
    where they come from, or ""."""
    start, config = plan.start, plan.config
    source = start.source
    if source is None:
        return build_model(config), ""
    if start.mode == "resume":
        line = f"resuming from {source.path} after step {source.step}"
    else:
        line = adapt_weights(source, config, plan.settings["seed"])
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


def adapt_weights(source, config, seed):
    """Make a Checkpoint's weights those of another config: cut off positions beyond block_size,
    and upcycle a dense model. Returns a line that says what was done."""
    dense = source.config
    if config.position == "learned":
        positions = source.weights["transformer.wpe.weight"]
        source.weights["transformer.wpe.weight"] = positions[: config.block_size]
    if is_moe(dense) or not is_moe(config):
        return f"starting with the weights of {source.path}"
    from nanomoe import upcycle  # late: only for those who use it

    source.weights = upcycle.upcycle(source.weights, dense, config, seed)
    return f"upcycled {source.path}: {upcycle.describe(dense, config)}"
