"""GPUs that are too old, missing or in use: one line says what they lack. Played on a CPU."""

import pytest
import torch

from configurator import InputError
from moe_model import MoEGPTConfig
from nanomoe import device
from tests.helpers import altered_train, one_line, succeeded, train

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
NO_TRITON = "Cannot find a working triton installation. Either the package is not installed"


def fail(message):
    """A function that fails as torch does, with lines for its developers below the first."""

    def function(*args, **options):
        raise RuntimeError(f"{message}\nSet TORCHDYNAMO_VERBOSE=1 for the internal stack trace")

    return function


@pytest.fixture
def card(monkeypatch):
    """A function that lets torch report a GPU of this capability, or several."""

    def report(capability=(9, 0), count=1, kernel=lambda *args, **options: torch.zeros(2)):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _=None: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _=None: "GeForce GTX 1080")
        monkeypatch.setattr(torch, "ones", kernel)
        monkeypatch.setattr(torch, "compile", lambda function: function)
        for variable in ("LOCAL_RANK", "CUDA_VISIBLE_DEVICES"):
            monkeypatch.delenv(variable, raising=False)
        device.compile_problem.cache_clear()

    yield report
    device.compile_problem.cache_clear()


def test_compile_is_tried(card, monkeypatch):
    """'auto' is off where it fails, and only tried on a GPU; each time it compiles something new,
    which no cache of an earlier run has."""
    card()
    functions = []
    monkeypatch.setattr(torch, "compile", lambda f: functions.append(f) or f)
    assert device.choose_compile("auto", CUDA) and device.choose_compile(True, CUDA)
    assert not device.choose_compile(False, CUDA) and not device.choose_compile("auto", CPU)
    device.compile_problem.cache_clear()
    assert device.compile_problem(CUDA) is None
    assert len({function(1) for function in functions}) == 2
    device.compile_problem.cache_clear()
    monkeypatch.setattr(torch, "compile", fail(NO_TRITON))
    assert not device.choose_compile("auto", CUDA)
    assert device.compile_problem(CUDA) == NO_TRITON
    with pytest.raises(InputError) as error:
        device.choose_compile(True, CUDA)
    assert str(error.value) == f"compile cannot work here: {NO_TRITON}; or use --compile=False"


MOE, DENSE = MoEGPTConfig(), object()


@pytest.mark.parametrize(
    "capability, dtype, config, words",
    [
        ((9, 0), "bfloat16", MOE, []),
        ((12, 0), "bfloat16", MOE, []),
        ((8, 0), "bfloat16", MOE, ["(capability 8.0) torch computes grouped GEMMs expert by"]),
        ((8, 0), "bfloat16", DENSE, []),
        ((7, 5), "float32", DENSE, ["has no fast bfloat16"]),
        ((7, 0), "float32", MOE, ["has no fast bfloat16", "in float32 the experts run one after"]),
        ((7, 0), "float16", MOE, ["in float16 the experts run one after"]),
        ((6, 1), "float32", DENSE, [f"compile is off: {NO_TRITON}", "has no fast bfloat16"]),
    ],
)
def test_the_slower_paths_are_named(capability, dtype, config, words, card, monkeypatch):
    card(capability)
    if "compile is off" in "".join(words):
        monkeypatch.setattr(torch, "compile", fail(NO_TRITON))
    auto = device.choose_dtype.__wrapped__("auto", CUDA)
    assert auto == ("bfloat16" if capability >= (8, 0) else "float32")
    lines = device.slow_paths(CUDA, dtype, "auto", config)
    assert len(lines) == len(words)
    for line, part in zip(lines, words, strict=True):
        assert part in line
    assert device.slow_paths(CPU, dtype, "auto", config) == []


def test_a_gpu_that_torch_cannot_use(card):
    """As one that this torch has no kernels for. A process that only asks runs none."""
    words = "CUDA error: no kernel image is available for execution on the device"
    card(kernel=fail(words))
    with pytest.raises(InputError) as error:
        device.choose_device("auto")
    assert str(error.value) == f"torch cannot use device 'cuda:0': {words}"
    assert device.choose_device("auto", try_it=False) == torch.device("cuda:0")
    card(kernel=fail("CUDA error: out of memory"))
    with pytest.raises(MemoryError, match="out of memory: the model and its optimizer do not fit"):
        device.choose_device("auto")


@pytest.mark.parametrize(
    "name, rank, number",
    [("auto", None, 0), ("cuda", None, 0), ("cuda:1", None, 1), ("auto", 3, 3)],
)
def test_a_cuda_device_has_its_number(name, rank, number, card, monkeypatch):
    """torch.cuda.set_device needs it."""
    card(count=4)
    if rank:
        monkeypatch.setenv("LOCAL_RANK", str(rank))
    assert device.choose_device(name) == torch.device("cuda", number)


@pytest.mark.parametrize(
    "count, environment, words",
    [
        (0, {}, f"torch {torch.__version__} sees 0 cuda devices"),
        (0, {"CUDA_VISIBLE_DEVICES": ""}, "sees 0 cuda devices, CUDA_VISIBLE_DEVICES is ''"),
        (1, {"LOCAL_RANK": "1"}, "sees 1 cuda devices, and this is process 1, counted from 0"),
    ],
)
def test_a_gpu_that_is_not_there(count, environment, words, card, monkeypatch):
    card(count=count)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError) as error:
        device.choose_device("cuda")
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("held, said", [(60e9, True), (1e9, False)])
def test_another_process_has_the_memory(held, said, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 15e9)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (80e9 - 15.5e9 - held, 80e9))
    with pytest.raises(MemoryError) as error, device.explain_out_of_memory():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    assert ("other processes hold 60.0 of this GPU's 80.0 GB" in str(error.value)) == said


def test_memory_that_the_driver_lacks():
    """Where nothing is left for it, connecting to the GPU fails, before any tensor."""
    for words in device.OUT_OF_MEMORY:
        with pytest.raises(MemoryError, match="out of memory: "), device.explain_out_of_memory():
            fail(words)()
    with pytest.raises(RuntimeError, match="another"), device.explain_out_of_memory():
        fail("another error")()


def test_what_is_said_at_the_start(play, tmp_path):
    """Slower paths, and, where the device has no memory left for the driver, one line."""
    change = "train.slow_paths = lambda *about: ['a slower path']"
    script = altered_train(tmp_path / "altered.py", change)
    out = succeeded(train(dataset=play, out_dir=tmp_path / "run", script=script))
    assert "note: a slower path\n" in out
    change = "def fail(*options):\n    raise RuntimeError('CUDA error: out of memory')\n"
    script = altered_train(tmp_path / "altered.py", change + "train.set_up_torch = fail")
    one_line(train(dataset=play, out_dir=tmp_path / "run", script=script), 1, "out of memory: ")
