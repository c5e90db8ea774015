"""
Checkpoints: write, verify, find the newest good one, read.

A checkpoint is a folder, `out_dir/step-00001000/`:
    model.safetensors   the weights (tied ones once), each router's bias and load
    training.pt         optimizer, gradient scaler, spike guard: tensors, numbers and strings
    config.json         step, losses, the model's config and the run's settings
    tokenizer.json      only for a tokenizer that is a file, in the format of Hugging Face
    manifest.json       SHA-256 and size of the other files; written last
It is written under a temporary name, flushed to the disk (fsync), and then renamed. So at every
moment a checkpoint is there complete or not at all.

Everything is verified before it is read, and nothing that is read is executed: safetensors and JSON
hold no code, and torch.load runs with weights_only=True. A nanoGPT ckpt.pt is read too, and so is
every model that hf/read.py reads.
"""

import contextlib
import errno
import hashlib
import json
import math
import os
import pickle
import shutil
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from configurator import InputError
from moe_model import MoEGPTConfig, build_config, build_model
from nanomoe.dataset import load_meta
from nanomoe.optim import load_optimizer_state
from nanomoe.tokenizer import FILE as TOKENIZER
from nanomoe.tokenizer import with_file, without_file

# hf.read is imported inside the functions that use it: training from scratch never loads it

FILES = ("model.safetensors", "training.pt", "config.json")
BEFORE = " before"  # ends a name in a manifest while add_val_loss() is replacing that file


@dataclass
class Checkpoint:
    path: Path
    step: int  # optimizer steps done
    config: object  # GPTConfig or MoEGPTConfig
    settings: dict  # of the run that wrote it
    val_loss: float | None  # at this step
    best_val_loss: float | None  # the lowest so far
    weights: dict  # name: tensor, on the CPU
    seconds: float = 0.0  # of training
    device: str = ""  # the type of device the run used
    dtype: str = ""  # the precision it computed in
    before_decay: bool = False  # lr_schedule 'wsd': no decay so far, or since the rate last jumped
    tokenizer: dict | None = None  # in the form of a meta.json; None in older checkpoints
    sequences: int | None = None  # training sequences seen; None in older checkpoints
    data: dict | None = None  # Dataset.fingerprint() of what it was trained on, if known
    has_training_state: bool = True  # False for transformers' models: no optimizer, and step is 0

    def build_model(self):
        """The model with these weights.

        Raises InputError that names every tensor that is missing or has another shape.
        """
        model = build_model(self.config)
        expected = {name: tuple(p.shape) for name, p in model.state_dict().items()}
        found = {name: tuple(p.shape) for name, p in self.weights.items()}
        if self.config.tie_weights:
            found.setdefault("lm_head.weight", found.get("transformer.wte.weight"))
        problems = []
        for name in sorted(expected | found):
            if expected.get(name) != found.get(name):
                problems.append(f"{name}: expected {expected.get(name)}, found {found.get(name)}")
        if problems:
            raise InputError(f"{self.path} does not fit its own config: {'; '.join(problems)}")
        model.load_state_dict(self.weights, strict=False)
        return model

    def tokenizer_meta(self, dataset=""):
        """The description of the model's tokenizer, in the form of a meta.json.

        It is that of `dataset` if one is given, else the one that came with the weights, else
        that of the dataset the model was trained on.
        Raises InputError if there is none, or if it has more token ids than the model.
        """
        if self.tokenizer and not dataset:
            return self.tokenizer
        name = dataset or self.settings.get("dataset", "")
        try:
            meta = load_meta(name, need_tokens=False)
        except InputError as error:
            if dataset:
                raise
            if name:
                why = f"was trained on dataset '{name}' and needs its tokenizer: {error}"
            else:
                why = "came without a tokenizer"
            advice = "or name a dataset that has the same tokenizer: --dataset=NAME"
            raise InputError(f"{self.path} {why}; {advice}") from None
        if not self.may_have(meta):
            raise InputError(
                f"dataset '{name}' has {meta['vocab_size']} token ids, the model of {self.path} "
                f"{self.config.vocab_size}: it was trained on another dataset"
            )
        if self.tokenizer and not self.same_tokenizer(meta):
            line = (
                f"note: dataset '{name}' uses another tokenizer than {self.path} was trained with"
            )
            print(line, file=sys.stderr, flush=True)
        return meta

    def same_tokenizer(self, meta):
        """Whether a dataset uses the tokenizer this model was trained with. True if unknown."""
        try:
            own = self.tokenizer_meta()
        except InputError:
            return self.may_have(meta)
        keys = ("tokenizer", "vocab_size", "chars", "tokenizer_json")
        if own["tokenizer"] == "unknown":
            keys = ("vocab_size",)
        return all(own.get(key) == meta.get(key) for key in keys)

    def may_have(self, meta):
        """Whether this may be a model for a tokenizer. It has no spare rows unless it is padded."""
        ids, rows = meta["vocab_size"], self.config.vocab_size
        return ids <= rows if rows % 64 == 0 else ids == rows

    def restore_training_state(self, optimizer, scaler, guard):
        """Load the saved state into an optimizer, a gradient scaler and a StepGuard.

        Raises OSError if the state is damaged or does not fit them.
        """
        state = self.training_state()
        try:
            load_optimizer_state(optimizer, state["optimizer"])
            if state.get("scaler"):
                scaler.load_state_dict(state["scaler"])
            if state.get("guard"):
                guard.load_state_dict(state["guard"])
        except (ValueError, LookupError, TypeError) as error:
            raise OSError(f"checkpoint {self.path} is damaged: {error}") from None

    def training_state(self):
        """The saved state_dicts: "optimizer", and "scaler" and "guard" if the run had them.

        Raises OSError if the file is damaged, InputError if it would run code.
        """
        is_nanogpt = self.path.is_file()
        state = safe_torch_load(self.path if is_nanogpt else self.path / "training.pt")
        if not isinstance(state, dict) or "optimizer" not in state:
            raise OSError(f"checkpoint {self.path} is damaged: it has no state of an optimizer")
        return state


