"""
See what the experts of a trained model do: one HTML page that needs no network.

$ python -m tools.xray out/plays-char-moe
$ python -m tools.xray out/plays-char-moe --text="To be, or not to be" --html=hamlet.html
$ python -m tools.xray out/plays-char-moe --text=FILE:poem.txt

The page shows a text coloured by expert. For the validation text it shows each expert's load and
favourite tokens, which experts are chosen together, how often neighbouring tokens share an expert,
and the loss without each expert.
"""

import functools
import json
import math
from pathlib import Path

import torch
from torch.utils._pytree import tree_map

from configurator import InputError, configure
from moe_model import MoEBlock, MoEGPTConfig
from nanomoe.dataset import Dataset
from nanomoe.device import autocast, choose_device, choose_dtype, limit_threads
from nanomoe.errors import run_main
from nanomoe.load import load
from nanomoe.log import for_json
from nanomoe.tokenizer import Tokenizer
from sample import read_prompt

# -----------------------------------------------------------------------------
# settings
out_dir = "out"  # a run's folder (its newest checkpoint) or a checkpoint; also without --out_dir=
html = ""  # write the page to this file; default: xray.html in the run's folder
text = ""  # the text to colour, or FILE:some.txt; default: the beginning of the validation text
text_tokens = 1024  # show at most this many tokens of the text
eval_tokens = 65536  # measure on this many tokens of the validation text, in whole windows
knockout_tokens = 8192  # measure each expert's knockout (a pass of its own) on this many; 0 = off
min_count = 20  # favourite tokens occur at least this often
dataset = ""  # take tokens and tokenizer from this dataset, not from the checkpoint's
device = "auto"  # 'cuda', 'cuda:1', 'mps', 'cpu' or 'auto'
dtype = "auto"  # 'float32', 'bfloat16', 'float16' or 'auto': bfloat16 where it is faster
# -----------------------------------------------------------------------------


