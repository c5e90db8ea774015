"""
Print text from a checkpoint that train.py (or nanoGPT) wrote, or from OpenAI's GPT-2.

$ python sample.py --out_dir=out/plays-char-moe --start="ROMEO:" --num_samples=3
$ python sample.py --out_dir=out/plays-char-moe --start=FILE:prompt.txt --show_experts=2
$ python sample.py --init_from=gpt2-xl --interactive

All samples are drawn together; the first appears as it is drawn, the others after it. Samples go to
standard output, speed and errors to standard error.
"""

import codecs
import colorsys
import contextlib
import io
import os
import sys
import time
from pathlib import Path

with contextlib.suppress(ImportError):
    import readline  # noqa: F401 (arrow keys in --interactive)

import torch

from configurator import InputError, configure, say
from model import generate_tokens, is_matrix, out_of_range
from moe_model import MoEGPTConfig
from nanomoe.device import autocast, choose_compile, choose_device, choose_dtype, limit_threads
from nanomoe.errors import run_main
from nanomoe.load import load
from nanomoe.tokenizer import Tokenizer

# -----------------------------------------------------------------------------
# settings. Config files and --key=value flags override them
# fmt: off
out_dir = "out"  # a run's folder (its newest checkpoint), a checkpoint, or nanoGPT's ckpt.pt
init_from = "resume"  # 'resume' = from out_dir; or 'gpt2', 'gpt2-medium', ..., a path, a hub name
start = "\n"  # the prompt, or FILE:prompt.txt for a file's content
interactive = False  # ask for prompts, one per line, until Ctrl-D; Ctrl-C ends a sample
num_samples = 10  # how many samples
max_new_tokens = 500  # tokens in each, at most
temperature = 0.8  # below 1.0: likelier text; above: more surprising; 0: greedy
top_k = 200  # sample from the likeliest top_k tokens only; 0 = from all
top_p = 1.0  # and from the fewest that together have this probability (nucleus); 1.0 = from all
stop_at_end = True  # a sample ends at <|endoftext|>, in vocabularies that have it
seed = 1337  # sample i draws from a generator seeded with seed + i
cached = True  # use the KV cache; False: the same text (but for rounding), slower
show_experts = -1  # colour each token by its first expert in this layer (0 is the first); -1 = off
dataset = ""  # take the tokenizer from this dataset, not from the one that the checkpoint names
device = "auto"  # 'cuda', 'cuda:1', 'mps', 'cpu' or 'auto'
dtype = "auto"  # 'float32', 'bfloat16', 'float16' or 'auto' = bfloat16 where it is faster
compile = False  # torch.compile; it takes half a minute, and gains nothing on a CPU
# fmt: on
# -----------------------------------------------------------------------------
# see model.out_of_range
LIMITS = {name: {"at_least": 1} for name in ("num_samples", "max_new_tokens")}
LIMITS |= {name: {"at_least": 0} for name in ("temperature", "top_k", "seed")}
LIMITS |= {"top_p": {"more_than": 0, "at_most": 1}, "show_experts": {"at_least": -1}}
NO_EXPERT = -1


# -----------------------------------------------------------------------------
# the prompt


def read_prompt(text):
    """A text, or for FILE:prompt.txt the file's content. Raises InputError if that is no text."""
    if not text.startswith("FILE:"):
        return text
    path = os.path.expanduser(text.removeprefix("FILE:"))
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise InputError(f"{path} is not UTF-8 text") from None


def encode(tokenizer, text):
    """A prompt's token ids, a list. Raises InputError."""
    if not text:
        raise InputError("the prompt is empty: give at least one character")
    try:
        return tokenizer.encode(text).tolist()
    except UnicodeEncodeError:
        raise InputError("the prompt is not UTF-8 text") from None


# -----------------------------------------------------------------------------
# colours: which expert a token visits


def first_experts(model, rows):
    """Yield the rows of draw(), and for each the first expert of its tokens in the layer
    show_experts: one row late, once the model has read it. NO_EXPERT for the beginning of a prompt
    that is longer than a context."""
    unread, seen = [], []

    def look(router, inputs, output):
        seen[:] = output[1][:, 0].view(num_samples, -1).T.tolist()

    with model.transformer.h[show_experts].mlp.router.register_forward_hook(look):
        for row in rows:
            if seen:  # it ends with the unread rows: the model may have read others again
                experts = [[NO_EXPERT] * num_samples] * (len(unread) - len(seen)) + seen
                yield from zip(unread, experts[-len(unread) :], strict=True)
                unread.clear()
                seen.clear()
            unread.append(row)


def colour(expert, num_experts):
    """The terminal's codes for black text on the expert's colour, from 256; the experts are spread
    over the colour wheel."""
    rgb = colorsys.hls_to_rgb(expert / num_experts, 0.7, 0.9)
    r, g, b = (round(5 * part) for part in rgb)
    return f"\x1b[38;5;16;48;5;{16 + 36 * r + 6 * g + b}m"


def describe_visits(visits):
    total = max(1, sum(visits))
    parts = []
    for expert, count in enumerate(visits):
        parts.append(f"{colour(expert, len(visits))} {expert} \x1b[0m {count / total:.1%}")
    return f"layer {show_experts}, share of the tokens per expert: {' '.join(parts)}"


# -----------------------------------------------------------------------------
# samples


