"""`esper train`: a whole run from a configuration file."""

import sys
from collections.abc import Callable
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import click
from rich.console import Console
from rich.progress import BarColumn
from rich.progress import MofNCompleteColumn
from rich.progress import Progress
from rich.progress import TextColumn
from rich.progress import TimeRemainingColumn

from esper.tolaria.report import format_count
from esper.tolaria.runs.config import RunConfig
from esper.tolaria.runs.config import flat_config
from esper.tolaria.runs.config import read_config
from esper.tolaria.runs.folder import EpochMetrics
from esper.tolaria.runs.folder import RunFolder
from esper.tolaria.runs.loggers import RunLogger
from esper.tolaria.runs.loggers import TensorBoardLogger
from esper.tolaria.runs.processes import joined
from esper.tolaria.runs.processes import place
from esper.tolaria.runs.training import train


class _Shown:
    """A live bar on a terminal; elsewhere one plain line per epoch."""

    def __init__(self, console: Console, epochs: int) -> None:
        self._console = console
        self._epochs = epochs
        self._bar = Progress(
            TextColumn("epoch"),
            MofNCompleteColumn(),
            BarColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[text]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("", total=epochs, text="")

    def __enter__(self) -> "_Shown":
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def show(self, metrics: EpochMetrics) -> None:
        done = metrics.epoch + 1
        parts = [
            f"{name} {value:.4f}"
            for name, value in (("train", metrics.train_loss), ("held-out", metrics.held_out_loss))
            if value is not None
        ]
        parts.append(f"{metrics.parameters:,} parameters")
        parts.append(f"{format_count(metrics.samples_per_s)} samples/s")
        if self._console.is_terminal:
            self._bar.update(self._task, completed=done, text="  ".join(parts))
            return
        left_s = metrics.wall_s * (self._epochs - done)
        line = f"epoch {done}/{self._epochs}  {'  '.join(parts)}  about {left_s:.0f} s left"
        self._console.print(line, soft_wrap=True, highlight=False, markup=False)


@contextmanager
def _extra(name: str) -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as error:
        raise click.ClickException(
            f"--{name} needs a package that is not installed ({error.name}): "
            f"pip install 'esper-morphogen[{name}]'"
        ) from error


def _loggers(
    config: RunConfig, folder: RunFolder, tensorboard: bool, mlflow: str | None, wandb: str | None
) -> list[RunLogger]:
    """Opens what was asked for, once all of it is known to be installed."""
    openers: list[Callable[[], RunLogger]] = []
    parameters = flat_config(config)
    if tensorboard:
        with _extra("tensorboard"):
            import_module("torch.utils.tensorboard")
        openers.append(lambda: TensorBoardLogger(folder.path / "tensorboard"))
    if mlflow is not None:
        with _extra("mlflow"):
            from esper.adapters.mlflow import MlflowLogger
        openers.append(
            lambda: MlflowLogger(experiment=mlflow, run_name=folder.name, parameters=parameters)
        )
    if wandb is not None:
        with _extra("wandb"):
            from esper.adapters.wandb import WandbLogger
        openers.append(
            lambda: WandbLogger(
                project=wandb, run_name=folder.name, folder=folder.path, parameters=parameters
            )
        )
    if openers:
        folder.path.mkdir(parents=True, exist_ok=True)
    return [open_logger() for open_logger in openers]


@click.command(name="train")
@click.argument("config_file", metavar="CONFIG.yaml", type=click.Path(path_type=Path))
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder of the run. Default: runs/ and the name of the configuration.",
)
@click.option("--resume", is_flag=True, help="Go on with the run of the folder.")
@click.option("--seed", type=click.IntRange(min=0), help="In place of the configuration's.")
@click.option(
    "--epochs", type=click.IntRange(min=1), help="In place of the configuration's length."
)
@click.option("--no-growth", is_flag=True, help="Train the host as it is, as a control.")
@click.option(
    "--plane",
    metavar="ADDRESS",
    help="unix:PATH or HOST:PORT of a running plane. Without it one is started for the run, with "
    "its store in the folder.",
)
@click.option("--tensorboard", is_flag=True, help="Log to tensorboard/ in the folder too.")
@click.option(
    "--mlflow",
    metavar="EXPERIMENT",
    help="Log to MLflow too, as a run of an experiment; MLFLOW_TRACKING_URI says where.",
)
@click.option(
    "--wandb",
    metavar="PROJECT",
    help="Log to Weights & Biases too, as a run of a project; WANDB_MODE=offline keeps it here.",
)
@joined()
def command(
    config_file: Path,
    out: Path | None,
    resume: bool,
    seed: int | None,
    epochs: int | None,
    no_growth: bool,
    plane: str | None,
    tensorboard: bool,
    mlflow: str | None,
    wandb: str | None,
) -> None:
    """Train and grow the model that CONFIG.yaml describes.

    Writes configuration, metrics, events, checkpoints and the finished model into the run's folder.
    A run that was interrupted, in whatever way, goes on with --resume.

    Processes that torchrun starts (torchrun --nproc-per-node=2 --no-python esper train ...) share
    each batch of the task; the first one prints and writes.
    """
    config = read_config(config_file)
    if seed is not None:
        config = replace(config, seed=seed)
    if epochs is not None:
        config = replace(config, epochs=epochs)
    if no_growth:
        config = replace(config, grow=False)
    folder = RunFolder(Path("runs") / config_file.stem if out is None else out)
    rank, _ = place()
    width = None if sys.stdout.isatty() else 120
    console = Console(width=width, quiet=rank != 0)
    if not resume:
        folder.check_free()
    loggers = _loggers(config, folder, tensorboard, mlflow, wandb) if rank == 0 else []
    with _Shown(console, config.epochs) as shown:
        info = train(
            config,
            folder,
            plane=plane,
            resume=resume,
            loggers=loggers,
            progress=shown.show,
        )
    figures = "  ".join(f"{name} {value:.6g}" for name, value in info.results.items())
    for line in (figures, f"wrote {folder.path}; see it with: esper report {folder.path}"):
        console.print(line, soft_wrap=True, highlight=False, markup=False)
