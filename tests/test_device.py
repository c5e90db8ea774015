"""Time, speed and memory, by hand."""

import time

import pytest
import torch

from nanomoe import device
from nanomoe.optim import num_moments
from tests.helpers import small_model

CPU = torch.device("cpu")


def test_the_timer_leaves_out_pauses_and_the_first_step(monkeypatch):
    """A run that had trained for 100 s; its first step takes 5 s, the next three one each."""
    now = 0.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    timer = device.Timer(CPU, 100.0)
    now = 5.0
    timer.restart()
    assert timer.lap(1) == 5.0 and timer.seconds() == 100.0
    now = 7.0
    with timer.paused():
        now = 17.0
    now = 18.0
    assert timer.lap(4) == 1.0 and timer.seconds() == 103.0 and timer.last_pause == 10.0


def test_speed(monkeypatch):
    """1,000 tokens in 2 s, on four GPUs. In float32 the bfloat16 peak says nothing."""
    monkeypatch.setattr(device, "device_name", lambda _: "NVIDIA H200")
    found = device.speed(2.0, 1000, 1e9, CPU, 4, "bfloat16")
    assert found == {"ms": 2000.0, "tokens_per_s": 500.0, "mfu": pytest.approx(500 / 4 / 989e3)}
    assert device.speed(2.0, 1000, 1e9, CPU, 4, "float32")["mfu"] is None


def test_the_estimate_of_memory():
    """Of 2 layers x 32 with 50 tokens in the vocabulary, 3 sequences of 16, in bfloat16: 16 bytes
    per parameter; per token 2 * 32 * (8 + 7 * 2) of the residual stream, 3 * 2 * 2 * 128 of hidden
    units, 2 * 2 * 50 of logits."""
    model = small_model()
    moments = num_moments(model, "adamw")
    state, activations = device.estimate_memory(model, moments, 3, "bfloat16")
    assert state == 16 * sum(p.numel() for p in model.parameters())
    assert activations == 3 * 16 * (1408 + 1536 + 200)
