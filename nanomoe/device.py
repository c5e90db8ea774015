"""
Which device and which precision to compute in, how fast the device can be, and how much memory a run will take.
"""

import contextlib
import functools
import math
import os
import time
from pathlib import Path

import torch

from configurator import InputError

# Dense bfloat16 peak of one GPU in FLOP/s, from the makers' data sheets, by the name that torch reports. A GPU that is
# not here gets no MFU: it would be a guess.
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


def choose_device(name):
    """'auto' to the best device there is; InputError for one that is not there."""
    if name == "auto":
        name = (
            "cuda"
            if torch.cuda.is_available()
            else "mps"
            if torch.backends.mps.is_available()
            else "cpu"
        )
    kind, _, number = str(name).partition(":")
    if kind not in ("cuda", "mps", "cpu") or (number and not number.isdecimal()):
        raise InputError(f"device is '{name}', expected cuda, cuda:N, mps, cpu or auto")
    if kind == "cuda" and not int(number or 0) < torch.cuda.device_count():
        raise InputError(
            f"device is '{name}', but this machine has {torch.cuda.device_count()} cuda devices"
        )
    if kind == "mps" and not torch.backends.mps.is_available():
        raise InputError("device is 'mps', but this machine has none")
    if kind == "cuda":  # always with its number, which torch.cuda.set_device needs
        name = f"cuda:{os.environ.get('LOCAL_RANK', number or 0)}"
    return torch.device(name)


def limit_threads(cpu_max="/sys/fs/cgroup/cpu.max"):
    """torch counts the machine's cores. A container may be allowed fewer, and threads that wait for their turn there cost
    many times what they give: no more threads than that, unless OMP_NUM_THREADS says how many."""
    try:
        quota, period = map(int, Path(cpu_max).read_text().split())
    except (OSError, ValueError):  # no such limit ("max 100000"), or not Linux
        return
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(min(torch.get_num_threads(), math.ceil(quota / period)))


@functools.cache  # it measures: once, and with one answer, for a process
def choose_dtype(name, device):
    """'auto' to bfloat16 where the device has it and is faster with it, else float32."""
    if name == "auto" and device.type == "cpu":
        # processors that only emulate bfloat16 are slower with it, so measure: about 10 ms
        a, seconds = torch.randn(512, 512), {torch.float32: [], torch.bfloat16: []}
        for _ in range(6):
            for kind, times in seconds.items():
                b, start = a.to(kind), time.perf_counter()
                b @ b
                times.append(time.perf_counter() - start)
        return (
            "bfloat16"
            if 1.5 * min(seconds[torch.bfloat16]) < min(seconds[torch.float32])
            else "float32"
        )
    if name == "auto":
        return (
            "bfloat16"
            if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 8
            else "float32"
        )
    if name not in ("float32", "bfloat16", "float16"):
        raise InputError(f"dtype is '{name}', expected float32, bfloat16, float16 or auto")
    return name


def choose_compile(wanted, device):
    return wanted is True or (wanted == "auto" and device.type == "cuda")


def synchronized_time(device):
    """Seconds on a clock, once the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def autocast(device, dtype):
    """The context in which a model computes in `dtype` (a name), its parameters staying float32."""
    return torch.autocast(device.type, getattr(torch, dtype), enabled=dtype != "float32")


def device_name(device):
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu ({torch.get_num_threads()} threads)" if device.type == "cpu" else device.type


def peak_flops(device):
    """Dense bfloat16 peak of a device in FLOP/s, None where it is not known."""
    return PEAK_FLOPS.get(device_name(device))


def estimate_memory(model, batch_size, dtype):
    """Bytes of training a model: weights, gradients and AdamW's two moments in float32; and the activations of a
    micro-batch, counted much as in Korthikanti et al. 2022 (arXiv 2205.05198, sec. 4.1), but for an attention that keeps
    no T x T matrix."""
    c, size = model.config, 4 if dtype == "float32" else 2
    stream = (
        c.n_layer * c.n_embd * (8 + 7 * size)
    )  # float32 residuals; inputs of norms, projections, attention
    hidden = sum(
        model.active_numel(name, p) // c.n_embd
        for name, p in model.transformer.h.named_parameters()
        if "c_fc" in name and p.dim() >= 2
    )
    per_token = stream + 3 * size * hidden + c.vocab_size * (4 + 2 * size)
    return 16 * sum(p.numel() for p in model.parameters()), batch_size * c.block_size * per_token


@contextlib.contextmanager
def explain_out_of_memory(settings=None):
    """Turn running out of memory into a MemoryError that says what would fit: with settings, those of a micro-batch, for the
    same tokens per step; without, a smaller model."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not isinstance(
            error, (MemoryError, torch.OutOfMemoryError)
        ) and "can't allocate memory" not in str(error):
            raise
        if settings is None:
            raise MemoryError(
                "out of memory: the model with its optimizer does not fit; fewer layers (n_layer), a smaller "
                "width (n_embd) or fewer experts (num_experts) would"
            ) from None
        name = "batch_size" if settings["batch_size"] > 1 else "block_size"
        value, accumulation = settings[name], settings["gradient_accumulation_steps"]
        factor = next((n for n in range(2, value + 1) if value % n == 0), 1)
        raise MemoryError(
            f"out of memory: with --{name}={value // factor} --gradient_accumulation_steps="
            f"{accumulation * factor} instead of {value} and {accumulation} the tokens per step stay the "
            "same"
        ) from None
