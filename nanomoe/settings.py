"""
The rules about train.py's settings: one table, one row a setting. Its default and its meaning are a
line at the top of train.py. A setting of the model also is a field of its config, with its limits.

$ python -m nanomoe.settings     prints what a run inherits from a checkpoint
"""

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import NamedTuple

from model import out_of_range
from nanomoe.schedule import Schedule

FIXED = "fixed"  # the checkpoint's; a flag or file that contradicts its model is an error
KEPT = "kept"  # the checkpoint's, unless a flag or config file sets it
NEW = "new"  # this start's: a flag, a config file, or the default
MODES = ("resume", "fine-tune", "upcycle")


class Rule(NamedTuple):
    """One row of the table."""

    resume: str = KEPT  # what a resumed run does with the checkpoint's value
    fine_tune: str = NEW  # and a fine-tuned one
    upcycle: str = NEW
    limits: Mapping = {}  # see model.out_of_range; those of the model's settings are in its config
    learned: bool = False  # a change on resume changes what is learned: one line says so
    no_effect: tuple = ()  # when it has no effect
    in_files: bool = True  # False: only a flag means it for this run, as files serve many runs


class When(NamedTuple):
    """A reason why settings have no effect."""

    holds: Callable  # of all settings, as attributes
    why: str


DENSE = When(lambda s: not s.use_moe, "use_moe is False")
ONLY_EVAL = When(lambda s: s.eval_only, "eval_only is True")
NO_SAMPLE = When(lambda s: s.eval_only and s.sample_tokens > 0, "eval_only is True")
NO_WANDB = When(lambda s: not s.wandb_log, "wandb_log is False")
CONSTANT_LR = When(lambda s: not s.decay_lr, "decay_lr is False")
NO_DECAY = When(
    lambda s: s.decay_lr and s.lr_schedule == "wsd" and s.decay_share == 0, "decay_share is 0"
)
NO_WSD = When(lambda s: s.decay_lr and s.lr_schedule != "wsd", "lr_schedule is not 'wsd'")
BY_SECONDS = When(lambda s: s.max_seconds > 0, "the rate falls over max_seconds")
NO_BALANCE_LOSS = When(
    lambda s: s.use_moe and s.expert_load_balance_loss_coef == 0,
    "expert_load_balance_loss_coef is 0",
)
TOP_1 = When(lambda s: s.use_moe and s.top_k == 1, "top_k is 1")
ALL_EXPERTS = When(
    lambda s: s.use_moe and s.top_k == s.num_experts, "every token visits all experts"
)
NO_DENSE_MLP = When(
    lambda s: s.use_moe and s.expert_dim > 0 and s.moe_stride == 1 and not s.num_dense_layers,
    "no layer is dense and expert_dim is set",
)


POSITIVE, NOT_NEGATIVE = {"at_least": 1}, {"at_least": 0}
SHARE = {"at_least": 0, "at_most": 1}
BETA = {"at_least": 0, "less_than": 1}
LAUNCH = Rule(NEW, NEW, NEW)
MODEL = Rule(FIXED, FIXED, FIXED)
EXPERTS = Rule(FIXED, FIXED, NEW, no_effect=(DENSE,), in_files=False)
BALANCE = EXPERTS._replace(fine_tune=KEPT)
TRAINING = Rule(no_effect=(ONLY_EVAL,), in_files=False)
LEARNED = TRAINING._replace(learned=True)
DECAY = Rule(learned=True, no_effect=(CONSTANT_LR,))

