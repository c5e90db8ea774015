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
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from configurator import InputError
from model import GPT, ConfigError, GPTConfig
from moe_model import build_config, build_model, config_to_dict, expert_impl_problem
from nanomoe.dataset import Dataset, pad_vocab_size
from nanomoe.device import choose_compile, choose_dtype
from nanomoe.distributed import broadcast_from_rank0, first_of_ranks, world_size
from nanomoe.schedule import Schedule, run_length
from nanomoe.settings import notes, problems

if TYPE_CHECKING:  # else late: a run from scratch reads no model, and takes nothing from one
    from nanomoe.load import Checkpoint


@dataclass
class Start:
    """How a run begins."""

    mode: str  # 'scratch', 'resume', 'fine-tune' or 'upcycle'
    source: "Checkpoint | None" = None  # where its weights come from

    @property
    def resumed(self) -> "Checkpoint | None":
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
        from nanomoe import load

        source = load.read(path)
        # if the run that wrote it has removed it before all ranks had read it, they look again
        if not first_of_ranks(True if source is None else None):
            break
    mode = "resume"
    if take_weights or source.training_file is None:
        mode = "fine-tune"
        wants_moe = settings["use_moe"] or "use_moe" not in given
        is_dense = not config_to_dict(source.config)["use_moe"]
        if settings["upcycle_from"] and wants_moe and is_dense:
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
    from nanomoe import load

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


# -----------------------------------------------------------------------------
# what the run will be


def make_plan(settings: Mapping, given: Mapping, start: Start, device: torch.device) -> Plan:
    """Decide all that follows from the settings, the start, the data and the device. Changes none
    of them, and writes nothing. All ranks call it.

    Raises one InputError with all problems, one per line; OSError for files that cannot be read."""
    settings, source = dict(settings), start.source
    if source:
        from nanomoe import inherit

        settings = inherit.inherit_settings(settings, given, start.mode, source)
    wrong = problems(settings, world_size)
    data = config = None
    try:
        build_config(settings)  # first: a Dataset needs a valid block_size
        data = Dataset(settings["dataset"], settings["block_size"], settings["seed"])
        if source:
            config = inherit.model_config(settings, start.mode, source)
            wrong += inherit.tokenizer_problems(settings["dataset"], data, source)
        else:
            config = build_config(settings | {"vocab_size": pad_vocab_size(data.vocab_size)})
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
    line = ""
    if start.resumed:
        earlier, line = inherit.follow_schedule(settings, source)
        if earlier is not source:
            start = Start("resume", earlier)
            settings |= length_of(settings, given, data, start)
    lines = lines_to_say(settings, given, start, data, line)
    if start.resumed and not settings["eval_only"]:
        lines += inherit.what_changed(settings, data, start.resumed)
    return Plan(settings, start, data, config, Schedule.of(settings), lines)


def length_of(settings, given, data, start):
    steps, sequences = 0, 0
    if resumed := start.resumed:
        steps, sequences = resumed.step, resumed.sequences_seen(settings)
    return run_length(settings, given, data.windows_per_epoch, steps, sequences)


def device_problems(settings: Mapping, config: GPTConfig, device: torch.device) -> list[str]:
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
    return lines


def compute_dtype(name: str, resumed: "Checkpoint | None", device: torch.device) -> str:
    """The precision to compute in. With 'auto' a resumed run keeps the precision it had, if the
    type of device is the same."""
    if name == "auto" and resumed and resumed.device == device.type:
        return resumed.dtype
    return broadcast_from_rank0(lambda: choose_dtype(name, device))


def initial_model(plan: Plan) -> tuple[GPT, str]:
    """The run's model on the CPU, the same weights on every device and rank; and a line that says
    where they come from, or ""."""
    start = plan.start
    if start.source is None:
        return build_model(plan.config), ""
    from nanomoe.inherit import inherit_model

    return inherit_model(plan.config, start.mode, start.source, plan.settings["seed"])
