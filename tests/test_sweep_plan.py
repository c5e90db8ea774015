"""tools/sweep_plan.py: the runs that a sweep file asks for, and bad sweep files."""

import json

import pytest

from configurator import InputError
from moe_model import build_config, build_model
from nanomoe.log import share_done
from tests.helpers import MACBETH, ROOT
from tests.sweeps import BASE, RUNS, plan, small_sweep, sweep, write
from tools.sweep_plan import read_sweep

SWEEPS = sorted((ROOT / "config" / "sweeps").glob("*.py"))
SIZES = {  # what can be matched, and what counts it in a model
    "active_flops": "flops_per_token",
    "active_params": "num_active_params",
    "total_params": "num_params",
}


@pytest.fixture
def file(tmp_path, play):
    return small_sweep(tmp_path, play)


def model_of(settings, **changed):
    return build_model(build_config(settings | {"vocab_size": 76} | changed))


def test_dry_run(file):
    done = sweep(file, "--dry_run")
    assert done.returncode == 0 and not (file.parent / "out").exists(), done.stderr
    header, *rows, last = done.stdout.splitlines()
    vocab_size = len(set(MACBETH))
    groups = plan(file, vocab_size=vocab_size).groups
    for group, line in zip(groups, rows, strict=True):
        model = model_of(group.settings, vocab_size=vocab_size)
        for size, count in SIZES.items():
            assert group.sizes[size] == getattr(model, count)()
        assert f"{model.num_params() / 1e6:.2f}M" in line
        assert f"{model.flops_per_token() / 1e6:.2f}" in line
    assert header.split()[:4] == ["seeds", "done", "params", "active"]
    off = groups[1].match.split()[3]
    assert rows[1].endswith(f"active_flops of 'dense' {off} with expert_dim=128")
    assert last.startswith("4 runs, 2 at a time on cpu")


def test_lengths(file):
    """A run's own length goes before that of all, in its command, too; a flag before the file's."""
    step = BASE["batch_size"] * BASE["block_size"] * BASE["gradient_accumulation_steps"]
    runs = {"steps": {}, "tokens": {"max_tokens": 7 * step - 1}, "two": {"max_iters": 3}}
    runs["two"] |= runs["tokens"]
    write(file, base=BASE, runs=runs)
    steps, tokens = plan(file).groups
    assert steps.flags["max_iters"] == BASE["max_iters"] and "max_iters" not in tokens.flags
    assert tokens.settings["max_iters"] == 7 and tokens.flags["max_tokens"] == 7 * step - 1
    assert "'two' is left out: max_iters and max_tokens say how long" in plan(file).problems[0]
    base = {key: value for key, value in BASE.items() if key != "max_iters"} | {"max_tokens": step}
    write(file, base=base, runs={"all": {}, "own": {"max_iters": 3}})
    every, own = plan(file).groups
    assert every.settings["max_iters"] == 1 and "max_tokens" not in own.flags
    write(file, base=base, runs={"all": {}})
    (forced,) = plan(file, "--max_iters=5").groups
    assert forced.settings["max_iters"] == 5 and "max_tokens" not in forced.flags
    write(file, base=BASE, runs={"epochs": {"max_epochs": 1.0}})
    assert "give max_tokens or max_iters" in plan(file).problems[0]


@pytest.mark.parametrize("quantity", SIZES)
@pytest.mark.parametrize("mlp", ["gelu", "swiglu"])
def test_matched(file, quantity, mlp):
    """The widths next to the chosen one are no nearer, dense to MoE and MoE to dense."""
    runs = {
        "dense": {"use_moe": False},
        "moe": {"use_moe": True, "num_experts": 8, "top_k": 2, "num_shared_experts": 1},
        "wide": {"use_moe": False, "match_to": "big"},
        "big": {"use_moe": True, "num_experts": 8, "match": ""},
    }
    base = BASE | {"mlp": mlp, "n_embd": 64, "bias": True}
    write(file, base=base, runs=runs, baseline="dense", match=quantity)
    groups = {group.name: group for group in plan(file).groups}

    def value(name, **changed):
        return getattr(model_of(groups[name].settings, **changed), SIZES[quantity])()

    assert groups["dense"].match == groups["big"].match == ""
    for name, key, to in (("moe", "expert_dim", "dense"), ("wide", "mlp_dim", "big")):
        width, target = groups[name].settings[key], value(to)
        unit = 8 if width < 1024 else 64
        assert width % unit == 0 and groups[name].flags[key] == width
        widths = [w for w in (width - unit, width, width + unit) if w > 0]
        off = {w: abs(value(name, **{key: w}) - target) for w in widths}
        assert min(off, key=off.get) == width
        assert f"{value(name) / target - 1:+.2%} with {key}={width}" in groups[name].match


