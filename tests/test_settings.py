"""nanomoe/settings.py: one row of rules for each setting of train.py. Which settings a run
inherits, which change what is learned, and which get a line because they do nothing."""

import dataclasses
from types import SimpleNamespace

import pytest

import train
from configurator import InputError, read_defaults, read_settings
from moe_model import MoEGPTConfig, build_config
from nanomoe import settings as table
from nanomoe.inherit import inherit_settings, what_changed
from nanomoe.init_from import Plan, Start, initial_model
from nanomoe.settings import FIXED, KEPT, MODES, NEW, SETTINGS, rule_for
from tests.helpers import MOE, ROOT, run_module, small_model, succeeded
from tests.helpers import train as run_train

CONFIGS = sorted((ROOT / "config").glob("*.py"))
DEFAULTS = {name: getattr(train, name) for name in read_defaults((ROOT / "train.py").read_text())}


# What users of today's settings rely on. A new setting need not stand here.
INHERITED = {
    (NEW, NEW, NEW): "out_dir init_from upcycle_from parallel device dtype compile",
    (FIXED, FIXED, FIXED): "n_layer n_head n_embd bias norm position n_kv_head mlp mlp_dim qk_norm "
    "tie_weights",
    (FIXED, FIXED, NEW): "use_moe num_experts top_k expert_dim num_shared_experts moe_stride "
    "num_dense_layers router_score norm_top_k route_scale",
    (FIXED, KEPT, NEW): "expert_load_balance_loss_coef balance_scope router_bias_update_rate "
    "router_z_loss_coef router_jitter capacity_factor expert_dropout",
    (FIXED, KEPT, KEPT): "block_size",
    (FIXED, NEW, NEW): "dropout optimizer",
    (KEPT, NEW, NEW): "gradient_checkpointing expert_impl dataset batch_size seed eval_interval "
    "gradient_accumulation_steps learning_rate max_iters max_tokens max_epochs max_seconds "
    "weight_decay beta1 beta2 grad_clip spike_guard decay_lr lr_schedule decay_share warmup_iters "
    "lr_decay_iters min_lr deterministic keep_last eval_iters log_interval wandb_log eval_only",
}
LEARNED = (
    "gradient_accumulation_steps batch_size dropout learning_rate max_iters max_seconds "
    "weight_decay beta1 beta2 grad_clip spike_guard decay_lr lr_schedule decay_share warmup_iters "
    "lr_decay_iters min_lr dtype seed deterministic"
)


# -----------------------------------------------------------------------------
# the table


def test_todays_settings_are_inherited_as_ever():
    for row, names in INHERITED.items():
        assert {name: SETTINGS[name][:3] for name in names.split()} == dict.fromkeys(
            names.split(), row
        )
    assert {name for name in DEFAULTS if SETTINGS[name].learned} >= set(LEARNED.split())
    assert not any(SETTINGS[name].learned for name in ("eval_interval", "keep_last", "compile"))


def test_every_setting_has_one_row_in_the_order_of_train_py():
    assert list(SETTINGS) == list(DEFAULTS)


def test_a_setting_without_a_row_is_an_error_that_names_the_table():
    assert table.problems(DEFAULTS, 1) == []
    assert table.problems(DEFAULTS | {"mine": 3}, 1) == [
        "setting 'mine' has no row in SETTINGS in nanomoe/settings.py, which says what a resumed "
        "run does with it"
    ]


def test_the_limits_of_the_models_settings_are_in_its_config():
    """And every setting of the model is fixed or kept on resume: its weights depend on it."""
    for field in dataclasses.fields(MoEGPTConfig):
        if field.name in SETTINGS:
            assert SETTINGS[field.name].limits == {}, field.name
            assert SETTINGS[field.name].resume in (FIXED, KEPT), field.name


def test_limits():
    """Every setting that is out of range, each in a sentence."""
    wrong = {
        "batch_size": (0, "at least 1"),
        "learning_rate": (0.0, "more than 0"),
        "max_seconds": (float("inf"), "a finite number"),
        "beta2": (1.0, "at least 0 and less than 1"),
        "decay_share": (1.5, "at least 0 and at most 1"),
        "min_lr": (float("nan"), "a finite number"),
        "compile": ("on", "one of True, False, auto"),
        "seed": (10**400, f"at least 0 and less than {2**64}"),
    }
    settings = DEFAULTS | {name: value for name, (value, _) in wrong.items()}
    found = table.problems(settings | {"gradient_accumulation_steps": 3}, 2)
    assert found.pop().endswith("(3) is not divisible by the number of processes (2)")
    assert sorted(found) == sorted(
        f"{name} is {value!r}, expected {expected}" for name, (value, expected) in wrong.items()
    )


