"""
Config files and --key=value over a script's defaults.

A script keeps its settings as plain globals, `name = value  # what it is for`, and calls `configure(globals())`.
Then `python train.py config/a.py config/b.py --batch_size=32 --compile=False --eval_only` applies, in this order,
Python files that assign to those names, and flags. `--flag` alone is `--flag=True`; `--help` lists everything.
"""

import ast
import difflib
import inspect
import io
import os
import signal
import sys
import time
import tokenize
from pathlib import Path


class InputError(ValueError):
    """What the user asked for cannot be done: one clear line, exit code 2."""


def run_main(main):
    """Call main(). An InputError ends the process with code 2, an OSError, MemoryError or FloatingPointError with code 1,
    after one line and without a traceback, also under torchrun."""
    sys.stdout.reconfigure(
        errors="replace"
    )  # a character that the terminal lacks is no reason to fail
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output, like head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (InputError, OSError, MemoryError, FloatingPointError) as error:
        if os.environ.get("RANK", "0") != "0":
            # Most errors strike every process: then rank 0 says it, and its end ends the others. Who outlives this pause
            # was struck alone.
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # by which torchrun ends the others
            time.sleep(10)
        print(
            "".join(f"error: {line}\n" for line in str(error).splitlines()),
            end="",
            file=sys.stderr,
            flush=True,
        )
        code = 2 if isinstance(error, InputError) else 1
        if "RANK" in os.environ:
            sys.stdout.flush()
            os._exit(
                code
            )  # with a process group open, an orderly shutdown can wait for the other ranks
        sys.exit(code)


def configure(script_globals, argv=None):
    """Apply config files and flags from argv (default sys.argv[1:]) to a script's globals, in place.

    Returns (settings, given): every key's value, and for the keys that were set, the file or flag that set them.
    Raises InputError naming key, source, what was expected and the nearest known key.
    """
    argv = sys.argv[1:] if argv is None else argv
    source = Path(script_globals["__file__"]).read_text()
    defaults = {name: script_globals[name] for name in read_defaults(source)}
    if "--help" in argv or "-h" in argv:
        print_help(script_globals.get("__doc__"), defaults, read_defaults(source))
        sys.exit(0)
    settings, given = dict(defaults), {}
    for arg in argv:
        if arg.startswith("--"):
            key, equals, text = arg[2:].partition("=")
            check_known(key, defaults, arg)
            values = {key: parse(key, text if equals else None, defaults[key], arg)}
        else:
            # a relative path is looked up from here, then from the script's folder
            path = (
                arg
                if os.path.exists(arg)
                else os.path.join(os.path.dirname(script_globals["__file__"]), arg)
            )
            values = read_config(path if os.path.exists(path) else arg, settings, defaults)
        settings |= values
        given |= {key: arg for key in values}
    script_globals.update(settings)
    return settings, given


def read_defaults(source):
    """{name: comment} of a script's settings: top-level `name = value` lines, up to the first function or class."""
    comments = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            break
        # constants are in capitals and are not settings
        if (
            isinstance(node, ast.Assign)
            and isinstance(node.targets[0], ast.Name)
            and node.targets[0].id.islower()
        ):
            found[node.targets[0].id] = comments.get(node.end_lineno, "")
    return found


def print_help(doc, defaults, comments):
    print(inspect.cleandoc(doc or ""), "\n\nsettings, with their defaults:")
    for key, value in defaults.items():
        print(f"  --{key}={value!r}".ljust(40), comments[key])


def check_known(key, defaults, source):
    if key not in defaults:
        near = difflib.get_close_matches(key.replace("-", "_"), defaults, n=1, cutoff=0.0)
        raise InputError(f"{source}: unknown key '{key}'; the nearest known one is '{near[0]}'")


def parse(key, text, default, source):
    """The value of a flag: its text (None for --key alone) read as the type that the default has."""
    if text is None:
        if not isinstance(default, bool) and default != "auto":
            raise InputError(f"{source}: '{key}' needs a value, as in --{key}={default}")
        return True
    if isinstance(default, str):
        # 'auto' settings also take True and False
        return {"true": True, "false": False}.get(text.lower(), text) if default == "auto" else text
    try:
        value = (
            {"true": True, "false": False}.get(text.lower(), text)
            if isinstance(default, bool)
            else ast.literal_eval(text)
        )
    except (ValueError, SyntaxError):
        value = text
    return check_type(key, value, default, source)


def check_type(key, value, default, source):
    if isinstance(default, float) and type(value) is int:
        value = float(value)
    if type(value) is not type(default) and not (default == "auto" and type(value) is bool):
        raise InputError(
            f"{source}: '{key}' is {value!r}, expected {type(default).__name__}, like {default!r}"
        )
    return value


def read_config(path, settings, defaults):
    """Run a Python config file, which sees the settings so far, and return what it assigns."""
    try:
        source = Path(path).read_text(encoding="utf-8")
    except (FileNotFoundError, IsADirectoryError, UnicodeDecodeError):
        raise InputError(f"{path}: no such config file (flags look like --key=value)") from None
    namespace = {"__file__": path, **settings}
    try:
        tree = ast.parse(source, path)
        exec(compile(tree, path, "exec"), namespace)
    except Exception as error:
        line = (
            error.lineno
            if isinstance(error, SyntaxError)
            else error.__traceback__.tb_next.tb_lineno
        )
        raise InputError(
            f"{path}, line {line}: {type(error).__name__}: {getattr(error, 'msg', error)}"
        ) from None
    # names that the file binds itself: also those that it sets to the value they had
    bound = {
        n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)
    } & set(namespace)
    values = {}
    for key in sorted(bound):
        if not key.startswith("_"):
            check_known(key, defaults, path)
            values[key] = check_type(key, namespace[key], defaults[key], path)
    return values
