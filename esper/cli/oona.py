"""`esper oona`: looks after an event log, served or not."""

from pathlib import Path

import click

from esper.cli.upkeep import DATA_OPTION
from esper.cli.upkeep import compact_rows
from esper.cli.upkeep import only_one
from esper.cli.upkeep import place
from esper.cli.upkeep import readable
from esper.cli.upkeep import restore_from
from esper.cli.upkeep import show_backup
from esper.oona.admin import LogAdmin
from esper.oona.v1 import event_pb2
from esper.plane import connect
from esper.plane.address import default_address
from esper.plane.offline import run_offline


@click.group()
def command() -> None:
    """Look after an event log: backup, restore, compact; `esper urza check` checks it.

    With --address (default: $ESPER_PLANE, else that of serve) the running server does it, beside
    its other work. With --data it is done on the directory of a server that does not run.
    """


@command.command()
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
@place
def backup(folder: Path, address: str | None, data: Path | None, as_json: bool) -> None:
    """Write a backup of the log to FOLDER, a new one or that of an earlier backup.

    A snapshot of one moment, with topics, events, consumer groups and request ids.
    """
    only_one(address, data)
    with readable():
        if data is None:
            with connect(address or default_address()) as plane:
                manifest = LogAdmin(plane.channel("oona")).backup(folder)
        else:
            (manifest,) = run_offline("backup", data, str(folder.absolute()), service="oona")
    show_backup(folder, manifest, as_json)


@command.command()
@click.argument("folder", type=click.Path(file_okay=False, exists=True, path_type=Path))
@DATA_OPTION
def restore(folder: Path, data: Path) -> None:
    """Make a log of the backup in FOLDER, after checking it; DIR must hold none.

    The log appears whole or not at all.
    """
    restore_from(folder, data, "oona", event_pb2.CheckLogResponse)


@command.command()
@DATA_OPTION
def compact(data: Path) -> None:
    """Rewrite the file with the rows without the free pages in it."""
    compact_rows(data, "oona")