# fmt: off
SETTINGS = {
    "out_dir": LAUNCH,
    "eval_interval": TRAINING._replace(limits=POSITIVE),
    "log_interval": TRAINING._replace(limits=POSITIVE),
    "load_interval": TRAINING._replace(limits=POSITIVE),
    "eval_iters": Rule(limits=POSITIVE),
    "eval_only": Rule(),
    "always_save_checkpoint": TRAINING,
    "keep_last": TRAINING._replace(limits=NOT_NEGATIVE),
    "init_from": LAUNCH,
    "upcycle_from": LAUNCH,
    "sample_tokens": Rule(limits=NOT_NEGATIVE, no_effect=(NO_SAMPLE,), in_files=False),
    "wandb_log": Rule(no_effect=(ONLY_EVAL,)),
    "wandb_project": Rule(no_effect=(NO_WANDB,), in_files=False),
    "wandb_run_name": Rule(no_effect=(NO_WANDB,), in_files=False),
    "tensorboard_log": Rule(no_effect=(ONLY_EVAL,)),

    "dataset": Rule(),
    "gradient_accumulation_steps": LEARNED._replace(limits=POSITIVE),
    "batch_size": Rule(limits=POSITIVE, learned=True),
    "block_size": Rule(FIXED, KEPT, KEPT),

    "n_layer": MODEL,
    "n_head": MODEL,
    "n_embd": MODEL,
    "dropout": Rule(FIXED, NEW, NEW, learned=True),
    "bias": MODEL,
    "norm": MODEL,
    "position": MODEL,
    "n_kv_head": MODEL,
    "mlp": MODEL,
    "mlp_dim": MODEL._replace(no_effect=(NO_DENSE_MLP,)),
    "qk_norm": MODEL,
    "tie_weights": MODEL,
    "gradient_checkpointing": Rule(KEPT, NEW, NEW),

    "use_moe": Rule(FIXED, FIXED, NEW),  # upcycling turns it on
    "num_experts": EXPERTS,
    "top_k": EXPERTS,
    "expert_dim": EXPERTS,
    "num_shared_experts": EXPERTS,
    "moe_stride": EXPERTS,
    "num_dense_layers": EXPERTS,
    "router_score": EXPERTS,
    "norm_top_k": EXPERTS._replace(no_effect=(DENSE, TOP_1)),
    "route_scale": EXPERTS,
    "expert_load_balance_loss_coef": BALANCE._replace(no_effect=(DENSE, ALL_EXPERTS)),
    "balance_scope": BALANCE._replace(no_effect=(DENSE, NO_BALANCE_LOSS)),
    "router_bias_update_rate": BALANCE._replace(no_effect=(DENSE, ALL_EXPERTS)),
    "router_z_loss_coef": BALANCE,
    "router_jitter": BALANCE,
    "capacity_factor": BALANCE._replace(no_effect=(DENSE, ALL_EXPERTS)),
    "expert_dropout": BALANCE,
    "expert_impl": EXPERTS._replace(resume=KEPT, fine_tune=NEW),

    "optimizer": Rule(FIXED, NEW, NEW, limits={"choices": ("adamw", "muon")}),
    "learning_rate": LEARNED._replace(limits={"more_than": 0}),
    "max_iters": LEARNED._replace(limits=POSITIVE),
    "max_tokens": TRAINING._replace(limits=NOT_NEGATIVE),
    "max_epochs": TRAINING._replace(limits=NOT_NEGATIVE),
    "max_seconds": LEARNED._replace(limits=NOT_NEGATIVE),
    "weight_decay": LEARNED._replace(limits=NOT_NEGATIVE),
    "beta1": LEARNED._replace(limits=BETA),
    "beta2": LEARNED._replace(limits=BETA),
    "grad_clip": LEARNED._replace(limits=NOT_NEGATIVE),
    "spike_guard": Rule(limits=NOT_NEGATIVE, learned=True),

    "decay_lr": Rule(learned=True),
    "lr_schedule": DECAY._replace(limits={"choices": ("cosine", "wsd")}),
    "decay_share": DECAY._replace(limits=SHARE, no_effect=(CONSTANT_LR, NO_WSD)),
    "warmup_iters": DECAY._replace(limits=NOT_NEGATIVE),
    "lr_decay_iters": DECAY._replace(
        limits=NOT_NEGATIVE, no_effect=(CONSTANT_LR, NO_DECAY, BY_SECONDS)
    ),
    "min_lr": DECAY._replace(limits=NOT_NEGATIVE, no_effect=(CONSTANT_LR, NO_DECAY)),

    "parallel": LAUNCH._replace(limits={"choices": ("ddp", "fsdp")}),
    "device": LAUNCH,
    "dtype": LAUNCH._replace(
        limits={"choices": ("auto", "float32", "bfloat16", "float16")}, learned=True
    ),
    "compile": LAUNCH._replace(limits={"choices": (True, False, "auto")}),
    "seed": Rule(limits={"at_least": 0, "less_than": 2**64}, learned=True),
    "deterministic": Rule(learned=True),
}
RETIRED = {  # settings of earlier versions, and what holds now, see configurator.check_settings
    "backend": ("it is nccl on CUDA and gloo elsewhere", ()),
    "max_bad_steps": ("a run stops after more than 10 skipped steps in a row", ()),
    "async_save": ("checkpoints are written in the background on CUDA", ()),
    "qk_norm_over": ("it is 'head'", ("head",)),
    "upcycle_noise": ("upcycling adds no noise, which gained nothing", ("0", "0.0")),
    "debug_nans": (
        "if a logged step is skipped, its line names the first layer that is not finite", ()
    ),
}
# fmt: on
# what a run is too short or too small for: when, and what to say. s: all settings, with what
# notes() adds to them
OUT_OF_REACH = (
    (
        lambda s: s.meant("eval_interval") and s.eval_interval > s.max_iters,
        "eval_interval is {s.eval_interval}, and the run has {s.max_iters} steps: it only "
        "evaluates at the end",
    ),
    (
        lambda s: s.meant("log_interval") and s.log_interval > s.max_iters,
        "log_interval is {s.log_interval}, and the run has {s.max_iters} steps: it only logs two "
        "of them",
    ),
    (
        lambda s: s.spike_guard and s.max_iters <= 64,
        "spike_guard needs 64 steps to begin, and the run has {s.max_iters}",
    ),
    (
        lambda s: s.use_moe and 0 < s.top_k < s.num_experts <= s.capacity_factor * s.top_k,
        "capacity_factor {s.capacity_factor} drops nothing: no expert can get more than "
        "num_experts / top_k even shares",
    ),
    (
        lambda s: s.step_sequences > s.windows_per_epoch,
        "a step trains on {s.step_sequences} sequences, and the training data has "
        "{s.windows_per_epoch}: it sees some of them more than once",
    ),
    (
        lambda s: s.eval_windows > s.val_windows,
        "eval_iters asks for {s.eval_windows} validation windows, and there are {s.val_windows}: "
        "it takes them all",
    ),
    (
        lambda s: 0 < s.max_iters <= s.steps_done,
        "max_iters is {s.max_iters} and {s.steps_done} steps are done: nothing to train",
    ),
    (
        lambda s: 0 < s.max_seconds <= s.seconds_done and s.steps_done < s.max_iters,
        "max_seconds is {s.max_seconds:g} and {s.seconds_done:.0f} seconds are done: nothing to "
        "train",
    ),
    (
        lambda s: s.device.startswith("cuda:") and s.world_size > 1,
        "the number in device has no effect: each process takes its own GPU",
    ),
    (
        lambda s: s.parallel == "fsdp" and s.world_size == 1,
        "parallel 'fsdp' has no effect: there is one process",
    ),
)
# settings that belong to one start on one machine, and not to the run
PER_LAUNCH = {name for name, rule in SETTINGS.items() if set(rule[:3]) == {NEW}}


