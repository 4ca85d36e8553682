"""`esper runs`: what is in run folders."""

import sys
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from esper.plane import EmbeddedPlane
from esper.plane import connect
from esper.tolaria.report import event_line
from esper.tolaria.report import format_count
from esper.tolaria.runs.folder import RunFolder
from esper.tolaria.runs.folder import RunFolderError
from esper.tolaria.runs.folder import find_runs
from esper.urza.v1 import run_pb2

_FOLDER = click.Path(path_type=Path, file_okay=False)


def _console() -> Console:
    return Console() if sys.stdout.isatty() else Console(width=140)


def _table(folders: list[RunFolder]) -> Table:
    table = Table(header_style="bold")
    for heading in ("run", "task", "status"):
        table.add_column(heading)
    for heading in ("epochs", "held-out loss", "test accuracy", "parameters", "FLOPs", "kept"):
        table.add_column(heading, justify="right")
    for folder in folders:
        try:
            info, epochs, events = folder.info(), folder.epochs(), folder.events()
        except RunFolderError as error:
            table.add_row(str(folder.path), "", f"[red]{error}[/red]")
            continue
        last = epochs[-1] if epochs else None
        measured = [one.held_out_loss for one in epochs if one.held_out_loss is not None]
        accuracy = info.results.get("test_accuracy")
        table.add_row(
            str(folder.path),
            info.task,
            info.status,
            f"{len(epochs)}/{info.epochs}",
            f"{measured[-1]:.4f}" if measured else "",
            "" if accuracy is None else f"{100 * accuracy:.2f} %",
            "" if last is None else f"{last.parameters:,}",
            "" if last is None else format_count(last.flops),
            str(sum(event.before != event.after == "FOSSILIZED" for event in events)),
        )
    return table


@click.group(name="runs")
def command() -> None:
    """List, show, compare and verify the runs that `esper train` has written."""


@command.command("list")
@click.argument("root", type=_FOLDER, default=Path("runs"))
def list_runs(root: Path) -> None:
    """List the runs in the folder ROOT (default: runs)."""
    folders = find_runs(root)
    if not folders:
        raise click.ClickException(f"{root} holds no run; `esper train` writes them")
    _console().print(_table(folders))


@command.command()
@click.argument("folder", metavar="RUN", type=_FOLDER)
def show(folder: Path) -> None:
    """Show one run: its figures and the life of its seeds."""
    run = RunFolder(folder)
    run.info()  # a folder of something else is refused
    console = _console()
    console.print(_table([run]))
    for event in run.events():
        console.print(event_line(event), soft_wrap=True)


@command.command()
@click.argument("folders", metavar="RUN RUN...", type=_FOLDER, nargs=-1, required=True)
def compare(folders: tuple[Path, ...]) -> None:
    """Compare runs side by side."""
    runs = [RunFolder(folder) for folder in folders]
    for run in runs:
        run.info()
    _console().print(_table(runs))


@command.command()
@click.argument("folder", metavar="RUN", type=_FOLDER)
def verify(folder: Path) -> None:
    """Verify that the history of a run is the one that was recorded.

    Recomputes every hash of the run's chain of events in the plane that keeps it: the one in the
    folder, or the one at the address that the run used.
    """
    run = RunFolder(folder)
    info = run.info()
    if not info.run:
        raise click.ClickException(f"{folder} has no history yet: its first epoch has not ended")
    if info.plane is not None:
        found = _verify(info.plane, info.run)
    else:
        with EmbeddedPlane(folder / "plane", services=("urza",)) as plane:
            found = _verify(plane.address, info.run)
    if not found.intact:
        raise click.ClickException(
            f"the history of {folder} was changed: event {found.first_broken} of runs/{info.run} "
            "is not the one that was recorded"
        )
    click.echo(f"all {found.num_events} events of runs/{info.run} are those that were recorded")


def _verify(address: str, run: str) -> run_pb2.VerifyRunResponse:
    with connect(address) as plane:
        return plane.urza.runs.verify_run(f"runs/{run}")
