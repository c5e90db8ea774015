"""
Any model by its name: a checkpoint of ours or of nanoGPT, or a model of transformers.

A name is a run's out_dir (its newest good checkpoint), a checkpoint folder, OUT_DIR/800 for that
step's, a nanoGPT ckpt.pt or its folder, a folder or .safetensors file of transformers, or, if
on_hub, a model on the hub.
"""

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from configurator import InputError
from model import GPT, GPTConfig
from moe_model import MoEGPTConfig, build_model
from nanomoe import checkpoint
from nanomoe.tokenizer import Meta, load_meta


@dataclass
class Checkpoint:
    """A model that was read, with the state of its run."""

    path: Path
    step: int  # optimizer steps done; 0 for transformers' models
    config: GPTConfig  # or MoEGPTConfig
    settings: dict  # of the run that wrote it
    val_loss: float | None  # at this step
    best_val_loss: float | None  # the lowest so far
    weights: dict  # name: tensor, on the CPU
    seconds: float = 0.0  # of training
    device: str = ""  # the type of device the run used
    dtype: str = ""  # the precision it computed in
    before_decay: bool = False  # lr_schedule 'wsd': no decay so far, or since the rate last jumped
    tokenizer: Meta | None = None  # None in older checkpoints
    sequences: int | None = None  # training sequences seen; None in older checkpoints
    data: dict | None = None  # Dataset.fingerprint() of what it was trained on, if known
    training_file: Path | None = None  # has the optimizer's state; None for transformers' models

    def build_model(self) -> GPT:
        """The model with these weights.

        Raises InputError that names every tensor that is missing or has another shape."""
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

    def tokenizer_meta(self, dataset: str = "") -> Meta:
        """The description of the model's tokenizer, in the form of a meta.json.

        It is that of `dataset` if one is given, else the one that came with the weights, else
        that of the dataset the model was trained on.
        Raises InputError if there is none, or if it has more token ids than the model."""
        if self.tokenizer and not dataset:
            return self.tokenizer
        name = dataset or self.settings.get("dataset", "")
        try:
            meta = load_meta(name, need_tokens=False)
        except InputError as error:
            if dataset:
                raise
            why = "came without a tokenizer"
            if name:
                why = f"was trained on dataset '{name}' and needs its tokenizer: {error}"
            advice = "or name a dataset that has the same tokenizer: --dataset=NAME"
            raise InputError(f"{self.path} {why}; {advice}") from None
        if not self.may_have(meta):
            raise InputError(
                f"dataset '{name}' has {meta['vocab_size']} token ids, the model of {self.path} "
                f"{self.config.vocab_size}: it was trained on another dataset"
            )
        if self.tokenizer and not self.same_tokenizer(meta):
            another = f"uses another tokenizer than {self.path} was trained with"
            print(f"note: dataset '{name}' {another}", file=sys.stderr, flush=True)
        return meta

    def same_tokenizer(self, meta: Meta) -> bool:
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

    def sequences_seen(self, settings: Mapping) -> int:
        """The training sequences seen. Older checkpoints do not say: then it is as many as their
        settings, or else these, make of their steps."""
        if self.sequences is not None:
            return self.sequences
        old = settings | self.settings
        return self.step * old["batch_size"] * old["gradient_accumulation_steps"]

    def training_state(self) -> dict:
        """The saved state_dicts: "optimizer", and "scaler" and "guard" if the run had them.

        Raises OSError if the file is damaged, InputError if it would run code."""
        state = checkpoint.safe_torch_load(self.training_file)
        if not isinstance(state, dict) or "optimizer" not in state:
            raise OSError(f"checkpoint {self.path} is damaged: it has no state of an optimizer")
        return state


def load(name: str | Path, on_hub: bool = False) -> Checkpoint:
    """The model of this name, verified and read.

    For sampling, export and the like: expert_impl becomes 'auto', whatever the run used.
    Raises InputError if it is no model, OSError if it is damaged or the hub cannot be asked."""
    found = None
    while found is None:
        found = read(find(name, on_hub))
    if isinstance(found.config, MoEGPTConfig):
        found.config.expert_impl = "auto"  # this device may not run what the run's device did
    return found


def find(name: str | Path, on_hub: bool = False) -> Path:
    """The path of the model of this name; if it is a checkpoint of ours, verified.

    In an out_dir a line names each damaged checkpoint that is skipped. Raises as load() does."""
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

    Raises as load() does."""
    if is_ours(path):
        try:
            return Checkpoint(path=path, **checkpoint.read(path))
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
