"""
Config files and --key=value flags over a script's defaults.

A script keeps its settings as plain globals, `name = value  # what it is for`, and calls
`configure(globals())`. Then

$ python train.py config/a.py config/b.py --batch_size=32 --compile=False --eval_only

runs the Python files, which assign to those names, and applies the flags, from left to right.
`--key` alone means `--key=True`. `--help` prints the script's docstring and every setting.
"""

import ast
import contextlib
import difflib
import inspect
import io
import os
import signal
import sys
import time
import tokenize
from pathlib import Path

TRUE_OR_FALSE = {"true": True, "false": False}
TEXTS = ("start", "text")  # settings in which a ~ is just a character


class InputError(ValueError):
    """The user asked for something that cannot be done. One line per problem; exit code 2."""


def run_main(main):
    """Call main() and turn the errors that a user can cause into one line and an exit code.

    InputError ends the process with code 2; OSError, MemoryError and FloatingPointError with
    code 1; Ctrl-C with code 130. None prints a traceback, not even under torchrun.
    """
    if sys.stdout is None:  # closed, as by >&-
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (open as long as the process)
    # print a question mark for a character that the terminal cannot show
    sys.stdout.reconfigure(errors="replace")
    try:
        main()
    except KeyboardInterrupt:
        end_process(130)
    except BrokenPipeError:  # whoever reads our output, like `head`, has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (InputError, OSError, MemoryError, FloatingPointError) as error:
        report_and_exit(error)


def report_and_exit(error):
    """Print an error to stderr and end this process. Of several ranks, one reports."""
    if os.environ.get("RANK", "0") != "0":
        # Most errors hit every rank: rank 0 reports, and torchrun kills the others during this
        # sleep. A rank that is still alive after it failed alone, so it reports itself. If all
        # know of the error, rank 0 may first be saving the last step.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        known = getattr(error, "on_all_ranks", False) and "TORCHELASTIC_RUN_ID" in os.environ
        time.sleep(900 if known else 10)
    message = str(error) or type(error).__name__
    lines = [f"error: {line}" for line in message.splitlines()]
    print("\n".join(lines), file=sys.stderr, flush=True)
    end_process(2 if isinstance(error, InputError) else 1)


def could_wait_at_exit():
    """Whether an orderly exit could wait for ever: with an open process group for the other ranks,
    with wandb for its server."""
    return "RANK" in os.environ or "wandb" in sys.modules


def end_process(code):
    """sys.exit(code), but at once if an orderly exit could wait."""
    if could_wait_at_exit():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def configure(script_globals, argv=None, positional=()):
    """Apply config files and flags to a script's globals, in place.

    argv: the arguments, by default sys.argv[1:].
    positional: names of settings. If given, the arguments without "--" are the values of these
        settings, in this order, and not config files.
    A setting `print_ = False` has the flag --print, so that it does not hide Python's print.
    A name in the script's RETIRED is no error: a line says so, see report_retired.

    Returns (settings, given): the value of every setting, and for each setting that was set,
    the file or flag that set it last.
    Raises InputError that names the key, who sets it, what was expected or the nearest key.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    script = script_globals["__file__"]
    retired = script_globals.get("RETIRED", {})
    comments = read_defaults(Path(script).read_text(encoding="utf-8"))
    variables = {flag_name(name): name for name in comments}
    defaults = {key: script_globals[name] for key, name in variables.items()}
    if "--help" in argv or "-h" in argv:
        print_help(script_globals.get("__doc__"), defaults, list(comments.values()))
        sys.exit(0)
    settings, given = dict(defaults), {}
    unfilled = list(positional)
    for arg in argv:
        if arg.startswith("--"):
            values = read_flag(arg, defaults, retired)
        elif not positional:
            path = find_config(arg, os.path.dirname(script))
            values = read_config(path, settings, defaults, retired)
        elif unfilled:
            key = unfilled.pop(0)
            values = {key: parse(key, arg, defaults[key], arg)}
        else:
            names = " and ".join(positional)
            raise InputError(
                f"unexpected argument '{arg}': expected {names}, then flags like --key=value"
            )
        settings |= values
        given |= dict.fromkeys(values, arg)
    for key, value in settings.items():
        script_globals[variables[key]] = value
    return settings, given


def split_argv(script_globals, argv=None):
    """Split the command line of a tool that takes train.py's settings beside its own.

    Returns three lists of arguments: the flags of this script's own settings (and --help), all
    other flags, and what is no flag.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    names = read_defaults(Path(script_globals["__file__"]).read_text(encoding="utf-8"))
    own_keys = {flag_name(name) for name in names} | {"help"}
    own, others, paths = [], [], []
    for arg in argv:
        is_flag = arg.startswith("--")
        if arg == "-h" or (is_flag and flag_key(arg) in own_keys):
            own.append(arg)
        elif is_flag:
            others.append(arg)
        else:
            paths.append(arg)
    return own, others, paths


def read_defaults(source):
    """{name: comment} of a script's settings, in order.

    Settings are the top-level lines `name = value  # comment` before the first function or class.
    """
    comment_at = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            comment_at[token.start[0]] = token.string.lstrip("# ")
    comments = {}
    for node in ast.parse(source).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            break
        if not isinstance(node, ast.Assign) or not isinstance(node.targets[0], ast.Name):
            continue
        name = node.targets[0].id
        if not name.islower():  # a constant
            continue
        # a value in brackets covers several lines; the comment is on one of them
        lines = range(node.lineno, node.end_lineno + 1)
        comments[name] = " ".join(comment_at[line] for line in lines if line in comment_at)
    return comments


def print_help(doc, defaults, comments):
    print(inspect.cleandoc(doc or ""), "\n\nsettings, with their defaults:")
    for (key, value), comment in zip(defaults.items(), comments, strict=True):
        print(f"  --{key}={value!r}".ljust(40), comment)


