"""tools/sweep_plan.py: the runs that a sweep file asks for, and bad sweep files."""

import json

import pytest

from configurator import InputError
from moe_model import build_config, build_model
from nanomoe.log import share_done
from tests.helpers import MACBETH, ROOT
from tests.sweeps import RUNS, ended, folders, plan, small_sweep, sweep, write
from tools.sweep_plan import read_sweep

SWEEPS = sorted((ROOT / "config" / "sweeps").glob("*.py"))


@pytest.fixture
def file(tmp_path, play):
    return small_sweep(tmp_path, play)


def test_dry_run(file):
    done = sweep(file, "--dry_run")
    assert done.returncode == 0 and not (file.parent / "out").exists(), done.stderr
    header, dense, moe, last = done.stdout.splitlines()
    groups = plan(file, vocab_size=len(set(MACBETH))).groups
    for group, line in zip(groups, (dense, moe), strict=True):
        vocab_size = len(set(MACBETH))
        model = build_model(build_config(group.settings | {"vocab_size": vocab_size}))
        assert group.sizes["total_params"] == model.num_params()
        assert group.sizes["active_params"] == model.num_active_params()
        assert group.sizes["active_flops"] == model.flops_per_token()
        assert f"{model.num_params() / 1e6:.2f}M" in line
        assert f"{model.flops_per_token() / 1e6:.2f}" in line
    assert header.split() == [
        "seeds",
        "done",
        "params",
        "active",
        "MFLOPs/token",
        "tokens",
        "GB",
        "matched",
    ]
    assert moe.endswith(f"active_flops of 'dense' {groups[1].match.split()[3]} with expert_dim=128")
    assert last.startswith("4 runs, 2 at a time on cpu")


def test_a_run_may_have_its_own_seeds(file):
    base = read_sweep(file, "laptop")["base"]
    runs = RUNS | {"once": {"use_moe": False, "seeds": [7]}}
    write(file, base=base, runs=runs, seeds=[1, 2])
    assert {run.seed for run in plan(file).runs if run.group.name == "once"} == {7}
    assert {run.seed for run in plan(file).runs if run.group.name == "dense"} == {1, 2}


def test_lengths_in_tokens(file):
    """A run's own length goes before that of all, in its command, too."""
    base = read_sweep(file, "laptop")["base"]
    step = base["batch_size"] * base["block_size"] * base.get("gradient_accumulation_steps", 40)
    write(file, base=base, runs={"steps": {}, "tokens": {"max_tokens": 7 * step - 1}})
    steps, tokens = plan(file).groups
    assert steps.flags["max_iters"] == base["max_iters"] and "max_iters" not in tokens.flags
    assert tokens.settings["max_iters"] == 7 and tokens.flags["max_tokens"] == 7 * step - 1
    del base["max_iters"]
    write(file, base=base | {"max_tokens": step}, runs={"all": {}, "own": {"max_iters": 3}})
    every, own = plan(file).groups
    assert every.settings["max_iters"] == 1 and "max_tokens" not in own.flags
    write(file, base=base, runs={"epochs": {"max_epochs": 1.0}})
    assert "give max_tokens or max_iters" in plan(file).problems[0]


@pytest.mark.parametrize(
    "quantity, count",
    [
        ("active_flops", "flops_per_token"),
        ("active_params", "num_active_params"),
        ("total_params", "num_params"),
    ],
)
@pytest.mark.parametrize("mlp", ["gelu", "swiglu"])
def test_matched(file, quantity, count, mlp):
    """The widths next to the chosen one are no nearer, dense to MoE and MoE to dense."""
    runs = {
        "dense": {"use_moe": False},
        "moe": {"use_moe": True, "num_experts": 8, "top_k": 2, "num_shared_experts": 1},
        "wide": {"use_moe": False, "match_to": "big"},
        "big": {"use_moe": True, "num_experts": 8, "match": ""},
    }
    base = read_sweep(file, "laptop")["base"] | {"mlp": mlp, "n_embd": 64, "bias": True}
    write(file, base=base, runs=runs, baseline="dense", match=quantity)
    groups = {group.name: group for group in plan(file).groups}

    def value(name, **changed):
        return getattr(
            build_model(build_config(groups[name].settings | {"vocab_size": 76} | changed)), count
        )()

    assert groups["dense"].match == groups["big"].match == ""
    for name, key, target in (
        ("moe", "expert_dim", value("dense")),
        ("wide", "mlp_dim", value("big")),
    ):
        width = groups[name].settings[key]
        unit = 8 if width < 1024 else 64
        assert width % unit == 0 and groups[name].flags[key] == width
        off = {
            w: abs(value(name, **{key: w}) - target)
            for w in (width - unit, width, width + unit)
            if w > 0
        }
        assert min(off, key=off.get) == width
        assert f"{value(name) / target - 1:+.2%} with {key}={width}" in groups[name].match


