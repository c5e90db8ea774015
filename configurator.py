"""
Config files and --key=value flags over a script's defaults.

A script keeps its settings as plain globals, `name = value  # what it is for`, and calls
`configure(globals())`. Then

$ python train.py config/a.py config/b.py --batch_size=32 --compile=False --eval_only

runs the Python files, which assign to those names, and applies the flags, from left to right.
`--key` alone means `--key=True`. `--help` prints the script's docstring and every setting; a
comment right above a setting is the heading of its group. A setting `print_ = False` has the key
`print`, so that it does not hide Python's print.
"""

import __future__

import ast
import contextlib
import difflib
import inspect
import io
import os
import sys
import tokenize
from collections.abc import MutableMapping
from pathlib import Path

TEXTS = ("start", "text")  # settings in which a ~ is just a character


class InputError(ValueError):
    """The user asked for something that cannot be done. One line per problem; exit code 2."""


def say(line):
    print(line, file=sys.stderr, flush=True)


def configure(script_globals, *args, **options):
    """read_settings(), and write the values into the script's globals."""
    settings, given = read_settings(script_globals, *args, **options)
    for name in read_defaults(source_of(script_globals)):
        script_globals[name] = settings[key_of(name)]
    return settings, given


def read_settings(script_globals, argv=None, positional=(), retired=None, note=say):
    """The settings of a script after config files and flags. Changes nothing.

    argv: the arguments, by default sys.argv[1:].
    positional: names of settings. If given, the arguments without "--" are the values of these
        settings, in this order, and not config files.
    retired, note: see check_settings.

    Returns (settings, given): the value of every setting, and for each setting that was set,
    the file or flag that set it last.
    Raises InputError that names the key, who sets it, what was expected or the nearest key."""
    argv = sys.argv[1:] if argv is None else list(argv)
    names = read_defaults(source_of(script_globals))
    defaults = {key_of(name): script_globals[name] for name in names}
    if "--help" in argv or "-h" in argv:
        print_help(script_globals)
        sys.exit(0)
    settings, given = dict(defaults), {}
    unfilled = list(positional)
    for arg in argv:
        if arg.startswith("--"):
            values = read_flag(arg, defaults)
        elif not positional:
            path = find_config(arg, os.path.dirname(script_globals["__file__"]))
            values = read_config(path, settings, defaults)
        elif unfilled:
            values = {unfilled.pop(0): arg}
        else:
            names = " and ".join(positional)
            raise InputError(
                f"unexpected argument '{arg}': expected {names}, then flags like --key=value"
            )
        values = check_settings(values, defaults, arg, retired, note)
        settings |= values
        given |= dict.fromkeys(values, arg)
    return settings, given


def split_argv(script_globals, argv=None):
    """Split the command line of a tool that takes train.py's settings beside its own. Returns three
    lists of arguments: the flags of this script's own settings (and --help), all other flags, and
    what is no flag."""
    argv = sys.argv[1:] if argv is None else argv
    own_keys = {key_of(name) for name in read_defaults(source_of(script_globals))} | {"help"}
    flags = [arg for arg in argv if arg.startswith("--") or arg == "-h"]
    own = [arg for arg in flags if arg == "-h" or arg[2:].partition("=")[0] in own_keys]
    others = [arg for arg in flags if arg not in own]
    return own, others, [arg for arg in argv if arg not in flags]


def source_of(script_globals):
    return Path(script_globals["__file__"]).read_text(encoding="utf-8")


def read_defaults(source):
    """{name: (comment, heading)} of a script's settings, in order: the top-level lines
    `name = value  # comment` before the first function or class."""
    comment_at = {}  # by line
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            comment_at[token.start[0]] = token.string.lstrip("# ")
    found, heading, all_lines = {}, "settings", ["", *source.splitlines()]
    for node in ast.parse(source).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            break
        if not isinstance(node, ast.Assign) or not isinstance(node.targets[0], ast.Name):
            continue
        name = node.targets[0].id
        if name.islower():  # else it is a constant
            above = all_lines[node.lineno - 1]
            if above.startswith("# ") and not above.startswith(("# ---", "# fmt:")):
                heading = above[2:]
            # a value in brackets covers several lines; the comment is on one of them
            lines = range(node.lineno, node.end_lineno + 1)
            comment = " ".join(comment_at[line] for line in lines if line in comment_at)
            found[name] = (comment, heading)
    return found


def print_help(script_globals):
    print(inspect.cleandoc(script_globals.get("__doc__") or ""))
    last_heading = None
    for name, (comment, heading) in read_defaults(source_of(script_globals)).items():
        if heading != last_heading:
            print(f"\n{heading}:")
            last_heading = heading
        print(f"  --{key_of(name)}={script_globals[name]!r}".ljust(40), comment)


def key_of(name):
    """The key of a script's variable: a trailing underscore does not belong to it."""
    return name.rstrip("_")