def flag_name(name):
    """The key of a script's variable: a trailing underscore does not belong to it."""
    return name.rstrip("_")


def flag_key(arg):
    """The key of a flag: 'key' of --key=value and of --key."""
    return arg[2:].partition("=")[0]


def read_flag(arg, defaults, retired):
    """{key: value} that the flag --key=value or --key sets; {} for a retired key."""
    key = flag_key(arg)
    text = arg.partition("=")[2] if "=" in arg else None
    if key in retired:
        report_retired(key, text, retired, arg)
        return {}
    check_known(key, defaults, arg)
    return {key: parse(key, text, defaults[key], arg)}


def report_retired(key, value, retired, source):
    """Say once, on rank 0, that a key which was a setting is ignored, and what holds now.

    retired[key]: what holds now; or (what holds now, values that mean the same). Any other value
    would have made another model, so it is an InputError."""
    holds = retired[key]
    if isinstance(holds, tuple):
        holds, same = holds
        if str(value) not in same:
            raise InputError(f"{source}: '{key}' is no longer a setting: {holds}; leave it out")
    if os.environ.get("RANK", "0") == "0":
        line = f"note: {source}: '{key}' is no longer a setting: {holds}"
        print(line, file=sys.stderr, flush=True)


def check_known(key, defaults, source, advice=""):
    """Raises InputError that names the nearest known key."""
    if key not in defaults:
        near = difflib.get_close_matches(key.replace("-", "_"), defaults, n=1, cutoff=0.0)
        raise InputError(
            f"{source}: unknown key '{key}'; the nearest known one is '{near[0]}'{advice}"
        )


def parse(key, text, default, source):
    """The value of a flag: its text, read as the type that the default has.

    text is None for --key alone. Raises InputError for a text of another type.
    """
    if text is None:
        if isinstance(default, bool) or default == "auto":
            return True
        raise InputError(f"{source}: '{key}' needs a value, as in --{key}={default or 'VALUE'}")
    if isinstance(default, bool) or default == "auto":  # 'auto' settings also take True and False
        value = TRUE_OR_FALSE.get(text.lower(), text)
    elif isinstance(default, str):
        value = text
    else:
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError, TypeError):
            value = text
    return check_type(key, value, default, source)


def check_type(key, value, default, source):
    """The value, a float if the default is one. Raises InputError if it has another type."""
    if isinstance(default, float) and type(value) is int:
        return float(value)
    if type(value) is type(default):
        return expand_home(value) if type(value) is str and key not in TEXTS else value
    if default == "auto" and isinstance(value, bool):
        return value
    expected = type(default).__name__
    raise InputError(f"{source}: '{key}' is {value!r}, expected {expected}, like {default!r}")


def expand_home(path):
    """A path without its ~, which a shell leaves in --key=~/path."""
    return os.path.expanduser(path) if path.startswith("~") else path


def short_path(path):
    """A path from here, for messages and commands; on another Windows drive the whole path."""
    try:
        return os.path.relpath(path)
    except ValueError:
        return str(path)


def find_config(path, script_folder):
    """A config file's path. A relative one is looked up here, then in the script's folder."""
    path = expand_home(path)
    for candidate in (path, os.path.join(script_folder, path)):
        if os.path.exists(candidate):
            return candidate
    return path


def read_config(path, settings, defaults, retired=None):
    """Run a Python config file, which sees the settings so far, and return what it assigns.

    Raises InputError for a file that cannot be read or run, for unknown keys and wrong types.
    """
    retired = retired or {}
    try:
        source = Path(path).read_text(encoding="utf-8-sig")
    except (FileNotFoundError, IsADirectoryError, UnicodeDecodeError):
        raise InputError(f"{path}: no such config file (flags look like --key=value)") from None
    namespace = Namespace(settings, __file__=path, __name__="__main__")
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
    for key in sorted(namespace.set_names(settings)):
        if key in defaults or not is_helper(key, namespace[key]):
            values[key] = namespace[key]
    return check_settings(values, defaults, retired, path)


def is_helper(name, value):
    """Whether a name that a config file sets is no setting."""
    is_code = inspect.ismodule(value) or callable(value)
    return name.startswith("_") or is_code or type(value).__module__ == "__future__"


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


class Namespace(dict):
    """What a config file runs in. It notes each name that the file sets, also to the value that the
    name already has, and also through an import, exec() or globals().update()."""

    def __init__(self, *args, **names):
        super().__init__(*args, **names)
        self.noted = set()

    def __setitem__(self, name, value):
        self.noted.add(name)
        super().__setitem__(name, value)

    def update(self, *args, **names):
        for name, value in dict(*args, **names).items():
            self[name] = value

    def set_names(self, before):
        """The names that were set. A function's `global` statement passes by __setitem__, so all
        that is not as before counts, too."""
        changed = {name for name in self if name not in before or self[name] is not before[name]}
        return (self.noted | changed) & set(self) - {"__file__", "__name__", "__builtins__"}


def check_settings(values, defaults, retired, source):
    """The values of known settings, each with its default's type. Raises InputError."""
    checked = {}
    for key, value in values.items():
        if key in retired:
            report_retired(key, value, retired, source)
            continue
        check_known(key, defaults, source, "; names of helpers begin with an underscore")
        checked[key] = check_type(key, value, defaults[key], source)
    return checked


def place_of(error, path):
    """The file and line at which a config file, or one that it imports, raised an error."""
    if isinstance(error, SyntaxError):
        return f"{error.filename or path}, line {error.lineno}"
    frame = error.__traceback__.tb_next  # the first one is read_config's
    return f"{path}, line {frame.tb_lineno}" if frame else path
