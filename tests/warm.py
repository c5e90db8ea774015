"""Run scripts in forks of a process that has imported torch, to save their start-up.

Importing torch and train.py takes two to three seconds, which is most of a run in these tests. So
each pytest worker keeps one forkserver that has imported both. For each run it forks, and the fork
becomes `python script arguments`: its arguments, folder, environment, output and exit code are
those of a user's run. tests/helpers.py uses this for every run of one process.
"""

import atexit
import contextlib
import multiprocessing
import os
import random
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["train", "sample", "matplotlib.pyplot", "tests.freeze"])


def run(command, cwd, env, timeout, ranks=1):
    """Like subprocess.run, for a command ["script.py", ...] or ["-m", "module", ...]. ranks: so
    many processes run it, as srun starts them, and share their output; the largest code counts."""
    envs = [env | of_rank for of_rank in ranks_of_srun(ranks)] if ranks > 1 else [env]
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder) / "out", Path(folder) / "err"
        processes = [FORKS.Process(target=become, args=(command, cwd, e, out, err)) for e in envs]
        for process in processes:
            process.start()
        end = time.monotonic() + timeout
        for process in processes:
            process.join(max(0, end - time.monotonic()))
        in_time = all(process.exitcode is not None for process in processes)
        for process in processes:
            process.kill()
            process.join()
        codes = [process.exitcode for process in processes]
        texts = [path.read_text(encoding="utf-8") for path in (out, err)]
    if not in_time:
        raise subprocess.TimeoutExpired(command, timeout, *texts)
    return subprocess.CompletedProcess(command, max(codes, key=abs), *texts)


def ranks_of_srun(ranks):
    """What srun adds to the environment of each rank."""
    shared = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "localhost", "MASTER_PORT": free_port()}
    return [shared | {"RANK": str(i), "LOCAL_RANK": str(i)} for i in range(ranks)]


class Started:
    """A command in the background, with what the tests use of a subprocess.Popen. Its output, on
    one pipe, is `stdout`."""

    def __init__(self, command, cwd, env):
        with tempfile.TemporaryDirectory() as folder:
            pipe = Path(folder) / "pipe"
            os.mkfifo(pipe)
            self.process = FORKS.Process(target=become, args=(command, cwd, env, pipe, pipe))
            self.process.start()
            self.stdout = open(pipe, encoding="utf-8", errors="replace")  # noqa: SIM115
        self.pid = self.process.pid

    @property
    def returncode(self):
        return self.process.exitcode

    def poll(self):
        return self.process.exitcode

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self):
        self.send_signal(signal.SIGTERM)

    def kill(self):
        self.send_signal(signal.SIGKILL)

    def wait(self, timeout=None):
        self.process.join(timeout)
        if self.poll() is None:
            raise subprocess.TimeoutExpired("a forked command", timeout)
        return self.poll()

    def communicate(self, timeout=None):
        """Its output from here on, and None. If the time is over, it is killed first."""
        killer = threading.Timer(timeout or 600, self.kill)
        killer.start()
        text = self.stdout.read()
        self.process.join()
        killer.cancel()
        return text, None


def free_port():
    """A port below those that the system hands out by itself, so that nobody takes it meanwhile."""
    while True:
        port = random.SystemRandom().randrange(10_000, 30_000)
        with contextlib.suppress(OSError), socket.socket() as free:
            free.bind(("localhost", port))
            return str(port)


def become(command, cwd, env, out, err):
    """In the fork: run a command as Python would."""
    # whatever the shell that runs the tests ignores
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    for number, path in enumerate((os.devnull, out, err)):
        access = os.O_WRONLY if number else os.O_RDONLY
        if number == 2 and path == out:
            file = os.dup(1)
        else:
            file = os.open(path, access | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(file, number)
        os.close(file)
    encoding = env.get("PYTHONIOENCODING", "utf-8")  # which Python reads at its start
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", encoding=encoding, closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", errors="backslashreplace", closefd=False)  # noqa: SIM115
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    if "RANK" in env:  # which distributed.py reads when it is imported
        for name in list(sys.modules):
            if name.split(".")[0] in ("nanomoe", "train", "sample"):
                del sys.modules[name]
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
