"""Sampling: the KV cache changes nothing but the time, and the draws are those asked for."""

import pytest
import torch

from model import KVCache, sample_next_token
from tests.helpers import MODERN, MOE, full, small_model, tokens

SIGMOID = {"router_score": "sigmoid", "route_scale": 2.5, "num_shared_experts": 1}
VARIANTS = {
    "gpt2": {},
    "gelu_tanh": {"mlp": "gelu_tanh"},
    "rope": MODERN | {"bias": False},
    "one kv head": MODERN | {"n_kv_head": 1},
    "two kv heads of four": MODERN | {"n_head": 4, "n_kv_head": 2},
    "moe": MOE,
    "modern moe": MODERN | MOE | SIGMOID | {"n_kv_head": 1, "num_dense_layers": 1},
    "top-1": MOE | {"top_k": 1},
    "dropout and capacity": MOE | {"dropout": 0.3, "capacity_factor": 0.5, "router_jitter": 0.3},
}
variants = pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS)


def lively(**settings):
    """A model in eval mode whose next token depends on all that came before."""
    model = small_model(**settings).eval()
    generator = torch.Generator().manual_seed(1)
    for p in model.parameters():
        if p.dim() >= 2:
            p.data = torch.randn(p.shape, generator=generator) * p.shape[-1] ** -0.5
    for name, p in model.named_buffers():
        if name.endswith("router.bias"):
            p.copy_(torch.linspace(-0.3, 0.3, len(p)))
    return model


@variants
def test_cached_logits_are_those_of_the_whole_context(settings):
    model, idx = lively(**settings), tokens(3, 16)
    with torch.no_grad():
        whole = model(idx, idx)[0]
        for first in (1, 5, 15):
            cache = [KVCache(16) for _ in range(2)]
            found = [model(idx[:, :first], kv_cache=cache)[0]]
            found += [model(idx[:, t : t + 1], kv_cache=cache)[0] for t in range(first, 16)]
            found = torch.cat(found, dim=1)
            torch.testing.assert_close(found, whole[:, first - 1 :], atol=1e-5, rtol=1e-5)
            assert cache[0].length == 16


@variants
@pytest.mark.parametrize("length", [1, full(12), full(16), 40])
def test_cached_and_uncached_are_identical(settings, length):
    """In float32, sampled and greedy, past block_size (16), from a shorter or longer prompt.

    Both equal the plain loop that the docstring describes."""
    model, idx = lively(**settings), tokens(2, length)
    for options in ({"seed": 3}, {"temperature": 0}, {"seed": 4, "top_k": 5, "top_p": 0.9}):
        cached, uncached = (
            model.generate(idx, 40, use_kv_cache=cached, **options) for cached in (True, False)
        )
        assert cached.equal(uncached) and cached.shape == (2, length + 40)
    expected, context = idx, idx[:, -16:]
    for _ in range(40):
        context = context[:, -8:] if context.shape[1] > 16 else context
        with torch.no_grad():
            token = model(context)[0][:, -1].argmax(-1, keepdim=True)
        expected, context = torch.cat((expected, token), 1), torch.cat((context, token), 1)
    assert model.generate(idx, 40, temperature=0).equal(expected)


def test_a_cache_takes_single_tokens_up_to_block_size():
    model, idx = small_model().eval(), tokens(1, 16)
    cache = [KVCache(16) for _ in range(2)]
    with torch.no_grad():
        model(idx[:, :14], kv_cache=cache)
        with pytest.raises(ValueError, match="one token at a time"):
            model(idx[:, 14:], kv_cache=cache)
        cache = [KVCache(16) for _ in range(2)]
        model(idx, kv_cache=cache)
        with pytest.raises(ValueError, match="longer than block_size"):
            model(idx[:, :1], kv_cache=cache)


