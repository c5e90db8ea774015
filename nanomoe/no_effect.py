"""
Settings that cannot do what they say in this run: because of another setting, its length, its size
or its device. Each gets one line before the first step.
"""

from types import SimpleNamespace

MOE_SETTINGS = (
    "num_experts top_k expert_dim num_shared_experts moe_stride num_dense_layers router_score "
    "norm_top_k route_scale expert_load_balance_loss_coef balance_scope router_bias_update_rate "
    "router_z_loss_coef router_jitter capacity_factor expert_dropout expert_impl"
)
TRAINING = (
    "gradient_accumulation_steps learning_rate weight_decay beta1 beta2 grad_clip max_iters "
    "max_tokens max_epochs max_seconds eval_interval log_interval load_interval keep_last "
    "always_save_checkpoint"
)
# settings, when they have no effect (s: all settings, as attributes), and why
RULES = [
    (MOE_SETTINGS, lambda s: not s.use_moe, "use_moe is False"),
    (
        "lr_schedule decay_share warmup_iters lr_decay_iters min_lr",
        lambda s: not s.decay_lr,
        "decay_lr is False",
    ),
    ("decay_share", lambda s: s.decay_lr and s.lr_schedule != "wsd", "lr_schedule is not 'wsd'"),
    (
        "lr_decay_iters min_lr",
        lambda s: s.decay_lr and s.lr_schedule == "wsd" and s.decay_share == 0,
        "decay_share is 0",
    ),
    ("lr_decay_iters", lambda s: s.max_seconds > 0, "the rate falls over max_seconds"),
    (
        "balance_scope",
        lambda s: s.use_moe and s.expert_load_balance_loss_coef == 0,
        "expert_load_balance_loss_coef is 0",
    ),
    ("norm_top_k", lambda s: s.use_moe and s.top_k == 1, "top_k is 1"),
    (
        "expert_load_balance_loss_coef router_bias_update_rate capacity_factor",
        lambda s: s.use_moe and s.top_k == s.num_experts,
        "every token visits all experts",
    ),
    (
        "mlp_dim",
        lambda s: s.use_moe and s.expert_dim > 0 and s.moe_stride == 1 and not s.num_dense_layers,
        "no layer is dense and expert_dim is set",
    ),
    ("wandb_project wandb_run_name", lambda s: not s.wandb_log, "wandb_log is False"),
    ("sample_tokens", lambda s: s.eval_only and s.sample_tokens > 0, "eval_only is True"),
    ("wandb_log", lambda s: s.eval_only and s.wandb_log, "eval_only is True"),
    ("tensorboard_log", lambda s: s.eval_only and s.tensorboard_log, "eval_only is True"),
    (TRAINING, lambda s: s.eval_only, "eval_only is True"),
]
SAMPLE_RULES = [  # of sample.py
    ("top_k top_p seed", lambda s: s.temperature == 0, "temperature is 0, which is greedy"),
    ("start", lambda s: s.interactive, "interactive is True"),
]
# of these a config file may say what holds if another flag turns them on
ONLY_AS_FLAGS = set(f"{MOE_SETTINGS} {TRAINING} wandb_project wandb_run_name sample_tokens".split())


def settings_without_effect(settings, given, world_size):
    """Lines for the settings that were given and have no effect, one for each reason.

    given: for each setting that was given, the flag or file that gave it."""
    s = SimpleNamespace(**settings)
    lines = lines_by_reason(RULES, s, given)
    if s.device.startswith("cuda:") and world_size > 1:
        lines.append("the number in device has no effect: each process takes its own GPU")
    if s.parallel == "fsdp" and world_size == 1:
        lines.append("parallel 'fsdp' has no effect: there is one process")
    return lines


def lines_by_reason(rules, s, given):
    found, lines = {}, []  # found: reason, and the settings for which it holds
    for names, applies, why in rules:
        if applies(s):
            found.setdefault(why, []).extend(n for n in names.split() if counts(n, given))
    for why, names in found.items():
        if names:
            verb = "has" if len(names) == 1 else "have"
            lines.append(f"{', '.join(names)} {verb} no effect: {why}")
    return lines