# -----------------------------------------------------------------------------
# write


def write(out_dir, step, weights, training, facts):
    """Write the folder out_dir/step-XXXXXXXX and return its path.

    weights: {name: tensor}. training: {name: state_dict}. facts: plain JSON.
    A folder that is there already stays as it is: a run's state after a step is always the same.
    Raises OSError, and then leaves no partial folder.
    """
    path = Path(out_dir) / f"step-{step:08d}"
    if path.exists():
        return path
    tmp = temporary(path)
    try:
        tmp.mkdir()
        save_file({name: p.contiguous() for name, p in weights.items()}, tmp / "model.safetensors")
        torch.save(training, tmp / "training.pt")
        tokenizer, tokenizer_json = without_file(facts.get("tokenizer"))
        (tmp / "config.json").write_text(json.dumps(facts | {"tokenizer": tokenizer}, indent=1))
        if tokenizer_json:
            (tmp / TOKENIZER).write_text(tokenizer_json, encoding="utf-8")
        # safetensors lets nobody else read its file, whatever the umask says
        shutil.copymode(tmp / "config.json", tmp / "model.safetensors")
        write_manifest(tmp)
        os.rename(tmp, path)
        fsync(path.parent)
    except (SafetensorError, RuntimeError) as error:
        # this is how safetensors and torch report a full disk; torch's text does not say so
        disk_is_full = shutil.disk_usage(path.parent).free < 2**20
        reason = "No space left on device" if disk_is_full else error
        raise OSError(f"could not write checkpoint {path}: {reason}") from None
    except OSError as error:
        raise OSError(f"could not write checkpoint {path}: {error.strerror or error}") from None
    finally:
        shutil.rmtree(tmp, ignore_errors=True)
    return path


def temporary(path):
    """The name of a checkpoint folder while it is being written or removed."""
    return path.with_name(f"{path.name}.tmp-{os.getpid()}")


