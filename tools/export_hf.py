r"""
Write a checkpoint as a model of Hugging Face's transformers: config.json, model.safetensors and the tokenizer's files, for
AutoModelForCausalLM and AutoTokenizer.

$ python -m tools.export_hf out/plays-char-swiglu hf/plays
$ python -m tools.export_hf out/plays-char-moe hf/plays-moe --remote_code=True
$ python sample.py --init_from=hf/plays

Which class: GPT-2, Llama, Qwen3, Mixtral, Qwen2-MoE, Qwen3-MoE, OLMoE or GLM-4-MoE, whichever computes just what the model
does. Where none does, as for experts with GPT-2's LayerNorm and learned positions, a line says what would have to be otherwise;
and --remote_code=True writes a model that runs with nanoMoE's own files, copied beside the weights, for transformers' option
trust_remote_code=True. What was written is loaded and compared before it gets its name: its logits on random tokens, as
transformers computes them, with the original's, and its weights, as nanoMoE reads them back, bit for bit.
"""

import json
import os
import shutil
import sys
import warnings
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from configurator import InputError, configure, run_main
from nanomoe import checkpoint, hf_classes
from nanomoe.device import limit_threads
from nanomoe.tokenizer import Tokenizer

# -----------------------------------------------------------------------------
# settings. The first two can be given without --name=
out_dir = ""  # a run's folder (its newest checkpoint), a checkpoint folder, a nanoGPT ckpt.pt or what else sample.py takes
folder = ""  # the new folder
dataset = ""  # take the tokenizer from this dataset instead of the one that the checkpoint names
remote_code = (
    False  # for any model: nanoMoE's own code goes along, instead of a class of transformers'
)
# -----------------------------------------------------------------------------

CODE = ("model.py", "moe_model.py")


def import_transformers():
    """The module, told to be quiet. Raises InputError."""
    try:
        import transformers  # late: it takes seconds, and nothing else needs it
    except ImportError:
        raise InputError(
            "transformers is needed to check what is written: pip install transformers"
        ) from None
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


# -----------------------------------------------------------------------------
# the tokenizer's files


def find_merge(token, ranks):
    """The two parts that byte-pair encoding makes a token of: its bytes, merged by all merges of a lower rank."""
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        i = min(range(len(parts) - 1), key=lambda i: ranks.get(parts[i] + parts[i + 1], len(ranks)))
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


def build_tokenizer(meta):
    """A tokenizers.Tokenizer that encodes as the Tokenizer of `meta` does."""
    from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Built
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters, merges = bytes_to_unicode(), []  # the characters that stand for bytes in GPT-2's files
    if meta["tokenizer"] == "char":
        built = Built(models.WordLevel({char: i for i, char in enumerate(meta["chars"])}))
        built.pre_tokenizer, built.decoder = (
            pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated"),
            decoders.Fuse(),
        )
        return built
    ranks = {bytes([byte]): byte for byte in range(256)}
    if meta["tokenizer"] == "gpt2":
        ranks = Tokenizer(meta).bpe._mergeable_ranks
        merges = [
            find_merge(token, ranks) for token in sorted(ranks, key=ranks.get) if len(token) > 1
        ]
    spell = {token: "".join(letters[byte] for byte in token) for token in ranks}
    built = Built(
        models.BPE(
            {spell[token]: rank for token, rank in ranks.items()},
            [(spell[a], spell[b]) for a, b in merges],
        )
    )
    built.pre_tokenizer = pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=meta["tokenizer"] == "gpt2"
    )
    built.decoder = decoders.ByteLevel()
    if meta["tokenizer"] == "gpt2":
        built.add_special_tokens([AddedToken("<|endoftext|>", normalized=False, special=True)])
    return built


def write_tokenizer(path, meta, block_size):
    built = build_tokenizer(meta)
    built.save(str(path / "tokenizer.json"))
    if meta["tokenizer"] == "gpt2":
        built.model.save(str(path))  # vocab.json and merges.txt, for readers that are older
    special = (
        dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
        if meta["tokenizer"] == "gpt2"
        else {}
    )
    (path / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "model_max_length": block_size,
                "clean_up_tokenization_spaces": False,
                **special,
            },
            indent=1,
        )
    )


# -----------------------------------------------------------------------------
# the model


def write_code(path):
    """nanoMoE's own files as the modules of a package, which transformers makes of the folder."""
    root = Path(__file__).resolve().parent
    shutil.copy(root / "modeling_nanomoe.py", path)
    for name in CODE:
        text = (root.parent / name).read_text(encoding="utf-8")
        for other in CODE:
            text = text.replace(f"\nfrom {other[:-3]} import", f"\nfrom .{other[:-3]} import")
            text = text.replace(f"\nimport {other[:-3]}\n", f"\nfrom . import {other[:-3]}\n")
        (path / name).write_text(text, encoding="utf-8")


