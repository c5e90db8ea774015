"""
Models as Hugging Face's transformers keeps them, read into ours: from a folder, a .safetensors file or the hub.

What tools/export_hf.py wrote is read as it was, also after transformers has saved it anew; of others' models, OpenAI's GPT-2
and what was made from it. Nothing that is read is executed.
"""

import contextlib
import json
import re
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from configurator import InputError
from moe_model import build_config
from nanomoe import hf_classes
from nanomoe.tokenizer import GPT2_VOCAB

GPT2_SIZES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")  # short for openai-community/...
FILES = ["config.json", "model.safetensors", "model-*.safetensors", "model.safetensors.index.json"]
SECONDS = 10  # that the hub may take to answer
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}  # theirs: ours
# keys of a config.json that change no logits, so that training and saving by others may change them
IGNORED_KEYS = {
    "architectures",
    "dtype",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "resid_pdrop",
    "embd_pdrop",
    "attn_pdrop",
    "attention_dropout",
    "nanomoe",
    "auto_map",
    "use_cache",
}


# -----------------------------------------------------------------------------
# where


def is_hf_model(path):
    """Whether a path is a model of transformers', and no checkpoint of our own."""
    if path.is_file():
        return path.suffix == ".safetensors"
    try:
        return "model_type" in json.loads((path / "config.json").read_text())
    except FileNotFoundError:
        return False
    except (ValueError, TypeError):  # damaged; our own have a manifest
        return not (path / "manifest.json").exists()


def looks_like_hub_id(where):
    """Whether `where` can only be a model on the hub: gpt2 and its sizes, or org/name, and nothing here is called so."""
    first = str(where).partition("/")[0]
    return not Path(where).exists() and (
        str(where) in GPT2_SIZES
        or (
            re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(where), re.ASCII) is not None
            and not Path(first).exists()
        )
    )


def is_complete(folder):
    """Whether a folder has a model's config and weights; interrupted downloads, or those of the config alone, have not."""
    with contextlib.suppress(OSError, InputError):
        return (folder / "config.json").exists() and all(
            path.exists() for path in weight_files(folder)
        )
    return False


def fetch(name):
    """The folder with a model of the hub's: in its cache, or downloaded now. Raises InputError if there is no such model,
    OSError if it cannot be asked."""
    # late: they take a while
    from huggingface_hub import HfApi, constants, errors, snapshot_download
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()
    repo = f"openai-community/{name}" if name in GPT2_SIZES else name
    nothing = f"no checkpoint at {name}: no such file or folder here, and"
    with contextlib.suppress(errors.LocalEntryNotFoundError, errors.HFValidationError):
        folder = Path(snapshot_download(repo, allow_patterns=FILES, local_files_only=True))
        if is_complete(folder):
            return folder
    try:
        # asked first, because this gives up in time, and downloads do not
        files = {
            file.rfilename for file in HfApi().model_info(repo, timeout=SECONDS).siblings or ()
        }
        if "config.json" not in files or not files & {
            "model.safetensors",
            "model.safetensors.index.json",
        }:
            raise InputError(
                f"{repo} on the hub has no config.json with a model.safetensors: not a model of transformers'"
            )
        return Path(
            snapshot_download(repo, allow_patterns=FILES, etag_timeout=SECONDS / 4)
        )  # which it tries six times
    except InputError:
        raise
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        raise InputError(
            f"{nothing} no model {repo} on {constants.ENDPOINT}, or it is private (then: hf auth login)"
        ) from None
    except errors.OfflineModeIsEnabled:
        raise OSError(
            f"{nothing} HF_HUB_OFFLINE forbids to fetch {repo}, which the cache has not"
        ) from None
    except Exception as error:  # of several libraries' kinds
        why = str(error).strip().splitlines() or [type(error).__name__]
        raise OSError(
            f"{nothing} {repo} could not be fetched from {constants.ENDPOINT} ({why[0]})"
        ) from None


# -----------------------------------------------------------------------------
# what


def load_hf_model(path, safe_torch_load):
    """A path for which is_hf_model() holds, to (config, {name: float32 tensor}, tokenizer as a meta.json describes it or None).
    safe_torch_load: for a pytorch_model.bin, checkpoint.safe_torch_load. Raises InputError for another model than ours or GPT-2, naming
    every tensor that does not fit, and OSError for damaged files."""
    file = (path.parent if path.is_file() else path) / "config.json"
    try:
        settings = json.loads(file.read_text())
        kind = settings.get("model_type")
    except FileNotFoundError:
        raise InputError(f"{path} needs its config.json beside it") from None
    except (ValueError, AttributeError) as error:
        raise OSError(f"{file} is damaged: {error}") from None
    try:
        if "nanomoe" in settings:
            config, family, tokenizer = own_config(settings)
        elif kind == "gpt2":
            config, family, tokenizer = gpt2_config(settings)
        else:
            raise InputError(
                f"its model_type is '{kind}', expected 'gpt2' or a model that tools/export_hf.py wrote"
            )
        weights = read_weights(path, safe_torch_load)
        if kind == "gpt2":
            weights = rename_gpt2(weights)
        return config, hf_classes.import_weights(config, family, weights), tokenizer
    except KeyError as error:
        raise InputError(f"{path} cannot be read: config.json has no {error}") from None
    except (ValueError, TypeError, AttributeError) as error:  # an InputError is a ValueError
        raise InputError(f"{path} cannot be read: {error}") from None