def rule_for(name: str, mode: str) -> str:
    """FIXED, KEPT or NEW: what becomes of a checkpoint's value of a setting in a mode of MODES."""
    return SETTINGS[name][MODES.index(mode)]


def problems(settings: Mapping, world_size: int) -> list[str]:
    """What is wrong with settings by themselves, but for those of the model, as sentences."""
    found = []
    for name, value in settings.items():
        if name not in SETTINGS:
            found.append(
                f"setting '{name}' has no row in SETTINGS in nanomoe/settings.py, which says what "
                "a resumed run does with it"
            )
        elif limits := SETTINGS[name].limits:
            found += out_of_range(name, value, **limits)
    if settings["gradient_accumulation_steps"] % world_size:
        found.append(
            f"gradient_accumulation_steps ({settings['gradient_accumulation_steps']}) is not "
            f"divisible by the number of processes ({world_size})"
        )
    needs_no_scaler = settings["spike_guard"] or settings["parallel"] == "fsdp"
    if settings["dtype"] == "float16" and needs_no_scaler:
        found.append("spike_guard and parallel 'fsdp' need bfloat16 or float32, not float16")
    return found


def notes(
    settings: Mapping, given: Mapping, data, world_size: int, steps: int = 0, seconds: float = 0.0
) -> list[str]:
    """Lines for the settings that were given and cannot do what they say in this run.

    given: for each setting that was set, the flag or file that set it. data: the Dataset.
    steps, seconds: what a resumed run has done."""
    s = SimpleNamespace(**settings)
    lines = without_effect(s, given)
    s.world_size, s.steps_done, s.seconds_done = world_size, steps, seconds
    s.step_sequences = s.gradient_accumulation_steps * s.batch_size
    s.windows_per_epoch = data.windows_per_epoch
    s.eval_windows = s.eval_iters * s.batch_size
    s.val_windows = (len(data.val) - 1) // s.block_size

    def meant(name):
        """Whether a length of this run goes with the value: a file's goes with the file's."""
        return is_flag(name, given) or (name in given and not is_flag("max_iters", given))

    s.meant = meant
    if not s.eval_only:
        lines += Schedule.of(settings).notes()
        lines += [text.format(s=s) for holds, text in OUT_OF_REACH if holds(s)]
    return lines


def without_effect(s: SimpleNamespace, given: Mapping) -> list[str]:
    """Lines for the settings that were given and have no effect, one for each reason."""
    names_by_reason = {}
    for name, rule in SETTINGS.items():
        for reason in rule.no_effect:
            if reason.holds(s) and is_meant(name, given):
                names_by_reason.setdefault(reason.why, []).append(name)
    lines = []
    for why, names in names_by_reason.items():
        verb = "has" if len(names) == 1 else "have"
        lines.append(f"{', '.join(names)} {verb} no effect: {why}")
    return lines


def is_meant(name, given):
    """Whether the user means a setting to have an effect in this very run."""
    rule = SETTINGS[name]
    if rule.in_files or is_flag(name, given):
        return name in given
    # in a file that never says use_moe, experts are a mistake
    return name in given and DENSE in rule.no_effect and "use_moe" not in given


def is_flag(name, given):
    return given.get(name, "").startswith("--")


def print_inherited():
    """Print the settings with each row of FIXED, KEPT and NEW."""
    names_by_row = {}
    for name, rule in SETTINGS.items():
        names_by_row.setdefault(rule[:3], []).append(name)
    print("resume  fine-tune  upcycle")
    for row, names in names_by_row.items():
        print("{:7} {:10} {:9}".format(*row), " ".join(names))


if __name__ == "__main__":
    print_inherited()
