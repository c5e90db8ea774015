"""
A run's numbers for Weights & Biases and TensorBoard. Neither can end a run: what fails is left with
one line, and log.jsonl has everything.
"""

import contextlib
import os
import threading
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from configurator import InputError

if TYPE_CHECKING:  # else late: only where something is drawn
    from matplotlib.figure import Figure

SECONDS = 30  # that a tracker may take to start or to end


class WandB:
    """id_file keeps the id of the wandb run. Raises InputError without a login."""

    def __init__(self, id_file: Path, step: int, settings: dict):
        import wandb  # late: only for those who use it

        needs_login = os.environ.get("WANDB_MODE") not in ("offline", "dryrun", "disabled")
        if needs_login and not wandb.login(prompt=False):
            raise InputError(
                "wandb_log is on, but there is no login: run `wandb login`, or set "
                "WANDB_MODE=offline"
            )
        if not id_file.exists() or not id_file.read_text():  # a kill may have left it empty
            id_file.write_text(uuid.uuid4().hex[:8])
        self.image = wandb.Image
        self.run = wandb.init(
            id=id_file.read_text(),
            resume="allow",
            project=settings["wandb_project"],
            name=settings["wandb_run_name"],
            config=settings,
            dir=id_file.parent,
            settings=wandb.Settings(silent=True, init_timeout=SECONDS),
            allow_val_change=True,
        )
        # A resumed run writes some steps again. By its own count of steps wandb would drop them.
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")
        if not self.run.offline and self.run.url:
            print(f"wandb: {self.run.url}", flush=True)

    def write(self, step: int, numbers: dict[str, float]) -> None:
        self.run.log(numbers | {"step": step})

    def draw(self, step: int, name: str, figure: "Figure") -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg  # late, as draw_load()

        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        self.write(step, {name: self.image(np.asarray(canvas.buffer_rgba()))})

    def close(self) -> None:
        """Wait for the upload, but not for ever; nor does errors.end_process()."""
        thread = threading.Thread(target=self.run.finish, daemon=True)
        thread.start()
        thread.join(SECONDS)
        if thread.is_alive():
            folder = Path(self.run.dir).parent
            raise TimeoutError(f"not all is uploaded; `wandb sync {folder}` does it")


class TensorBoard:
    """Event files in a folder, without those of steps that are done again."""

    def __init__(self, folder: Path, step: int, settings: dict):
        try:
            from torch.utils.tensorboard import SummaryWriter  # late: an optional package
        except ImportError:
            raise ImportError("not installed: pip install tensorboard") from None
        self.writer = SummaryWriter(folder, purge_step=step + 1)

    def write(self, step: int, numbers: dict[str, float]) -> None:
        for name, value in numbers.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def draw(self, step: int, name: str, figure: "Figure") -> None:
        self.writer.add_figure(name, figure, step)

    def close(self) -> None:
        self.writer.close()


class Trackers:
    """The trackers that the settings turn on. Only rank 0 has them.

    places: {setting: the tracker's path in out_dir}. step: the one that the run resumes after.
    Raises InputError if wandb_log is on and there is no login."""

    def __init__(self, places: dict[str, Path], step: int, settings: dict):
        self.open, self.load = {}, None
        for name, kind in (("wandb_log", WandB), ("tensorboard_log", TensorBoard)):
            if settings[name]:
                with self.goes_on_without(name):
                    self.open[name] = kind(places[name], step, settings)

    @contextlib.contextmanager
    def goes_on_without(self, name):
        """Turn an error into one line, and use this tracker no more."""
        try:
            yield
        except InputError:
            raise
        except Exception as error:  # wandb raises many kinds
            self.open.pop(name, None)
            reason = (str(error).splitlines() or [""])[0]
            print(
                f"note: {name} is off from here on ({type(error).__name__}: {reason}); log.jsonl "
                "has everything",
                flush=True,
            )

    def write(self, entry: dict) -> None:
        """A log entry with a step. An evaluation also gets a picture of the experts' last load."""
        self.load = entry.get("expert_load", self.load)
        numbers = scalars(entry)
        for name, tracker in list(self.open.items()):
            with self.goes_on_without(name):
                tracker.write(entry["step"], numbers)
                if self.load and "val_loss" in entry:
                    tracker.draw(entry["step"], "expert_load", draw_load(self.load))

    def close(self) -> None:
        for name, tracker in list(self.open.items()):
            with self.goes_on_without(name):
                tracker.close()
        self.open = {}


def scalars(entry: dict) -> dict[str, float]:
    """A log entry as {name: number}, with NAME/layer_I for each layer of a list. From the experts'
    load come each layer's max_vio and dead_experts."""
    lists = {name: value for name, value in entry.items() if isinstance(value, list)}
    found = {k: v for k, v in entry.items() if k not in {"step", *lists} and v is not None}
    if "expert_load" in lists:
        load = lists.pop("expert_load")
        lists["max_vio"] = [max(shares) * len(shares) - 1 for shares in load]
        lists["dead_experts"] = [shares.count(0) for shares in load]
        found["collapsed_layers"] = len(lists.pop("collapsed_layers"))
    for name, values in lists.items():
        found |= {f"{name}/layer_{i}": value for i, value in enumerate(values)}
    return found


def draw_load(load: list[list[float]]) -> "Figure":
    """A heat map of each expert's load over the mean load: a row for each layer."""
    from matplotlib.figure import Figure  # late: only for those who use it

    figure = Figure(figsize=(8, 1 + 0.3 * len(load)), layout="constrained")
    axes = figure.subplots()
    relative = (np.array(load) * len(load[0])).clip(1e-3)
    image = axes.imshow(relative, aspect="auto", **load_colors())
    axes.set(xlabel="expert", ylabel="MoE layer", yticks=range(len(load)))
    add_load_bar(figure, image, axes)
    return figure


def load_colors() -> dict:
    """Options of imshow() for load over mean load: grey is even, red overloaded, blue underused."""
    from matplotlib.colors import LogNorm

    return {"norm": LogNorm(0.25, 4), "cmap": "coolwarm"}


def add_load_bar(figure: "Figure", image, axes) -> None:
    """Beside the axes: which color is which load."""
    ticks = [0.25, 0.5, 1, 2, 4]
    bar = figure.colorbar(image, ax=axes, extend="both", ticks=ticks, format="{x:g}", pad=0.02)
    bar.minorticks_off()
    bar.set_label("load / mean load")