def own_config(settings):
    """The config, Family and tokenizer of a model that was exported, from its config.json. Raises InputError where the rest of
    the file says something else: transformers goes by that."""
    own = settings["nanomoe"]
    config = build_config(own["model"])
    family = (
        hf_classes.REMOTE
        if settings["model_type"] == "nanomoe"
        else hf_classes.matching_class(config)
    )
    expected, found = plain(hf_classes.hf_config(config, family)), plain(settings)
    wrong = [
        f"{key} is {found.get(key)!r}, expected {value!r}"
        for key, value in expected.items()
        if found.get(key, ...) != value and key not in IGNORED_KEYS
    ]
    if wrong:
        raise InputError(f"config.json was changed after the export: {'; '.join(wrong)}")
    return config, family, own.get("tokenizer")


def plain(settings):
    """A config.json with all keys on one level and under one name, whoever saved it last."""
    nested = {
        key: value
        for part in ("rope_parameters", "rope_scaling")
        for key, value in (settings.get(part) or {}).items()
    }
    settings = {
        key: value
        for key, value in settings.items()
        if key not in ("rope_parameters", "rope_scaling")
    } | nested
    same = {"num_local_experts": "num_experts", "n_routed_experts": "num_experts"}
    return {same.get(key, key): value for key, value in settings.items()}


def gpt2_config(settings):
    """The same for a GPT-2 of another's. Raises InputError, or KeyError for a key that is missing."""
    same = {
        "layer_norm_epsilon": 1e-5,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "reorder_and_upcast_attn": False,
        "add_cross_attention": False,
    }
    wrong = [
        f"{key} is {settings[key]!r}, expected {value!r}"
        for key, value in same.items()
        if settings.get(key, value) != value
    ]
    act = settings.get("activation_function", "gelu_new")
    wrong += [
        f"{key} is {settings[key]!r}, expected a whole number"
        for key in ("vocab_size", "n_embd", "n_layer", "n_head", "n_positions", "n_ctx")
        if key in settings and type(settings[key]) is not int
    ]
    if act not in ACTIVATIONS:
        wrong.append(f"activation_function is {act!r}, expected one of {', '.join(ACTIVATIONS)}")
    if wrong:
        raise InputError("; ".join(wrong))
    # The vocabulary stays as it is: GPT-2's logits are far below zero, so rows of zeros as padding would win the softmax
    config = build_config(
        {
            "block_size": settings.get("n_positions") or settings["n_ctx"],
            "mlp_dim": settings.get("n_inner") or 0,
            "mlp": ACTIVATIONS[act],
            "tie_weights": settings.get("tie_word_embeddings", True),
            "bias": True,
            **{key: settings[key] for key in ("vocab_size", "n_embd", "n_layer", "n_head")},
        }
    )
    meta = (
        {"tokenizer": "gpt2", "vocab_size": GPT2_VOCAB} if config.vocab_size >= GPT2_VOCAB else None
    )
    return config, hf_classes.matching_class(config), meta


def rename_gpt2(weights):
    """The hub's first files have no prefix, but masks, and as pickles a copy of the embedding."""
    return {
        name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}": p
        for name, p in weights.items()
        if not name.endswith((".attn.bias", ".attn.masked_bias"))
    }


def weight_files(folder):
    """The files that hold a model's weights. Raises InputError if there are none."""
    if (folder / "model.safetensors").exists():
        return [folder / "model.safetensors"]
    index = folder / "model.safetensors.index.json"
    if index.exists():
        try:
            return [
                folder / Path(name).name
                for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))
            ]
        except (ValueError, KeyError, TypeError, AttributeError):
            raise OSError(f"{index} is damaged") from None
    if (folder / "pytorch_model.bin").exists():
        return [folder / "pytorch_model.bin"]
    raise InputError(
        "it has no weights, expected model.safetensors, model.safetensors.index.json or pytorch_model.bin"
    )


def read_weights(path, safe_torch_load):
    """{name: tensor} of a file, or of all files of a folder."""
    found = {}
    for file in [path] if path.is_file() else weight_files(path):
        try:
            new = load_file(file) if file.suffix == ".safetensors" else safe_torch_load(file)
        except FileNotFoundError:
            raise OSError(f"{path} is damaged: {file.name} is missing") from None
        except SafetensorError as error:
            raise OSError(f"{file} is damaged: {error}") from None
        if not isinstance(new, dict) or not all(isinstance(p, torch.Tensor) for p in new.values()):
            raise InputError(f"{file.name} holds something else than tensors")
        found |= new
    return found
