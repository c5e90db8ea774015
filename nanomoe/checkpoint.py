"""
Checkpoints in our own format: write, add an evaluation, prune, find the newest good one, read.

A checkpoint is a folder, `out_dir/step-00001000/`:
    model.safetensors   the weights (tied ones once), each router's bias and load
    training.pt         optimizer, gradient scaler, spike guard: tensors, numbers and strings
    config.json         step, losses, the model's config and the run's settings
    tokenizer.json      only for a tokenizer that is a file, in the format of Hugging Face
    manifest.json       SHA-256 and size of the files above; written last
    evaluation.json     only if the step was evaluated after it was saved: its losses
It is written under a temporary name, flushed to the disk (fsync), and then renamed. So at every
moment a checkpoint is there complete or not at all. So is evaluation.json. It holds a SHA-256 of
its losses and the manifest: if it is damaged, or of another checkpoint, this counts as damage of
the checkpoint. Without it the step counts as not evaluated.

Everything is verified before it is read, and nothing that is read is executed: safetensors and JSON
hold no code, and torch.load runs with weights_only=True. load.py makes a model of what is read.
"""

import contextlib
import errno
import hashlib
import io
import json
import math
import os
import pickle
import shutil
import warnings
from pathlib import Path
from typing import Any, TypedDict

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from configurator import InputError
from moe_model import build_config
from nanomoe.tokenizer import FILE as TOKENIZER
from nanomoe.tokenizer import Meta, with_file, without_file

FILES = ("model.safetensors", "training.pt", "config.json")
EVALUATION = "evaluation.json"
# Earlier versions added a loss to config.json. Meanwhile the manifest had both versions of it, the
# old one under a name that ends like this; a kill may have left it.
BEFORE = " before"
DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64"}


class Facts(TypedDict, total=False):
    """config.json with evaluation.json; see load.Checkpoint. Older ones have fewer keys."""

    step: int
    sequences: int
    seconds: float
    val_loss: float | None
    best_val_loss: float | None
    before_decay: bool
    device: str
    dtype: str
    model: dict  # the config, see moe_model.config_to_dict
    run: dict  # train.py's settings
    tokenizer: Meta
    data: dict[str, str]


# -----------------------------------------------------------------------------
# write


def write(out_dir: str | Path, step: int, weights: dict, training: dict, facts: Facts) -> Path:
    """Write the folder out_dir/step-XXXXXXXX and return its path.

    weights: {name: tensor}. training: {name: state_dict}. facts: plain JSON.
    What is written is hashed on its way, and not read again. A folder that is there already is
    verified and stays as it is: a run's state after a step is always the same.
    Raises OSError, and then leaves no partial folder."""
    path = Path(out_dir) / f"step-{step:08d}"
    if path.exists():
        verify(path)
        return path
    folder = temporary(path)
    tokenizer, tokenizer_json = without_file(facts.get("tokenizer"))
    texts = {"config.json": json.dumps(facts | {"tokenizer": tokenizer}, indent=1)}
    if tokenizer_json:
        texts[TOKENIZER] = tokenizer_json
    manifest = {}
    try:
        folder.mkdir()
        with HashedFile(folder / "model.safetensors") as file:
            write_weights(weights, file)
            manifest["model.safetensors"] = file.flush_to_disk()
        with HashedFile(folder / "training.pt") as file:
            torch.save(training, file)
            manifest["training.pt"] = file.flush_to_disk()
        for name, text in texts.items():
            manifest[name] = write_text(folder / name, text)
        # without blanks, so that a change of any byte changes what is read
        write_text(folder / "manifest.json", json.dumps(manifest, separators=(",", ":")))
        flush_folder(folder)
        os.rename(folder, path)
        flush_folder(path.parent)
    except OSError as error:
        raise OSError(f"could not write checkpoint {path}: {error.strerror or error}") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return path


def temporary(path: Path) -> Path:
    """The name of a file or folder while it is being written or removed."""
    return path.with_name(f"{path.name}.tmp-{os.getpid()}")


class HashedFile(io.BufferedWriter):
    """A new file that is hashed while it is written."""

    def __init__(self, path):
        super().__init__(io.FileIO(path, "wb"))
        self.digest, self.error = hashlib.sha256(), None

    def write(self, data):
        self.digest.update(data)
        if not self.error:
            try:
                super().write(data)
            except OSError as error:
                # not raised here: torch.save would then hide that the disk is full
                self.error = error
        return memoryview(data).nbytes

    def flush_to_disk(self):
        """Wait until it is on the disk, and return its entry in the manifest. Raises OSError."""
        if self.error:
            raise self.error
        self.flush()
        os.fsync(self.fileno())
        return {"sha256": self.digest.hexdigest(), "bytes": self.tell()}


