"""Whatever a config file changes in its namespace counts."""

import sys

import pytest

from configurator import InputError, check_settings, read_config

DEFAULTS = {"batch_size": 12, "learning_rate": 6e-4, "dataset": "openwebtext", "compile": "auto"}
BASE = "import math\nbatch_size = 32\n\ndef helper():\n    pass\n"


@pytest.fixture
def read(tmp_path):
    (tmp_path / "base_config.py").write_text(BASE)
    (tmp_path / "broken.py").write_text("\nif:\n")

    def read(text):
        path = tmp_path / "config.py"
        path.write_text(text)
        return check_settings(read_config(str(path), DEFAULTS, DEFAULTS), DEFAULTS, str(path))

    return read


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
def test_what_counts(read, text, expected):
    assert read(text) == expected


def test_each_config_has_its_own_base(tmp_path):
    """Whatever another config, or train.py itself, has imported under that name."""
    for folder, size in (("a", 1), ("b", 2)):
        (tmp_path / folder).mkdir()
        for base in ("base", "configurator"):
            (tmp_path / folder / f"{base}.py").write_text(f"batch_size = {size}\n")
            path = tmp_path / folder / f"{base}_config.py"
            path.write_text(f"from {base} import *")
            assert read_config(str(path), dict(DEFAULTS), DEFAULTS) == {"batch_size": size}
    assert sys.modules["configurator"].read_config is read_config
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
def test_what_is_refused(read, text, words):
    with pytest.raises(InputError) as error:
        read(text)
    for word in words:
        assert word in str(error.value)
