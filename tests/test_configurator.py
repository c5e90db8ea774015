"""Config files and flags: nanoGPT's way, without its faults."""

import random

import pytest

import train
from configurator import InputError, configure, read_defaults, split_argv
from nanomoe.errors import note
from tests.helpers import ROOT, run_script
from tests.helpers import train as run_train


def apply(*argv):
    return configure(dict(vars(train)), argv, retired=train.RETIRED, note=note)


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
    b = config_file(
        tmp_path,
        "batch_size = 3\nlr_decay_iters = max_iters // 2  # sees what came before\n",
        "b.py",
    )
    settings, given = apply(
        a, b, "--learning_rate=1", "--eval_only", "--compile=False", "--wandb_run_name=x=a=b"
    )
    assert (settings["batch_size"], settings["max_iters"], settings["lr_decay_iters"]) == (3, 10, 5)
    assert settings["learning_rate"] == 1.0 and isinstance(settings["learning_rate"], float)
    assert (
        settings["eval_only"] is True
        and settings["compile"] is False
        and settings["wandb_run_name"] == "x=a=b"
    )
    assert (
        given["batch_size"] == b
        and given["learning_rate"] == "--learning_rate=1"
        and "n_layer" not in given
    )
    assert settings["n_layer"] == train.n_layer


def test_a_value_equal_to_the_default_counts_as_given(tmp_path):
    _, given = apply(config_file(tmp_path, "n_layer = 12\n"))
    assert "n_layer" in given


def test_flags_update_the_script_in_place():
    script = dict(vars(train))
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
    assert set(keys.split()) <= set(read_defaults((ROOT / "train.py").read_text())) | set(
        train.RETIRED
    )


def test_a_nanogpt_config_file_runs_unchanged(tmp_path):
    text = (
        "import time\n\nout_dir = 'out-x'\nwandb_run_name = 'ft-' + str(time.time())\n"
        "batch_size = 12\ngradient_accumulation_steps = 5 * 8\nmax_iters = 2000\n"
        "lr_decay_iters = 2000\ndevice = 'cpu'\ncompile = False\ndtype = 'float16'\n"
        "backend = 'nccl'\n_private = [1]\n\ndef helper():\n    return 1\n"
    )
    settings, _ = apply(config_file(tmp_path, text))
    assert settings["gradient_accumulation_steps"] == 40 and settings["wandb_run_name"].startswith(
        "ft-"
    )


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


@pytest.mark.parametrize(
    "text, words",
    [
        ("batch_size = 4\nn_layers = 3\n", ["unknown key 'n_layers'", "'n_layer'"]),
        ("batch_size = '4'\n", ["batch_size", "expected int"]),
        ("batch_size = True\n", ["batch_size", "expected int"]),
        ("n_layer = [1]\n", ["n_layer", "expected int"]),
        ("batch_size = = 4\n", ["line 1", "SyntaxError"]),
        ("batch_size = 4\nx = 1 / 0\n", ["line 2", "ZeroDivisionError"]),
        ("batch_size = undefined_name\n", ["line 1", "NameError", "undefined_name"]),
    ],
)
def test_bad_config_files(tmp_path, text, words):
    path = config_file(tmp_path, text)
    message = refused(path)
    assert all(word in message for word in [path, *words]), message


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
    rng, keys = random.Random(0), list(read_defaults((ROOT / "train.py").read_text()))
    for _ in range(100):
        key = rng.choice([k for k in keys if len(k) > 4])
        typo = misspell(key, rng)
        if typo not in keys and typo != "bet1a":  # which is as near to beta2
            assert f"'{key}'" in refused(f"--{typo}=1"), typo


CONTRADICTIONS = [
    ("use_moe = True\nnum_experts = 4\ntop_k = 5", ["top_k (5)", "num_experts (4)"]),
    ("n_head = 5\nn_embd = 64", ["n_embd (64)", "n_head (5)"]),
    ("n_head = 4\nn_embd = 64\nn_kv_head = 3", ["n_head (4)", "n_kv_head (3)"]),
    ("position = 'rope'\nn_head = 2\nn_embd = 6", ["rope", "3"]),
    ("use_moe = True\nn_layer = 2\nnum_dense_layers = 2", ["no layer is MoE"]),
    (
        "use_moe = True\nrouter_score = 'sigmoid'\nrouter_z_loss_coef = 0.1",
        ["router_z_loss_coef", "sigmoid"],
    ),
    ("dtype = 'float16'\nspike_guard = 6.0", ["spike_guard", "float16"]),
    ("parallel = 'fsdp'\ndtype = 'float16'", ["fsdp", "float16"]),
    ("block_size = 10**9", ["block_size (1000000000)"]),
    ("beta1 = 1.0", ["beta1 is 1.0"]),
    ("learning_rate = -1.0", ["learning_rate is -1.0"]),
    ("norm = 'batchnorm'", ["norm is 'batchnorm'", "rmsnorm"]),
    ("parallel = 'ddpp'", ["parallel is 'ddpp'", "fsdp"]),
    ("dataset = 'shakespear'", ["no dataset 'shakespear'"]),
    ("init_from = 'resum'", ["no checkpoint at resum"]),
    ("weight_decay = float('nan')", ["weight_decay is nan"]),
    ("device = 'tpu'", ["device is 'tpu'"]),
    ("batch_size = 0", ["batch_size is 0"]),
]


def mistake(seed):
    """A line for a config file that is a typo, has the wrong type or contradicts another setting;
    and the words that its error must have."""
    rng, keys = random.Random(seed), list(read_defaults((ROOT / "train.py").read_text()))
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
    return rng.choice(CONTRADICTIONS)


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
    for key, (comment, heading) in read_defaults((ROOT / "train.py").read_text()).items():
        assert f"--{key}=" in done.stdout and comment and comment in done.stdout, key
        assert f"\n{heading}:\n" in done.stdout
    assert "--gradient_accumulation_steps=40" in done.stdout
    assert run_script("sample.py", "-h").stdout.count("\n  --") == 17


def test_one_line_and_exit_code_2(tmp_path):
    done = run_script("train.py", "--n_layr=3", cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert (
        done.stderr
        == "error: --n_layr=3: unknown key 'n_layr'; the nearest known one is 'n_layer'\n"
    )


@pytest.mark.parametrize("key", train.RETIRED)
def test_a_retired_setting_is_noted_and_ignored(key, tmp_path, capsys, monkeypatch):
    why, value = train.RETIRED[key], "x"
    if isinstance(why, tuple):
        why, (value, *_) = why
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


def test_a_run_with_retired_settings_ends_well(play, tmp_path):
    path = config_file(tmp_path, "upcycle_noise = 0.0\n")
    out_dir = tmp_path / "out"
    done = run_train(path, "--debug_nans", dataset=play, out_dir=out_dir, backend="nccl")
    assert done.returncode == 0, done.stderr
    notes = [line for line in done.stderr.splitlines() if line.startswith("note: ")]
    assert len(notes) == 3 and f"note: {path}: 'upcycle_noise'" in done.stderr


TOOL = """
\"\"\"A tool.\"\"\"
import json
source = "here"  # where from
target = ""  # where to
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
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].strip() == "A tool."
    rows = [line.split(maxsplit=1) for line in lines if line.startswith("  --")]
    assert rows == [
        ["--source='here'", "where from"],
        ["--target=''", "where to"],
        ["--print=False", "only print"],
        ["--jobs=0", "how many"],
    ]
