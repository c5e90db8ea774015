"""
Checkpoints: save, verify, load, find the newest good one.

One folder each, `out_dir/step-00001000/`:
    model.safetensors   the weights (tied ones once), a router's bias and load
    training.pt         optimizer, gradient scaler, spike guard: tensors, numbers and strings
    config.json         step, losses, the model's config and the run's settings
    manifest.json       SHA-256 and size of the other files, written last
It is written under a temporary name, brought to the disk (fsync), and renamed: at every moment a checkpoint is there whole or
not at all. What is read is verified first. Nothing that is read is executed: safetensors and JSON hold no code, torch.load
runs with weights_only=True. A nanoGPT ckpt.pt is read as well, and what hub.py reads: models of Hugging Face's transformers.
"""

import contextlib
import errno
import hashlib
import json
import math
import os
import pickle
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from configurator import InputError
from moe_model import build_config, build_model
from nanomoe import hf_load
from nanomoe.dataset import load_meta
from nanomoe.distributed import load_optimizer_state

FILES = ("model.safetensors", "training.pt", "config.json")


@dataclass
class Checkpoint:
    path: Path
    step: int  # optimizer steps done
    config: object  # GPTConfig or MoEGPTConfig
    settings: dict  # of the run that wrote it
    val_loss: float | None  # at this step, and the best one so far
    best_val_loss: float | None
    weights: dict  # name: tensor, on the CPU
    seconds: float = 0.0  # of training
    device: str = ""  # the kind that it ran on, and in which precision
    dtype: str = ""
    tokenizer: dict | None = None  # as a meta.json describes it, where it came with the weights
    weights_only: bool = False  # of transformers: without the state of an optimizer, at step 0

    def build_model(self):
        """The model with these weights. Raises InputError naming tensors that are missing or have another shape."""
        model = build_model(self.config)
        expected = {name: tuple(p.shape) for name, p in model.state_dict().items()}
        found = {name: tuple(p.shape) for name, p in self.weights.items()}
        if self.config.tie_weights:
            found.setdefault("lm_head.weight", found.get("transformer.wte.weight"))
        wrong = [
            f"{name}: expected {expected.get(name)}, found {found.get(name)}"
            for name in sorted(expected | found)
            if expected.get(name) != found.get(name)
        ]
        if wrong:
            raise InputError(f"{self.path} does not fit its own config: {'; '.join(wrong)}")
        model.load_state_dict(self.weights, strict=False)
        return model

    def tokenizer_meta(self, dataset=""):
        """What describes its tokenizer, as a meta.json does: what came with the weights, or that of the dataset it was trained
        on, or of the one that is given instead. Raises InputError if it is not there, or has more token ids than the model."""
        if self.tokenizer and not dataset:
            return self.tokenizer
        name = dataset or self.settings.get("dataset", "")
        try:
            meta = load_meta(name, need_tokens=False)
        except InputError as error:
            if dataset:
                raise
            why = (
                f"was trained on dataset '{name}', whose tokenizer is needed: {error}"
                if name
                else "came without a tokenizer"
            )
            raise InputError(f"{self.path} {why}; or give its place with --dataset=") from None
        if meta["vocab_size"] > self.config.vocab_size:
            raise InputError(
                f"dataset '{name}' has {meta['vocab_size']} token ids, the model of {self.path} only "
                f"{self.config.vocab_size}: it was trained on another dataset"
            )
        return meta

    def same_tokenizer(self, meta):
        """Whether the ids of a dataset with this meta.json mean what they did in training, as far as that is known."""
        try:
            own = self.tokenizer_meta()
        except InputError:
            return True
        return own["tokenizer"] == meta["tokenizer"] and own.get("chars") == meta.get("chars")

    def restore_training_state(self, optimizer, scaler, guard):
        """Give an optimizer, a gradient scaler and a StepGuard the state that they had. Raises OSError."""
        state = self.training_state()
        try:
            load_optimizer_state(optimizer, state["optimizer"])
            for name, part in (("scaler", scaler), ("guard", guard)):
                if state.get(name):
                    part.load_state_dict(state[name])
        except (ValueError, LookupError, TypeError) as error:
            raise OSError(f"checkpoint {self.path} is damaged: {error}") from None

    def training_state(self):
        """{"optimizer": state_dict, and those of a gradient scaler and a StepGuard where there are any}."""
        state = safe_torch_load(self.path if self.path.is_file() else self.path / "training.pt")
        if not isinstance(state, dict) or "optimizer" not in state:
            raise OSError(f"checkpoint {self.path} is damaged: it has no state of an optimizer")
        return state


