"""The READMEs say what is so: quoted code, links, flags, names, length, and the two commands."""

import re
from pathlib import Path

import pytest

from configurator import read_defaults

ROOT = Path(__file__).resolve().parent.parent
CONFIG_README = (ROOT / "config" / "README.md").read_text()
README = ROOT / "README.md"
# those of the folders, which GitHub shows below the list of their files
PAGES = [README, *sorted(ROOT.glob("*/README.md")), ROOT / "assets" / "RESULTS.md"]
COMMANDS = (
    "    pip install -r requirements.txt && python data/plays_char/prepare.py"
    " && python train.py config/train_plays_char_moe.py",
    "    pip install -r requirements-dev.txt && pytest",
)


each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


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


def strip_lines(text):
    return [line.strip() for line in text.strip().splitlines()]


def passages(block):
    """The passages of a quotation, separated by comments like `# ... in Router.route`."""
    return [strip_lines(part) for part in re.split(r"(?m)^# \.\.\..*$", block) if part.strip()]


def is_quoted(passage, source):
    """Whether these lines stand in the source, one after the other, however they are indented."""
    lines = strip_lines(source)
    length = len(passage)
    return any(lines[i : i + length] == passage for i in range(len(lines) - length + 1))


def test_the_quoted_moe_is_the_code_that_runs():
    (block,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    source = (ROOT / "moe_model.py").read_text()
    assert 15 <= len(block.splitlines()) <= 25
    assert "def loop(" in block
    for passage in passages(block):
        assert is_quoted(passage, source), "\n".join(passage)


def test_readme_is_short_enough_to_be_read():
    text = README.read_text()
    assert len(text.splitlines()) <= 180
    assert len(text.split()) <= 1800


def test_the_two_commands_are_there_word_for_word():
    lines = README.read_text().splitlines()
    for command in COMMANDS:
        assert lines.count(command) == 1


@each_page
def test_links_and_pictures_lead_to_files(page):
    assert missing_targets(page) == []


@each_page
def test_flags_are_settings_of_their_script(page):
    assert unknown_flags(page.read_text()) == []


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
    assert is_quoted(strip_lines("  y = x\n  return y"), source)
    assert not is_quoted(strip_lines("def f(x):\n    return y"), source)
    assert passages("# ... in f\na\n# ...\nb\nc\n") == [["a"], ["b", "c"]]