def write_manifest(folder):
    """Flush a folder's files to the disk, then write their manifest, then flush that too."""
    names = [*FILES, TOKENIZER] if (folder / TOKENIZER).exists() else FILES
    for name in names:
        fsync(folder / name)
    replace_manifest(folder, {name: checksum(folder / name) for name in names})


def replace_manifest(folder, entries):
    # without blanks, so that a change of any byte changes what is read
    replace(folder / "manifest.json", json.dumps(entries, separators=(",", ":")))
    fsync(folder)


def replace(path, text):
    """Write a file and flush it to the disk. It is there as a whole, or as it was before."""
    new = temporary(path)
    new.write_text(text)
    fsync(new)
    os.replace(new, path)


def add_val_loss(path, val_loss, best_val_loss):
    """Add an evaluation's loss, and the lowest so far, to a checkpoint folder. Raises OSError.

    It fits its manifest at every moment: for a while the manifest has both versions of config.json.
    """
    try:
        facts = json.loads((path / "config.json").read_text())
        manifest = json.loads((path / "manifest.json").read_text())
        manifest.pop("config.json" + BEFORE, None)  # a kill may have left it
        facts |= {"val_loss": val_loss, "best_val_loss": best_val_loss}
        replace(path / "new.json", json.dumps(facts, indent=1))
        entries = manifest | {"config.json": checksum(path / "new.json")}
        before = {"config.json" + BEFORE: checksum(path / "config.json")}
        replace_manifest(path, entries | before)
        os.replace(path / "new.json", path / "config.json")
        replace_manifest(path, entries)
    except OSError as error:
        raise OSError(f"could not write to checkpoint {path}: {error.strerror or error}") from None


def fsync(path):
    """Wait until a file, or a folder's list of names, is on the disk. Raises OSError."""
    descriptor = None
    try:
        # Windows flushes no file that is only read, and opens no folder
        descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
        os.fsync(descriptor)
    except OSError as error:
        # nor can some network file systems do it for folders
        unsupported = error.errno in (errno.EINVAL, errno.ENOTSUP, errno.EACCES)
        if not path.is_dir() or not unsupported:
            raise
    finally:
        if descriptor is not None:
            os.close(descriptor)


def checksum(path):
    """A file's entry in the manifest."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"sha256": digest, "bytes": path.stat().st_size}


def prune(out_dir, keep_last):
    """Remove checkpoints; keep_last 0 keeps all.

    It keeps the newest keep_last, the best one, which has the lowest validation loss, and the
    newest from before the decay, from which the run can be made longer. If there are any to
    remove, the newest is verified first: if it is damaged, OSError is raised and nothing is
    removed.
    """
    paths = list_steps(out_dir)
    if not keep_last or len(paths) <= keep_last:
        return
    steady = [path for path in paths if is_before_decay(path)]
    keep = [lowest_val_loss(paths), *paths[-keep_last:], *steady[-1:]]
    old = [path for path in paths if path not in keep]
    if old:
        verify(paths[-1])
    for path in old:
        remove(path)


def remove(path):
    """Remove a checkpoint folder. On Windows it stays while somebody reads it."""
    try:
        # renamed first, so that a kill in between leaves no half checkpoint under its name
        shutil.rmtree(path.rename(temporary(path)))
    except PermissionError:
        if os.name != "nt":
            raise


def lowest_val_loss(paths):
    """The checkpoint folder with the lowest finite validation loss, or None."""
    best, best_loss = None, math.inf
    for path in paths:
        loss = read_fact(path, "val_loss")
        if isinstance(loss, float) and math.isfinite(loss) and loss < best_loss:
            best, best_loss = path, loss
    return best


def is_before_decay(path):
    """Whether a checkpoint folder is from before the decay, see Checkpoint.before_decay."""
    return read_fact(path, "before_decay") is True


def read_fact(path, name):
    """A value in a checkpoint folder's config.json; None if it is missing or damaged."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return json.loads((path / "config.json").read_text())[name]
    return None


# -----------------------------------------------------------------------------
# find


