"""
Where a run begins: with new weights, where it stopped, or with the weights of another model.

A run begins in one of four modes, which --init_from and --upcycle_from choose:
    scratch    new weights
    resume     the same run, from the newest good checkpoint of out_dir, or from any checkpoint of
               train.py or nanoGPT. It takes the weights with the routers' bias and load, the
               optimizer, scaler and spike guard, the step, and the seconds and best loss so far;
               the order of batches and dropout follow from seed and step
    fine-tune  a new run with the weights of a Hugging Face model, or of upcycle_from when that is
               the same kind of model, dense or MoE
    upcycle    a new run with the weights of upcycle_from, a dense model, made into a MoE's
INHERITED says which settings come from the checkpoint. Each setting that is part of the model has
to stand in it.
"""

import os
import shlex
from dataclasses import dataclass

from configurator import InputError
from moe_model import MoEGPTConfig, build_config, build_model, config_to_dict
from nanomoe import checkpoint, upcycle
from nanomoe.checkpoint import Checkpoint
from nanomoe.distributed import broadcast_from_rank0, first_of_ranks, print0, torchrun_ids
from nanomoe.optim import load_optimizer_state
from nanomoe.run_dir import last_torchrun_ids

FIXED = "fixed"  # the checkpoint's; a flag or file that contradicts its model is an error
KEPT = "kept"  # the checkpoint's, unless a flag or config file sets it
NEW = "new"  # this start's: a flag, a config file, or the default
MODES = ("resume", "fine-tune", "upcycle")

# fmt: off
INHERITED = {  # settings: what they are in (resume, fine-tune, upcycle)
    "n_layer n_head n_embd n_kv_head bias norm position mlp mlp_dim qk_norm tie_weights":
        (FIXED, FIXED, FIXED),
    "use_moe":  # upcycling turns it on
        (FIXED, FIXED, NEW),
    "num_experts top_k expert_dim num_shared_experts moe_stride num_dense_layers router_score "
    "norm_top_k route_scale":
        (FIXED, FIXED, NEW),
    "expert_load_balance_loss_coef balance_scope router_bias_update_rate router_z_loss_coef "
    "router_jitter capacity_factor expert_dropout":
        (FIXED, KEPT, NEW),
    "block_size":
        (FIXED, KEPT, KEPT),
    "dropout":
        (FIXED, NEW, NEW),
    "gradient_checkpointing expert_impl":
        (KEPT, NEW, NEW),
    "optimizer":
        (FIXED, NEW, NEW),
    "init_from upcycle_from out_dir device dtype compile parallel":
        (NEW, NEW, NEW),
    "all others":  # data, batch, rates, schedule, evaluation, logging, seed
        (KEPT, NEW, NEW),
}
# fmt: on

# settings that a resumed run may have otherwise than before, and that change what it learns
# fmt: off
LEARNED_FROM = (
    "batch_size", "gradient_accumulation_steps", "seed", "dropout", "learning_rate",
    "weight_decay", "beta1", "beta2", "grad_clip", "spike_guard", "decay_lr", "lr_schedule",
    "decay_share", "warmup_iters", "lr_decay_iters", "min_lr", "max_iters", "max_seconds", "dtype",
    "deterministic",
)
# fmt: on

# settings that belong to one start on one machine, and not to the run
PER_LAUNCH = set()
for _settings, _row in INHERITED.items():
    if set(_row) == {NEW}:
        PER_LAUNCH |= set(_settings.split())


def rule_for(setting, mode):
    """FIXED, KEPT or NEW: what INHERITED says of a setting in a mode of MODES."""
    rules = INHERITED["all others"]
    for settings, row in INHERITED.items():
        if setting in settings.split():
            rules = row
    return rules[MODES.index(mode)]


@dataclass
class Init:
    """How a run begins."""

    mode: str  # 'scratch', 'resume', 'fine-tune' or 'upcycle'
    torchruns: list  # ids of the torchruns that started the processes, see torchrun_ids()
    source: Checkpoint | None = None  # where its weights come from

    @property
    def resumed(self):
        """The checkpoint whose run goes on, or None."""
        return self.source if self.mode == "resume" else None


def start_run(settings, given):
    """The Init that the settings, a dict, ask for. Writes what the run inherits into them.

    given: for the settings that were set, the flag or file that set them. All ranks call it.
    Raises InputError, and OSError for files that cannot be read."""
    ids = torchrun_ids()
    source, take_weights = find_source(settings, ids)
    if source is None:
        return Init("scratch", ids)
    mode = "resume"
    if take_weights or not source.has_training_state:
        mode = "fine-tune"
        wants_moe = settings["use_moe"] or "use_moe" not in given
        if settings["upcycle_from"] and wants_moe and not is_moe(source.config):
            mode = "upcycle"
    inherit_settings(source, mode, settings, given)
    return Init(mode, ids, source)