def test_large_widths_are_multiples_of_64(file):
    write(
        file,
        base=read_sweep(file, "laptop")["base"] | {"n_embd": 512},
        baseline="dense",
        match="active_flops",
        runs={"dense": {"use_moe": False}, "moe": {"use_moe": True, "num_experts": 16, "top_k": 1}},
    )
    assert plan(file).groups[1].settings["expert_dim"] == 2048


def test_an_end_before_the_last_start_does_not_count(tmp_path):
    settings = {"max_iters": 40, "max_seconds": 0.0}
    lines = [{"start": 1, "settings": {}}, {"step": 20, "seconds": 9.0}, {"end": 1, "steps": 20}]
    for more, share in (
        ([], 1),
        ([{"start": 2}], 0.5),
        ([{"start": 2}, {"step": 30, "seconds": 12.0}], 0.75),
    ):
        (tmp_path / "log.jsonl").write_text(
            "".join(json.dumps(line) + "\n" for line in lines + more) + '5\n{"step": 3'
        )
        assert share_done(tmp_path, settings) == share
        assert share_done(tmp_path, settings | {"max_seconds": 18.0}) == (
            share if not more else 0.5 if len(more) == 1 else pytest.approx(2 / 3)
        )
    assert share_done(tmp_path / "nowhere", settings) == 0


def test_grid_sizes_and_flags(file):
    file.write_text(
        '"""Q"""\nbase = {"laptop": {"config": "config/train_plays_char_moe.py", "max_iters": 7},\n'
        '        "gpt2": {"config": "config/train_gpt2_moe.py"}}\n'
        'grid = {"num_experts": [2, 4], "top_k": [1, 2]}\nruns = {size: {"top_k": 1}}\n'
    )
    small, large = plan(file, "--n_layer=3"), plan(file, size="gpt2")
    names = [f"num_experts={e},top_k={k}" for e in (2, 4) for k in (1, 2)]
    assert [g.name for g in small.groups] == ["laptop", *names] and [
        g.name for g in large.groups
    ] == ["gpt2", *names]
    assert small.groups[2].settings["top_k"] == 2 and small.groups[2].settings["num_experts"] == 2
    assert all(
        g.settings["n_layer"] == 3 and g.settings["max_iters"] == 7 and g.flags["n_layer"] == 3
        for g in small.groups
    )
    assert all(
        g.settings["n_layer"] == 12 and g.config == "config/train_gpt2_moe.py" for g in large.groups
    )
    assert [run.folder.name for run in small.runs][
        1
    ] == "num_experts=2,top_k=1,seed=1337" and not small.problems