@torch.no_grad()
def compare(path, loaded, family, meta):
    """Read a written folder with transformers and with nanoMoE; returns the largest difference of logits. Raises OSError for
    any difference that is more than rounding."""
    transformers, c, own_code = import_transformers(), loaded.config, family is hf_classes.REMOTE
    with warnings.catch_warnings(action="ignore"):
        theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
            path,
            dtype=torch.float32,
            output_loading_info=True,
            local_files_only=True,
            trust_remote_code=own_code,
        )
    if wrong := {key: value for key, value in info.items() if value}:
        raise OSError(f"transformers read other tensors than were written: {wrong}")
    idx = torch.randint(
        c.vocab_size, (4, min(c.block_size, 128)), generator=torch.Generator().manual_seed(0)
    )
    found, expected = theirs.eval()(idx).logits, loaded.build_model().eval()(idx, idx)[0]
    difference = (found - expected).abs().max().item()
    # of logits larger than 10 float32 itself leaves no more
    if not difference <= 1e-5 * max(10, expected.abs().max().item()) or not found.argmax(-1).equal(
        expected.argmax(-1)
    ):
        raise OSError(
            f"transformers computes something else: logits differ by {difference:.1e}, likeliest tokens at "
            f"{(found.argmax(-1) != expected.argmax(-1)).sum()} of {idx.numel()} positions"
        )
    back = checkpoint.load(path)
    wrong = [
        name
        for name in hf_classes.our_shapes(c)
        if not name.endswith("router.load")
        and not back.weights[name].equal(loaded.weights[name].float())
    ]
    if (
        wrong
        or back.config != c
        or (back.tokenizer or {}).get("tokenizer") != (meta or {}).get("tokenizer")
    ):
        raise OSError(f"it does not read back as it was: {', '.join(wrong) or 'config.json'}")
    if meta:
        own, ids = (
            Tokenizer(meta),
            torch.randint(meta["vocab_size"], (4096,), generator=torch.Generator().manual_seed(0)),
        )
        text = own.decode(ids.tolist())
        theirs = transformers.AutoTokenizer.from_pretrained(
            path, local_files_only=True, trust_remote_code=own_code
        )
        if theirs(text)["input_ids"] != own.encode(text).tolist():
            raise OSError("the tokenizer of transformers encodes otherwise")
    return difference


def export(loaded, folder, family, meta=None):
    """Write a Checkpoint as a model of the Family's class into a new folder, with the tokenizer that `meta` describes, and
    return the largest difference of logits. Raises OSError, leaving nothing, if anything does not read back as it was."""
    folder = Path(folder).resolve()
    tmp = folder.with_name(f"{folder.name}.tmp-{os.getpid()}")
    try:
        tmp.mkdir(parents=True)
        (tmp / "config.json").write_text(
            json.dumps(hf_classes.hf_config(loaded.config, family, meta), indent=1)
        )
        weights = hf_classes.export_weights(loaded.config, family, loaded.weights)
        save_file(weights, tmp / "model.safetensors", {"format": "pt"})
        shutil.copymode(
            tmp / "config.json", tmp / "model.safetensors"
        )  # it would be its owner's alone
        if meta:
            write_tokenizer(tmp, meta, loaded.config.block_size)
        if family is hf_classes.REMOTE:
            write_code(tmp)
        difference = compare(tmp, loaded, family, meta)
        os.rename(tmp, folder)
    except SafetensorError as error:  # how it reports a full disk
        raise OSError(f"could not write {tmp}: {error}") from None
    finally:
        copies = Path(import_transformers().utils.HF_MODULES_CACHE).glob(
            f"transformers_modules/*_hyphen_{os.getpid()}"
        )
        for left in (
            tmp,
            *copies,
        ):  # it keeps modules that came with a model, under the temporary name
            shutil.rmtree(left, ignore_errors=True)
    return difference


def choose(loaded):
    try:
        return (
            hf_classes.REMOTE
            if remote_code
            else hf_classes.matching_class(loaded.config, loaded.weights)
        )
    except InputError as error:
        raise InputError(
            f"{error}; or export it with --remote_code=True, and nanoMoE's own code goes along"
        ) from None


def main():
    names = [arg for arg in sys.argv[1:] if not arg.startswith("-")]
    places = [f"--{key}={name}" for key, name in zip(("out_dir", "folder"), names, strict=False)]
    configure(globals(), [*(a for a in sys.argv[1:] if a not in names), *places])
    if len(names) > 2 or not out_dir or not folder:
        raise InputError(
            "expected a checkpoint and a new folder, as in: python -m tools.export_hf out/plays-char-moe hf/plays"
        )
    if Path(folder).exists() and (not Path(folder).is_dir() or any(Path(folder).iterdir())):
        raise InputError(f"{folder} exists, and is not an empty folder")
    limit_threads()
    import_transformers()
    loaded = checkpoint.load(out_dir)
    loaded.build_model()  # weights that do not fit their config are an error here
    family = choose(loaded)
    print(f"{loaded.path}, after {loaded.step:,} steps: {family.name} ({family.about})")
    try:
        meta = loaded.tokenizer_meta(dataset)
    except InputError as error:
        if dataset:
            raise
        meta = None
        print(f"without a tokenizer: {error}")
    difference = export(loaded, folder, family, meta)
    print(
        f"logits as transformers computes them differ by {difference:.1e} at most; the weights read back as they were"
    )
    print(
        f"{folder}: {sum(path.stat().st_size for path in Path(folder).iterdir()) / 1e6:,.1f} MB"
        + (f", with the tokenizer '{meta['tokenizer']}'" if meta else "")
    )


if __name__ == "__main__":
    run_main(main)