def test_large_widths_are_multiples_of_64(file):
    runs = {"dense": {"use_moe": False}, "moe": {"use_moe": True, "num_experts": 16, "top_k": 1}}
    write(file, base=BASE | {"n_embd": 512}, baseline="dense", match="active_flops", runs=runs)
    assert plan(file).groups[1].settings["expert_dim"] == 2048


def test_an_end_before_the_last_start_does_not_count(tmp_path):
    settings = {"max_iters": 40, "max_seconds": 0.0}
    lines = [{"start": 1, "settings": {}}, {"step": 20, "seconds": 9.0}, {"end": 1, "steps": 20}]
    again = {"start": 2}
    for more, of_steps, of_seconds in (
        ([], 1, 1),
        ([again], 0.5, 0.5),
        ([again, {"step": 30, "seconds": 12.0}], 0.75, 2 / 3),
    ):
        text = "".join(json.dumps(line) + "\n" for line in lines + more)
        (tmp_path / "log.jsonl").write_text(text + '5\n{"step": 3')
        assert share_done(tmp_path, settings) == of_steps
        assert share_done(tmp_path, settings | {"max_seconds": 18.0}) == pytest.approx(of_seconds)
    assert share_done(tmp_path / "nowhere", settings) == 0


def test_grid_sizes_and_flags(file):
    file.write_text(
        '"""Q"""\nbase = {"laptop": {"config": "config/train_plays_char_moe.py", "max_iters": 7},\n'
        '        "gpt2": {"config": "config/train_gpt2_moe.py"}}\n'
        'grid = {"num_experts": [2, 4], "top_k": [1, 2]}\nruns = {size: {"top_k": 1}}\n'
    )
    small, large = plan(file, "--n_layer=3"), plan(file, size="gpt2")
    names = [f"num_experts={e},top_k={k}" for e in (2, 4) for k in (1, 2)]
    assert [group.name for group in small.groups] == ["laptop", *names]
    assert [group.name for group in large.groups] == ["gpt2", *names]
    assert small.groups[2].settings["top_k"] == 2 and small.groups[2].settings["num_experts"] == 2
    for group in small.groups:
        assert group.settings["n_layer"] == group.flags["n_layer"] == 3
        assert group.settings["max_iters"] == 7
    for group in large.groups:
        assert group.settings["n_layer"] == 12 and group.config == "config/train_gpt2_moe.py"
    assert small.runs[1].folder.name == "num_experts=2,top_k=1,seed=1337" and not small.problems


def runs(**more):
    return {"runs": RUNS | more}


TWO_OF_A_NAME = {"top_k=1": {"num_expert": 1}}


@pytest.mark.parametrize(
    "changes, left_out, words",
    [
        (runs(x={"num_expert": 4}), ["x"], "unknown key 'num_expert'; the nearest known one is"),
        (runs(x={"num_experts": "four"}), ["x"], "'four', expected int"),
        (runs(x={"use_moe": True, "top_k": 9}), ["x"], "top_k (9)"),
        (runs(**{"4-experts": {"use_moe": False}}), ["4-experts"], "that of run '4 experts'"),
        ({"seeds": [1, 1]}, ["dense", "4 experts"], "with seed 1"),
        ({"grid": {"top_k": []}}, [], "the grid is empty: top_k has no values"),
        ({"grid": {"top_k": [1, 1]}, **runs(**TWO_OF_A_NAME)}, ["top_k=1"] * 3, "of the grid"),
        (runs(x={"batch_size": 0}), ["x"], "batch_size is 0"),
        (runs(x={"learning_rate": -1.0}), ["x"], "learning_rate is -1.0"),
        (runs(x={"match": ["a"], "match_to": ["b"]}), ["x"], "['a'] of '['b']'"),
        ({"grid": {"tpo_k": [1]}}, ["tpo_k=1"], "'top_k'"),
        (runs(x={"expert_dim": 8, "use_moe": True}), ["x"], "it sets expert_dim, but match"),
        (runs(x={"seed": 8}), ["x"], "it sets seed"),
        (runs(x={"seeds": 8}), ["x"], "seeds are 8"),
        (runs(x={"seeds": []}), ["x"], "seeds are []"),
        (runs(a={"match_to": "b"}, b={"match_to": "a"}), ["a", "b"], "which is to match it"),
        (runs(x={"match": "flops"}), ["x"], "flops of 'dense', expected active_flops"),
    ],
)
def test_what_is_wrong_is_left_out(tmp_path, play, changes, left_out, words):
    found = plan(small_sweep(tmp_path, play, **{"seeds": [1]} | changes))
    told = "\n".join(found.problems)
    assert len(found.problems) == max(1, len(left_out)) and words in told, told
    for name in left_out:
        assert f"run '{name}' " in told and "is left out: " in told, told
    assert [run.folder.name for run in found.runs] == ["dense,seed=1", "4-experts,seed=1"]