def test_a_sequence_does_not_depend_on_its_neighbours():
    """Sample i of a seed is sample 0 of seed + i. A longer sample starts like a shorter one."""
    model, idx = lively(**MOE), tokens(1, 4)
    together = model.generate(idx.expand(3, -1), 30, seed=7)
    for i in range(3):
        assert model.generate(idx, 30, seed=7 + i)[0].equal(together[i])
        assert model.generate(idx, 12, seed=7 + i)[0].equal(together[i, :16])
    assert len({tuple(row) for row in together.tolist()}) == 3
    assert not model.generate(idx, 30).equal(model.generate(idx, 30))  # no seed: any
    assert model.generate(idx, 200, temperature=5.0, vocab_size=7)[:, 4:].max() == 6


def test_each_token_has_its_own_draw():
    """Where all tokens are as likely, a sequence has most of them, as often as each other."""
    model = small_model()
    model.transformer.ln_f.weight.data.zero_()
    model.transformer.ln_f.bias.data.zero_()
    found = torch.bincount(model.generate(tokens(4, 1), 500, seed=1)[:, 1:].flatten(), minlength=50)
    assert found.min() > 15 and found.max() < 70  # 40 each, and a standard deviation of 6


def draws(logits, number=20_000, **options):
    """The share of each token, drawn at evenly spaced shares."""
    share = (torch.arange(number) + 0.5) / number
    drawn = sample_next_token(torch.tensor(logits).expand(number, -1), share, **options)
    return torch.bincount(drawn, minlength=len(logits)).double() / number


def test_draw():
    logits = [1.0, 3.0, -2.0, 2.0, 0.5]
    p = torch.tensor(logits).double().softmax(-1)

    def expect(found, kept, temperature=1.0):
        q = (torch.tensor(logits).double() / temperature).softmax(-1)
        q[[i for i in range(5) if i not in kept]] = 0
        torch.testing.assert_close(found, q / q.sum(), atol=2e-4, rtol=0)

    expect(draws(logits), range(5))
    expect(draws(logits, temperature=0.5), range(5), 0.5)
    expect(draws(logits, temperature=3.0), range(5), 3.0)
    expect(draws(logits, top_k=2), [1, 3])
    expect(draws(logits, top_k=99), range(5))
    # likeliest first 0.61, 0.22, 0.08, ...: the smallest set that reaches the share
    assert 0.6 < p[1] < 0.65 and 0.83 < p[1] + p[3] < 0.86
    expect(draws(logits, top_p=0.01), [1])
    expect(draws(logits, top_p=0.6), [1])
    expect(draws(logits, top_p=0.8), [1, 3])
    expect(draws(logits, top_p=0.9), [0, 1, 3])
    expect(draws(logits, top_p=1.0), range(5))
    expect(draws(logits, top_k=2, top_p=0.7), [1])  # of what top_k left, 0.73 and 0.27
    # of the probabilities at that temperature
    expect(draws(logits, temperature=3.0, top_p=0.4), [1, 3], 3.0)
    for temperature in (0, 1e-300, 5e-324):
        assert draws(logits, temperature=temperature)[1] == 1
    last = sample_next_token(torch.tensor([[0.0, -200.0, 0.0, -1e30]]), torch.tensor([1 - 2**-24]))
    assert last in (0, 2)  # never one without probability


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_not_finite(bad):
    model = lively()
    model.transformer.ln_f.weight.data[0] = bad
    with pytest.raises(FloatingPointError, match="not finite"):
        model.generate(tokens(1, 4), 3)
    assert not model.training


def test_stop():
    """Each sequence ends at its own, and the last one ends them all."""
    model, idx = lively(), tokens(3, 4)
    free = model.generate(idx, 60, seed=1)[:, 4:]
    stop = next(v for v in range(50) if all(v in row for row in free.tolist()))
    firsts = [row.index(stop) for row in free.tolist()]
    found = model.generate(idx, 60, seed=1, stop=stop)[:, 4:]
    assert found.shape[1] == max(firsts) + 1 and len(set(firsts)) > 1
    for row, before, first in zip(found, free, firsts, strict=True):
        assert row[: first + 1].equal(before[: first + 1]) and (row[first:] == stop).all()
