"""Config files and flags: nanoGPT's way, without its faults."""

import random
import sys

import pytest

import train
from configurator import InputError, configure, read_defaults, read_settings, split_argv
from nanomoe.errors import note
from nanomoe.settings import RETIRED
from tests.helpers import ROOT, run_script
from tests.test_bad_input import CONTRADICTIONS

KEYS = read_defaults((ROOT / "train.py").read_text())


def apply(*argv):
    return read_settings(vars(train), argv, retired=RETIRED, note=note)


def refused(*argv):
    with pytest.raises(InputError) as error:
        apply(*argv)
    assert "\n" not in str(error.value)
    return str(error.value)


def config_file(folder, text, name="c.py"):
    path = folder / name
    path.write_text(text)
    return str(path)


def test_order_of_files_and_flags(tmp_path):
    a = config_file(tmp_path, "batch_size = 2\nmax_iters = 10\n", "a.py")
    text = (
        "batch_size = 3\nlr_decay_iters = max_iters // 2  # sees what came before\nn_layer = 12\n"
    )
    b = config_file(tmp_path, text, "b.py")
    flags = ("--learning_rate=1", "--eval_only", "--compile=False", "--wandb_run_name=x=a=b")
    settings, given = apply(a, b, *flags)
    expected = {"batch_size": 3, "max_iters": 10, "lr_decay_iters": 5, "learning_rate": 1.0}
    expected |= {"eval_only": True, "compile": False, "wandb_run_name": "x=a=b"}
    assert settings.items() >= expected.items() and settings["n_head"] == train.n_head
    assert isinstance(settings["learning_rate"], float)
    assert given["batch_size"] == b and given["learning_rate"] == "--learning_rate=1"
    assert "n_layer" in given and "n_head" not in given  # given, though it is the default


def test_settings_are_read_or_also_written():
    script = dict(vars(train))
    assert read_settings(script, ["--n_layer=3"])[0]["n_layer"] == 3
    assert script["n_layer"] == train.n_layer
    configure(script, ["--n_layer=3"])
    assert script["n_layer"] == 3


def test_keys_of_nanogpt_and_of_the_older_nanomoe_keep_their_names():
    keys = """
        out_dir eval_interval log_interval eval_iters eval_only always_save_checkpoint init_from
        wandb_log wandb_project wandb_run_name dataset gradient_accumulation_steps batch_size
        block_size n_layer n_head n_embd dropout bias learning_rate max_iters weight_decay beta1
        beta2 grad_clip decay_lr warmup_iters lr_decay_iters min_lr backend device dtype compile
        gradient_checkpointing use_moe num_experts top_k expert_load_balance_loss_coef
    """
    assert set(keys.split()) <= {*KEYS, *RETIRED}


def test_a_nanogpt_config_file_runs_unchanged(tmp_path):
    text = (
        "import time\n\nout_dir = 'out-x'\nwandb_run_name = 'ft-' + str(time.time())\n"
        "batch_size = 12\ngradient_accumulation_steps = 5 * 8\nmax_iters = 2000\n"
        "lr_decay_iters = 2000\ndevice = 'cpu'\ncompile = False\ndtype = 'float16'\n"
        "backend = 'nccl'\n_private = [1]\n\ndef helper():\n    return 1\n"
    )
    settings, _ = apply(config_file(tmp_path, text))
    assert settings["gradient_accumulation_steps"] == 40
    assert settings["wandb_run_name"].startswith("ft-")


@pytest.mark.parametrize(
    "argument, words",
    [
        ("--batchsize=4", ["--batchsize=4", "unknown key 'batchsize'", "'batch_size'"]),
        ("--batch-size=4", ["unknown key", "'batch_size'"]),
        ("--batch_size=4.5", ["batch_size", "4.5", "expected int"]),
        ("--batch_size=many", ["batch_size", "'many'", "expected int"]),
        ("--batch_size", ["'batch_size' needs a value"]),
        ("--batch_size=", ["batch_size", "expected int"]),
        ("--learning_rate=fast", ["learning_rate", "expected float"]),
        ("--use_moe=3", ["use_moe", "expected bool"]),
        ("--bias=None", ["bias", "expected bool"]),
        ("config/nothing.py", ["config/nothing.py", "no such config file"]),
        ("batch_size=4", ["no such config file", "--key=value"]),
    ],
)
def test_bad_arguments(argument, words):
    message = refused(argument)
    assert all(word in message for word in words), message


