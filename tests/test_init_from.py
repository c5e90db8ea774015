"""Which settings a run inherits: the table, its copy in nanomoe/README.md, and what happens."""

import dataclasses
import re
from types import SimpleNamespace

import pytest

import train
from configurator import InputError, read_defaults
from moe_model import MoEGPTConfig, build_config
from nanomoe.init_from import (
    FIXED,
    INHERITED,
    KEPT,
    MODES,
    NEW,
    PER_LAUNCH,
    Init,
    inherit_settings,
    initial_model,
    rule_for,
)
from tests.helpers import ROOT, small_model

SETTINGS = {name: getattr(train, name) for name in read_defaults((ROOT / "train.py").read_text())}


def changed(value):
    """Another value of the same type."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, str):
        return f"{value}-"
    return value + 1


def test_every_setting_stands_in_the_table_once_at_most():
    named = [key for keys in INHERITED if keys != "all others" for key in keys.split()]
    assert len(named) == len(set(named)) and set(named) <= set(SETTINGS)
    assert {key for key in named if {rule_for(key, mode) for mode in MODES} == {NEW}} == PER_LAUNCH


def test_every_setting_of_the_model_stands_in_the_table():
    """Otherwise a flag could change a resumed model without a word."""
    named = {key for keys in INHERITED for key in keys.split()}
    fields = {field.name for field in dataclasses.fields(MoEGPTConfig)}
    assert fields & set(SETTINGS) <= named and fields - set(SETTINGS) == {"vocab_size"}


def test_the_readme_has_the_same_table():
    text = (ROOT / "nanomoe" / "README.md").read_text()
    rows = {}
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("| ").split("|")]
        if len(cells) == 4 and set(cells[1:]) <= {FIXED, KEPT, NEW}:
            rows[" ".join(re.findall(r"`(\w+)`", cells[0])) or "all others"] = tuple(cells[1:])
    assert rows == INHERITED


@pytest.mark.parametrize("use_moe", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_each_setting_is_inherited_as_the_table_says(mode, use_moe):
    """For every setting: what becomes of it when it is not given, and when it is."""
    config = build_config(
        SETTINGS
        | {"use_moe": use_moe, "num_experts": 8, "top_k": 2, "n_layer": 3, "vocab_size": 64}
    )
    run = {key: changed(value) for key, value in SETTINGS.items()}
    source = SimpleNamespace(path="a checkpoint", config=config, settings=run)
    saved = (run if mode == "resume" else {}) | vars(config) | {"use_moe": use_moe}
    for key, default in SETTINGS.items():
        if key == "use_moe":
            continue
        rule = rule_for(key, mode)
        settings = dict(SETTINGS, use_moe=use_moe)
        inherit_settings(source, mode, settings, given={})
        inherited = rule != NEW and key in saved
        assert settings[key] == (saved[key] if inherited else default), key

        value = changed(saved.get(key, default))
        settings = dict(SETTINGS, use_moe=use_moe) | {key: value}
        if rule == FIXED and (key in vars(config) or key == "optimizer"):
            expected = f"--x: {key} = .* contradicts the checkpoint"
            if key == "optimizer":
                expected = f"--x: a checkpoint was trained with optimizer '{saved[key]}', not"
            with pytest.raises(InputError, match=expected):
                inherit_settings(source, mode, settings, given={key: "--x"})
        else:
            inherit_settings(source, mode, settings, given={key: "--x"})
            assert settings[key] == value, key


def test_upcycling_turns_use_moe_on():
    dense = SimpleNamespace(
        path="d", config=build_config(SETTINGS | {"vocab_size": 64}), settings={}
    )
    settings = dict(SETTINGS)
    inherit_settings(dense, "upcycle", settings, given={})
    assert settings["use_moe"] is True


def test_the_seed_is_that_of_upcycled_routers():
    dense = small_model()
    config = build_config(vars(dense.config) | {"use_moe": True})

    def router(seed):
        source = SimpleNamespace(path="d", config=dense.config, weights=dense.state_dict())
        source.build_model = lambda: source.weights["transformer.h.0.mlp.router.weight"]
        return initial_model(Init("upcycle", [], source), config, {"seed": seed})

    assert router(1).equal(router(1)) and not router(1).equal(router(2))