def write_text(path: Path, text: str) -> dict:
    """Write a file, wait until it is on the disk, and return its entry in the manifest."""
    with HashedFile(path) as file:
        file.write(text.encode())
        return file.flush_to_disk()


def write_weights(weights, file):
    """Write tensors in the format of safetensors. Its own function would need a second copy of them
    in memory to hash them."""
    header, size = {}, 0
    # large types first, so that every tensor is aligned
    names = sorted(weights, key=lambda name: -weights[name].element_size())
    for name in names:
        p, start = weights[name], size
        size += p.numel() * p.element_size()
        header[name] = {
            "dtype": DTYPES[p.dtype],
            "shape": [*p.shape],
            "data_offsets": [start, size],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for name in names:
        file.write(weights[name].detach().contiguous().flatten().view(torch.uint8).numpy())


def flush_folder(path: Path) -> None:
    """Wait until a folder's list of names is on the disk. Raises OSError."""
    descriptor = None
    try:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
    except OSError as error:
        # Windows opens no folder, and some network file systems cannot flush one
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EACCES):
            raise
    finally:
        if descriptor is not None:
            os.close(descriptor)


def replace(path: Path, text: str) -> None:
    """Write a file and flush it to the disk. It is there as a whole, or as it was before."""
    write_text(temporary(path), text)
    os.replace(temporary(path), path)


def add_evaluation(path: Path, val_loss: float, best_val_loss: float | None) -> None:
    """Add an evaluation's loss, and the lowest so far, to a checkpoint folder. Raises OSError."""
    try:
        replace(path / EVALUATION, evaluation_text(path, val_loss, best_val_loss))
        flush_folder(path)
    except OSError as error:
        raise OSError(f"could not write to checkpoint {path}: {error.strerror or error}") from None


def evaluation_text(path, val_loss, best_val_loss):
    losses = {"val_loss": val_loss, "best_val_loss": best_val_loss}
    covered = json.dumps(losses) + (path / "manifest.json").read_text()
    return json.dumps(losses | {"sha256": hashlib.sha256(covered.encode()).hexdigest()})


def prune(out_dir: str | Path, keep_last: int) -> None:
    """Remove checkpoints; keep_last 0 keeps all.

    It keeps the newest keep_last, the best one, which has the lowest validation loss, and the
    newest from before the decay, from which the run can be made longer.
    The newest one is not read again: write() has hashed what it wrote, and the system has said that
    it is on the disk. But if a file is missing or has another size, OSError is raised and nothing
    is removed."""
    paths = list_steps(out_dir)
    if not keep_last or len(paths) <= keep_last:
        return
    facts = {path: read_facts(path) for path in paths}
    steady = [path for path in paths if facts[path].get("before_decay") is True]
    losses = {path: facts[path].get("val_loss") for path in paths}
    evaluated = [p for p in paths if isinstance(losses[p], float) and math.isfinite(losses[p])]
    best = [min(evaluated, key=losses.get)] if evaluated else []
    keep = {*paths[-keep_last:], *steady[-1:], *best}
    old = [path for path in paths if path not in keep]
    if old:
        verify(paths[-1], sizes_only=True)
    for path in old:
        try:
            # renamed first, so that a kill in between leaves no half checkpoint under its name
            shutil.rmtree(path.rename(temporary(path)))
        except PermissionError:
            if os.name != "nt":  # on Windows it stays while somebody reads it
                raise


# -----------------------------------------------------------------------------
# find


def list_steps(out_dir: str | Path) -> list[Path]:
    """The checkpoint folders of out_dir, oldest first."""
    paths = []
    for path in Path(out_dir).glob("step-*"):
        if path.name.removeprefix("step-").isdigit():  # not a temporary name
            paths.append(path)
    return sorted(paths, key=step_of)


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def latest_good(out_dir: str | Path) -> Path:
    """The newest good checkpoint folder of out_dir. A line names each damaged one.

    Raises InputError if there is none at all, OSError if none is good."""
    problem = InputError(f"no checkpoint in {out_dir}")
    for path in reversed(list_steps(out_dir)):
        if isinstance(problem, OSError):
            print(f"{problem}; taking {path.name}", flush=True)
        try:
            verify(path)
            return path
        except OSError as error:
            if was_removed(path):  # its run goes on and has newer ones
                return latest_good(out_dir)
            problem = error
    raise problem