def read_flag(arg, defaults):
    """{key: value} of a flag. A text that is no value of the default's type stays a text."""
    key, equals, text = arg[2:].partition("=")
    default = defaults.get(key)
    takes_bool = isinstance(default, bool) or default == "auto"
    if not equals:
        if key in defaults and not takes_bool:
            raise InputError(f"{arg}: '{key}' needs a value, as in --{key}={default or 'VALUE'}")
        return {key: True}
    if takes_bool:
        return {key: {"true": True, "false": False}.get(text.lower(), text)}
    if not isinstance(default, str):
        with contextlib.suppress(ValueError, SyntaxError, TypeError):
            return {key: ast.literal_eval(text)}
    return {key: text}


def check_settings(values, defaults, source, retired=None, note=say):
    """The values of known settings, each with its default's type. Raises InputError.

    source: the flag or file that sets them.
    retired: {key: (what holds now, values that mean the same)} of keys that were settings once;
        note(line) says it, and the key is left out. If there are such values, any other one would
        have made another model, so it is an InputError."""
    checked = {}
    for key, value in values.items():
        if key in (retired or {}):
            holds, same = retired[key]
            told = f"{source}: '{key}' is no longer a setting: {holds}"
            if same and str(value) not in same:
                raise InputError(f"{told}; leave it out")
            note(f"note: {told}")
        elif key in defaults:
            checked[key] = check_type(key, value, defaults[key], source)
        else:
            (near,) = difflib.get_close_matches(key.replace("-", "_"), defaults, n=1, cutoff=0.0)
            message = f"{source}: unknown key '{key}'; the nearest known one is '{near}'"
            if not source.startswith("--"):
                message += "; names of helpers begin with an underscore"
            raise InputError(message)
    return checked


def check_type(key, value, default, source):
    """The value, a float if the default is one. Raises InputError if it has another type."""
    if isinstance(default, float) and type(value) is int:
        return float(value)
    if type(value) is str and isinstance(default, str):
        # a shell leaves the ~ of --key=~/path
        return value if key in TEXTS else os.path.expanduser(value)
    if type(value) is type(default) or (default == "auto" and isinstance(value, bool)):
        return value
    expected = type(default).__name__
    raise InputError(f"{source}: '{key}' is {value!r}, expected {expected}, like {default!r}")


def short_path(path):
    """A path from here, for messages and commands; on another Windows drive the whole path."""
    try:
        return os.path.relpath(path)
    except ValueError:
        return str(path)


def find_config(path, script_folder):
    """A config file's path. A relative one is looked up here, then in the script's folder."""
    path = os.path.expanduser(path)
    below_script = os.path.join(script_folder, path)
    return path if os.path.exists(path) or not os.path.exists(below_script) else below_script


class Namespace(dict):
    """What a config file runs in. It notes each name that the file sets, also to the value that the
    name already has, and also through an import or globals().update()."""

    def __setitem__(self, name, value):
        self.noted.add(name)
        super().__setitem__(name, value)

    update = MutableMapping.update  # dict's own does not call __setitem__


def read_config(path, settings, known):
    """Run a Python config file, which sees the settings so far, and return what it assigns, also to
    unknown names, but for helpers. Raises InputError if it cannot be read or run."""
    try:
        source = Path(path).read_text(encoding="utf-8-sig")
    except (FileNotFoundError, IsADirectoryError, UnicodeDecodeError):
        raise InputError(f"{path}: no such config file (flags look like --key=value)") from None
    before = dict(settings, __file__=path, __name__="__main__")
    namespace = Namespace(before)
    namespace.noted = set()
    with imports_from(os.path.dirname(os.path.abspath(path))):
        try:
            exec(compile(source, path, "exec"), namespace)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # SystemExit, too: nothing would be trained
            what = getattr(error, "msg", error)
            message = f"{place_of(error, path)}: {type(error).__name__}: {what}"
            raise InputError(message) from None
    if deleted := sorted(settings.keys() - namespace.keys()):
        raise InputError(f"{path}: deletes {', '.join(deleted)}")
    values = {}
    for name, value in sorted(namespace.items()):
        # a function's `global` statement passes by __setitem__
        is_set = name in namespace.noted or name not in before or value is not before[name]
        is_code = inspect.ismodule(value) or callable(value) or type(value) is __future__._Feature
        if is_set and (name in known or not (name.startswith("_") or is_code)):
            values[name] = value
    return values


@contextlib.contextmanager
def imports_from(folder):
    """Meanwhile `from base import *` means base.py in this folder, whatever else is called base."""
    path, names = sys.path[:], {file.stem for file in Path(folder).glob("*.py")}
    hidden = {name: sys.modules.pop(name) for name in names & sys.modules.keys()}
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path[:] = path
        for name in names:
            sys.modules.pop(name, None)
        sys.modules.update(hidden)


def place_of(error, path):
    """The file and line at which a config file, or one that it imports, raised an error."""
    if isinstance(error, SyntaxError):
        return f"{error.filename or path}, line {error.lineno}"
    frame = error.__traceback__.tb_next  # the first one is read_config's
    return f"{path}, line {frame.tb_lineno}" if frame else path