def misspell(key, rng):
    """A key with a letter dropped, doubled or swapped, without its _, or with capitals."""
    i = rng.randrange(1, len(key) - 1)
    dropped = key[:i] + key[i + 1 :]
    doubled = key[:i] + key[i] * 2 + key[i + 1 :]
    swapped = key[:i] + key[i + 1] + key[i] + key[i + 2 :]
    joined = key.replace("_", "") if "_" in key else key + "s"
    return rng.choice([dropped, doubled, swapped, joined, key.title()])


def test_every_typo_is_refused():
    """The message names the key that was meant."""
    rng, keys = random.Random(0), list(KEYS)
    for _ in range(100):
        key = rng.choice([k for k in keys if len(k) > 4])
        typo = misspell(key, rng)
        if typo not in keys and typo != "bet1a":  # which is as near to beta2
            assert f"'{key}'" in refused(f"--{typo}=1"), typo


def mistake(seed):
    """A line for a config file that is a typo, has the wrong type or contradicts another setting;
    and the words that its error must have."""
    rng, keys = random.Random(seed), list(KEYS)
    if seed % 3 == 0:
        key = rng.choice([k for k in keys if len(k) > 4])
        typo = misspell(key, rng)
        while typo in keys:
            typo = misspell(key, rng)
        return f"{typo} = {getattr(train, key)!r}", [f"unknown key '{typo}'", f"'{key}'"]
    if seed % 3 == 1:
        key = rng.choice([k for k in keys if getattr(train, k) != "auto"])
        expected = type(getattr(train, key))
        values = (None, [1], "some", 1.5, True, {"a": 1}, b"x")
        value = rng.choice([v for v in values if type(v) is not expected])
        return f"{key} = {value!r}", [f"'{key}' is {value!r}", f"expected {expected.__name__}"]
    settings, words = rng.choice(CONTRADICTIONS)
    return "; ".join(f"{key} = {value!r}" for key, value in settings.items()), [words]


@pytest.mark.full
@pytest.mark.repeat(9)
def test_config_files_with_one_mistake(seed, play, tmp_path):
    """One mistake after one of our own config files: an error names it, nothing is left."""
    config = random.Random(seed).choice(sorted((ROOT / "config").glob("*.py")))
    # without the mistake it would run anywhere
    text = f"dataset = {str(play)!r}\nblock_size = 32\ndevice = 'cpu'\n"
    text += "init_from = 'scratch'\nupcycle_from = ''\n"
    line, words = mistake(seed)
    path = config_file(tmp_path, text + line + "\n")
    done = run_script("train.py", config, path, out_dir=tmp_path / "out")
    assert done.returncode == 2 and done.stdout == "", (line, done.stdout, done.stderr)
    assert done.stderr.startswith("error: ") and "Traceback" not in done.stderr, done.stderr
    assert all(word in done.stderr for word in words), (line, words, done.stderr)
    assert not (tmp_path / "out").exists()


def test_help_lists_every_key_with_default_and_comment(tmp_path):
    done = run_script("train.py", "--help", cwd=tmp_path)
    assert done.returncode == 0
    for key, (comment, heading) in KEYS.items():
        assert f"--{key}=" in done.stdout and comment and comment in done.stdout, key
        assert f"\n{heading}:\n" in done.stdout
    assert "--gradient_accumulation_steps=40" in done.stdout
    assert run_script("sample.py", "-h").stdout.count("\n  --") == 17


