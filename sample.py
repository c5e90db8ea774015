"""
Print text from a checkpoint that train.py (or nanoGPT) wrote, or from OpenAI's GPT-2.

$ python sample.py --out_dir=out/plays-char-moe --start="ROMEO:" --num_samples=3
$ python sample.py --out_dir=out/plays-char-moe --start=FILE:prompt.txt --show_experts=2
$ python sample.py --init_from=gpt2-xl --interactive

The first sample appears as it is drawn, and all are drawn together. Samples go to the standard output, all else to the other.
"""

import codecs
import colorsys
import contextlib
import io
import sys
import time
from pathlib import Path

with contextlib.suppress(ImportError):
    import readline  # noqa: F401 (arrow keys in --interactive)

import torch

from configurator import InputError, configure, run_main
from model import generate_tokens, is_matrix, out_of_range
from moe_model import MoEGPTConfig
from nanomoe import checkpoint
from nanomoe.device import autocast, choose_device, choose_dtype, limit_threads
from nanomoe.tokenizer import Tokenizer

# -----------------------------------------------------------------------------
# settings. Config files and --key=value flags override them
out_dir = "out"  # a run's folder (its newest checkpoint), a checkpoint folder, or a nanoGPT ckpt.pt
init_from = "resume"  # 'resume' = what out_dir holds; or 'gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl', or what train.py takes
start = "\n"  # the prompt, or FILE:prompt.txt for a file's content
interactive = False  # ask for prompts, one line each, until Ctrl-D; Ctrl-C ends a sample
num_samples = 10  # how many samples
max_new_tokens = 500  # tokens in each, at most
temperature = (
    0.8  # below 1.0: likelier text, above: more surprising; 0: always the likeliest token (greedy)
)
top_k = 200  # sample from the likeliest top_k tokens only; 0 = from all
top_p = 1.0  # and from the fewest that have this share of the probability (nucleus sampling); 1.0 = from all
stop_at_end = True  # a sample ends at <|endoftext|>, in vocabularies that have it
seed = 1337  # sample i draws from a generator seeded with seed + i
cached = True  # keep keys and values; False computes the whole context for every token: the same text, later
show_experts = -1  # colour each token by its first expert in this layer (0 is the first); -1 = off
dataset = ""  # take the tokenizer from this dataset instead of the one that the checkpoint names
device = "auto"  # 'cuda', 'cuda:1', 'mps', 'cpu' or 'auto'
dtype = "auto"  # 'float32', 'bfloat16', 'float16' or 'auto': bfloat16 where it is faster
compile = False  # torch.compile, which takes half a minute and gains nothing on a CPU
# -----------------------------------------------------------------------------


def read_prompt(text):
    """A text, or for FILE:prompt.txt the file's content. Raises InputError if that is no text."""
    if not text.startswith("FILE:"):
        return text
    try:
        return Path(text.removeprefix("FILE:")).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise InputError(f"{text.removeprefix('FILE:')} is not UTF-8 text") from None


def colour(expert, num_experts):
    """The terminal's codes for black on the expert's colour; experts are spread over the colour wheel (256-colour mode)."""
    r, g, b = (round(5 * part) for part in colorsys.hls_to_rgb(expert / num_experts, 0.7, 0.9))
    return f"\x1b[38;5;16;48;5;{16 + 36 * r + 6 * g + b}m"


class Writer:
    """Writes the tokens of one sample to a file as they come; a character whose bytes are in several tokens with its last."""

    def __init__(self, tokenizer, num_experts, file):
        self.tokenizer, self.num_experts, self.file = tokenizer, num_experts, file
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.count, self.ended = 0, False

    def write(self, token, expert):
        """Of a token without an expert (-1) in no colour."""
        text = self.decoder.decode(self.tokenizer.to_bytes([token]))
        if expert >= 0 and text:
            on, off = colour(expert, self.num_experts), "\x1b[0m"
            text = (
                on + text.replace("\n", f"{off}\n{on}") + off
            )  # or it would reach to the end of the terminal's line
        self.file.write(text)
        self.file.flush()
        self.count += 1

    def end(self):
        self.file.write(
            self.decoder.decode(b"", final=True) + "\n---------------\n"
        )  # the rest of a character


def positions(model, prompt, vocab_size, end):
    """Yield for one position after the other, from the first of the prompt (a list of ids), the tokens that the samples have
    there and their experts, two lists; -1 is the expert where none is asked for or the context began behind the token."""
    B, layer = num_samples, show_experts
    history, known = [[token] * B for token in prompt], []

    def see(_router, _x, out):
        seen = out[1][:, 0].view(B, -1).T.tolist()
        known.extend([[-1] * B] * (len(history) - len(known) - len(seen)))
        known.extend(seen[len(seen) - (len(history) - len(known)) :])

    # the expert of a token is known when the next one is drawn
    tokens = generate_tokens(
        model,
        torch.tensor([prompt] * B, device=model.lm_head.weight.device),
        max_new_tokens + (layer >= 0),
        temperature,
        top_k or None,
        top_p,
        vocab_size,
        seed,
        end,
        cached,
    )
    if layer < 0:
        yield from ((row, [-1] * B) for row in history)
        yield from ((token.tolist(), [-1] * B) for token in tokens)
        return
    hook, done = model.transformer.h[layer].mlp.router.register_forward_hook(see), 0
    try:
        for token in tokens:
            yield from zip(history[done:], known[done:], strict=True)
            done = len(known)
            history.append(token.tolist())
    finally:
        hook.remove()


