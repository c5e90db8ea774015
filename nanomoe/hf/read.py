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
from moe_model import build_config
from nanomoe.checkpoint import replace_retired_values, safe_torch_load
from nanomoe.hf import classes
from nanomoe.tokenizer import GPT2_VOCAB, with_file

GPT2_SIZES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")  # short for openai-community/...
FILES = ["config.json", "model.safetensors", "model-*.safetensors", "model.safetensors.index.json"]
SECONDS = 10  # how long the hub may take to answer
ACTIVATIONS = {  # theirs: ours
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
# keys that exports of earlier commits lack
NEW_KEYS = {"rope_theta", "router_aux_loss_coef", "output_router_logits"}
# keys of a config.json that change no logits; training and saving with transformers may change them
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
# finding and fetching


def is_hf_model(path):
    """Whether a path is a model of transformers and not a checkpoint of ours."""
    if path.is_file():
        return path.suffix == ".safetensors"
    try:
        return "model_type" in json.loads((path / "config.json").read_text())
    except FileNotFoundError:
        return False
    except (ValueError, TypeError):  # a damaged config.json; a checkpoint of ours has a manifest
        return not (path / "manifest.json").exists()


def looks_like_hub_id(name):
    """Whether a name can only be a model on the hub: gpt2 or one of its sizes, or org/name.

    A name of something that exists here is never one.
    """
    name = str(name)
    if Path(name).exists():
        return False
    if name in GPT2_SIZES:
        return True
    organisation = name.partition("/")[0]
    well_formed = re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name, re.ASCII)
    return well_formed is not None and not Path(organisation).exists()


def is_complete(folder):
    """Whether a folder of the cache has a model's config and all its weights.

    After an interrupted download, or a download of the config alone, it does not.
    """
    if not (folder / "config.json").exists():
        return False
    try:
        return all(path.exists() for path in weight_files(folder))
    except (OSError, InputError):
        return False


def fetch(name):
    """The folder of a model on the hub: from the cache, or downloaded now.

    Raises InputError if there is no such model, OSError if the hub cannot be reached.
    """
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
        # ask first: this call keeps to its timeout, a download does not
        info = HfApi().model_info(repo, timeout=SECONDS)
        files = {file.rfilename for file in info.siblings or ()}
        has_weights = "model.safetensors" in files or "model.safetensors.index.json" in files
        if "config.json" not in files or not has_weights:
            raise InputError(
                f"{repo} on the hub is not a model of transformers: it has no config.json with a "
                "model.safetensors"
            )
        # the client tries six times
        return Path(snapshot_download(repo, allow_patterns=FILES, etag_timeout=SECONDS / 4))
    except InputError:
        raise
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


# -----------------------------------------------------------------------------
# reading


def load_hf_model(path):
    """Read a model at a path for which is_hf_model() holds.

    Returns its config, {name: float32 tensor}, and its tokenizer as a meta.json describes it, or
    None. Raises InputError for a model that is neither ours nor a GPT-2, naming every tensor that
    does not fit; OSError for damaged files.
    """
    folder = path.parent if path.is_file() else path
    file = folder / "config.json"
    try:
        settings = json.loads(file.read_text())
        model_type = settings.get("model_type")
    except FileNotFoundError:
        raise InputError(f"{path} needs its config.json beside it") from None
    except (ValueError, AttributeError) as error:
        raise OSError(f"{file} is damaged: {error}") from None
    try:
        if "nanomoe" in settings:
            config, family, tokenizer = read_exported_config(settings)
            tokenizer = with_file(tokenizer, folder)
        elif model_type == "gpt2":
            config, family, tokenizer = read_gpt2_config(settings)
        else:
            raise InputError(
                f"its model_type is '{model_type}', expected 'gpt2' or a model that "
                "tools/export_hf.py wrote"
            )
        weights = read_weights(path)
        if model_type == "gpt2":
            weights = rename_gpt2(weights)
        return config, classes.import_weights(config, family, weights), tokenizer
    except KeyError as error:
        raise InputError(f"{path} cannot be read: config.json has no {error}") from None
    except (ValueError, TypeError, AttributeError) as error:  # an InputError is a ValueError
        raise InputError(f"{path} cannot be read: {error}") from None