def test_float16_has_a_scaler_that_some_settings_cannot_have():
    settings = DEFAULTS | {"dtype": "float16"}
    assert table.problems(settings, 1) == []
    for other in ({"spike_guard": 6.0}, {"parallel": "fsdp"}):
        assert "not float16" in table.problems(settings | other, 1)[0]


def test_the_table_that_is_printed():
    rows = [line.split() for line in succeeded(run_module("nanomoe.settings")).splitlines()[1:]]
    assert sorted(name for row in rows for name in row[3:]) == sorted(SETTINGS)
    assert ["fixed", "kept", "kept", "block_size"] in rows


# -----------------------------------------------------------------------------
# what a run inherits


def changed(value):
    """Another value of the same type."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, str):
        return f"{value}-"
    return value + 1


@pytest.mark.parametrize("use_moe", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_each_setting_is_inherited_as_the_table_says(mode, use_moe):
    """For every setting: what becomes of it when it is not given, and when it is."""
    config = build_config(
        DEFAULTS
        | {"use_moe": use_moe, "num_experts": 8, "top_k": 2, "n_layer": 3, "vocab_size": 64}
    )
    run = {key: changed(value) for key, value in DEFAULTS.items()}
    source = SimpleNamespace(path="a checkpoint", config=config, settings=run)
    saved = (run if mode == "resume" else {}) | vars(config) | {"use_moe": use_moe}
    for key, default in DEFAULTS.items():
        if key == "use_moe":
            continue
        rule = rule_for(key, mode)
        before = dict(DEFAULTS, use_moe=use_moe)
        after = inherit_settings(before, {}, mode, source)
        inherited = rule != NEW and key in saved
        assert after[key] == (saved[key] if inherited else default), key
        assert before == dict(DEFAULTS, use_moe=use_moe)  # it changes nothing

        value = changed(saved.get(key, default))
        settings = dict(DEFAULTS, use_moe=use_moe) | {key: value}
        if rule == FIXED and (key in vars(config) or key == "optimizer"):
            expected = f"--x: {key} = .* contradicts the checkpoint"
            if key == "optimizer":
                expected = f"--x: a checkpoint was trained with optimizer '{saved[key]}', not"
            with pytest.raises(InputError, match=expected):
                inherit_settings(settings, {key: "--x"}, mode, source)
        else:
            assert inherit_settings(settings, {key: "--x"}, mode, source)[key] == value, key


def test_upcycling_turns_use_moe_on():
    config = build_config(DEFAULTS | {"vocab_size": 64})
    source = SimpleNamespace(path="d", config=config, settings={})
    assert inherit_settings(DEFAULTS, {}, "upcycle", source)["use_moe"] is True


def test_the_seed_is_that_of_upcycled_routers():
    dense = small_model()
    config = build_config(vars(dense.config) | {"use_moe": True})

    def router(seed):
        source = SimpleNamespace(path="d", config=dense.config, weights=dense.state_dict())
        source.build_model = lambda: source.weights["transformer.h.0.mlp.router.weight"]
        plan = Plan({"seed": seed}, Start("upcycle", source), None, config, None, [])
        return initial_model(plan)[0]

    assert router(1).equal(router(1)) and not router(1).equal(router(2))


def test_a_change_that_changes_what_is_learned_is_said():
    """Of all settings, those whose row says so, each in the one line."""
    data = SimpleNamespace(fingerprint=lambda: None)
    resumed = SimpleNamespace(settings=DEFAULTS, dtype="auto", data=None, path="a checkpoint")
    assert what_changed(DEFAULTS, data, resumed) == []
    found = what_changed({k: changed(v) for k, v in DEFAULTS.items()}, data, resumed)
    for name, rule in SETTINGS.items():
        text = f"{name} {changed(DEFAULTS[name])} instead of {DEFAULTS[name]}"
        assert (text in found[0]) == rule.learned, name


# -----------------------------------------------------------------------------
# settings that do nothing


def notes(*args, tokens_in_val=10**7, windows=10**5, done=(0, 0.0), world_size=1):
    settings, given = read_settings(dict(vars(train)), list(args))
    data = SimpleNamespace(val=range(tokens_in_val), windows_per_epoch=windows)
    return table.notes(settings, given, data, world_size, *done)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_our_configs_have_none(path):
    """Nor have a MoE's dense twins settings without effect."""
    assert notes(str(path)) == notes() == []
    twin = notes(str(path), "--use_moe=False") if "moe" in path.stem else []
    assert [line for line in twin if "no effect" in line] == []


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--num_experts=16"], "num_experts has no effect: use_moe is False"),
        (["--top_k=2", "--router_jitter=0.1"], "top_k, router_jitter have no effect: use_moe"),
        (["--decay_lr=False", "--min_lr=0", "--warmup_iters=9"], "warmup_iters, min_lr have no"),
        (["--decay_share=0.5"], "decay_share has no effect: lr_schedule"),
        (["--decay_lr=False", "--decay_share=0.5"], "decay_share has no effect: decay_lr"),
        (["--decay_lr=False", "--lr_schedule=wsd", "--decay_share=0", "--min_lr=0"], "decay_lr is"),
        (["--lr_schedule=wsd", "--decay_share=0", "--min_lr=0"], "min_lr has no effect: decay_sh"),
        (["--max_seconds=60", "--lr_decay_iters=9"], "lr_decay_iters has no effect: the rate"),
        (["--use_moe", "--expert_load_balance_loss_coef=0", "--balance_scope=micro"], "balance_sc"),
        (["--use_moe", "--norm_top_k=False"], "norm_top_k has no effect: top_k is 1"),
        (["--use_moe", "--top_k=4", "--capacity_factor=1.0"], "capacity_factor has no effect"),
        (["--use_moe", "--expert_dim=8", "--mlp_dim=64"], "mlp_dim has no effect: no layer"),
        (["--wandb_project=mine"], "wandb_project has no effect: wandb_log is False"),
        (["--eval_only", "--sample_tokens=9"], "sample_tokens has no effect"),
        (["--eval_only", "--max_iters=9", "--wandb_log"], "wandb_log, max_iters have no effect"),
        (["--parallel=fsdp"], "parallel 'fsdp' has no effect: there is one process"),
        (["--max_iters=60"], "warmup_iters is 2000 of 60 steps: the learning rate never reaches"),
        (["--max_iters=60", "--max_seconds=9"], "warmup_iters is 2000 of 60 steps"),
        (["--lr_decay_iters=100"], "ends before the warm-up of 2000 steps"),
        (["--lr_schedule=wsd", "--lr_decay_iters=100"], "overlap: the learning rate never"),
        (
            ["--lr_schedule=wsd", "--decay_share=0.01", "--max_iters=60", "--warmup_iters=5"],
            "less than one step: the learning rate never falls",
        ),
        (["--lr_decay_iters=700000"], "the learning rate never reaches 6e-05"),
        (["--min_lr=1.0"], "min_lr (1.0) is above learning_rate (0.0006): it rises"),
        (["--max_iters=50", "--warmup_iters=1", "--spike_guard=6"], "spike_guard needs 64 steps"),
        (["--max_iters=9000", "--eval_interval=9001"], "it only evaluates at the end"),
        (["--max_iters=9000", "--log_interval=9001"], "it only logs two of them"),
        (["--max_iters=9000", "--lr_schedule=wsd", "--decay_share=0.9"], "overlap: the learning r"),
        (["--use_moe", "--top_k=2", "--capacity_factor=2.5"], "drops nothing: no expert can get m"),
    ],
    ids=str,
)
def test_one_line(flags, words):
    found = notes(*flags)
    assert len(found) == 1 and words in found[0], found


