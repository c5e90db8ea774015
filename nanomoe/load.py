"""
Any model by its name: a checkpoint of ours or of nanoGPT, or a model of transformers.

A name is a run's out_dir (its newest good checkpoint), a checkpoint folder, OUT_DIR/800 for that
step's, a nanoGPT ckpt.pt or its folder, a folder or .safetensors file of transformers, or, if
on_hub, a model on the hub.
"""

import re
from pathlib import Path

from configurator import InputError
from moe_model import MoEGPTConfig
from nanomoe import checkpoint
from nanomoe.checkpoint import Checkpoint


def load(name: str | Path, on_hub: bool = False) -> Checkpoint:
    """The model of this name, verified and read.

    For sampling, export and the like: expert_impl becomes 'auto', whatever the run used.
    Raises InputError if it is no model, OSError if it is damaged or the hub cannot be asked.
    """
    found = None
    while found is None:
        found = read(find(name, on_hub))
    if isinstance(found.config, MoEGPTConfig):
        found.config.expert_impl = "auto"  # this device may not run what the run's device did
    return found


def find(name: str | Path, on_hub: bool = False) -> Path:
    """The path of the model of this name; if it is a checkpoint of ours, verified.

    In an out_dir a line names each damaged checkpoint that is skipped. Raises as load() does.
    """
    path = Path(name)
    if path.name.isdecimal() and not path.exists():
        path = path.with_name(f"step-{int(path.name):08d}")
    if checkpoint.list_steps(path):
        return checkpoint.latest_good(path)
    if path.is_dir() and is_ours(path):
        checkpoint.verify(path)
        return path
    if path.is_file() or (path / "config.json").exists():
        return path
    if (path / "ckpt.pt").exists():
        return path / "ckpt.pt"
    if on_hub:
        from nanomoe.hf import read as hf  # late: only for a name that is nothing here

        if hf.looks_like_hub_id(name):
            return hf.fetch(str(name))
    if path.is_dir():
        raise InputError(f"no checkpoint in {path}")
    raise InputError(f"no checkpoint at {path}: no such file or folder")


def read(path: Path) -> Checkpoint | None:
    """The model at a path from find(); None if it is a checkpoint that its run has removed since.

    Raises as load() does.
    """
    if is_ours(path):
        try:
            return checkpoint.read(path)
        except OSError:
            if checkpoint.was_removed(path):
                return None
            raise
    if path.is_file() and path.suffix != ".safetensors":
        from nanomoe import nanogpt  # late: only for nanoGPT's files

        fields = nanogpt.read_checkpoint(path, checkpoint.safe_torch_load(path))
        return Checkpoint(path=path, training_file=path, **fields)
    from nanomoe.hf import read as hf  # late: only for models of transformers

    config, weights, tokenizer = hf.load_hf_model(path)
    return Checkpoint(path, 0, config, {}, None, None, weights, tokenizer=tokenizer)


def is_ours(path):
    """Whether a path is a checkpoint folder of ours, if perhaps a damaged one."""
    return (path / "manifest.json").exists() or bool(re.fullmatch(r"step-\d+", path.name))
