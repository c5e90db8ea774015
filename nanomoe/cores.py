"""How many CPU cores there are for us."""

import contextlib
import math
import os
from pathlib import Path


def container_cores(cpu_max="/sys/fs/cgroup/cpu.max"):
    """The cores that the container may use, rounded up; infinity if there is no limit."""
    with contextlib.suppress(OSError, ValueError):  # no limit ("max 100000"), or not Linux
        quota, period = map(int, Path(cpu_max).read_text().split())
        return math.ceil(quota / period)
    return math.inf


def num_cores():
    """The cores that this process may use."""
    cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    return min(cores, container_cores())
