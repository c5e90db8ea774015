"""Run scripts in forks of a process that has imported torch, to save their start-up.

Importing torch and train.py takes two to three seconds, which is most of a run in these tests. So
each pytest worker keeps one forkserver that has imported both. For each run it forks, and the fork
becomes `python script arguments`: its arguments, folder, environment, output and exit code are
those of a user's run. tests/helpers.py uses this for every run of one process.
"""

import atexit
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["train", "sample", "matplotlib.pyplot", "tests.freeze"])


def run(command, cwd, env, timeout):
    """Like subprocess.run, for a command ["script.py", ...] or ["-m", "module", ...]."""
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder) / "out", Path(folder) / "err"
        process = FORKS.Process(target=become, args=(command, cwd, env, out, err))
        process.start()
        process.join(timeout)
        in_time = process.exitcode is not None
        if not in_time:
            process.kill()
            process.join()
        code = process.exitcode
        texts = [path.read_text(encoding="utf-8") for path in (out, err)]
    if not in_time:
        raise subprocess.TimeoutExpired(command, timeout, *texts)
    return subprocess.CompletedProcess(command, code, *texts)


def become(command, cwd, env, out, err):
    """In the fork: run a command as Python would."""
    for number, path in enumerate((os.devnull, out, err)):
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        os.dup2(file, number)
        os.close(file)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    if "PYTHONIOENCODING" in os.environ:  # which Python reads at its start
        sys.stdout.reconfigure(encoding=os.environ["PYTHONIOENCODING"])
    try:
        if command[0] == "-m":
            sys.path[0] = os.getcwd()
            sys.argv = command[1:]
            runpy.run_module(command[1], run_name="__main__", alter_sys=True)
        else:
            sys.path[0] = str(Path(command[0]).parent)
            sys.argv = command
            runpy.run_path(command[0], run_name="__main__")
    except Exception:
        traceback.print_exc()
        sys.exit(1)
    finally:
        atexit._run_exitfuncs()  # before Python 3.15 multiprocessing leaves them out
