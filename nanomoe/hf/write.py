"""
Write a model of transformers into a new folder, and check that it reads back as it was.
"""

import json
import os
import shutil
import warnings
from pathlib import Path
from types import ModuleType

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from configurator import InputError
from nanomoe.hf import classes
from nanomoe.hf.read import load_hf_model
from nanomoe.hf.tokenizer import write_tokenizer
from nanomoe.load import Checkpoint
from nanomoe.tokenizer import Meta, Tokenizer


def import_transformers() -> ModuleType:
    """The module, told to be quiet. Raises InputError if it is not installed."""
    try:
        import transformers  # late: it takes seconds, and nothing else needs it
    except ImportError:
        raise InputError("the export needs transformers: pip install transformers") from None
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


def write_code(path):
    """Copy nanoMoE's model files; transformers makes a package of the folder."""
    root = Path(__file__).resolve().parents[2]
    shutil.copy(root / "nanomoe" / "hf" / "modeling.py", path / "modeling_nanomoe.py")
    shutil.copy(root / "model.py", path)
    code = (root / "moe_model.py").read_text(encoding="utf-8")
    code = code.replace("\nfrom model import", "\nfrom .model import")
    (path / "moe_model.py").write_text(code, encoding="utf-8")


def random_ids(vocab_size, *shape):
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def compare_logits(path, loaded, options):
    """The largest difference of a written folder's logits. Raises OSError if it is not rounding."""
    with warnings.catch_warnings(action="ignore"):
        theirs, info = import_transformers().AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, output_loading_info=True, **options
        )
    if wrong := {key: value for key, value in info.items() if value}:
        raise OSError(f"transformers read other tensors than were written: {wrong}")
    idx = random_ids(loaded.config.vocab_size, 4, min(loaded.config.block_size, 128))
    found = theirs.eval()(idx).logits
    expected = loaded.build_model().eval()(idx, idx)[0]
    difference = (found - expected).abs().max().item()
    other_tokens = (found.argmax(-1) != expected.argmax(-1)).sum().item()
    allowed = 1e-5 * max(10, expected.abs().max().item())  # float32 rounds large logits more
    if other_tokens or not difference <= allowed:
        raise OSError(
            f"transformers computes something else: logits differ by {difference:.1e}, the "
            f"likeliest tokens at {other_tokens} of {idx.numel()} positions"
        )
    return difference


def compare_weights(path, loaded, meta):
    """Raises OSError if a written folder does not come back as the Checkpoint it was made from."""
    config, weights, tokenizer = load_hf_model(path)
    wrong = []
    for name, p in weights.items():
        is_kept = not name.endswith("router.load")  # state of the training
        if is_kept and not p.equal(loaded.weights[name].float()):
            wrong.append(name)
    same_kind = (tokenizer or {}).get("tokenizer") == (meta or {}).get("tokenizer")
    if wrong or config != loaded.config or not same_kind:
        raise OSError(f"it does not read back as it was: {', '.join(wrong) or 'config.json'}")


def compare_tokenizer(path, meta, options):
    """Raises OSError if transformers' tokenizer gives other ids than the Tokenizer of this meta."""
    ours = Tokenizer(meta)
    theirs = import_transformers().AutoTokenizer.from_pretrained(path, **options)
    text = ours.decode(random_ids(meta["vocab_size"], 4096).tolist())
    if theirs(text)["input_ids"] != ours.encode(text).tolist():
        raise OSError("transformers' tokenizer gives different ids")


def export(
    loaded: Checkpoint, folder: str | Path, family: classes.Family, meta: Meta | None = None
) -> float:
    """Write a Checkpoint into a new folder, as a model of the Family's class.

    meta: of the tokenizer, as in a meta.json. Returns the largest difference of logits. Raises
    OSError, and leaves nothing, if the folder does not read back as it was."""
    folder = Path(folder).resolve()
    tmp = folder.with_name(f"{folder.name}.tmp-{os.getpid()}")
    options = {"local_files_only": True, "trust_remote_code": family is classes.REMOTE}
    try:
        tmp.mkdir(parents=True)
        config = classes.hf_config(loaded.config, family, meta)
        (tmp / "config.json").write_text(json.dumps(config, indent=1))
        weights = classes.export_weights(loaded.config, family, loaded.weights)
        save_file(weights, tmp / "model.safetensors", {"format": "pt"})
        # safetensors makes a file that only its owner can read
        shutil.copymode(tmp / "config.json", tmp / "model.safetensors")
        if config.get("output_router_logits"):
            # transformers then computes the balance loss in generate(), too, and fails with a cache
            (tmp / "generation_config.json").write_text(json.dumps({"use_cache": False}))
        if family is classes.REMOTE:
            write_code(tmp)
        if meta:
            write_tokenizer(tmp, meta, loaded.config.block_size)
            compare_tokenizer(tmp, meta, options)
        difference = compare_logits(tmp, loaded, options)
        compare_weights(tmp, loaded, meta)
        os.rename(tmp, folder)
    except SafetensorError as error:  # how it reports a full disk
        raise OSError(f"could not write {tmp}: {error}") from None
    finally:
        shutil.rmtree(tmp, ignore_errors=True)
        modules = Path(import_transformers().utils.HF_MODULES_CACHE, "transformers_modules")
        for copy in modules.glob(f"*_hyphen_{os.getpid()}"):  # of our code, under tmp's name
            shutil.rmtree(copy, ignore_errors=True)
    return difference
