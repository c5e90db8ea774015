"""
Read models in the form of Hugging Face's transformers: from a folder, a .safetensors file or the
hub.

A model that tools/export_hf.py wrote comes back as it was, also after transformers has saved it
again. Of other models, OpenAI's GPT-2 and its descendants are read. Nothing that is read is
executed.
"""

import contextlib
import json
import re
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from configurator import InputError
from model import GPTConfig, out_of_range
from moe_model import build_config
from nanomoe.checkpoint import replace_retired_values, safe_torch_load
from nanomoe.hf import classes
from nanomoe.tokenizer import GPT2_VOCAB, with_file

GPT2_SIZES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")  # short for openai-community/...
FILES = ["config.json", "model.safetensors", "model-*.safetensors", "model.safetensors.index.json"]
SECONDS = 10  # how long the hub may take to answer


# -----------------------------------------------------------------------------
# finding and fetching


def looks_like_hub_id(name: str | Path) -> bool:
    """Whether a name can only be a model on the hub: gpt2 or one of its sizes, or org/name. If it,
    or its first part, exists here, it is none."""
    name = str(name)
    if Path(name.partition("/")[0]).exists():
        return False
    well_formed = re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name, re.ASCII)
    return name in GPT2_SIZES or well_formed is not None


def is_complete(folder):
    """Whether a folder has a model's config and all its weights, so no half of a download."""
    try:
        return (folder / "config.json").exists() and all(p.exists() for p in weight_files(folder))
    except (OSError, InputError):
        return False


def fetch(name: str) -> Path:
    """The folder of a model on the hub: from the cache, or downloaded now.

    Raises InputError if there is no such model, OSError if the hub cannot be reached."""
    # late: they take a while
    from huggingface_hub import HfApi, constants, errors, snapshot_download
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()
    repo = f"openai-community/{name}" if name in GPT2_SIZES else name
    not_here = f"no checkpoint at {name}: no such file or folder here, and"
    with contextlib.suppress(errors.LocalEntryNotFoundError, errors.HFValidationError):
        folder = Path(snapshot_download(repo, allow_patterns=FILES, local_files_only=True))
        if is_complete(folder):
            return folder
    try:
        # ask first: this call keeps to its timeout, a download does not and tries six times
        HfApi().model_info(repo, timeout=SECONDS)
        folder = Path(snapshot_download(repo, allow_patterns=FILES, etag_timeout=SECONDS / 4))
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        raise InputError(
            f"{not_here} no model {repo} on {constants.ENDPOINT}, or it is private (then run: "
            "hf auth login)"
        ) from None
    except errors.OfflineModeIsEnabled:
        raise OSError(f"{not_here} {repo} is not in the cache and HF_HUB_OFFLINE is set") from None
    except Exception as error:  # several libraries raise their own kinds
        reasons = str(error).strip().splitlines() or [type(error).__name__]
        raise OSError(
            f"{not_here} {repo} could not be fetched from {constants.ENDPOINT} ({reasons[0]})"
        ) from None
    if not is_complete(folder):
        raise InputError(
            f"{repo} on the hub is not a model of transformers: it has no config.json with a "
            "model.safetensors"
        )
    return folder


# -----------------------------------------------------------------------------
# reading