def find_source(settings, torchruns):
    """The Checkpoint that resolve_init_from() finds, or None, and whether to take only its weights.

    If the run that wrote it removes it before all ranks have read it, they look again."""
    while True:
        found = broadcast_from_rank0(lambda: resolve_init_from(settings, torchruns))
        path, take_weights = found
        source = read_model(path) if path else None
        removed = path is not None and source is None
        if not first_of_ranks(True if removed else None):
            return source, take_weights


def is_moe(config):
    return isinstance(config, MoEGPTConfig)


def resolve_init_from(settings, torchruns=()):
    """Returns (checkpoint path or None, whether to take only its weights). torchruns: their ids,
    from torchrun_ids(). If one of them started the last run in out_dir, too, then this is a
    restart, which resumes whatever init_from says. Raises InputError, OSError."""
    init_from, out_dir = settings["init_from"], settings["out_dir"]
    if not out_dir:
        raise InputError("out_dir is empty")
    upcycle_from = settings["upcycle_from"]
    if upcycle_from and os.path.realpath(upcycle_from) == os.path.realpath(out_dir):
        raise InputError(
            f"upcycle_from and out_dir are both {out_dir}; give the new run another out_dir"
        )
    restarted = bool(set(torchruns) & set(last_torchrun_ids(out_dir)))
    if init_from == "resume":
        return find_model(out_dir), False
    if (init_from == "auto" or restarted) and checkpoint.exists(out_dir):
        return find_model(out_dir), False
    if init_from == "upcycle" and not upcycle_from:
        raise InputError("init_from is 'upcycle': set upcycle_from to a dense model")
    if upcycle_from and init_from not in ("upcycle", "auto"):
        raise InputError(
            f"upcycle_from is '{upcycle_from}': set init_from to 'upcycle' or 'auto', "
            f"not '{init_from}'"
        )
    if upcycle_from:
        return find_model(upcycle_from, on_hub=True), True
    if init_from in ("scratch", "auto"):
        return None, False
    return find_model(init_from, on_hub=True), False


def find_model(name, on_hub=False):
    from nanomoe import load  # late: a run from scratch needs no other model

    return load.find(name, on_hub)


def read_model(path):
    from nanomoe import load  # late: a run from scratch needs no other model

    return load.read(path)


def inherit_settings(source, mode, settings, given):
    """Overwrite settings with those of a Checkpoint, as INHERITED says. Raises InputError for
    flags and files that contradict its model."""
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
    problems = []
    for key, value in settings.items():
        rule = rule_for(key, mode)
        if rule == NEW or key not in saved:
            continue
        if key not in given:
            settings[key] = saved[key]
        elif rule == FIXED and key in model and value != model[key]:
            problems.append(
                f"{given[key]}: {key} = {value!r} contradicts the checkpoint {source.path}, where "
                f"{key} = {model[key]!r}; leave it out, or train a new model in another out_dir"
            )
        elif key == "optimizer" and value != saved[key]:
            dense = "" if model["use_moe"] else "--use_moe=False "
            problems.append(
                f"{given[key]}: {source.path} was trained with optimizer {saved[key]!r}, not "
                f"{value!r}; leave it out, or start a new run with its weights: "
                f"--init_from=upcycle {shlex.quote(f'--upcycle_from={source.path}')} {dense}"
                "--out_dir=NEW"
            )
    if problems:
        raise InputError("\n".join(sorted(problems)))


def sequences_seen(resumed, settings):
    """How many training sequences a Checkpoint's run has seen. Older checkpoints do not say: they
    have seen as many as their settings make of their steps."""
    if resumed.sequences is not None:
        return resumed.sequences
    old = settings | resumed.settings
    return resumed.step * old["batch_size"] * old["gradient_accumulation_steps"]


def say_what_changed(resumed, settings, data):
    """One line for the settings that differ from a resumed Checkpoint's and change what is learned,
    and one if its dataset is another text. settings: with the dtype that is computed in."""
    changed, old = [], resumed.settings | {"dtype": resumed.dtype or settings["dtype"]}
    for key in LEARNED_FROM:
        if key in old and settings[key] != old[key]:
            changed.append(f"{key} {settings[key]} instead of {old[key]}")
    if changed:
        print0(f"resumed with {', '.join(changed)}")
    if resumed.data and resumed.data != data.fingerprint():
        print0(
            f"the text of dataset '{settings['dataset']}' is not the one that {resumed.path} was "
            "trained on; it has the same tokenizer"
        )