def read_exported_config(settings):
    """The config, Family and tokenizer of a model that tools/export_hf.py wrote.

    transformers goes by the rest of config.json, so the rest must agree with our part. Raises
    InputError if it does not.
    """
    own = settings["nanomoe"]
    config = build_config(replace_retired_values(own["model"]))
    if settings["model_type"] == "nanomoe":
        family = classes.REMOTE
    else:
        family = classes.matching_class(config)
    expected = flatten(classes.hf_config(config, family))
    found = flatten(settings)
    wrong = []
    for key, value in expected.items():
        same = key in found and found[key] == value
        older = key not in found and key in NEW_KEYS
        if not same and not older and key not in IGNORED_KEYS:
            wrong.append(f"{key} is {found.get(key)!r}, expected {value!r}")
    if wrong:
        raise InputError(f"config.json was changed after the export: {'; '.join(wrong)}")
    return config, family, own.get("tokenizer")


def flatten(settings):
    """A config.json with all its keys on one level, and one name for each.

    Versions of transformers differ in where and under which names they save them.
    """
    flat = {}
    nested = ("rope_parameters", "rope_scaling")
    for key, value in settings.items():
        if key in ("num_local_experts", "n_routed_experts"):
            key = "num_experts"
        if key not in nested:
            flat[key] = value
    for key in nested:
        flat |= settings.get(key) or {}
    return flat


def read_gpt2_config(settings):
    """The config, Family and tokenizer of a GPT-2. Raises InputError, KeyError."""
    fixed = {
        "layer_norm_epsilon": 1e-5,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "reorder_and_upcast_attn": False,
        "add_cross_attention": False,
    }
    wrong = []
    for key, value in fixed.items():
        if settings.get(key, value) != value:
            wrong.append(f"{key} is {settings[key]!r}, expected {value!r}")
    for key in ("vocab_size", "n_embd", "n_layer", "n_head", "n_positions", "n_ctx"):
        if key in settings and type(settings[key]) is not int:
            wrong.append(f"{key} is {settings[key]!r}, expected a whole number")
    activation = settings.get("activation_function", "gelu_new")
    if activation not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        wrong.append(f"activation_function is {activation!r}, expected one of {known}")
    if wrong:
        raise InputError("; ".join(wrong))
    # The vocabulary is not padded: GPT-2's logits are far below zero, so the zero logits of padding
    # rows would win the softmax.
    config = build_config(
        {
            "vocab_size": settings["vocab_size"],
            "block_size": settings.get("n_positions") or settings["n_ctx"],
            "n_layer": settings["n_layer"],
            "n_head": settings["n_head"],
            "n_embd": settings["n_embd"],
            "mlp_dim": settings.get("n_inner") or 0,
            "mlp": ACTIVATIONS[activation],
            "tie_weights": settings.get("tie_word_embeddings", True),
            "bias": True,
        }
    )
    tokenizer = None
    if config.vocab_size >= GPT2_VOCAB:
        tokenizer = {"tokenizer": "gpt2", "vocab_size": GPT2_VOCAB}
    return config, classes.matching_class(config), tokenizer


def rename_gpt2(weights):
    """GPT-2's tensors under their full names, without the attention masks.

    The first files on the hub lack the prefix and hold the masks; the pickles also hold a copy of
    the embedding.
    """
    renamed = {}
    for name, p in weights.items():
        if name.endswith((".attn.bias", ".attn.masked_bias")):
            continue
        if not name.startswith(("transformer.", "lm_head.")):
            name = f"transformer.{name}"
        renamed[name] = p
    return renamed


def weight_files(folder):
    """The files that hold a model's weights. Raises InputError if there are none."""
    single = folder / "model.safetensors"
    index = folder / "model.safetensors.index.json"
    pickled = folder / "pytorch_model.bin"
    if single.exists():
        return [single]
    if index.exists():
        try:
            names = set(json.loads(index.read_text())["weight_map"].values())
            return [folder / Path(name).name for name in sorted(names)]
        except (ValueError, KeyError, TypeError, AttributeError):
            raise OSError(f"{index} is damaged") from None
    if pickled.exists():
        return [pickled]
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
        is_dict = isinstance(part, dict)
        if not is_dict or not all(isinstance(p, torch.Tensor) for p in part.values()):
            raise InputError(f"{file.name} contains objects that are not tensors")
        weights |= part
    return weights