GOOD = "base = {'config': 'config/train_gpt2.py'}\n"


@pytest.mark.parametrize(
    "text, words",
    [
        ("", "base is {}"),
        ("base = {'config': 'nowhere.py'}", "nowhere.py: no such config file"),
        ("base = {'laptop': {'max_iters': 1}}", "base is {'laptop': {'max_iters': 1}}"),
        ("base = {'gpt2': {'config': 'config/a.py'}}", "one for each size, like {'laptop'"),
        (
            "base = {'config': 'config/train_gpt2.py', 'max_itres': 1}",
            "unknown key 'max_itres'; the nearest known one is 'max_iters'",
        ),
        ("grids = {}", "unknown key 'grids'; the nearest known one is 'grid'"),
        ("runs = ['dense']", "'runs' is ['dense'], expected dict"),
        (GOOD + "runs = {'dense': 1}", "runs has 'dense': 1"),
        (GOOD + "runs = {1: {}}", "runs has 1: {}"),
        (GOOD + "runs = {'dense': {1: 2}}", "runs has 'dense': {1: 2}"),
        (GOOD + "grid = {'top_k': 2}", "grid has 'top_k': 2"),
        (GOOD + "seeds = [-1]", "seeds is [-1]"),
        (GOOD + "seeds = []", "seeds is []"),
        (GOOD + "findings = ['text']", "findings is ['text']"),
        (GOOD + "base |= {'seed': 2}", "seed: the sweep itself sets that"),
        (GOOD + "base |= {'init_from': 'x'}", "init_from: the sweep itself sets that"),
        (GOOD + "runs = {'dense': {}}\nbaseline = 'dens'", "baseline is 'dens'"),
        (GOOD + "runs = 1 / 0", "line 2: ZeroDivisionError"),
    ],
)
def test_bad_files(tmp_path, text, words):
    path = tmp_path / "bad.py"
    path.write_text(text + "\n")
    with pytest.raises(InputError) as error:
        plan(path)
    assert "\n" not in str(error.value) and words in str(error.value)


def test_bad_calls_are_one_line(file):
    bad = file.parent / "bad.py"
    bad.write_text(GOOD)
    for arguments, words in (
        ([bad], f"{bad}: there is no run that can be run"),
        ([file, "--jobs=-1"], "jobs is -1, expected at least 0"),
        ([file, "--gpus=0,"], "gpus is '0,', expected numbers, like 0,1"),
        ([file, "config/a.py"], "unexpected argument 'config/a.py': expected file"),
        ([file, "--seed=3"], "seed: the sweep itself sets that"),
    ):
        done = sweep(*arguments)
        assert done.returncode == 2 and done.stderr.startswith(f"error: {words}"), done.stderr
        assert done.stderr.count("\n") == 1, done.stderr


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
@pytest.mark.parametrize("size", ["laptop", "gpt2"])
def test_every_sweep_can_be_run(path, size):
    """In both sizes; with a baseline, and what is matched nearly equal."""
    found, sweep = plan(path, size=size), read_sweep(path, size)
    assert path.read_text().startswith('"""') and not found.problems
    assert len(found.runs) >= 6 and len(sweep["seeds"]) == 3
    assert sweep["baseline"] and found.groups[0].name == sweep["baseline"]
    for group in found.groups:
        off = group.match.partition("' ")[2].split("%")[0]
        assert not group.match or abs(float(off)) < 4, group.match
    names = {group.name for group in found.groups}
    for finding in sweep["findings"]:
        assert set(finding) == {"claim", "source", "theirs", "runs", "metric", "expect"}
        assert set(finding["runs"]) <= names and finding["expect"] in ("lower", "higher")
