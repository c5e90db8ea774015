"""Run scripts in forks of a process that has imported torch, to save their start-up.

Importing torch and train.py takes two to three seconds, which is most of a run in these tests. So
each pytest worker keeps one process that has imported both. For each run that process forks, and
the fork becomes `python script arguments`: its arguments, folder, environment, output and exit
code are those of a user's run. tests/helpers.py uses this for every run of one process.
"""

import atexit
import gc
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


SERVERS = threading.local()


def server():
    """The process that forks. Each thread of a pytest worker, or of tests/stress.py, has one."""
    if hasattr(SERVERS, "process"):
        return SERVERS.process
    SERVERS.process = subprocess.Popen(
        [sys.executable, __file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        bufsize=0,  # so that select() below sees all that has not been read
    )
    atexit.register(SERVERS.process.stdin.close)
    return SERVERS.process


def run(command, cwd, env, timeout):
    """Like subprocess.run, for a command ["script.py", ...] or ["-m", "module", ...]."""
    process = server()
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder) / "out", Path(folder) / "err"
        job = {"command": command, "cwd": str(cwd), "env": env, "out": str(out), "err": str(err)}
        process.stdin.write(json.dumps(job).encode() + b"\n")
        pid = int(process.stdout.readline())
        in_time = select.select([process.stdout], [], [], timeout)[0]
        if not in_time:
            os.kill(pid, signal.SIGKILL)
        code = int(process.stdout.readline())
        texts = [path.read_text(encoding="utf-8") for path in (out, err)]
    if not in_time:
        raise subprocess.TimeoutExpired(command, timeout, *texts)
    return subprocess.CompletedProcess(command, code, *texts)


def serve():
    """Fork for each line of stdin. Returns in a fork only: the command that it has to run."""
    for line in sys.stdin:
        job = json.loads(line)
        pid = os.fork()
        if not pid:
            become(job)
            return job["command"]
        print(pid, flush=True)
        status = os.waitpid(pid, 0)[1]
        print(os.waitstatus_to_exitcode(status), flush=True)


def become(job):
    files = (
        (0, os.devnull, os.O_RDONLY),
        (1, job["out"], os.O_WRONLY | os.O_CREAT),
        (2, job["err"], os.O_WRONLY | os.O_CREAT),
    )
    for number, path, flags in files:
        file = os.open(path, flags, 0o600)
        os.dup2(file, number)
        os.close(file)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    os.chdir(job["cwd"])
    os.environ.clear()
    os.environ.update(job["env"])
    if "PYTHONIOENCODING" in os.environ:  # which Python reads at its start
        sys.stdout.reconfigure(encoding=os.environ["PYTHONIOENCODING"])


def main():
    sys.path[0] = str(ROOT)
    from matplotlib import pyplot  # noqa: F401 (for tools/report.py)

    import sample  # noqa: F401
    import train  # noqa: F401

    gc.freeze()  # a fork's garbage collector then skips all that is there already
    command = serve()
    if not command:
        return
    code = 0
    try:
        execute(command)
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    # Shutting the interpreter down takes a second. This is the part that a script can notice.
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def execute(command):
    if command[0] == "-m":
        sys.path[0] = os.getcwd()
        sys.argv = command[1:]
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = str(Path(command[0]).parent)
        sys.argv = command
        runpy.run_path(command[0], run_name="__main__")


if __name__ == "__main__":
    main()
