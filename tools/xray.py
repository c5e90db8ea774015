r"""
What the experts of a trained model do: one HTML page that needs nothing else, not even a network.

$ python -m tools.xray out/plays-char-moe
$ python -m tools.xray out/plays-char-moe --text="To be, or not to be" --html=hamlet.html
$ python -m tools.xray --out_dir=out/plays-char-moe --text=FILE:poem.txt

It shows a text with each token in the colour of its expert; and of the validation text each expert's load and favourite tokens,
which experts work together, how often neighbours share an expert, and what the loss is without each of them.
"""

import contextlib
import json
import math
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from configurator import InputError, configure, run_main
from moe_model import MoEBlock, MoEGPTConfig
from nanomoe import checkpoint
from nanomoe.dataset import Dataset
from nanomoe.device import autocast, choose_device, choose_dtype, limit_threads
from nanomoe.tokenizer import Tokenizer
from sample import read_prompt

# -----------------------------------------------------------------------------
# settings. The run can be given without --out_dir=
out_dir = "out"  # a run's folder (its newest checkpoint) or a checkpoint folder
html = ""  # where to write the page; by default xray.html in the run's folder
text = ""  # the text to colour, or FILE:some.txt for a file's content; by default the beginning of the validation text
text_tokens = 1024  # at most so many tokens of it are shown
eval_tokens = 65536  # the figures are of so many tokens of the validation text, in whole windows
knockout_tokens = 8192  # and the losses without an expert of so many, because each takes a pass of its own; 0 = none
min_count = 20  # a token that occurs less often is no expert's favourite
dataset = (
    ""  # take tokens and tokenizer from this dataset instead of the one that the checkpoint names
)
device = "auto"  # 'cuda', 'cuda:1', 'mps', 'cpu' or 'auto'
dtype = "auto"  # 'float32', 'bfloat16', 'float16' or 'auto': bfloat16 where it is faster
# -----------------------------------------------------------------------------