def print_samples(model, tokenizer, prompt):
    """Continue a prompt, a list of ids, and print the samples, the first one as it comes; the speed to the standard error."""
    if len(prompt) > model.config.block_size:
        say(
            f"the prompt has {len(prompt):,} tokens: the model sees the last {model.config.block_size:,}"
        )
    E, end, start = (
        getattr(model.config, "num_experts", 0),
        tokenizer.eot_token if stop_at_end else None,
        time.perf_counter(),
    )
    writers = [
        Writer(tokenizer, E, sys.stdout if i == 0 else io.StringIO()) for i in range(num_samples)
    ]
    visits = [0] * E
    with contextlib.suppress(KeyboardInterrupt) if interactive else contextlib.nullcontext():
        for i, (tokens, experts) in enumerate(positions(model, prompt, tokenizer.vocab_size, end)):
            for writer, token, expert in zip(writers, tokens, experts, strict=True):
                writer.ended |= i >= len(prompt) and token == end
                if not writer.ended:
                    writer.write(token, expert)
                    if expert >= 0:
                        visits[expert] += 1
    seconds, new = (
        time.perf_counter() - start,
        sum(max(0, writer.count - len(prompt)) for writer in writers),
    )
    for writer in writers:
        writer.end()
    print("".join(writer.file.getvalue() for writer in writers[1:]), end="", flush=True)
    if show_experts >= 0:
        say(
            f"layer {show_experts}, expert and share of the tokens: "
            + " ".join(
                f"{colour(e, E)} {e} \x1b[0m {n / max(1, sum(visits)):.1%}"
                for e, n in enumerate(visits)
            )
        )
    say(f"{new:,} tokens in {seconds:.2f} s: {new / seconds:,.1f} tokens/s")


def say(line):
    print(line, file=sys.stderr, flush=True)


def encode(tokenizer, text):
    """A prompt's ids. Raises InputError."""
    if not text:
        raise InputError("the prompt is empty: it needs at least one character")
    try:
        return tokenizer.encode(text).tolist()
    except UnicodeEncodeError:
        raise InputError("the prompt is not UTF-8 text") from None


def main():
    configure(globals())
    found = out_of_range(
        globals(),
        dict.fromkeys(("num_samples", "max_new_tokens"), 1)
        | dict.fromkeys(("temperature", "top_k", "top_p", "seed"), 0)
        | {"show_experts": -1},
        {},
        (),
    )
    if not 0 < top_p <= 1:
        found.append(f"top_p is {top_p}, expected 0 < top_p <= 1")
    if compile and show_experts >= 0:
        found.append("show_experts looks into the model, which needs compile=False")
    if found:
        raise InputError("\n".join(found))
    limit_threads()
    where = choose_device(device)
    loaded = (
        checkpoint.load(out_dir)
        if init_from == "resume"
        else checkpoint.load(init_from, on_hub=True)
    )
    tokenizer, c = Tokenizer(loaded.tokenizer_meta(dataset)), loaded.config
    layers = [i for i in range(c.n_layer) if isinstance(c, MoEGPTConfig) and c.is_moe(i)]
    if show_experts >= 0 and show_experts not in layers:
        raise InputError(
            f"show_experts is {show_experts}, but {loaded.path} has experts in "
            + (f"layers {', '.join(map(str, layers))}" if layers else "no layer")
        )
    prompt = None if interactive else encode(tokenizer, read_prompt(start))

    model, compute_dtype = loaded.build_model().to(where).eval(), choose_dtype(dtype, where)
    if (
        compute_dtype != "float32"
    ):  # cast once what autocast would for every token; the rest needs float32
        for name, p in model.transformer.h.named_parameters():
            if is_matrix(name, p) and "router" not in name:
                p.data = p.data.to(getattr(torch, compute_dtype))
    if compile:
        model.compile_parts(dynamic=True)
    with autocast(where, compute_dtype):
        if not interactive:
            print_samples(model, tokenizer, prompt)
        while interactive:
            try:
                text = input("prompt: " if sys.stdout.isatty() else "")
                print_samples(model, tokenizer, encode(tokenizer, text))
            except InputError as error:
                say(f"error: {error}")
            except EOFError:
                say("")
                break


if __name__ == "__main__":
    run_main(main)
