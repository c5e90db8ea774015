"""GPUs that are too old, missing or in use: one line says what they lack. Played on a CPU."""

import pytest
import torch

from configurator import InputError
from moe_model import MoEGPTConfig
from nanomoe import device
from tests.helpers import altered_train, one_line, succeeded, train

CUDA = torch.device("cuda")


@pytest.fixture
def card(monkeypatch):
    """A function that lets torch report a GPU of this capability, or several."""

    def report(capability=(9, 0), name="GeForce GTX 1080", count=1):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _=None: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _=None: name)
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_80", "sm_90a"])
        monkeypatch.setattr(device, "can_run", lambda name: True)
        monkeypatch.setattr(device.importlib.util, "find_spec", lambda name: name)
        for variable in ("LOCAL_RANK", "CUDA_VISIBLE_DEVICES"):
            monkeypatch.delenv(variable, raising=False)

    return report


@pytest.mark.parametrize("capability, compiles", [((6, 1), False), ((7, 0), True), ((9, 0), True)])
def test_an_old_gpu_is_not_compiled_for(capability, compiles, card, monkeypatch):
    card(capability)
    assert device.choose_compile("auto", CUDA) is compiles
    problem = device.compile_problem(CUDA)
    assert problem is None if compiles else "GeForce GTX 1080 has 6.1" in problem
    monkeypatch.setattr(device.importlib.util, "find_spec", lambda name: None)
    assert not device.choose_compile("auto", CUDA)  # as on Windows
    assert not compiles or "there is no Triton" in device.compile_problem(CUDA)


def test_python_without_its_headers(card, monkeypatch, tmp_path):
    """What torch.compile writes includes Python.h."""
    card()
    assert device.choose_compile("auto", CUDA)
    monkeypatch.setattr(device.sysconfig, "get_path", lambda name: str(tmp_path))
    assert not device.choose_compile("auto", CUDA)
    for where in (CUDA, torch.device("cpu")):
        assert f"there is no {tmp_path / 'Python.h'}" in device.compile_problem(where)


MOE, DENSE = MoEGPTConfig(), object()


@pytest.mark.parametrize(
    "capability, dtype, config, words",
    [
        ((9, 0), "bfloat16", MOE, []),
        ((12, 0), "bfloat16", MOE, []),
        ((8, 0), "bfloat16", MOE, ["expert by expert; one kernel for all experts needs 9.0"]),
        ((8, 0), "bfloat16", DENSE, []),
        ((7, 5), "float32", DENSE, ["no fast bfloat16, so the precision is float32"]),
        ((7, 0), "float32", MOE, ["no fast bfloat16", "in float32 the experts run one after"]),
        ((7, 0), "float16", MOE, ["in float16 the experts run one after"]),
        ((6, 1), "float32", DENSE, ["compile is off: Triton needs", "no fast bfloat16"]),
    ],
)
def test_the_slower_paths_are_named(capability, dtype, config, words, card):
    card(capability)
    assert device.choose_dtype.__wrapped__("auto", CUDA) == (
        "bfloat16" if capability >= (8, 0) else "float32"
    )
    lines = device.slow_paths(CUDA, dtype, "auto", config)
    assert len(lines) == len(words)
    for line, part in zip(lines, words, strict=True):
        assert part in line
    assert device.slow_paths(torch.device("cpu"), dtype, "auto", config) == []


@pytest.mark.parametrize(
    "capability, runs", [((7, 0), False), ((7, 5), True), ((8, 6), True), ((10, 0), False)]
)
def test_a_gpu_without_kernels(capability, runs, card):
    """Machine code of 8.0 runs on 8.6, too; PTX runs on all later GPUs."""
    card(capability)
    if runs:
        assert device.choose_device("cuda").index == 0
        return
    with pytest.raises(InputError, match=r"has no kernels for GeForce GTX 1080 \(sm_\d+\)"):
        device.choose_device("auto")


def test_ptx_runs_on_later_gpus(card, monkeypatch):
    card((10, 0))
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_90", "compute_90"])
    assert device.choose_device("cuda").index == 0


@pytest.mark.parametrize(
    "name, local_rank, chosen",
    [
        ("auto", None, "cuda:0"),
        ("cuda", None, "cuda:0"),
        ("cuda:1", None, "cuda:1"),
        ("auto", "3", "cuda:3"),
    ],
)
def test_a_cuda_device_has_its_number(name, local_rank, chosen, card, monkeypatch):
    """torch.cuda.set_device needs the number."""
    card(count=4)
    if local_rank:
        monkeypatch.setenv("LOCAL_RANK", local_rank)
    found = device.choose_device(name)
    assert str(found) == chosen
    assert torch.cuda._utils._get_device_index(found) == int(chosen[-1])


@pytest.mark.parametrize(
    "count, environment, words",
    [
        (0, {}, "torch sees 0 cuda devices; nvidia-smi says"),
        (0, {"CUDA_VISIBLE_DEVICES": ""}, "CUDA_VISIBLE_DEVICES is '', which leaves 0 cuda"),
        (1, {"LOCAL_RANK": "1"}, "this is process 1, counted from 0: --nproc_per_node=1"),
        (2, {"LOCAL_RANK": "7"}, "torch sees 2 cuda devices, and this is process 7"),
    ],
)
def test_a_gpu_that_is_not_there(count, environment, words, card, monkeypatch):
    card(count=count)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError) as error:
        device.choose_device("cuda")
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_torch_without_cuda(card, monkeypatch):
    card(count=0)
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(InputError, match="is built without CUDA: install a build that has it"):
        device.choose_device("cuda")


@pytest.mark.parametrize("held, said", [(60e9, True), (1e9, False)])
def test_another_process_has_the_memory(held, said, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 15e9)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (80e9 - 15.5e9 - held, 80e9))
    with pytest.raises(MemoryError) as error, device.explain_out_of_memory():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    assert ("other processes hold 60.0 of this GPU's 80.0 GB" in str(error.value)) == said


@pytest.mark.parametrize(
    "words", ["CUDA error: out of memory", "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"]
)
def test_memory_that_the_driver_lacks(words, play, tmp_path):
    """Where nothing is left for the driver, connecting to the GPU fails, before any tensor."""
    change = f"""
def fail(device):
    raise RuntimeError({words!r})
train.init_distributed = fail
"""
    script = altered_train(tmp_path / "altered.py", change)
    one_line(train(dataset=play, out_dir=tmp_path / "run", script=script), 1, "out of memory: ")


def test_the_slower_paths_are_said_at_the_start(play, tmp_path):
    change = "train.slow_paths = lambda *about: ['a slower path']"
    script = altered_train(tmp_path / "altered.py", change)
    out = succeeded(train(dataset=play, out_dir=tmp_path / "run", script=script))
    assert "note: a slower path\n" in out
