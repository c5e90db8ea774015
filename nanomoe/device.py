"""
Choose the device and the precision; the device's peak speed; an estimate of a run's memory.
"""

import contextlib
import ctypes
import functools
import importlib.util
import math
import os
import shutil
import subprocess
import sysconfig
import time
from pathlib import Path

import torch

from configurator import InputError
from nanomoe.cores import container_cores

# Dense bfloat16 peak of one GPU in FLOP/s, from the makers' data sheets, by the name that torch
# reports. A GPU that is not listed gets no MFU: it would be a guess.
PEAK_FLOPS = {
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA GeForce RTX 3090": 71e12,
    "NVIDIA GeForce RTX 4090": 165e12,
    "NVIDIA GeForce RTX 5090": 209e12,
}


CUDA_CONTEXT = 0.5e9  # bytes that the driver takes for each process, about
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # from glibc's malloc.h


def choose_device(name):
    """The torch.device for 'cuda', 'cuda:N', 'mps', 'cpu' or 'auto', the best one there is.

    Raises InputError for a device that this machine does not have, or that this torch cannot use.
    Under torchrun each process gets the GPU of its LOCAL_RANK.
    """
    if name == "auto":
        name = best_device()
    kind, _, number = str(name).partition(":")
    if kind not in ("cuda", "mps", "cpu") or (number and not number.isdecimal()):
        raise InputError(f"device is '{name}', expected cuda, cuda:N, mps, cpu or auto")
    if kind == "mps" and not torch.backends.mps.is_available():
        raise InputError("device is 'mps', but this machine has none")
    if kind == "cuda":
        number = int(os.environ.get("LOCAL_RANK", number or 0))
        if problem := cuda_problem(number):
            raise InputError(f"device is '{name}', but {problem}")
        name = f"cuda:{number}"  # always with its number, which torch.cuda.set_device needs
    return torch.device(name)


def best_device():
    if torch.cuda.is_available():
        return "cuda"
    if torch.backends.mps.is_available():
        return "mps"
    return "cpu"


def cuda_problem(number):
    """Why this process cannot use the GPU of this number, or None."""
    count = torch.cuda.device_count()
    if number < count:
        return kernels_problem(number)
    if count == 0 and torch.version.cuda is None and torch.version.hip is None:
        return f"torch {torch.__version__} is built without CUDA: install a build that has it"
    seen = f"torch sees {count} cuda devices"
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        visible = os.environ["CUDA_VISIBLE_DEVICES"]
        seen = f"CUDA_VISIBLE_DEVICES is '{visible}', which leaves {count} cuda devices"
    if "LOCAL_RANK" in os.environ and count:
        return f"{seen}, and this is process {number}, counted from 0: --nproc_per_node={count}"
    return seen if count else f"{seen}; nvidia-smi says what the driver sees"


def kernels_problem(number):
    """Why this torch has no kernels for a GPU, or None. Machine code (sm_90) runs on GPUs of the
    same first number and the same or a higher second one; PTX (compute_90) on all later ones."""
    names = torch.cuda.get_arch_list() if torch.version.cuda else []
    if not names:  # an AMD GPU: torch does not say
        return None
    has = torch.cuda.get_device_capability(number)
    for name in names:
        kind, _, digits = name.rstrip("af").partition("_")
        needs = int(digits[:-1]), int(digits[-1])
        if needs <= has and (kind == "compute" or needs[0] == has[0]):
            return None
    return (
        f"torch {torch.__version__} has no kernels for {torch.cuda.get_device_name(number)} "
        f"(sm_{has[0]}{has[1]}), only for {', '.join(names)}: install a build that has, or use "
        "--device=cpu"
    )


def limit_threads(cpu_max="/sys/fs/cgroup/cpu.max"):
    """Use no more threads than this container has CPUs, unless OMP_NUM_THREADS is set.

    torch counts the machine's cores. A container may be allowed fewer, and threads that wait for
    their turn make everything many times slower.
    """
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(min(torch.get_num_threads(), container_cores(cpu_max)))


