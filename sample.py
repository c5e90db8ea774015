"""
Print text from a checkpoint that train.py (or nanoGPT) wrote.

$ python sample.py --out_dir=out/plays-char-moe --start="ROMEO:" --num_samples=3
$ python sample.py --out_dir=out/plays-char-moe --start=FILE:prompt.txt
"""

from pathlib import Path

import numpy as np
import torch

import checkpoint
from configurator import InputError, configure, run
from dataset import Tokenizer, load_meta
from device import autocast, choose_device, choose_dtype, limit_threads

# -----------------------------------------------------------------------------
# settings. Config files and --key=value flags override them
out_dir = "out"  # a run's folder (its newest checkpoint), a checkpoint folder, or a nanoGPT ckpt.pt
start = "\n"  # the prompt, or FILE:prompt.txt for a file's content
num_samples = 10  # how many samples
max_new_tokens = 500  # tokens in each
temperature = 0.8  # below 1.0: likelier text, above: more surprising; 0: always the likeliest token
top_k = 200  # sample from the likeliest top_k tokens only; 0 = from all
seed = 1337  # the same seed gives the same samples
dataset = ""  # take the tokenizer from this dataset instead of the one that the checkpoint names
device = "auto"  # 'cuda', 'cuda:1', 'mps', 'cpu' or 'auto'
dtype = "auto"  # 'float32', 'bfloat16', 'float16' or 'auto': bfloat16 where it is faster
compile = False  # torch.compile, which pays for many samples on a GPU only
# -----------------------------------------------------------------------------


def read_prompt(text):
    """A text, or for FILE:prompt.txt the file's content. Raises InputError if that is no text."""
    if not text.startswith("FILE:"):
        return text
    try:
        return Path(text.removeprefix("FILE:")).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise InputError(f"{text.removeprefix('FILE:')} is not UTF-8 text") from None


def tokenizer_of(loaded, name):
    """The Tokenizer of the dataset `name`, by default the one that a Checkpoint was trained on. Raises InputError if it is not
    there, or has more token ids than the model."""
    name = name or loaded.settings.get("dataset", "")
    try:
        tokenizer = Tokenizer(load_meta(name, need_tokens=False))
    except InputError as error:
        raise InputError(f"{loaded.path} was trained on dataset '{name}', whose tokenizer is needed: {error}; "
                         "or give its place with --dataset=") from None
    if tokenizer.vocab_size > loaded.config.vocab_size:
        raise InputError(f"dataset '{name}' has {tokenizer.vocab_size} token ids, the model of {loaded.path} only "
                         f"{loaded.config.vocab_size}: it was trained on another dataset")
    return tokenizer


def main():
    configure(globals())
    for name, least in (("num_samples", 1), ("max_new_tokens", 1), ("temperature", 0), ("top_k", 0), ("seed", 0)):
        if not globals()[name] >= least:
            raise InputError(f"{name} is {globals()[name]}, expected at least {least}")
    limit_threads()
    where = choose_device(device)
    loaded = checkpoint.load(out_dir)
    tokenizer = tokenizer_of(loaded, dataset)
    prompt = tokenizer.encode(read_prompt(start))
    if not len(prompt):
        raise InputError("the prompt is empty: --start needs at least one character")

    model = loaded.build_model().to(where).eval()
    if compile:
        model.compile()
    generator = torch.Generator(where).manual_seed(seed)
    idx = torch.tensor(prompt.astype(np.int64), device=where).expand(num_samples, -1)
    with autocast(where, choose_dtype(dtype, where)):
        idx = model.generate(idx, max_new_tokens, temperature, top_k or None, tokenizer.vocab_size, generator)
    for sample in idx.tolist():
        print(tokenizer.decode(sample))
        print("---------------")


if __name__ == "__main__":
    run(main)