def write(out_dir, step, weights, training, facts):
    """Write out_dir/step-XXXXXXXX/ and return its path. A checkpoint that is there already is left as it is: the state of a
    run after a given step is always the same. Raises OSError, leaving no partial folder."""
    path = Path(out_dir) / f"step-{step:08d}"
    if path.exists():
        return path
    tmp = temporary(path)
    try:
        tmp.mkdir()
        save_file({name: p.contiguous() for name, p in weights.items()}, tmp / "model.safetensors")
        torch.save(training, tmp / "training.pt")
        (tmp / "config.json").write_text(json.dumps(facts, indent=1))
        write_manifest(tmp)
        os.rename(tmp, path)
        fsync(path.parent)
    except (
        SafetensorError,
        RuntimeError,
    ) as error:  # how these libraries report a full disk, torch in riddles
        full = shutil.disk_usage(path.parent).free < 2**20
        raise OSError(
            f"could not write checkpoint {path}: {'No space left on device' if full else error}"
        ) from None
    except OSError as error:
        raise OSError(f"could not write checkpoint {path}: {error.strerror or error}") from None
    finally:
        shutil.rmtree(tmp, ignore_errors=True)
    return path


def temporary(path):
    """Where a checkpoint is while it is being written or removed."""
    return path.with_name(f"{path.name}.tmp-{os.getpid()}")


def write_manifest(folder):
    """Bring a folder's files to the disk, and write their manifest behind them."""
    for name in FILES:
        fsync(folder / name)
    manifest = {
        name: {"sha256": sha256(folder / name), "bytes": (folder / name).stat().st_size}
        for name in FILES
    }
    # without spaces: there is no byte whose change would go unseen
    (folder / "manifest.json").write_text(json.dumps(manifest, separators=(",", ":")))
    fsync(folder / "manifest.json")
    fsync(folder)