def keep_freed_memory():
    """Let this process keep the memory that it frees, up to 1 GB.

    glibc hands large blocks back to the system, and every step asks for them again: the page faults
    were 4% of a small MoE's step on a CPU. Where there is no glibc this does nothing.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, 2**25)  # the most that an older glibc takes
        libc.mallopt(M_TRIM_THRESHOLD, 2**30)


@functools.cache  # on a CPU it measures: once, so that a process has one answer
def choose_dtype(name, device):
    """The name of the precision to compute in: 'auto' is bfloat16 where it is faster, else float32.

    Raises InputError for an unknown name.
    """
    if name == "auto":
        return "bfloat16" if bfloat16_is_faster(device) else "float32"
    if name not in ("float32", "bfloat16", "float16"):
        raise InputError(f"dtype is '{name}', expected float32, bfloat16, float16 or auto")
    return name


def bfloat16_is_faster(device):
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    if device.type != "cpu":
        return False
    # processors that only emulate bfloat16 are slower with it, so measure: about 10 ms
    a = torch.randn(512, 512)
    seconds = {torch.float32: math.inf, torch.bfloat16: math.inf}
    for _ in range(6):
        for dtype in seconds:
            b = a.to(dtype)
            start = time.perf_counter()
            b @ b
            seconds[dtype] = min(seconds[dtype], time.perf_counter() - start)
    return 1.5 * seconds[torch.bfloat16] < seconds[torch.float32]


def choose_compile(wanted, device):
    """Whether to use torch.compile: True, False, or 'auto': on CUDA, if it works."""
    if wanted == "auto":
        return device.type == "cuda" and not compile_problem(device)
    return wanted is True


def compile_problem(device):
    """Why torch.compile cannot work on a device, or None. It writes C++, or for a GPU a little C,
    and has a compiler translate it."""
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability < (7, 0):
            name, has = torch.cuda.get_device_name(device), ".".join(map(str, capability))
            return f"Triton needs a GPU of capability 7.0 or more, and {name} has {has}"
        if not importlib.util.find_spec("triton"):
            return "there is no Triton: pip install triton, on Windows triton-windows"
        variable, names = "CC", ("gcc", "clang", "cc")
    else:
        variable, names = "CXX", ("g++", "clang++", "c++")
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if not header.exists():
        return f"there is no {header}; install it (Debian and Ubuntu: apt install python3-dev)"
    if os.name == "nt":
        names = ("cl",)
    own = os.environ.get(variable)
    if not any(map(can_run, [own] if own else names)):
        return f"there is no compiler ({own or ', '.join(names)}); install one or set {variable}"
    return None


@functools.cache  # a start asks several times
def can_run(program):
    """Whether a compiler is there and starts. On a Mac without its tools one is there and fails."""
    if not shutil.which(program):
        return False
    flag = [] if program == "cl" else ["--version"]
    return subprocess.run([program, *flag], capture_output=True).returncode == 0


def slow_paths(device, dtype, compile_setting, config):
    """Lines that say which slower path a GPU takes for a model of this config, and why. dtype: the
    name of the precision."""
    if device.type != "cuda":
        return []
    lines, capability = [], torch.cuda.get_device_capability(device)
    name, has = torch.cuda.get_device_name(device), ".".join(map(str, capability))
    if compile_setting == "auto" and (problem := compile_problem(device)):
        lines.append(f"compile is off: {problem}")
    if dtype == "float32" and capability < (8, 0):
        lines.append(
            f"{name} (capability {has}) has no fast bfloat16, so the precision is float32; "
            "--dtype=float16 uses its tensor cores"
        )
    if hasattr(config, "num_experts") and dtype == "bfloat16" and capability < (9, 0):
        lines.append(
            f"on {name} (capability {has}) torch computes grouped GEMMs expert by expert; one "
            "kernel for all experts needs 9.0"
        )
    if hasattr(config, "num_experts") and dtype != "bfloat16":
        lines.append(f"in {dtype} the experts run one after the other, and the host waits for each")
    return lines


def synchronized_time(device):
    """A clock's time in seconds, read once the device has done all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def autocast(device, dtype):
    """The context in which a model computes in `dtype` (a name); parameters stay float32."""
    return torch.autocast(device.type, getattr(torch, dtype), enabled=dtype != "float32")


