"""`esper demo`: growth on real data, next to the controls that it must beat."""

import sys
from pathlib import Path
from typing import Literal

import click
from rich.console import Console
from rich.progress import BarColumn
from rich.progress import Progress
from rich.progress import TaskID
from rich.progress import TextColumn
from rich.progress import TimeElapsedColumn

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
    console = Console() if sys.stdout.isatty() else Console(width=120)
    with _Bars(console) as bars:
        result = demo.run(out, seed=seed, epochs=epochs, mode=mode, plane=plane, progress=bars.show)
    print_report(console, result.report)
    if result.plane_failure is not None:
        console.print(f"the plane was lost: {result.plane_failure}", highlight=False)
    model = out / "model"
    console.print(f"wrote {out / REPORT_FILE}, {out / PLOT_FILE} and {model}", highlight=False)
    console.print(f"check it with: esper evaluate {model}", highlight=False)