def latest_good_before_decay(out_dir: str | Path, step: int) -> Path | None:
    """The newest good checkpoint folder from before the decay and from before a step, or None.

    A line names each damaged one."""
    for path in reversed(list_steps(out_dir)):
        if step_of(path) < step and read_facts(path).get("before_decay") is True:
            try:
                verify(path)
                return path
            except OSError as error:
                print(error, flush=True)
    return None


def was_removed(path: Path) -> bool:
    """Whether a checkpoint folder is gone while its out_dir still holds others."""
    return not path.exists() and bool(list_steps(path.parent))


def verify(path: Path, sizes_only: bool = False) -> None:
    """Compare a checkpoint folder with its manifest. Raises OSError that says what is wrong."""
    problem = None
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        names = {name for name in (*FILES, *manifest) if not name.endswith(BEFORE)}
        for name in names:
            found = {"bytes": (path / name).stat().st_size}
            if not sizes_only:
                with open(path / name, "rb") as file:
                    found["sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
            written = [manifest[name], manifest.get(name + BEFORE, manifest[name])]
            if not any(found.items() <= entry.items() for entry in written):
                problem = f"{name} is not as it was written"
        read_evaluation(path)
    except FileNotFoundError as error:
        problem = f"{Path(error.filename).name} is missing"
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        problem = f"manifest.json cannot be read ({type(error).__name__})"
    if problem:
        raise OSError(f"checkpoint {path} is damaged: {problem}")


# -----------------------------------------------------------------------------
# read


def read(path: Path) -> dict:
    """The fields of a load.Checkpoint from a folder that has been verified. Raises OSError if it is
    damaged."""
    try:
        facts = json.loads((path / "config.json").read_text()) | read_evaluation(path)
        optional = ("device", "dtype", "before_decay", "sequences", "data")
        return {
            "config": build_config(replace_retired_values(facts["model"])),
            "weights": load_file(path / "model.safetensors"),
            "settings": replace_retired_values(facts["run"]),
            "step": int(facts["step"]),
            "val_loss": facts["val_loss"],
            "best_val_loss": facts["best_val_loss"],
            "seconds": facts["seconds"],
            "tokenizer": with_file(facts.get("tokenizer"), path) or None,
            "training_file": path / "training.pt",
            **{name: facts[name] for name in optional if name in facts},
        }
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise OSError(f"checkpoint {path} is damaged: {error}") from None


def read_evaluation(path):
    """The losses of a checkpoint's evaluation.json; {} without one. Raises OSError if it is not as
    it was written."""
    try:
        content = (path / EVALUATION).read_bytes()
    except FileNotFoundError:
        return {}
    with contextlib.suppress(ValueError, KeyError, TypeError):
        losses = json.loads(content)
        if content == evaluation_text(path, losses["val_loss"], losses["best_val_loss"]).encode():
            return losses
    raise OSError(f"checkpoint {path} is damaged: {EVALUATION} is not as it was written")


def read_facts(path: Path) -> Facts:
    """What config.json and evaluation.json of a folder say; {} if one of them is damaged."""
    with contextlib.suppress(OSError, ValueError, TypeError):
        return json.loads((path / "config.json").read_text()) | read_evaluation(path)
    return {}


def replace_retired_values(settings: dict) -> dict:
    """Saved settings with values of today in place of those that are gone.

    Keys that are gone may stay: nothing reads them."""
    if settings.get("expert_impl") == "split":  # computed the same as the others, only faster
        return settings | {"expert_impl": "auto"}
    return settings


def safe_torch_load(path: Path) -> Any:
    """torch.load for tensors and plain containers only.

    Raises InputError for a file that would run code, OSError for one that is damaged."""
    try:
        with warnings.catch_warnings(action="ignore"):  # torch warns of unusual pickles
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:  # torch's own text recommends to load it all the same
        reason = "it is damaged, or a pickle that would run code when it is read"
        raise InputError(f"{path} is refused: {reason}") from None
    except (RuntimeError, EOFError, LookupError, ValueError, TypeError, AttributeError) as error:
        lines = str(error).splitlines() or [type(error).__name__]
        raise OSError(f"{path} is damaged: {lines[0]}") from None