def device_name(device):
    """The GPU's name, as in PEAK_FLOPS, or 'cpu (2 threads)' or 'mps'."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        return f"cpu ({torch.get_num_threads()} threads)"
    return device.type


def peak_flops(device):
    """The device's dense bfloat16 peak in FLOP/s, or None if it is not known."""
    return PEAK_FLOPS.get(device_name(device))


def estimate_memory(model, num_moments, batch_size, dtype):
    """Two estimates in bytes for training a model: (state, activations).

    state: weights, gradients and the optimizer's moments (see optim.num_moments), in float32.
    activations: of one micro-batch, counted as in Korthikanti et al. 2022 (arXiv 2205.05198, sec.
    4.1), except that attention keeps no T x T matrix.
    """
    c = model.config
    size = 4 if dtype == "float32" else 2
    # float32 residuals; inputs of norms, projections and attention
    stream = c.n_layer * c.n_embd * (8 + 7 * size)
    hidden = 0  # units that one token visits, over all layers
    for name, p in model.transformer.h.named_parameters():
        if "c_fc" in name and p.dim() >= 2:
            hidden += model.active_numel(name, p) // c.n_embd
    logits = 2 * size * c.vocab_size  # and their gradient
    per_token = stream + 3 * size * hidden + logits
    state = 8 * sum(p.numel() for p in model.parameters()) + 4 * num_moments
    return state, batch_size * c.block_size * per_token


@contextlib.contextmanager
def explain_out_of_memory(settings=None):
    """Turn running out of memory into a MemoryError that says what to try instead.

    With settings it suggests a smaller micro-batch for the same tokens per step; without, while
    the model and its optimizer are made, a smaller model.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        advice = smaller_model() if settings is None else smaller_batch(settings)
        raise MemoryError(f"out of memory: {advice}{memory_of_others()}") from None


def is_out_of_memory(error):
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    # torch's allocator on a CPU; the driver; cuBLAS
    signs = ("can't allocate memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return any(sign in str(error) for sign in signs)


def memory_of_others():
    """The end of an error message if others hold a tenth of this process's GPU or more, else ""."""
    if not torch.cuda.is_initialized():
        return ""
    try:
        free, total = torch.cuda.mem_get_info()
    except RuntimeError:  # the driver cannot answer without memory of its own
        return ""
    others = total - free - torch.cuda.memory_reserved() - CUDA_CONTEXT
    if others < total / 10:
        return ""
    return f"; other processes hold {others / 1e9:.1f} of this GPU's {total / 1e9:.1f} GB"


def smaller_model():
    return (
        "the model and its optimizer do not fit; use fewer layers (n_layer), a smaller width "
        "(n_embd) or fewer experts (num_experts)"
    )


def smaller_batch(settings):
    """The flags for smaller micro-batches, or if they hold one sequence, for shorter ones."""
    name = "batch_size" if settings["batch_size"] > 1 else "block_size"
    value = settings[name]
    accumulation = settings["gradient_accumulation_steps"]
    factor = smallest_divisor(value)
    return (
        f"with --{name}={value // factor} --gradient_accumulation_steps={accumulation * factor} "
        f"instead of {value} and {accumulation} the tokens per step stay the same"
    )


def smallest_divisor(number):
    """The smallest divisor above 1; 1 for 1."""
    for divisor in range(2, number + 1):
        if number % divisor == 0:
            return divisor
    return 1