class Writer:
    """Writes one sample's tokens to a file as they come. A character whose bytes are spread over
    several tokens is written with the last of them. visits: a list in which it counts each expert's
    tokens."""

    def __init__(self, tokenizer, file, visits):
        self.tokenizer = tokenizer
        self.file = file
        self.visits = visits
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.count = 0

    def write(self, token, expert):
        """token: None after the sample's end. expert: its colour, or NO_EXPERT."""
        if token is None:
            return
        text = self.decoder.decode(self.tokenizer.to_bytes([token]))
        if expert != NO_EXPERT:
            self.visits[expert] += 1
            on, off = colour(expert, len(self.visits)), "\x1b[0m"
            if text:  # a colour that is on at a line's end would fill the terminal's line
                text = on + text.replace("\n", f"{off}\n{on}") + off
        self.file.write(text)
        self.file.flush()
        self.count += 1

    def end(self):
        rest = self.decoder.decode(b"", final=True)  # of an unfinished character
        self.file.write(f"{rest}\n---------------\n")


def draw(model, prompt, vocab_size, stop):
    """Yield the tokens of one position after the other, the prompt's first: a list with an entry
    per sample, None after its end."""
    rows = [[token] * num_samples for token in prompt]
    yield from rows
    idx = torch.tensor(rows, device=model.lm_head.weight.device).T
    options = {"vocab_size": vocab_size, "seed": seed, "stop": stop, "use_kv_cache": cached}
    # with one more, the model reads the last one, which shows its expert
    count = max_new_tokens if show_experts < 0 else max_new_tokens + 1
    for row in generate_tokens(model, idx, count, temperature, top_k or None, top_p, **options):
        yield [None if token == stop else token for token in row.tolist()]


def print_samples(model, tokenizer, prompt):
    """Continue a prompt, a list of ids, and print the samples, then the speed."""
    T = model.config.block_size
    if len(prompt) > T:
        say(f"the prompt has {len(prompt):,} tokens: the model sees the last {T:,}")
    visits = [0] * getattr(model.config, "num_experts", 0)
    files = [sys.stdout] + [io.StringIO() for _ in range(num_samples - 1)]
    writers = [Writer(tokenizer, file, visits) for file in files]
    rows = draw(model, prompt, tokenizer.vocab_size, tokenizer.eot_token if stop_at_end else None)
    if show_experts >= 0:
        rows = first_experts(model, rows)
    else:
        rows = ((row, [NO_EXPERT] * num_samples) for row in rows)
    begin = time.perf_counter()
    # in --interactive Ctrl-C ends the sample and not the program
    with contextlib.suppress(KeyboardInterrupt) if interactive else contextlib.nullcontext():
        for row, experts in rows:
            for writer, token, expert in zip(writers, row, experts, strict=True):
                writer.write(token, expert)
    seconds = time.perf_counter() - begin
    new_tokens = sum(max(0, writer.count - len(prompt)) for writer in writers)
    for writer in writers:
        writer.end()
    for file in files[1:]:
        print(file.getvalue(), end="", flush=True)
    if show_experts >= 0:
        say(describe_visits(visits))
    say(f"{new_tokens:,} tokens in {seconds:.2f} s: {new_tokens / seconds:,.1f} tokens/s")


def ask_for_prompts(model, tokenizer):
    while True:
        try:
            text = input("prompt: " if sys.stdout.isatty() else "")
            print_samples(model, tokenizer, encode(tokenizer, text))
        except InputError as error:
            say(f"error: {error}")
        except EOFError:
            return say("")


# -----------------------------------------------------------------------------


def check_settings():
    problems = []
    for name, limits in LIMITS.items():
        problems += out_of_range(name, globals()[name], **limits)
    if compile and show_experts >= 0:
        problems.append("show_experts looks into the model, which needs compile=False")
    if problems:
        raise InputError("\n".join(problems))


def check_show_experts(loaded):
    c = loaded.config
    layers = range(c.n_layer) if isinstance(c, MoEGPTConfig) else ()
    layers = [str(layer) for layer in layers if c.is_moe(layer)]
    if show_experts >= 0 and str(show_experts) not in layers:
        which = f"layers {', '.join(layers)}" if layers else "no layer"
        path = loaded.path
        raise InputError(f"show_experts is {show_experts}, but {path} has experts in {which}")


def main():
    _, given = configure(globals())
    check_settings()
    for name in ("top_k", "top_p", "seed"):
        if temperature == 0 and name in given:
            say(f"note: {name} has no effect: temperature is 0, which is greedy")
    if interactive and "start" in given:
        say("note: start has no effect: interactive is True")
    limit_threads()
    torch_device = choose_device(device)
    loaded = load(out_dir) if init_from == "resume" else load(init_from, on_hub=True)
    tokenizer = Tokenizer(loaded.tokenizer_meta(dataset))
    check_show_experts(loaded)
    prompt = None if interactive else encode(tokenizer, read_prompt(start))

    model = loaded.build_model().to(torch_device).eval()
    compute_dtype = choose_dtype(dtype, torch_device)
    # cast once what autocast would cast for every token; routers, norms and head stay float32
    for name, p in model.transformer.h.named_parameters():
        if is_matrix(name, p) and "router" not in name:
            p.data = p.data.to(getattr(torch, compute_dtype))
    if choose_compile(compile, torch_device):
        model.compile_parts(dynamic=True)
    with autocast(torch_device, compute_dtype):
        if interactive:
            ask_for_prompts(model, tokenizer)
        else:
            print_samples(model, tokenizer, prompt)


if __name__ == "__main__":
    run_main(main)