def test_what_depends_on_the_data_and_the_checkpoint():
    assert "takes them all" in notes("--eval_iters=900", tokens_in_val=1024 * 100)[0]
    assert "nothing to train" in notes("--max_iters=5000", done=(5000, 9.0))[0]
    assert "61 seconds are done: nothing" in notes("--max_seconds=60", done=(50, 61.2))[0]
    assert "a step trains on 480 sequences" in notes(windows=479)[0] and not notes(windows=480)
    assert notes("--parallel=fsdp", world_size=2) == []
    assert "its own GPU" in notes("--device=cuda:1", world_size=2)[0]
    assert notes("--device=cuda:1") == notes("--eval_only", "--sample_tokens=0") == []
    assert notes("--lr_schedule=wsd", "--decay_share=0", "--learning_rate=1e-5") == []


def test_lines_of_a_file(tmp_path):
    """One with experts that never says use_moe, and one that a flag cuts short."""
    path = tmp_path / "config.py"

    def of_file(text, *flags):
        path.write_text(text)
        return notes(str(path), *flags)

    experts = "num_experts = 16\ntop_k = 2\n"
    assert "num_experts, top_k have no effect: use_moe is False" in of_file(experts)[0]
    assert of_file(experts + "wandb_project = 'mine'\nuse_moe = False\n") == []
    rate = "decay_lr = False\neval_interval = 500\n"
    long = rate + "max_iters = 5000\n"
    assert of_file(long) == of_file(long, "--max_iters=100") == []
    assert "it only evaluates at the end" in of_file(rate + "max_iters = 100\n")[0]


def test_before_the_first_step(play, tmp_path):
    out = succeeded(
        run_train(
            dataset=play, out_dir=tmp_path, warmup_iters=2, eval_interval=2, **MOE, norm_top_k=True
        )
    )
    lines = [line for line in out.splitlines() if line.startswith("note: ")]
    assert lines == ["note: warmup_iters is 2 of 2 steps: the learning rate never reaches 0.0006"]
    assert out.index("note: ") < out.index("step 1/2")
