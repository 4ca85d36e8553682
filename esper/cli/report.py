"""`esper report`: a run as an HTML page."""

from pathlib import Path

import click

from esper.tolaria.runs.folder import REPORT_FILE
from esper.tolaria.runs.folder import RunFolder
from esper.tolaria.runs.page import report


@click.command(name="report")
@click.argument("folder", metavar="RUN", type=click.Path(path_type=Path, file_okay=False))
@click.option(
    "--out", type=click.Path(path_type=Path, dir_okay=False), help="Default: report.html in RUN."
)
def command(folder: Path, out: Path | None) -> None:
    """Make one HTML page of the run in the folder RUN.

    Losses, the life of every seed, held-out trials with their intervals, size and cost, and the
    host with its grafts. It needs no other file and no network, and works for unfinished runs too.
    """
    page = report(RunFolder(folder))
    out = folder / REPORT_FILE if out is None else out
    out.write_text(page, encoding="utf-8")
    click.echo(f"wrote {out}")
