"""`esper demo`: growth on real data, next to the controls that it must beat."""

import os
import sys
import tempfile
from pathlib import Path
from typing import Literal

import click
from rich.console import Console
from rich.progress import BarColumn
from rich.progress import Progress
from rich.progress import TaskID
from rich.progress import TextColumn
from rich.progress import TimeElapsedColumn

from esper.artifacts import check_target
from esper.tolaria import demo
from esper.tolaria.plots import PLOT_FILE
from esper.tolaria.report import REPORT_FILE
from esper.tolaria.report import print_report


class _Bars:
    """A live bar per arm on a terminal; elsewhere a plain line per tenth of an arm.

    Args:
        console: Where to show it.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._shown: dict[str, int] = {}
        self._bars: dict[str, TaskID] = {}
        self._progress = Progress(
            TextColumn("{task.description:<34}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f} %"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[text]}"),
            console=console,
            disable=not console.is_terminal,
        )

    def __enter__(self) -> "_Bars":
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def show(self, arm: str, share: float, text: str) -> None:
        """Shows how far an arm has come."""
        if self._console.is_terminal:
            if arm not in self._bars:
                self._bars[arm] = self._progress.add_task(arm, total=1.0, text=text)
            self._progress.update(self._bars[arm], completed=share, text=text)
            return
        tenth = int(10 * share + 1e-9)
        if tenth > self._shown.get(arm, 0):
            self._shown[arm] = tenth
            self._console.print(f"{arm}: {10 * tenth} %, {text}", soft_wrap=True, highlight=False)


def check_out(out: Path) -> None:
    """Refuses a folder that cannot take the results, before minutes of training are lost.

    Args:
        out: Folder for the results; made where it does not exist.

    Raises:
        click.ClickException: If it cannot be made or written, or something is in the way.
        ModelFolderError: If `model` in it is there already and is no model folder.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        # The mode bits say too little: root passes them all, and a mount may be read-only.
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise click.ClickException(
            f"--out is {str(out)!r}, but it must be a folder that can be written: {error.strerror}"
        ) from error
    for path in (out / REPORT_FILE, out / PLOT_FILE):
        if path.exists() and not (path.is_file() and os.access(path, os.W_OK)):
            raise click.ClickException(
                f"--out is {str(out)!r}, but its {path.name} is not a file that can be replaced"
            )
    check_target(out / "model")


@click.command(name="demo")
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("runs/demo"),
    show_default=True,
    help="Folder for report.json, growth.png and model/.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option("--epochs", type=click.IntRange(min=1), default=demo.EPOCHS, show_default=True)
@click.option(
    "--mode",
    type=click.Choice(["lockstep", "async"]),
    default="lockstep",
    show_default=True,
    help="lockstep waits for the plane's advice and is repeatable; async never waits.",
)
@click.option(
    "--plane",
    metavar="ADDRESS",
    help="unix:PATH or HOST:PORT of a running plane. Without it one is started for the run.",
)
def command(
    out: Path, seed: int, epochs: int, mode: Literal["lockstep", "async"], plane: str | None
) -> None:
    """Grow a small model on real digits and compare it with static ones.

    Trains a small multilayer perceptron on scikit-learn's digits and lets it grow, then trains
    the controls: the same model without growth, the same at equal compute, and a model of the final
    size at equal compute. Prints a table and the life of every seed.
    """
    check_out(out)
    console = Console() if sys.stdout.isatty() else Console(width=120)
    with _Bars(console) as bars:
        result = demo.run(out, seed=seed, epochs=epochs, mode=mode, plane=plane, progress=bars.show)
    print_report(console, result.report)
    model = out / "model"
    lines = [
        f"wrote {out / REPORT_FILE}, {out / PLOT_FILE} and {model}",
        f"check it with: esper evaluate {model}",
    ]
    if result.history.plane_failure is not None:
        lines.insert(0, f"the plane was lost: {result.history.plane_failure}")
    for line in lines:  # neither wrapped nor read as markup: paths are there to be copied
        console.print(line, soft_wrap=True, highlight=False, markup=False)