def load_hf_model(path: Path) -> tuple[GPTConfig, dict, dict | None]:
    """Read a model of transformers, a folder or a .safetensors file.

    Returns its config, {name: float32 tensor}, and its tokenizer as a meta.json describes it, or
    None. Raises InputError for a model that is neither ours nor a GPT-2, naming every tensor that
    does not fit; OSError for damaged files."""
    folder = path.parent if path.is_file() else path
    file = folder / "config.json"
    try:
        settings = json.loads(file.read_text())
        model_type = settings.get("model_type")
    except FileNotFoundError:
        raise InputError(f"{path} needs its config.json beside it") from None
    except (ValueError, AttributeError, RecursionError) as error:
        raise OSError(f"{file} is damaged: {error}") from None
    try:
        if "nanomoe" in settings:
            config, family = read_exported_config(settings)
            tokenizer = with_file(settings["nanomoe"].get("tokenizer"), folder)
        elif model_type == "gpt2":
            config, family, tokenizer = read_gpt2_config(settings)
        else:
            raise InputError(
                f"its model_type is '{model_type}', expected 'gpt2' or a model that "
                "tools/export_hf.py wrote"
            )
        theirs = read_weights(path)
        if model_type == "gpt2":
            theirs = rename_gpt2(theirs)
        return config, classes.import_weights(config, family, theirs), tokenizer
    except KeyError as error:
        raise InputError(f"{path} cannot be read: config.json has no {error}") from None
    # an InputError is a ValueError; a RuntimeError is torch's, of sizes that no memory holds
    except (ValueError, TypeError, AttributeError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(f"{path} cannot be read: {reason}") from None


def read_exported_config(settings):
    """The config and Family of a model that tools/export_hf.py wrote.

    transformers goes by the rest of config.json, so that must agree with our part. Raises
    InputError if it does not."""
    config = build_config(replace_retired_values(settings["nanomoe"]["model"]))
    family = classes.REMOTE
    if settings["model_type"] != family.model_type:
        family = classes.matching_class(config)
    if wrong := differences(flatten(settings), flatten(classes.class_config(config, family))):
        raise InputError(f"config.json was changed after the export: {'; '.join(wrong)}")
    return config, family


def flatten(settings):
    """A config.json with one level and one name for a thing: versions of transformers differ."""
    flat = dict(settings)
    for key in ("num_local_experts", "n_routed_experts"):
        if key in flat:
            flat["num_experts"] = flat.pop(key)
    for key in ("rope_parameters", "rope_scaling"):
        flat |= flat.pop(key, None) or {}
    return flat


def differences(found, expected):
    """The keys of a config.json that are not as expected, as sentences."""
    return [
        f"{key} is {found.get(key)!r}, expected {value!r}"
        for key, value in expected.items()
        if found.get(key) != value
    ]


def read_gpt2_config(settings):
    """The config, Family and tokenizer of a GPT-2. Raises InputError, KeyError."""
    fixed = {key: value for key, value in classes.GPT2.items() if not isinstance(value, str)}
    wrong = differences(fixed | settings, fixed)
    for key in ("vocab_size", "n_embd", "n_layer", "n_head", "n_positions", "n_ctx"):
        if key in settings and type(settings[key]) is not int:
            wrong.append(f"{key} is {settings[key]!r}, expected a whole number")
    activation = settings.get("activation_function", "gelu_new")
    wrong += out_of_range("activation_function", activation, choices=classes.ACTIVATIONS)
    if wrong:
        raise InputError("; ".join(wrong))
    # The vocabulary is not padded: GPT-2's logits are far below zero, so the zero logits of padding
    # rows would win the softmax.
    config = GPTConfig(
        vocab_size=settings["vocab_size"],
        block_size=settings.get("n_positions") or settings["n_ctx"],
        n_layer=settings["n_layer"],
        n_head=settings["n_head"],
        n_embd=settings["n_embd"],
        mlp_dim=settings.get("n_inner") or 0,
        mlp=classes.ACTIVATIONS[activation],
        tie_weights=settings.get("tie_word_embeddings", True),
    )
    tokenizer = None
    if config.vocab_size >= GPT2_VOCAB:
        tokenizer = {"tokenizer": "gpt2", "vocab_size": GPT2_VOCAB}
    return config, classes.matching_class(config), tokenizer


def rename_gpt2(weights):
    """GPT-2's tensors under their full names, without the attention masks.

    The first files on the hub lack the prefix and hold the masks."""
    renamed = {}
    for name, p in weights.items():
        if not name.endswith((".attn.bias", ".attn.masked_bias")):
            is_full = name.startswith(("transformer.", "lm_head."))
            renamed[name if is_full else f"transformer.{name}"] = p
    return renamed


def weight_files(folder):
    """The files that hold a model's weights. Raises InputError if there are none."""
    index = folder / "model.safetensors.index.json"
    if not (folder / "model.safetensors").exists() and index.exists():
        try:
            names = set(json.loads(index.read_text())["weight_map"].values())
            return [folder / Path(name).name for name in sorted(names)]
        except (ValueError, KeyError, TypeError, AttributeError):
            raise OSError(f"{index} is damaged") from None
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).exists():
            return [folder / name]
    raise InputError(
        "it has no weights, expected model.safetensors, model.safetensors.index.json or "
        "pytorch_model.bin"
    )


def read_weights(path):
    """{name: tensor} from a file, or from all weight files of a folder."""
    weights = {}
    for file in [path] if path.is_file() else weight_files(path):
        try:
            part = load_file(file) if file.suffix == ".safetensors" else safe_torch_load(file)
        except FileNotFoundError:
            raise OSError(f"{path} is damaged: {file.name} is missing") from None
        except SafetensorError as error:
            raise OSError(f"{file} is damaged: {error}") from None
        if not isinstance(part, dict) or not all(map(torch.is_tensor, part.values())):
            raise InputError(f"{file.name} contains objects that are not tensors")
        weights |= part
    return weights
