"""The READMEs say what is so: quoted code, links, flags, names, length, and the two commands."""

import re

import pytest

from configurator import read_defaults
from tests.helpers import ROOT

CONFIG_README = (ROOT / "config" / "README.md").read_text()
README = ROOT / "README.md"
# those of the folders, which GitHub shows below the list of their files
PAGES = [README, *sorted(ROOT.glob("*/README.md")), ROOT / "assets" / "RESULTS.md"]
COMMANDS = (
    "    pip install -r requirements.txt && python data/plays_char/prepare.py"
    " && python train.py config/train_plays_char_moe.py",
    "    pip install -r requirements-dev.txt && pytest",
)


def code_lines(text):
    """The lines of all code blocks; a command that continues with a backslash is one line."""
    lines = []
    fenced = False
    for line in text.replace("\\\n", " ").splitlines():
        if line.startswith("```"):
            fenced = not fenced
        elif fenced or line.startswith("    "):
            lines.append(line)
    return lines


def unknown_flags(text):
    """(script, flag) for every flag of train.py or sample.py that is not a setting of it."""
    found = []
    for line in code_lines(text):
        for script, arguments in re.findall(r"\b(train|sample)\.py([^|&;#]*)", line):
            known = read_defaults((ROOT / f"{script}.py").read_text())
            flags = re.findall(r"--(\w+)", arguments)
            found += [(f"{script}.py", flag) for flag in flags if flag not in {*known, "help"}]
    return found


def missing_targets(page):
    """The relative links and pictures of a page that lead to no file."""
    links = re.findall(r"\]\(([^)\s]+)\)|src(?:set)?=\"([^\"]+)\"", page.read_text())
    targets = [(markdown or html).partition("#")[0] for markdown, html in links]
    local = [target for target in targets if target and "://" not in target]
    return [target for target in local if not (page.parent / target).exists()]


def altered_passages(block, source):
    """The passages of a quotation, separated by comments like `# ... in Router.route`, whose lines
    do not stand in the source, one after the other, however they are indented."""
    block, source = (re.sub(r"(?m)^ +| +$", "", text) for text in (block, source))
    passages = [part.strip() for part in re.split(r"(?m)^# \.\.\..*$", block) if part.strip()]
    return [passage for passage in passages if f"\n{passage}\n" not in f"\n{source}\n"]


def test_the_quoted_moe_is_the_code_that_runs():
    (block,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert 15 <= len(block.splitlines()) <= 25
    assert "def loop(" in block
    assert altered_passages(block, (ROOT / "moe_model.py").read_text()) == []


def test_readme_is_short_and_has_the_two_commands_word_for_word():
    text = README.read_text()
    lines = text.splitlines()
    assert len(lines) <= 180 and len(text.split()) <= 1800
    assert [lines.count(command) for command in COMMANDS] == [1, 1]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_and_flags_are_settings_of_their_script(page):
    assert missing_targets(page) == [] and unknown_flags(page.read_text()) == []


def unknown_names(text):
    """The names in backticks that no top script and no module of nanomoe defines or has."""
    sources = [*ROOT.glob("*.py"), *ROOT.glob("nanomoe/**/*.py"), *ROOT.glob("config/*/*.py")]
    code = "\n".join(path.read_text() for path in sources)
    found = []
    for quoted in re.findall(r"`([^`\n]+)`", text):
        name = re.match(r"(?:\w+\.)*(\w+)(?: = .*|\(.*\))?$", quoted)  # of `a.b.name = value`
        known = name and re.search(rf"(?m)(def|class) {name[1]}\b|^ *{name[1]} *[:=]", code)
        if not known and not list(ROOT.glob(f"**/{quoted}")):
            found.append(quoted)
    return found


def test_the_recipes_name_what_exists():
    others = {"pytest", "--help", "torch.optim.Optimizer", "self.training", "config.name"}
    others |= {"torch.Generator", "scaler.unscale_"}
    recipes = CONFIG_README.split("## Recipes")[1].split("## Config files")[0]
    assert len(re.findall(r"(?m)^\*\*To add ", recipes)) >= 5
    assert set(unknown_names(recipes)) <= others


def test_every_config_and_sweep_file_is_listed():
    names = {path.name for path in (ROOT / "config").glob("**/*.py")}
    assert {name for name in names if f"`{name}`" not in CONFIG_README} == set()


def test_what_is_wrong_would_be_seen(tmp_path):
    assert unknown_flags("    python train.py --top_k=2 --topk=2\n") == [("train.py", "topk")]
    assert unknown_flags("```\npython sample.py --start=x \\\n  --strat=y\n```\n")
    assert not unknown_flags("In prose, `python train.py --topk=2` is no command.\n")
    page = tmp_path / "README.md"
    page.write_text("[a](here.md#part) [b](gone.md) ![c](gone.png) [d](https://x.y/z)\n")
    (tmp_path / "here.md").touch()
    assert missing_targets(page) == ["gone.md", "gone.png"]
    assert unknown_names("`Router.scores`, `Router.score`, `train.py`") == ["Router.score"]
    source = "def f(x):\n    y = x\n    return y\n"
    quoted = "# ... in f\n  y = x\n  return y\n# ...\ndef f(x):\n    return y\n# ...\ny = x\nretur"
    assert altered_passages(quoted, source) == ["def f(x):\nreturn y", "y = x\nretur"]