def counts(name, given):
    """Whether the user means a setting to have an effect in this very run."""
    if name in ONLY_AS_FLAGS and not is_flag(given, name):
        # in a file that never says use_moe, experts are a mistake
        return name in given and name in MOE_SETTINGS.split() and "use_moe" not in given
    return name in given


def is_flag(given, name):
    return given.get(name, "").startswith("--")


def settings_out_of_reach(settings, given, data, first_step=0, seconds=0.0):
    """Lines for the settings that this run is too short or too small for.

    data: the Dataset. first_step, seconds: how far a resumed run is."""
    s = SimpleNamespace(**settings)
    lines, last = [], s.lr_decay_iters or s.max_iters
    if s.eval_only:
        return lines
    for name in ("eval_interval", "log_interval"):
        # a file's value is meant for the file's length of run
        meant = is_flag(given, name) or (name in given and not is_flag(given, "max_iters"))
        if meant and settings[name] > s.max_iters:
            lines.append(
                f"{name} is {settings[name]}, and the run has {s.max_iters} steps: it only "
                f"{'evaluates at the end' if name == 'eval_interval' else 'logs two of them'}"
            )
    if s.decay_lr and s.warmup_iters >= s.max_iters:
        lines.append(
            f"warmup_iters is {s.warmup_iters} of {s.max_iters} steps: the learning rate never "
            f"reaches {s.learning_rate}"
        )
    elif s.decay_lr and not s.max_seconds:
        if s.lr_schedule == "cosine" and s.lr_decay_iters and s.lr_decay_iters <= s.warmup_iters:
            lines.append(
                f"lr_decay_iters ({s.lr_decay_iters}) ends before the warm-up of {s.warmup_iters} "
                "steps: the learning rate then falls at once"
            )
        elif s.lr_schedule == "wsd" and s.warmup_iters > (1 - s.decay_share) * last:
            lines.append(
                f"warm-up ({s.warmup_iters} steps) and decay ({s.decay_share} of {last}) overlap: "
                f"the learning rate never reaches {s.learning_rate}"
            )
        elif s.lr_schedule == "wsd" and 0 < s.decay_share * last < 1:
            lines.append(
                f"decay_share is {s.decay_share} of {last} steps, less than one step: the learning "
                "rate never falls"
            )
        elif last > s.max_iters:
            lines.append(
                f"lr_decay_iters is {last} of {s.max_iters} steps: the learning rate never reaches "
                f"{s.min_lr}"
            )
    never_falls = s.lr_schedule == "wsd" and s.decay_share == 0
    if s.decay_lr and s.min_lr > s.learning_rate and not never_falls:
        lines.append(f"min_lr ({s.min_lr}) is above learning_rate ({s.learning_rate}): it rises")
    if s.spike_guard and s.max_iters <= 64:
        lines.append(f"spike_guard needs 64 steps to begin, and the run has {s.max_iters}")
    if s.use_moe and 0 < s.top_k < s.num_experts <= s.capacity_factor * s.top_k:
        lines.append(
            f"capacity_factor {s.capacity_factor} drops nothing: no expert can get more than "
            f"{s.num_experts / s.top_k:g} even shares"
        )
    sequences = s.gradient_accumulation_steps * s.batch_size
    if sequences > data.windows_per_epoch:
        lines.append(
            f"a step trains on {sequences} sequences, and the training data has "
            f"{data.windows_per_epoch}: it sees some of them more than once"
        )
    windows = (len(data.val) - 1) // s.block_size
    if s.eval_iters * s.batch_size > windows:
        lines.append(
            f"eval_iters asks for {s.eval_iters * s.batch_size} validation windows, and there are "
            f"{windows}: it takes them all"
        )
    if 0 < s.max_iters <= first_step:
        lines.append(
            f"max_iters is {s.max_iters} and {first_step} steps are done: nothing to train"
        )
    elif 0 < s.max_seconds <= seconds:
        lines.append(
            f"max_seconds is {s.max_seconds:g} and {seconds:.0f} seconds are done: nothing to train"
        )
    return lines