def test_one_line_and_exit_code_2(tmp_path):
    done = run_script("train.py", "--n_layr=3", cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    line = "--n_layr=3: unknown key 'n_layr'; the nearest known one is 'n_layer'"
    assert done.stderr == f"error: {line}\n"


@pytest.mark.parametrize("key", RETIRED)
def test_a_retired_setting_is_noted_and_ignored(key, tmp_path, capsys, monkeypatch):
    why, same = RETIRED[key]
    value = same[0] if same else "x"
    path = config_file(tmp_path, f"batch_size = 3\n{key} = '{value}'\n")
    for argument in (f"--{key}={value}", path):
        settings, given = apply(argument, "--n_layer=3")
        assert key not in settings and key not in given
        assert settings["n_layer"] == 3
        assert settings["batch_size"] == (3 if argument == path else train.batch_size)
        note = f"note: {argument}: '{key}' is no longer a setting: {why}\n"
        assert capsys.readouterr() == ("", note)
    monkeypatch.setenv("RANK", "1")  # of many processes, the first one says it
    apply(f"--{key}={value}", path)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("key, value", [("upcycle_noise", 0.1), ("qk_norm_over", "width")])
def test_a_retired_setting_that_made_another_model_is_refused(key, value, tmp_path):
    """Otherwise the run would be another one than the file asks for."""
    path = config_file(tmp_path, f"{key} = {value!r}\n")
    for argument in (f"--{key}={value}", path):
        with pytest.raises(InputError, match=f"'{key}' is no longer a setting: .*; leave it out"):
            apply(argument)


# -----------------------------------------------------------------------------
# what a config file says


@pytest.fixture
def bases(tmp_path):
    """A folder with files that a config file may import."""
    config_file(tmp_path, "import math\nbatch_size = 32\ndef helper(): pass\n", "base_config.py")
    config_file(tmp_path, "\nif:\n", "broken.py")
    return tmp_path


@pytest.mark.parametrize(
    "text, expected",
    [
        ("from base_config import *", {"batch_size": 32}),
        ("import base_config\nbatch_size = base_config.batch_size", {"batch_size": 32}),
        ("from base_config import batch_size", {"batch_size": 32}),
        ("exec(open(__file__.replace('config.py', 'base_config.py')).read())", {"batch_size": 32}),
        ("globals().update(batch_size=32, learning_rate=1e-3)",
         {"batch_size": 32, "learning_rate": 1e-3}),
        ("globals().update({'batch_size': 32})", {"batch_size": 32}),
        ("globals()['batch_size'] = 32", {"batch_size": 32}),
        ("vars().update([('batch_size', 32)])", {"batch_size": 32}),
        ("globals().__ior__({'batch_size': 32})", {"batch_size": 32}),
        ("globals().setdefault('batch_size', 3)", {}),
        ("def _grow():\n    global batch_size\n    batch_size = 32\n_grow()", {"batch_size": 32}),
        ("batch_size = 12", {"batch_size": 12}),  # given, though it is the default
        ("globals().update(batch_size=12)", {"batch_size": 12}),
        ("batch_size += 20", {"batch_size": 32}),
        ("for batch_size in (1, 32):\n    pass", {"batch_size": 32}),
        ("with open(__file__) as _file:\n    dataset = _file.name[-9:]", {"dataset": "config.py"}),
        ("if (batch_size := 32):\n    pass", {"batch_size": 32}),
        ("try:\n    import no_such_module\nexcept ImportError:\n    batch_size = 32",
         {"batch_size": 32}),
        ("if False:\n    batch_size = 32", {}),
        ("_sizes = [batch_size for batch_size in (1, 2)]", {}),
        ("import os\nfrom math import sqrt\nclass Helper:\n    pass", {}),
        ("_n = 4\nbatch_size = 8 * _n\ndel _n", {"batch_size": 32}),
        ("from __future__ import annotations\nbatch_size: int = 32", {"batch_size": 32}),
        ("if __name__ == '__main__':\n    batch_size = 32", {"batch_size": 32}),
        ("import sys\nsys.path.pop(0)\nbatch_size = 32", {"batch_size": 32}),
        ("\ufeffbatch_size = 32", {"batch_size": 32}),
        ("", {}),
    ],
)  # fmt: skip
def test_what_counts_in_a_config_file(text, expected, bases):
    """Whatever it changes in its namespace."""
    settings, given = apply(config_file(bases, text, "config.py"))
    assert {key: settings[key] for key in given} == expected


def test_each_config_has_its_own_base(tmp_path):
    """Whatever another config, or train.py itself, has imported under that name."""
    for folder, size in (("a", 1), ("b", 2)):
        (tmp_path / folder).mkdir()
        for base in ("base", "configurator"):
            config_file(tmp_path / folder, f"batch_size = {size}\n", f"{base}.py")
            path = config_file(tmp_path / folder, f"from {base} import *", f"{base}_config.py")
            assert apply(path)[0]["batch_size"] == size
    assert sys.modules["configurator"].read_settings is read_settings
    assert "base" not in sys.modules and str(tmp_path / "a") not in sys.path


@pytest.mark.parametrize(
    "text, words",
    [
        ("batchsize = 3", ["unknown key 'batchsize'", "'batch_size'", "begin with an underscore"]),
        ("globals().update(batchsize=3)", ["unknown key 'batchsize'"]),
        ("for i in range(3):\n    pass", ["unknown key 'i'", "begin with an underscore"]),
        ("from math import pi", ["unknown key 'pi'"]),
        ("batch_size = max", ["config.py", "'batch_size'", "expected int"]),
        ("batch_size = '4'", ["'batch_size' is '4'", "expected int"]),
        ("batch_size = True", ["'batch_size' is True", "expected int"]),
        ("batch_size = = 4", ["config.py, line 1", "SyntaxError"]),
        ("batch_size = 4\nx = 1 / 0", ["line 2", "ZeroDivisionError"]),
        ("batch_size = undefined_name", ["line 1", "NameError", "undefined_name"]),
        ("import math as batch_size", ["batch_size", "expected int"]),
        ("from no_such_module import *", ["line 1", "No module named"]),
        ("from .base_config import *", ["line 1", "relative import"]),
        ("batch_size = 3\nexit()", ["config.py, line 2", "SystemExit"]),
        ("class _Odd(BaseException):\n    pass\nraise _Odd('odd')", ["line 3", "_Odd: odd"]),
        ("del batch_size", ["config.py", "deletes batch_size"]),
        ("globals().pop('dataset')", ["config.py", "deletes dataset"]),
        ("from broken import *", ["broken.py, line 2", "SyntaxError"]),
    ],
)
def test_what_is_refused_in_a_config_file(text, words, bases):
    message = refused(config_file(bases, text, "config.py"))
    assert all(word in message for word in words), message


# -----------------------------------------------------------------------------
# scripts with settings of their own

TOOL = """
\"\"\"A tool.\"\"\"
import json
source = "here"  # where from
target = ""  # where to
# what to do
print_ = False  # only print
jobs = (
    0  # how many
)
def main(): pass
late = 1
"""


@pytest.fixture
def tool(tmp_path):
    """The globals of a script with settings of its own."""
    path = tmp_path / "tool.py"
    path.write_text(TOOL.lstrip())
    script = {"__file__": str(path)}
    exec(path.read_text(), script)
    return script


def test_positional_arguments_are_settings(tool):
    places = ("source", "target")
    settings, given = configure(tool, ["a.py", "--jobs=2", "b"], places)
    assert settings == {"source": "a.py", "target": "b", "print": False, "jobs": 2}
    assert given == {"source": "a.py", "jobs": "--jobs=2", "target": "b"}
    assert (tool["source"], tool["target"], tool["jobs"]) == ("a.py", "b", 2)
    assert configure(tool, ["--target=c"], places)[1] == {"target": "--target=c"}
    with pytest.raises(InputError) as error:
        configure(tool, ["a", "b", "c", "--jobs=2"], places)
    assert "unexpected argument 'c': expected source and target, then flags" in str(error.value)


def test_a_setting_may_have_the_name_of_a_builtin(tool):
    settings, given = configure(tool, ["--print"])
    assert settings["print"] is True and "print_" not in settings and given["print"] == "--print"
    assert tool["print_"] is True and "print" not in tool
    with pytest.raises(InputError, match="unknown key 'print_'; the nearest known one is 'print'"):
        configure(tool, ["--print_"])


def test_a_tools_own_flags_are_told_from_others(tool):
    argv = ["--jobs=2", "a.py", "--n_layer=3", "--print", "--job=2", "b.py", "--late=1", "-h"]
    own, others, paths = split_argv(tool, argv)
    assert own == ["--jobs=2", "--print", "-h"]
    assert others == ["--n_layer=3", "--job=2", "--late=1"]
    assert paths == ["a.py", "b.py"]
    assert split_argv(tool, ["--help"]) == (["--help"], [], [])


def test_a_tools_help(tool, capsys):
    with pytest.raises(SystemExit) as end:
        configure(tool, ["x", "--help"], ("source",))
    assert end.value.code in (0, None)
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert [" ".join(line.split()) for line in lines] == [
        "A tool.",
        "",
        "settings:",
        "--source='here' where from",
        "--target='' where to",
        "",
        "what to do:",
        "--print=False only print",
        "--jobs=0 how many",
    ]