def val_batches(data, num_tokens):
    """Validation windows of at least num_tokens tokens, as batches (idx, targets), both (B, T) int64."""
    starts, B = (
        data.val_offsets(math.ceil(num_tokens / data.block_size)),
        max(1, 4096 // data.block_size),
    )
    return [
        tuple(map(torch.from_numpy, data.read_windows("val", starts[i : i + B])))
        for i in range(0, len(starts), B)
    ]


def text_batches(ids, T):
    """A text's ids, cut into windows that know nothing of each other, as batches of one; the last token has no target."""
    idx, targets = torch.tensor([ids]), torch.tensor([[*ids[1:], -1]])
    return [(idx[:, i : i + T], targets[:, i : i + T]) for i in range(0, len(ids), T)]


@torch.no_grad()
def loss_of(model, batches, where, compute_dtype):
    """Mean cross-entropy in nats per token; nan where no token has a target."""
    total, count = 0.0, 0
    for idx, targets in batches:
        with autocast(where, compute_dtype):
            loss = model(idx.to(where), targets.to(where))[1].item()
        known = int((targets != -1).sum())
        total, count = total + (loss * known if known else 0.0), count + known
    return total / count if count else math.nan


def loss_and_routes(model, batches, where, compute_dtype):
    """loss_of, and {layer: (gate_NK, expert_NK)} of all tokens as the layer's router returned them, on the CPU."""
    seen = {
        layer: [] for layer, block in enumerate(model.transformer.h) if isinstance(block, MoEBlock)
    }
    hooks = [
        model.transformer.h[layer].mlp.router.register_forward_hook(
            lambda _router, _x, out, layer=layer: seen[layer].append([t.cpu() for t in out[:2]])
        )
        for layer in seen
    ]
    loss = loss_of(model, batches, where, compute_dtype)
    for hook in hooks:
        hook.remove()
    return loss, {
        layer: [torch.cat(parts) for parts in zip(*calls, strict=True)]
        for layer, calls in seen.items()
    }


@contextlib.contextmanager
def knocked_out(experts, e):
    """A layer's Experts with the output of expert e zeroed: its last matrix and bias, which are then put back as they were."""
    parts = [p.data[e] for p in (experts.c_proj, experts.c_proj_bias) if p is not None]
    kept = [p.clone() for p in parts]
    try:
        for p in parts:
            p.zero_()
        yield
    finally:
        for p, old in zip(parts, kept, strict=True):
            p.copy_(old)


def knock_out(model, layer, batches, where, compute_dtype):
    """The loss without each expert of a layer, a list."""
    losses = []
    for e in range(model.config.num_experts):
        with knocked_out(model.transformer.h[layer].mlp.experts, e):
            losses.append(loss_of(model, batches, where, compute_dtype))
    return losses


def numbers(values, digits):
    """A number, or nested lists or a tensor of them, rounded; what is not finite is None, because JSON has no word for it."""
    values = values.tolist() if isinstance(values, torch.Tensor) else values
    if isinstance(values, list):
        return [numbers(value, digits) for value in values]
    return round(values, digits) if math.isfinite(values) else None


def profile(expert_NK, token_N, start_N, c, decode):
    """The figures of one layer, for a config c; start_N: whether a token is the first of its window."""
    (N, K), E, V = expert_NK.shape, c.num_experts, c.vocab_size
    count_VE = torch.bincount(
        (token_N.unsqueeze(1) * E + expert_NK).flatten(), minlength=V * E
    ).view(V, E)
    load_E, count_V = count_VE.sum(dim=0).double() / (N * K), torch.bincount(token_N, minlength=V)
    first_N = expert_NK[:, 0]
    same = (first_N[1:] == first_N[:-1])[~start_N[1:]].double().mean()
    chance = (torch.bincount(first_N, minlength=E).double() / N).square().sum()

    lift_VE = (count_VE / count_VE.sum(dim=0) / (count_V / N).unsqueeze(1)).nan_to_num()
    best = (lift_VE * (count_V >= min_count).unsqueeze(1)).topk(min(10, V), dim=0)
    favourites = [
        [
            [decode([v]), round(lift, 3), int(count_VE[v, e]), int(count_V[v])]
            for v, lift in zip(best.indices[:, e].tolist(), best.values[:, e].tolist(), strict=True)
            if lift > 1
        ]
        for e in range(E)
    ]

    chosen_NE = torch.zeros(N, E, dtype=torch.float64).scatter_(1, expert_NK, 1)
    pair_EE, expected_EE = chosen_NE.T @ chosen_NE, torch.outer(load_E, load_E)
    for t in (pair_EE, expected_EE):  # both as shares of all pairs, of different experts
        t.fill_diagonal_(0).div_(t.sum())
    return {
        "load": numbers(load_E, 6),
        "same": numbers(same.item(), 6),
        "chance": numbers(chance.item(), 6),
        "favourites": favourites,
        "pairs": numbers(pair_EE / expected_EE, 3) if K > 1 else None,
    }


def main():
    runs = [arg for arg in sys.argv[1:] if not arg.startswith("-")]
    if len(runs) > 1:
        raise InputError(f"one run at a time, not {' and '.join(runs)}")
    _, given = configure(
        globals(),
        [*(a for a in sys.argv[1:] if a not in runs), *(f"--out_dir={name}" for name in runs)],
    )
    for name, least in (
        ("text_tokens", 1),
        ("eval_tokens", 1),
        ("knockout_tokens", 0),
        ("min_count", 1),
    ):
        if globals()[name] < least:
            raise InputError(f"{name} is {globals()[name]}, expected at least {least}")
    limit_threads()
    where = choose_device(device)
    how = where, choose_dtype(dtype, where)
    loaded = checkpoint.load(out_dir)
    c, source = loaded.config, dataset or loaded.settings.get("dataset", "")
    if not isinstance(c, MoEGPTConfig):
        raise InputError(f"{loaded.path} is a dense model: it has no experts to look at")
    tokenizer = Tokenizer(loaded.tokenizer_meta(dataset))
    ids = tokenizer.encode(read_prompt(text)).tolist()
    if "text" in given and not ids:
        raise InputError("the text is empty: --text needs at least one character")
    try:
        data = Dataset(source, c.block_size)
        batches, few = val_batches(data, eval_tokens), val_batches(data, knockout_tokens)
        shown, measured = (
            (ids or data.val[:text_tokens].tolist())[:text_tokens],
            f"the validation text of '{source}'",
        )
    except InputError as error:
        if not ids:
            raise InputError(f"{error}; or give a text with --text=") from None
        print(f"the figures are of the given text: {error}")
        batches, few = (
            text_batches(ids, c.block_size),
            text_batches(ids[:knockout_tokens], c.block_size),
        )
        shown, measured = ids[:text_tokens], "the given text"

    model = loaded.build_model().to(where).eval()
    loss, routes = loss_and_routes(model, batches, *how)
    token_N = torch.cat([idx.flatten() for idx, _ in batches])
    start_N = torch.cat([torch.arange(idx.numel()) % idx.shape[1] == 0 for idx, _ in batches])
    count, whole = sum(idx.numel() for idx, _ in few), loss_of(model, few, *how)
    of_text = loss_and_routes(model, text_batches(shown, c.block_size), *how)[1].values()
    about = {
        "checkpoint": f"{loaded.path}, after {loaded.step:,} steps",
        "model": f"{c.num_experts} experts, {c.top_k} for each token, in layers {', '.join(map(str, routes))} of 0 to "
        f"{c.n_layer - 1}" + f"; in no figure here: {c.num_shared_experts} shared, "
        "which every token visits" * bool(c.num_shared_experts),
        "measured on": f"{len(token_N):,} tokens of {measured}, in {start_N.sum():,} windows, in {how[1]}",
        "loss": f"{loss:.4f} nats per token; without one expert: measured on {count:,} tokens",
        "text shown": f"{len(shown):,} tokens of "
        + (f"{len(ids):,}" if ids else "the validation text's beginning"),
    }
    for name, value in about.items():
        print(f"{name:12s} {value}")
    layers = []
    for layer, (_, expert_NK) in routes.items():
        row = profile(expert_NK, token_N, start_N, c, tokenizer.decode)
        row |= {
            "layer": layer,
            "knockout": numbers([loss - whole for loss in knock_out(model, layer, few, *how)], 6),
        }
        layers.append(row)
        print(
            f"layer {layer}: load {min(row['load']):.1%} to {max(row['load']):.1%}, even is {1 / c.num_experts:.1%}; the "
            f"same expert again {row['same'] or 0:.1%}, by chance {row['chance']:.1%}",
            flush=True,
        )
    page = {
        "run": loaded.path.parent.name,
        "about": about,
        "experts": c.num_experts,
        "top_k": c.top_k,
        "layers": layers,
        "text": {
            "tokens": [tokenizer.decode([v]) for v in shown],
            "window": c.block_size,
            "expert": [expert_NK.flatten().tolist() for _, expert_NK in of_text],
            "gate": [numbers(gate_NK.flatten(), 3) for gate_NK, _ in of_text],
        },
    }
    path = Path(html or loaded.path.parent / "xray.html")
    # in a script HTML looks for nothing but "<"
    data = json.dumps(page, separators=(",", ":")).replace("<", r"\u003c")
    path.write_text(
        Path(__file__).with_suffix(".html").read_text(encoding="utf-8").replace("DATA", data),
        encoding="utf-8",
    )
    print(f"{path}: {path.stat().st_size / 1e3:,.0f} kB")


if __name__ == "__main__":
    run_main(main)