@pytest.mark.parametrize(
    "changes, words",
    [
        (
            {"runs": RUNS | {"typo": {"num_expert": 4}}},
            ["run 'typo' is left out", "'num_expert'", "'num_experts'"],
        ),
        (
            {"runs": RUNS | {"type": {"num_experts": "four"}}},
            ["run 'type' is left out", "'four', expected int"],
        ),
        (
            {"runs": RUNS | {"wrong": {"use_moe": True, "top_k": 9}}},
            ["run 'wrong' is left out", "top_k (9)"],
        ),
        (
            {"runs": RUNS | {"4-experts": {"use_moe": False}}},
            ["'4-experts' with seed 1 is left out", "that of run '4 experts'"],
        ),
        (
            {"seeds": [1, 1]},
            ["'dense' with seed 1 is left out", "'4 experts' with seed 1 is left out"],
        ),
        ({"grid": {"top_k": []}}, ["the grid is empty: top_k has no values"]),
        (
            {"grid": {"top_k": [1, 1]}, "match": "", "runs": RUNS | {"top_k=1": {"num_expert": 1}}},
            [
                "run 'top_k=1' of the grid is left out",
                "run 'top_k=1' of the grid is left out",
                "run 'top_k=1' is left out",
            ],
        ),
        (
            {"runs": RUNS | {"none": {"batch_size": 0}}},
            ["run 'none' is left out", "batch_size is 0"],
        ),
        (
            {"runs": RUNS | {"list": {"match": ["a"], "match_to": ["b"]}}},
            ["run 'list' is left out", "['a'] of '['b']'"],
        ),
        ({"grid": {"tpo_k": [1]}}, ["run 'tpo_k=1' is left out", "'top_k'"]),
        (
            {"runs": RUNS | {"own": {"expert_dim": 8, "use_moe": True}}},
            ["run 'own' is left out", "expert_dim", "solve"],
        ),
        ({"runs": RUNS | {"own": {"seed": 8}}}, ["run 'own' is left out", "seed"]),
        ({"runs": RUNS | {"own": {"seeds": 8}}}, ["run 'own' is left out", "seeds are 8"]),
        ({"runs": RUNS | {"own": {"seeds": []}}}, ["run 'own' is left out", "seeds are []"]),
        (
            {"runs": RUNS | {"a": {"match_to": "b"}, "b": {"match_to": "a"}}},
            ["run 'a' is left out", "run 'b' is left out"],
        ),
        (
            {"runs": RUNS | {"a": {"match": "flops"}}},
            ["run 'a' is left out", "flops of 'dense'", "active_flops"],
        ),
    ],
)
def test_what_is_wrong_is_left_out(file, changes, words):
    write(
        file,
        **{
            "base": read_sweep(file, "laptop")["base"],
            "runs": RUNS,
            "seeds": [1],
            "baseline": "dense",
            "match": "active_flops",
        }
        | changes,
    )
    found = plan(file)
    assert len(found.problems) == len([w for w in words if "is left out" in w or "empty" in w]), (
        found.problems
    )
    assert all(word in "\n".join(found.problems) for word in words), found.problems
    assert [run.folder.name for run in found.runs] == ["dense,seed=1", "4-experts,seed=1"]


def test_the_other_runs_still_run(file):
    base = read_sweep(file, "laptop")["base"] | {"max_iters": 1}
    wrong = {
        "typo": {"num_expert": 4},
        "4-experts": {"use_moe": False},
        "away": {"dataset": "nowhere"},
    }
    write(file, base=base, runs=RUNS | wrong, grid={"top_k": []}, seeds=[1], baseline="dense")
    done = sweep(file)
    told = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2 and len(told) == 4 and "2 of 2 runs are done" in done.stdout, (
        done.stderr
    )
    assert any("no dataset 'nowhere'" in line for line in told) and any(
        "the grid is empty" in line for line in told
    )
    assert [folder.name for folder in folders(file) if ended(folder)] == [
        "4-experts,seed=1",
        "dense,seed=1",
    ]


@pytest.mark.parametrize(
    "text, words",
    [
        ("", ["base is {}"]),
        ("base = {'config': 'nowhere.py'}\n", ["nowhere.py: no such config file"]),
        ("base = {'laptop': {'max_iters': 1}}\n", ["base is {'laptop': {'max_iters': 1}}"]),
        (
            "base = {'gpt2': {'config': 'config/train_gpt2.py'}}\n",
            ["one for each size, like {'laptop'"],
        ),
        ("base = {'config': 'config/train_gpt2.py', 'max_itres': 1}\n", ["max_itres", "max_iters"]),
        ("grids = {}\n", ["unknown key 'grids'", "'grid'"]),
        ("runs = ['dense']\n", ["'runs' is ['dense'], expected dict"]),
        (
            "base = {'config': 'config/train_gpt2.py'}\nruns = {'dense': 1}\n",
            ["runs has 'dense': 1"],
        ),
        ("base = {'config': 'config/train_gpt2.py'}\nruns = {1: {}}\n", ["runs has 1: {}"]),
        (
            "base = {'config': 'config/train_gpt2.py'}\nruns = {'dense': {1: 2}}\n",
            ["runs has 'dense': {1: 2}"],
        ),
        (
            "base = {'config': 'config/train_gpt2.py'}\nruns = {'dense': {}}\nseeds = [-1]\n",
            ["seeds is [-1]"],
        ),
        (
            "base = {'config': 'config/train_gpt2.py'}\n"
            "runs = {'dense': {}}\nfindings = ['text']\n",
            ["findings is ['text']"],
        ),
        (
            "base = {'config': 'config/train_gpt2.py', 'seed': 2}\nruns = {'dense': {}}\n",
            ["seed: the sweep itself sets that"],
        ),
        (
            "base = {'config': 'config/train_gpt2.py', 'init_from': 'x'}\nruns = {'dense': {}}\n",
            ["init_from: the sweep itself"],
        ),
        (
            "base = {'config': 'config/train_gpt2.py'}\nruns = {'dense': {}}\nbaseline = 'dens'\n",
            ["baseline is 'dens'"],
        ),
        (
            "base = {'config': 'config/train_gpt2.py'}\nruns = {'dense': {}}\nseeds = []\n",
            ["seeds is []"],
        ),
        (
            "base = {'config': 'config/train_gpt2.py'}\nruns = 1 / 0\n",
            ["line 2: ZeroDivisionError"],
        ),
    ],
)
def test_bad_files(tmp_path, text, words):
    path = tmp_path / "bad.py"
    path.write_text(text)
    with pytest.raises(InputError) as error:
        plan(path)
    assert "\n" not in str(error.value) and all(word in str(error.value) for word in words)


