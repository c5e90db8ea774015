"""
Which device and precision, whether torch.compile works there; memory, time and speed.

What a device can do is tried, not derived from its name: one kernel, one small compilation.
"""

import contextlib
import ctypes
import functools
import math
import os
import time
from collections.abc import Iterator

import numpy as np
import torch

from configurator import InputError
from model import GPT, GPTConfig
from nanomoe.errors import num_cores

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

# what torch's allocator on a CPU, the driver and cuBLAS say
OUT_OF_MEMORY = "can't allocate memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED"
CUDA_CONTEXT = 0.5e9  # bytes that the driver takes for each process, about


def choose_device(name: str, try_it: bool = True) -> torch.device:
    """The torch.device for 'cuda', 'cuda:N', 'mps', 'cpu' or 'auto', the best one there is.

    Raises InputError for a device that this machine does not have, or on which a small kernel
    fails. With try_it=False none runs, so that this process takes no memory there. Under torchrun
    each process gets the GPU of its LOCAL_RANK."""
    has_mps = torch.backends.mps.is_available()
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu"
    kind, _, number = str(name).partition(":")
    if kind not in ("cuda", "mps", "cpu") or (number and not number.isdecimal()):
        raise InputError(f"device is '{name}', expected cuda, cuda:N, mps, cpu or auto")
    if kind == "mps" and not has_mps:
        raise InputError("device is 'mps', but this machine has none")
    if kind == "cuda":
        number, count = int(os.environ.get("LOCAL_RANK", number or 0)), torch.cuda.device_count()
        if number >= count:
            seen = f"torch {torch.__version__} sees {count} cuda devices"
            if "CUDA_VISIBLE_DEVICES" in os.environ:
                seen += f", CUDA_VISIBLE_DEVICES is '{os.environ['CUDA_VISIBLE_DEVICES']}'"
            if "LOCAL_RANK" in os.environ:
                seen += f", and this is process {number}, counted from 0"
            raise InputError(f"device is '{name}', but {seen}")
        name = f"cuda:{number}"  # always with its number, which torch.cuda.set_device needs
    device = torch.device(name)
    try:
        with explain_out_of_memory():
            if try_it:
                torch.ones(2, device=device).sum().item()
    except RuntimeError as error:
        raise InputError(f"torch cannot use device '{name}': {first_line(error)}") from None
    return device


def first_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def limit_threads(cpu_max: str = "/sys/fs/cgroup/cpu.max") -> None:
    """Use no more threads than this container may: torch counts the machine's cores, and threads
    that wait for their turn make everything many times slower. OMP_NUM_THREADS goes first."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(min(torch.get_num_threads(), num_cores(cpu_max)))


def keep_freed_memory() -> None:
    """Let this process keep the memory that it frees, up to 1 GB. glibc hands large blocks back to
    the system, and every step asks for them again: 4% of a small MoE's step on a CPU."""
    with contextlib.suppress(OSError, AttributeError, TypeError):  # there is no glibc
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 2**25)  # M_MMAP_THRESHOLD: the most that an older glibc takes
        libc.mallopt(-1, 2**30)  # M_TRIM_THRESHOLD


def set_up_torch(device: torch.device, seed: int, dtype: str, deterministic: bool) -> None:
    """What holds for the whole process: its GPU, its random numbers, how exact torch computes."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    torch.manual_seed(seed)
    if dtype == "float32":  # in lower precision, what is float32 needs all its bits
        torch.set_float32_matmul_precision("high")  # TF32 on a GPU
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)


def to_device(
    windows: tuple[np.ndarray, np.ndarray], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch from Dataset.read_windows as tensors (B, T) on the device."""
    x, y = map(torch.from_numpy, windows)
    on_gpu = device.type == "cuda"
    if on_gpu:  # from pinned memory, and only from there, a copy need not be waited for
        x, y = x.pin_memory(), y.pin_memory()
    return x.to(device, non_blocking=on_gpu), y.to(device, non_blocking=on_gpu)


def autocast(device: torch.device, dtype: str) -> torch.autocast:
    """The context in which a model computes in `dtype` (a name); parameters stay float32."""
    return torch.autocast(device.type, getattr(torch, dtype), enabled=dtype != "float32")


@functools.cache  # on a CPU it measures: once, so that a process has one answer
def choose_dtype(name: str, device: torch.device) -> str:
    """The name of the precision to compute in; 'auto' is bfloat16 where it is faster, else float32.
    Raises InputError for an unknown name."""
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


def choose_compile(wanted: bool | str, device: torch.device) -> bool:
    """Whether to use torch.compile: True, False, or 'auto': on CUDA, if it works. Raises InputError
    if it is True and cannot work."""
    if wanted == "auto":
        return device.type == "cuda" and not compile_problem(device)
    if wanted is True and (problem := compile_problem(device)):
        raise InputError(f"compile cannot work here: {problem}; or use --compile=False")
    return wanted is True


@functools.cache  # a start asks several times
def compile_problem(device: torch.device) -> str | None:
    """What torch says if torch.compile does not work on a device, or None."""
    new = time.time()  # a constant that is in no cache of compiled code
    try:
        torch.compile(lambda x: x * new)(torch.ones(2, device=device))
    except Exception as error:  # whatever Triton, a compiler or the driver raises
        return first_line(error)
    return None