def fsync(path):
    """Wait until a file, or a folder's list of names, is on the disk."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    except OSError as error:  # some network file systems cannot do it for folders
        if not path.is_dir() or error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(number)


def sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def verify(path):
    """Compare a checkpoint folder with its manifest. Raises OSError that says what is wrong with it."""
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        wrong = next(
            (
                f"{name} is not as it was written"
                for name in FILES
                if manifest[name]
                != {"sha256": sha256(path / name), "bytes": (path / name).stat().st_size}
            ),
            None,
        )
    except FileNotFoundError as error:
        wrong = f"{Path(error.filename).name} is missing"
    except (ValueError, KeyError, TypeError) as error:
        wrong = f"manifest.json cannot be read ({type(error).__name__})"
    if wrong:
        raise OSError(f"checkpoint {path} is damaged: {wrong}")


def prune(out_dir, keep_last):
    """Verify the newest checkpoint, then remove all but the newest keep_last and the one with the lowest validation loss. 0
    keeps all. Raises OSError if the newest is damaged, before anything is removed."""
    paths = list_steps(out_dir)
    if not keep_last or len(paths) <= keep_last:
        return
    verify(paths[-1])
    losses = {}
    for path in paths:
        with contextlib.suppress(
            OSError, ValueError, KeyError, TypeError
        ):  # a damaged one is no best one
            losses[path] = json.loads((path / "config.json").read_text())["val_loss"]
    known = [path for path in losses if losses[path] is not None and math.isfinite(losses[path])]
    best = min(known, key=losses.get, default=None)
    for path in paths[:-keep_last]:
        if path != best:  # renamed first: a kill must not leave half of it under its name
            shutil.rmtree(path.rename(temporary(path)))


def list_steps(out_dir):
    """The checkpoint folders of out_dir, oldest first."""
    return sorted(
        (p for p in Path(out_dir).glob("step-*") if p.name.removeprefix("step-").isdigit()),
        key=step_of,
    )


def step_of(path):
    return int(path.name.removeprefix("step-"))


def locate(where, on_hub=False):
    """The checkpoint that `where` means: a checkpoint folder, OUT_DIR/STEP, a nanoGPT ckpt.pt, the newest one in an out_dir,
    what hub.py reads, or, if on_hub, fetches. Raises InputError when there is none, OSError when the hub cannot be asked."""
    name, where = where, Path(where)
    if where.name.isdecimal() and not where.exists():
        where = where.with_name(f"step-{int(where.name):08d}")
    if steps := list_steps(where):
        return steps[-1]
    if (
        where.is_file()
        or (where / "config.json").exists()
        or (where.is_dir() and where.match("step-[0-9]*"))
    ):
        return where
    if (where / "ckpt.pt").exists():
        return where / "ckpt.pt"
    if on_hub and hf_load.looks_like_hub_id(name):
        return hf_load.fetch(str(name))
    raise InputError(
        f"no checkpoint in {where}"
        if where.is_dir()
        else f"no checkpoint at {where}: no such file or folder"
    )


def exists(out_dir):
    """Whether there is anything to resume."""
    try:
        return bool(locate(out_dir))
    except InputError:
        return False


def latest_good(where, on_hub=False):
    """find(), verified; of an out_dir the newest good one, a damaged one being named in a line. Raises InputError when
    there is none, OSError if none is good."""
    path = locate(where, on_hub)
    if hf_load.is_hf_model(path):  # it has no manifest
        return path
    candidates = [path] if path.is_file() else list_steps(where)[::-1] or [path]
    for path, before in zip(candidates, [*candidates[1:], None], strict=True):
        try:
            if path.is_dir():
                verify(path)
            return path
        except OSError as error:
            if before is None:
                raise
            print(f"{error}; taking {before.name}", flush=True)


def load(where, on_hub=False):
    """choose(), read into a Checkpoint. Raises InputError for one of another kind, OSError for a damaged one."""
    return read(latest_good(where, on_hub))


def read(path):
    """The Checkpoint at a path, which latest_good() has verified."""
    if hf_load.is_hf_model(path):
        config, weights, tokenizer = hf_load.load_hf_model(path, safe_torch_load)
        return Checkpoint(
            path, 0, config, {}, None, None, weights, tokenizer=tokenizer, weights_only=True
        )
    if path.is_file():
        return from_nanogpt(path, safe_torch_load(path))
    try:
        facts = json.loads((path / "config.json").read_text())
        return Checkpoint(
            path,
            int(facts["step"]),
            build_config(facts["model"]),
            facts["run"],
            facts["val_loss"],
            facts["best_val_loss"],
            load_file(path / "model.safetensors"),
            facts["seconds"],
            facts.get("device", ""),
            facts.get("dtype", ""),
        )
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise OSError(f"checkpoint {path} is damaged: {error}") from None


def from_nanogpt(path, saved):
    """A nanoGPT ckpt.pt, already read, as a Checkpoint."""
    try:
        config = build_config(saved["model_args"])
        weights = {
            name.removeprefix("_orig_mod."): p for name, p in saved["model"].items()
        }  # a compiled model's prefix
        # the causal mask, which models without flash attention kept as a buffer
        weights = {name: p for name, p in weights.items() if not name.endswith(".attn.bias")}
        best = float(saved["best_val_loss"])
        return Checkpoint(
            path, int(saved["iter_num"]), config, dict(saved["config"]), best, best, weights
        )
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path} is not a nanoGPT checkpoint: {type(error).__name__}: {error}"
        ) from None


def safe_torch_load(path):
    """torch.load of tensors and plain containers only. Raises InputError for a file that would run code."""
    try:
        with warnings.catch_warnings(action="ignore"):  # of unusual pickles
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:  # torch's own words recommend loading it anyway
        raise InputError(
            f"{path} is refused: it is damaged, or a pickle that would run code when it is read"
        ) from None
    except (RuntimeError, EOFError, LookupError, ValueError, TypeError, AttributeError) as error:
        raise OSError(
            f"{path} is damaged: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
        ) from None