def list_steps(out_dir):
    """The checkpoint folders of out_dir, oldest first."""
    paths = []
    for path in Path(out_dir).glob("step-*"):
        if path.name.removeprefix("step-").isdigit():  # not a temporary name
            paths.append(path)
    return sorted(paths, key=step_of)


def step_of(path):
    return int(path.name.removeprefix("step-"))


def locate(name, on_hub=False):
    """The path of the checkpoint that `name` means; it is not verified.

    name: an out_dir (its newest checkpoint), a checkpoint folder, OUT_DIR/800 for that step's,
    a nanoGPT ckpt.pt or its folder, a model of transformers, or, if on_hub, one on the hub.
    Raises InputError if there is none, OSError if the hub cannot be asked.
    """
    path = Path(name)
    if path.name.isdecimal() and not path.exists():
        path = path.with_name(f"step-{int(path.name):08d}")
    steps = list_steps(path)
    if steps:
        return steps[-1]
    is_step_folder = path.is_dir() and path.match("step-[0-9]*")
    if path.is_file() or is_step_folder or (path / "config.json").exists():
        return path
    if (path / "ckpt.pt").exists():
        return path / "ckpt.pt"
    if on_hub:
        from nanomoe.hf import read as hf_read

        if hf_read.looks_like_hub_id(name):
            return hf_read.fetch(str(name))
    if path.is_dir():
        raise InputError(f"no checkpoint in {path}")
    raise InputError(f"no checkpoint at {path}: no such file or folder")


def exists(out_dir):
    """Whether out_dir holds a checkpoint, good or damaged."""
    try:
        locate(out_dir)
    except InputError:
        return False
    return True


def latest_good(name, on_hub=False):
    """The path of the checkpoint that `name` means, verified.

    In an out_dir this is the newest good one; a line names each damaged one that is skipped.
    Raises InputError if there is no checkpoint, OSError if none is good.
    """
    from nanomoe.hf import read as hf_read

    path = locate(name, on_hub)
    if hf_read.is_hf_model(path):  # it has no manifest
        return path
    if path.is_file():  # nor has a nanoGPT ckpt.pt
        return path
    last_error = None
    for candidate in list_steps(name)[::-1] or [path]:
        if last_error:
            print(f"{last_error}; taking {candidate.name}", flush=True)
        try:
            verify(candidate)
            return candidate
        except OSError as error:
            if was_removed(candidate):  # its run goes on and has newer ones
                return latest_good(name, on_hub)
            last_error = error
    raise last_error


def latest_good_before_decay(out_dir, step):
    """The newest good checkpoint folder from before the decay and from before a step, or None.

    A line names each damaged one.
    """
    for path in reversed(list_steps(out_dir)):
        if step_of(path) < step and is_before_decay(path):
            problem = find_damage(path)
            if not problem:
                return path
            print(f"checkpoint {path} is damaged: {problem}", flush=True)
    return None


def verify(path):
    """Compare a checkpoint folder with its manifest. Raises OSError that says what is wrong."""
    problem = find_damage(path)
    if problem:
        raise OSError(f"checkpoint {path} is damaged: {problem}")


def find_damage(path):
    """What differs between a checkpoint folder and its manifest, or None."""
    while True:
        manifest = read_text(path / "manifest.json")
        problem = compare_with_manifest(path)
        # while we were reading, its run may have added an evaluation's loss
        if not problem or manifest == read_text(path / "manifest.json"):
            return problem


def read_text(path):
    with contextlib.suppress(OSError, ValueError):
        return path.read_text()
    return None


def compare_with_manifest(path):
    """find_damage(), for a folder that nobody changes meanwhile."""
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        names = {name for name in (*FILES, *manifest) if not name.endswith(BEFORE)}
        for name in names:
            written = [manifest[name], manifest.get(name + BEFORE)]
            if checksum(path / name) not in written:
                return f"{name} is not as it was written"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (ValueError, KeyError, TypeError) as error:
        return f"manifest.json cannot be read ({type(error).__name__})"
    return None