def test_bad_calls_are_one_line(file):
    (file.parent / "bad.py").write_text("base = {'config': 'config/train_gpt2.py'}\n")
    for done, words in (
        (
            sweep(file.parent / "bad.py"),
            f"{file.parent / 'bad.py'}: there is no run that can be run",
        ),
        (sweep(file, "--jobs=-1"), "jobs is -1, expected at least 0"),
        (sweep(file, "--gpus=0,"), "gpus is '0,', expected numbers, like 0,1"),
        (
            sweep(file, "config/train_gpt2.py"),
            "unexpected argument 'config/train_gpt2.py': expected file",
        ),
    ):
        assert (
            done.returncode == 2
            and done.stderr.startswith(f"error: {words}")
            and done.stderr.count("\n") == 1
        ), done.stderr


def test_a_folder_that_holds_another_run_is_left_alone(file):
    assert sweep(file, max_iters=2).returncode == 0
    before = [(folder / "log.jsonl").read_bytes() for folder in folders(file)]
    (file.parent / "out" / "4-experts,seed=1" / "log.jsonl").unlink()
    done = sweep(file, "--print", max_iters=3)  # what is left out is no part of a report, either
    index = json.loads((file.parent / "out" / "sweep.json").read_text())["runs"]
    assert (
        done.returncode == 2
        and index["dense"]["folders"] == []
        and index["4 experts"]["folders"] == ["4-experts,seed=1"]
    )
    (file.parent / "out" / "4-experts,seed=1" / "log.jsonl").write_bytes(before[0])
    done = sweep(file, max_iters=3)
    assert (
        sweep(file, max_iters=2, dtype="bfloat16").stderr.count("dtype=float32 instead of bfloat16")
        == 4
    )
    assert (
        done.returncode == 2
        and "max_iters=2 instead of 3" in done.stderr
        and "no run that can be run" in done.stderr
    )
    assert [(folder / "log.jsonl").read_bytes() for folder in folders(file)] == before
    with pytest.raises(InputError, match="the sweep itself sets"):
        plan(file, "--seed=3")


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
@pytest.mark.parametrize("size", ["laptop", "gpt2"])
def test_every_sweep_can_be_run(path, size):
    """In both sizes; with a baseline, and what is matched nearly equal."""
    found, sweep = plan(path, size=size), read_sweep(path, size)
    assert (
        path.read_text().startswith('"""')
        and not found.problems
        and len(found.runs) >= 6
        and len(sweep["seeds"]) == 3
    )
    assert sweep["baseline"] and found.groups[0].name == sweep["baseline"]
    for group in found.groups:
        assert not group.match or abs(float(group.match.partition("' ")[2].split("%")[0])) < 4, (
            group.match
        )
    names = {group.name for group in found.groups}
    for finding in sweep["findings"]:
        assert set(finding) == {"claim", "source", "theirs", "runs", "metric", "expect"}
        assert set(finding["runs"]) <= names and finding["expect"] in ("lower", "higher")