def val_batches(data, num_tokens):
    """Validation windows of at least num_tokens tokens: batches of idx and targets, (B, T)."""
    offsets = data.val_offsets(math.ceil(num_tokens / data.block_size))
    B = max(1, 4096 // data.block_size)
    parts = [data.read_windows("val", offsets[i : i + B]) for i in range(0, len(offsets), B)]
    return [tuple(map(torch.from_numpy, part)) for part in parts]


def text_batches(ids, T):
    """A text as independent windows of T tokens, batches of one; the last token has no target."""
    idx, targets = torch.tensor([ids]), torch.tensor([[*ids[1:], -1]])
    return [(idx[:, i : i + T], targets[:, i : i + T]) for i in range(0, len(ids), T)]


@torch.no_grad()
def loss_of(model, batches, torch_device, compute_dtype):
    """Mean cross-entropy in nats per token; nan if no token has a target.

    batches, here and below: a list of (idx, targets), each (B, T); a target of -1 does not count.
    """
    total, count = 0.0, 0
    for idx, targets in batches:
        known = int((targets != -1).sum())
        with autocast(torch_device, compute_dtype):
            loss = model(idx.to(torch_device), targets.to(torch_device))[1].item()
        if known:
            total += loss * known
            count += known
    return total / count if count else math.nan


def loss_and_routes(model, batches, torch_device, compute_dtype):
    """loss_of(), and {layer: (gate_NK, expert_NK)} of all tokens, from the routers, on the CPU."""
    blocks = enumerate(model.transformer.h)
    routers = {layer: block.mlp.router for layer, block in blocks if isinstance(block, MoEBlock)}
    calls = {router: [] for router in routers.values()}

    def record(router, _x, out):
        calls[router].append([tensor.cpu() for tensor in out[:2]])

    hooks = [router.register_forward_hook(record) for router in calls]
    loss = loss_of(model, batches, torch_device, compute_dtype)
    for hook in hooks:
        hook.remove()
    routes = {}
    for layer, router in routers.items():
        gates, experts = zip(*calls[router], strict=True)
        routes[layer] = torch.cat(gates), torch.cat(experts)
    return loss, routes


def knockout_losses(model, layer, batches, torch_device, compute_dtype):
    """The loss without each expert of a layer, whose gates are 0 then: a list."""
    losses = []
    for e in range(model.config.num_experts):

        def silence(_router, _x, out, e=e):
            gate_NK, expert_NK, routing = out
            return gate_NK.masked_fill(expert_NK == e, 0), expert_NK, routing

        with model.transformer.h[layer].mlp.router.register_forward_hook(silence):
            losses.append(loss_of(model, batches, torch_device, compute_dtype))
    return losses


def favourite_tokens(count_VE, count_V, decode):
    """For each expert, its tokens of highest lift: [text, lift, visits, occurrences]."""
    # lift: how much more frequent a token is among the expert's tokens than among all
    lift_VE = count_VE / count_VE.sum(dim=0) / (count_V / count_V.sum()).unsqueeze(1)
    lift_VE = lift_VE.nan_to_num() * (count_V >= min_count).unsqueeze(1)
    favourites = []
    for e in range(count_VE.shape[1]):
        found = []
        best = lift_VE[:, e].topk(min(10, len(count_V)))
        for lift, v in zip(best.values.tolist(), best.indices.tolist(), strict=True):
            if lift > 1:
                found.append([decode([v]), round(lift, 3), int(count_VE[v, e]), int(count_V[v])])
        favourites.append(found)
    return favourites


def layer_figures(expert_NK, token_N, starts_N, config, decode):
    """The figures of one layer. starts_N: whether a token is the first of its window."""
    (N, K), E, V = expert_NK.shape, config.num_experts, config.vocab_size
    pairs = (token_N.unsqueeze(1) * E + expert_NK).flatten()
    count_VE = torch.bincount(pairs, minlength=V * E).view(V, E)
    load_E = count_VE.sum(dim=0).double() / (N * K)
    first_N = expert_NK[:, 0]
    same = (first_N[1:] == first_N[:-1])[~starts_N[1:]].double().mean()
    chance = (torch.bincount(first_N, minlength=E).double() / N).square().sum()

    # pairs of different experts: their shares as found, and as expected from the loads
    chosen_NE = torch.zeros(N, E, dtype=torch.float64).scatter_(1, expert_NK, 1)
    found_EE = (chosen_NE.T @ chosen_NE).fill_diagonal_(0)
    expected_EE = torch.outer(load_E, load_E).fill_diagonal_(0)
    lift_EE = (found_EE / found_EE.sum()) / (expected_EE / expected_EE.sum())
    return {
        "load": load_E.tolist(),
        "same": same.item(),
        "chance": chance.item(),
        "favourites": favourite_tokens(count_VE, torch.bincount(token_N, minlength=V), decode),
        "pairs": lift_EE.round(decimals=3).tolist() if K > 1 else None,
    }


def collect(loaded, tokenizer, ids):
    """Everything that the page shows. ids: the given text, or [] to show the validation text."""
    config = loaded.config
    T = config.block_size
    source = dataset or loaded.settings.get("dataset", "")
    measured_on = f"the validation text of '{source}'"
    shown = ids
    try:
        data = Dataset(source, T)
        batches, few = val_batches(data, eval_tokens), val_batches(data, knockout_tokens)
        shown = ids or data.val[:text_tokens].tolist()
    except InputError as error:
        if not ids:
            raise InputError(f"{error}; or give a text with --text=") from None
        print(f"measuring on the given text: {error}")
        measured_on = "the given text"
        batches, few = text_batches(ids, T), text_batches(ids[:knockout_tokens], T)
    shown = shown[:text_tokens]

    torch_device = choose_device(device)
    how = torch_device, choose_dtype(dtype, torch_device)
    model = loaded.build_model().to(torch_device).eval()
    loss, routes = loss_and_routes(model, batches, *how)
    token_N = torch.cat([idx.flatten() for idx, _ in batches])
    starts_N = torch.cat([torch.arange(idx.numel()) % idx.shape[1] == 0 for idx, _ in batches])
    experts = f"{config.num_experts} experts, {config.top_k} per token"
    if config.num_shared_experts:
        experts += f" (and {config.num_shared_experts} shared, for every token; not shown)"
    few_tokens = sum(idx.numel() for idx, _ in few)
    about = {
        "checkpoint": f"{loaded.path}, after {loaded.step:,} steps",
        "model": f"{experts}, in layers {', '.join(map(str, routes))} of 0 to {config.n_layer - 1}",
        "measured on": f"{len(token_N):,} tokens of {measured_on}, in {starts_N.sum():,} windows, "
        f"in {how[1]}",
        "loss": f"{loss:.4f} nats per token; knockouts: measured on {few_tokens:,} tokens",
        "text shown": f"{len(shown):,} of {len(ids or data.val):,} tokens",
    }
    for name, value in about.items():
        print(f"{name:12s} {value}")
    layers = []
    whole = loss_of(model, few, *how)
    for layer, (_, expert_NK) in routes.items():
        row = layer_figures(expert_NK, token_N, starts_N, config, tokenizer.decode)
        losses = knockout_losses(model, layer, few, *how)
        layers.append({"layer": layer, "knockout": [loss - whole for loss in losses]} | row)
        print(
            f"layer {layer}: load {min(row['load']):.1%} to {max(row['load']):.1%}, even is "
            f"{1 / config.num_experts:.1%}; neighbours share an expert {row['same']:.1%}, "
            f"by chance {row['chance']:.1%}",
            flush=True,
        )
    shown_routes = loss_and_routes(model, text_batches(shown, T), *how)[1].values()
    return {
        "run": loaded.path.parent.name,
        "about": about,
        "experts": config.num_experts,
        "top_k": config.top_k,
        "layers": layers,
        "text": {
            "tokens": [tokenizer.decode([token]) for token in shown],
            "window": T,
            "expert": [expert_NK.flatten().tolist() for _, expert_NK in shown_routes],
            "gate": [gate_NK.flatten().round(decimals=3).tolist() for gate_NK, _ in shown_routes],
        },
    }


def main():
    _, given = configure(globals(), positional=("out_dir",))
    least = {"text_tokens": 1, "eval_tokens": 1, "knockout_tokens": 0, "min_count": 1}
    for name, value in least.items():
        if globals()[name] < value:
            raise InputError(f"{name} is {globals()[name]}, expected at least {value}")
    limit_threads()
    loaded = load(out_dir)
    if not isinstance(loaded.config, MoEGPTConfig):
        raise InputError(f"{loaded.path} is a dense model: it has no experts to look at")
    tokenizer = Tokenizer(loaded.tokenizer_meta(dataset))
    ids = tokenizer.encode(read_prompt(text)).tolist()
    if "text" in given and not ids:
        raise InputError("the text is empty: --text needs at least one character")
    # JSON has no NaN; inside a script element, HTML looks for nothing but "<"
    found = tree_map(functools.partial(for_json, digits=6), collect(loaded, tokenizer, ids))
    page = json.dumps(found, separators=(",", ":"))
    template = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
    path = Path(html or loaded.path.parent / "xray.html")
    path.write_text(template.replace("DATA", page.replace("<", "\\u003c")), encoding="utf-8")
    print(f"wrote {path} ({path.stat().st_size / 1e3:,.0f} kB)")


if __name__ == "__main__":
    run_main(main)