def slow_paths(
    device: torch.device, dtype: str, compile_setting: bool | str, config: GPTConfig
) -> list[str]:
    """Lines that say which slower paths a GPU takes for a model of this config."""
    if device.type != "cuda":
        return []
    lines, capability = [], torch.cuda.get_device_capability(device)
    name = f"{torch.cuda.get_device_name(device)} (capability {'.'.join(map(str, capability))})"
    if compile_setting == "auto" and (problem := compile_problem(device)):
        lines.append(f"compile is off: {problem}")
    if dtype == "float32" and capability < (8, 0):
        lines.append(f"{name} has no fast bfloat16; --dtype=float16 uses its tensor cores")
    if hasattr(config, "num_experts") and dtype != "bfloat16":
        lines.append(f"in {dtype} the experts run one after the other, and the host waits for each")
    elif hasattr(config, "num_experts") and capability < (9, 0):
        lines.append(f"on {name} torch computes grouped GEMMs expert by expert, not in one kernel")
    return lines


# -----------------------------------------------------------------------------
# time and speed


def synchronized_time(device: torch.device) -> float:
    """A clock's time in seconds, read once the device has done all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def device_name(device: torch.device) -> str:
    """The GPU's name, as in PEAK_FLOPS, or 'cpu (2 threads)' or 'mps'."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        return f"cpu ({torch.get_num_threads()} threads)"
    return device.type


def peak_flops(device: torch.device) -> float | None:
    """The device's dense bfloat16 peak in FLOP/s, or None if it is not known."""
    return PEAK_FLOPS.get(device_name(device))


class Timer:
    """The seconds of training since the run began, over all its starts, and the seconds per step
    since the last log line. Both leave out evaluating and saving; the first also leaves out each
    start's first step, which compiles."""

    def __init__(self, device: torch.device, seconds: float = 0.0):
        self.device = device
        self.seconds_before = seconds
        self.started = self.lap_started = synchronized_time(device)
        self.lap_step = None
        self.last_pause = 0.0

    def restart(self) -> None:
        self.started = synchronized_time(self.device)

    def seconds(self) -> float:
        return self.seconds_before + time.perf_counter() - self.started

    def lap(self, step: int) -> float:
        """Seconds per step since the last lap; the first lap is of one step."""
        now = synchronized_time(self.device)
        steps = 1 if self.lap_step is None else step - self.lap_step
        seconds = (now - self.lap_started) / steps
        self.lap_started, self.lap_step = now, step
        return seconds

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        begin = synchronized_time(self.device)
        yield
        self.last_pause = synchronized_time(self.device) - begin
        self.started += self.last_pause
        self.lap_started += self.last_pause


def speed(
    seconds_per_step: float,
    tokens_per_step: int,
    flops_per_token: float,
    device: torch.device,
    num_devices: int,
    dtype: str,
) -> dict[str, float | None]:
    """ms per step, tokens per second and MFU, the model's FLOPs over the devices' dense bfloat16
    peak (Chowdhery et al. 2022, PaLM, arXiv 2204.02311, app. B), None where that is unknown."""
    tokens_per_s = tokens_per_step / seconds_per_step
    peak = peak_flops(device)
    mfu = None
    if peak and dtype != "float32":
        mfu = tokens_per_s * flops_per_token / (peak * num_devices)
    return {"ms": seconds_per_step * 1e3, "tokens_per_s": tokens_per_s, "mfu": mfu}


# -----------------------------------------------------------------------------
# memory


def estimate_memory(model: GPT, num_moments: int, batch_size: int, dtype: str) -> tuple[int, int]:
    """Two estimates in bytes for training a model: (state, activations).

    state: weights, gradients and the optimizer's moments (see optim.num_moments), in float32.
    activations: of one micro-batch, counted as in Korthikanti et al. 2022 (arXiv 2205.05198, sec.
    4.1), except that attention keeps no T x T matrix."""
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
def explain_out_of_memory(settings: dict | None = None) -> Iterator[None]:
    """Turn running out of memory into a MemoryError that says what to try instead: with settings a
    smaller micro-batch for the same tokens per step; without, a smaller model."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        known = isinstance(error, (MemoryError, torch.OutOfMemoryError))
        if not known and not any(words in str(error) for words in OUT_OF_MEMORY):
            raise
        advice = (
            "the model and its optimizer do not fit; use fewer layers (n_layer), a smaller width "
            "(n_embd) or fewer experts (num_experts)"
        )
        if settings:
            advice = smaller_batch(settings)
        raise MemoryError(f"out of memory: {advice}{memory_of_others()}") from None


def memory_of_others():
    """The end of an error message if others hold a tenth of this process's GPU or more, else ""."""
    with contextlib.suppress(RuntimeError):  # the driver cannot answer if the GPU is full
        if torch.cuda.is_initialized():
            free, total = torch.cuda.mem_get_info()
            others = total - free - torch.cuda.memory_reserved() - CUDA_CONTEXT
            if others >= total / 10:
                held = f"{others / 1e9:.1f} of this GPU's {total / 1e9:.1f} GB"
                return f"; other processes hold {held}"
    return ""


def smaller_batch(settings):
    """The flags for smaller micro-batches, or if they hold one sequence, for shorter ones."""
    name = "batch_size" if settings["batch_size"] > 1 else "block_size"
    value = settings[name]
    accumulation = settings["gradient_accumulation_steps"]
    factor = next((n for n in range(2, value) if value % n == 0), value)
    return (
        f"with --{name}={value // factor} --gradient_accumulation_steps={accumulation * factor} "
        f"instead of {value} and {accumulation} the tokens per step stay the same"
    )
