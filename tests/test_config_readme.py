"""config/README.md lists every setting of train.py with its default, and every config file."""

import ast
import re

import train
from configurator import read_defaults
from tests.helpers import ROOT

TEXT = (ROOT / "config" / "README.md").read_text()
ROW = re.compile(r"^\| `(\w+)` \| `(.+?)` \| .+ \|$", re.MULTILINE)
SETTINGS = TEXT.split("## Settings of train.py")[1].split("## Config files")[0]


def test_every_setting_has_a_row_with_its_default():
    names = read_defaults((ROOT / "train.py").read_text())
    rows = [(name, repr(ast.literal_eval(default))) for name, default in ROW.findall(SETTINGS)]
    assert rows == [(name, repr(vars(train)[name])) for name in names]


def test_no_other_setting_is_named():
    known = read_defaults((ROOT / "train.py").read_text())
    for name in re.findall(r"`([a-z]\w*)`", SETTINGS):
        assert name in known, name
    for name in train.RETIRED:
        assert f"`{name}`" not in TEXT


def test_every_config_and_sweep_file_is_listed():
    for folder in ("config", "config/sweeps"):
        names = {path.name for path in (ROOT / folder).glob("*.py")}
        assert {name for name in names if f"`{name}`" not in TEXT} == set()