def follow_schedule(init, settings, get_lr):
    """See that a resumed run's learning rate does not jump, or say that it does.

    A run with lr_schedule 'wsd' that got longer goes back to its newest checkpoint from before
    the decay, unless --init_from names another one. get_lr: train.py's. All ranks call it.
    Raises OSError if the checkpoint cannot be read.
    """
    newest = init.resumed
    if newest is None or settings["eval_only"] or newest.step >= settings["max_iters"]:
        return  # no step follows
    old, new = rates_after(newest, settings, get_lr)
    if new > old and settings["init_from"] in ("resume", "auto"):
        out_dir = settings["out_dir"]
        path = broadcast_from_rank0(
            lambda: checkpoint.latest_good_before_decay(out_dir, newest.step)
        )
        earlier = read_model(path) if path else newest
        before, after = rates_after(earlier, settings, get_lr)
        if before == after:
            print0(
                f"the run is longer than it was: from step {newest.step} it goes back to step "
                f"{earlier.step}, before its learning rate began to fall"
            )
            init.source = earlier
            return
    old, new = f"{old:.3e}", f"{new:.3e}"
    if old != new:
        print0(f"the learning rate jumps from {old} to {new}: this run had another schedule so far")


def rates_after(source, settings, get_lr):
    """The learning rate of the step after a Checkpoint: in the schedule of the run that wrote it,
    and in that of these settings. Equal if its run may go on with them."""
    old = settings | {"lr_schedule": "cosine", "max_seconds": 0.0} | source.settings
    step_and_seconds = source.step, source.seconds
    rate = get_lr(settings, *step_and_seconds)
    if source.before_decay and rate == get_lr(old | {"decay_share": 0.0}, *step_and_seconds):
        return rate, rate  # all rates so far are those of a longer run, too
    return get_lr(old, *step_and_seconds), rate


def model_config_for(init, settings, vocab_size):
    """The config of the run's model, for settings that it has inherited. vocab_size: of a new
    model. Raises InputError if the checkpoint's weights cannot become that model's, and
    ConfigError for settings that make no model."""
    if init.mode == "scratch":
        return build_config(settings | {"vocab_size": vocab_size})
    old = init.source.config
    config = build_config(settings | {"vocab_size": old.vocab_size})
    if config.position == "learned" and config.block_size > old.block_size:
        raise InputError(
            f"block_size is {config.block_size}, but {init.source.path} has positions for "
            f"{old.block_size} tokens"
        )
    if init.mode == "upcycle":
        upcycle.group_size(old, config)
    return config


def initial_model(init, config, settings):
    """The run's model on the CPU: the same weights on every device and rank. Says where they come
    from."""
    if init.mode == "scratch":
        return build_model(config)
    if init.mode == "resume":
        print0(f"resuming from {init.source.path} after step {init.source.step}")
    else:
        print0(adapt_weights(init.source, config, settings["seed"]))
    init.source.config = config
    model = init.source.build_model()
    init.source.weights = None  # frees their memory
    return model


def restore_training_state(source, optimizer, scaler, guard):
    """Load a Checkpoint's training state into an optimizer, a gradient scaler and a StepGuard.

    Raises OSError if the state is damaged or does not fit them.
    """
    state = source.training_state()
    try:
        load_optimizer_state(optimizer, state["optimizer"])
        if state.get("scaler"):
            scaler.load_state_dict(state["scaler"])
        if state.get("guard"):
            guard.load_state_dict(state["guard"])
    except (ValueError, LookupError, TypeError) as error:
        raise OSError(f"checkpoint {source.path} is damaged: {error}") from None


def adapt_weights(source, config, seed):
    """Make a Checkpoint's weights those of another config: cut off positions beyond block_size,
    and upcycle a dense model. Returns a line that says what was done."""
    dense = source.config
    if config.position == "learned":
        positions = source.weights["transformer.wpe.weight"]
        source.weights["transformer.wpe.weight"] = positions[: config.block_size]
    if is_moe(dense) or not is_moe(config):
        return f"starting with the weights of {source.path}"
    G = upcycle.group_size(dense, config)
    source.weights = upcycle.upcycle(source.weights, dense, config, seed)
    what = "copies of the dense MLP"
    if G > 1:
        what = f"groups of {G} that share out the dense MLP's hidden units"
    first = "what the dense model does"
    if reason := upcycle.inexact_reason(config):
        first = f"not what the dense model does: {reason}"
    layers = sum(config.is_moe(layer) for layer in range(config.n_layer))
    return (
        f"upcycled {source.path}: in {layers} layers {config.num_experts} experts, {what}; "
        f"at first it computes {first}"
    )