# -----------------------------------------------------------------------------
# read


def load(name, on_hub=False):
    """The Checkpoint that `name` means, as in latest_good(), verified and read.

    For sampling, export and the like: expert_impl becomes 'auto', whatever the run used.
    Raises InputError if it is no checkpoint, OSError if it is damaged.
    """
    loaded = None
    while loaded is None:
        loaded = read_unless_removed(latest_good(name, on_hub))
    if isinstance(loaded.config, MoEGPTConfig):
        loaded.config.expert_impl = "auto"  # this device may not run what the run's device did
    return loaded


def read_unless_removed(path):
    """read(path); None for a checkpoint that its run has removed since it was found."""
    try:
        return read(path)
    except OSError:
        if was_removed(path):
            return None
        raise


def was_removed(path):
    """Whether a checkpoint folder is gone while its out_dir still holds others."""
    return not path.exists() and bool(list_steps(path.parent))


def read(path):
    """The Checkpoint at a path that latest_good() has verified. Raises as load() does."""
    from nanomoe.hf import read as hf_read

    if hf_read.is_hf_model(path):
        config, weights, tokenizer = hf_read.load_hf_model(path)
        return Checkpoint(
            path=path,
            step=0,
            config=config,
            settings={},
            val_loss=None,
            best_val_loss=None,
            weights=weights,
            tokenizer=tokenizer,
            has_training_state=False,
        )
    if path.is_file():
        return from_nanogpt(path, safe_torch_load(path))
    try:
        facts = json.loads((path / "config.json").read_text())
        return Checkpoint(
            path=path,
            step=int(facts["step"]),
            config=build_config(replace_retired_values(facts["model"])),
            settings=replace_retired_values(facts["run"]),
            val_loss=facts["val_loss"],
            best_val_loss=facts["best_val_loss"],
            weights=load_file(path / "model.safetensors"),
            seconds=facts["seconds"],
            device=facts.get("device", ""),
            dtype=facts.get("dtype", ""),
            before_decay=facts.get("before_decay", False),
            tokenizer=with_file(facts.get("tokenizer"), path) or None,
            sequences=facts.get("sequences"),
            data=facts.get("data"),
        )
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise OSError(f"checkpoint {path} is damaged: {error}") from None


def replace_retired_values(settings):
    """Saved settings with values of today in place of those that are gone.

    Keys that are gone may stay: nothing reads them.
    """
    if settings.get("expert_impl") == "split":  # computed the same as the others, only faster
        return settings | {"expert_impl": "auto"}
    return settings


def from_nanogpt(path, saved):
    """The Checkpoint of a nanoGPT ckpt.pt. saved: its contents. Raises InputError."""
    try:
        config = build_config(saved["model_args"])
        weights = {}
        for name, p in saved["model"].items():
            if not name.endswith(".attn.bias"):  # the causal mask of older versions
                weights[name.removeprefix("_orig_mod.")] = p  # the prefix of a compiled model
        best_val_loss = float(saved["best_val_loss"])
        return Checkpoint(
            path=path,
            step=int(saved["iter_num"]),
            config=config,
            settings=dict(saved["config"]),
            val_loss=best_val_loss,
            best_val_loss=best_val_loss,
            weights=weights,
        )
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise InputError(f"{path} is not a nanoGPT checkpoint: {reason}") from None


def safe_torch_load(path):
    """torch.load for tensors and plain containers only.

    Raises InputError for a file that would run code, OSError for one that is damaged.
    """
    try:
        with warnings.catch_warnings(action="ignore"):  # torch warns of unusual pickles
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:  # torch's own text recommends to load it all the same
        reason = "it is damaged, or a pickle that would run code when it is read"
        raise InputError(f"{path} is refused: {reason}") from None
    except (RuntimeError, EOFError, LookupError, ValueError, TypeError, AttributeError) as error:
        lines = str(error).splitlines() or [type(error).__name__]
        raise OSError(f"{path} is damaged: {lines[0]}") from None
