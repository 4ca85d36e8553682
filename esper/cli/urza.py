"""`esper urza`: looks after a store, served or not."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click
from google.protobuf.json_format import MessageToDict
from google.protobuf.json_format import ParseDict
from rich.console import Console
from rich.table import Table

from esper.cli.upkeep import DATA_OPTION
from esper.cli.upkeep import compact_rows
from esper.cli.upkeep import format_bytes
from esper.cli.upkeep import only_one
from esper.cli.upkeep import place
from esper.cli.upkeep import readable
from esper.cli.upkeep import report
from esper.cli.upkeep import restore_from
from esper.cli.upkeep import show_backup
from esper.cli.upkeep import steps
from esper.oona.admin import LogAdmin
from esper.oona.v1 import event_pb2
from esper.plane import Plane
from esper.plane import PlaneError
from esper.plane import connect
from esper.plane.address import default_address
from esper.plane.offline import run_offline
from esper.urza.admin import StoreAdmin
from esper.urza.v1 import store_pb2


@click.group()
def command() -> None:
    """Look after a store: figures, check, garbage collection, backup.

    With --address (default: $ESPER_PLANE, else that of serve) the running server does it, beside
    its other work. With --data it is done on the directory of a server that does not run.
    """


@contextmanager
def _admin(address: str | None) -> Iterator[StoreAdmin]:
    with readable(), connect(address or default_address()) as plane:
        yield StoreAdmin(plane.channel("urza"))


@command.command()
@place
def stats(address: str | None, data: Path | None, as_json: bool) -> None:
    """Show how much is stored and how much room there is."""
    only_one(address, data)
    if data is None:
        with _admin(address) as admin:
            found = admin.stats()
    else:
        with readable():
            (line,) = run_offline("stats", data)
        found = ParseDict(line, store_pb2.GetStoreStatsResponse())
    if as_json:
        click.echo(
            json.dumps(MessageToDict(found, always_print_fields_with_no_presence=True), indent=2)
        )
        return
    facts = Table(title="Store", show_header=False, title_justify="left")
    quota = format_bytes(found.max_blob_bytes) if found.HasField("max_blob_bytes") else "the disk"
    facts.add_row("directory", found.directory)
    facts.add_row("schema version", str(found.schema_version))
    facts.add_row("blobs", f"{found.num_blobs}, {format_bytes(found.blob_bytes)} of {quota}")
    facts.add_row("in quarantine", str(found.num_quarantined))
    limit = format_bytes(found.max_row_bytes)
    facts.add_row("file of rows", f"{format_bytes(found.row_file_bytes)} of {limit}")
    keep = format_bytes(found.keep_free_bytes)
    facts.add_row("free on the disk", f"{format_bytes(found.free_bytes)}, {keep} are kept free")
    facts.add_row("writes waiting", str(found.num_queued))
    rows = Table("table", "rows", title="Rows", title_justify="left")
    for table in found.tables:
        rows.add_row(table.name, str(table.num_rows))
    console = Console()
    console.print(facts)
    console.print(rows)


@command.command()
@place
@click.option("--quarantine", is_flag=True, help="Move aside what is damaged.")
@click.pass_context
def check(
    ctx: click.Context, address: str | None, data: Path | None, as_json: bool, quarantine: bool
) -> None:
    """Read everything that is stored, by Urza and by Oona, and print what is wrong with it.

    Recomputes the digest of every blob, blueprint and kernel, the hash chain of every run and the
    checksum of every report and event, follows every reference, counts offsets, compares indexes
    with rows, and proves the structure of the files. Exit status 1 where something is wrong; a file
    without a row, as a crash can leave it, is not.
    """
    only_one(address, data)
    with readable():
        if data is None:
            sound = _check_served(address or default_address(), as_json, quarantine)
        else:
            sound = _check_directory(data, as_json, quarantine)
    if not sound:
        ctx.exit(1)


def _check_served(address: str, as_json: bool, quarantine: bool) -> bool:
    with connect(address) as plane:
        served = {name: _serves(plane, name) for name in ("urza", "oona")}
        if not any(served.values()):
            raise PlaneError(f"the plane on {address} serves neither urza nor oona")
        sound = True
        if served["urza"]:
            store = StoreAdmin(plane.channel("urza")).check(quarantine=quarantine)
            sound &= report(store, as_json)
        if served["oona"]:
            log = LogAdmin(plane.channel("oona")).check(quarantine=quarantine)
            sound &= report(log, as_json)
        return sound


def _serves(plane: Plane, service: str) -> bool:
    try:
        plane.channel(service)
    except PlaneError:
        return False
    return True


def _check_directory(data: Path, as_json: bool, quarantine: bool) -> bool:
    """Checks both stores, also where one of them cannot even be opened."""
    arguments = ["--quarantine"] if quarantine else []
    sound = True
    failures: list[PlaneError] = []
    # A directory that holds neither is refused by the first.
    if (data / "urza").exists() or not (data / "oona").exists():
        try:
            lines = run_offline("check", data, *arguments)
            sound &= report(steps(lines, store_pb2.CheckStoreResponse), as_json)
        except PlaneError as error:
            failures.append(error)
    if (data / "oona").exists():
        try:
            lines = run_offline("check", data, *arguments, service="oona")
            sound &= report(steps(lines, event_pb2.CheckLogResponse), as_json)
        except PlaneError as error:
            failures.append(error)
    if failures:
        raise PlaneError("; ".join(map(str, failures)))
    return sound


@command.command()
@place
@click.option(
    "--grace",
    type=click.FloatRange(min=0),
    metavar="SECONDS",
    help="Keep what was used within so many seconds. Default: 3600 with a server, 0 without.",
)
@click.option("--dry-run", is_flag=True, help="Only count.")
def gc(
    address: str | None, data: Path | None, as_json: bool, grace: float | None, dry_run: bool
) -> None:
    """Remove the blobs that no kernel refers to, and what interrupted uploads have left.

    A server counts every blob as used when it starts.
    """
    only_one(address, data)
    if data is None:
        with _admin(address) as admin:
            outcome = admin.collect_garbage(grace, dry_run=dry_run)
    else:
        arguments = [] if grace is None else ["--grace", str(grace)]
        arguments += ["--dry-run"] if dry_run else []
        with readable():
            (line,) = run_offline("gc", data, *arguments)
        outcome = ParseDict(line, store_pb2.CollectGarbageResponse())
    if as_json:
        click.echo(json.dumps(MessageToDict(outcome, always_print_fields_with_no_presence=True)))
        return
    click.echo(
        f"{'would remove' if dry_run else 'removed'} {outcome.num_blobs} blobs "
        f"({format_bytes(outcome.blob_bytes)}), {outcome.num_orphans} orphans, "
        f"{outcome.num_uploads} interrupted uploads"
    )


@command.command()
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
@place
def backup(folder: Path, address: str | None, data: Path | None, as_json: bool) -> None:
    """Write a backup of the store to FOLDER, a new one or that of an earlier backup.

    A snapshot of one moment, verified while it is written; blobs that FOLDER has are not copied
    again. Nothing is removed from the store meanwhile.
    """
    only_one(address, data)
    if data is None:
        with _admin(address) as admin:
            manifest = admin.backup(folder)
    else:
        with readable():
            (manifest,) = run_offline("backup", data, str(folder.absolute()))
    show_backup(folder, manifest, as_json)


@command.command()
@click.argument("folder", type=click.Path(file_okay=False, exists=True, path_type=Path))
@DATA_OPTION
def restore(folder: Path, data: Path) -> None:
    """Make a store of the backup in FOLDER, after checking it; DIR must hold none.

    The store appears whole or not at all.
    """
    restore_from(folder, data, "urza", store_pb2.CheckStoreResponse)


@command.command()
@DATA_OPTION
def compact(data: Path) -> None:
    """Rewrite the file with the rows without the free pages in it."""
    compact_rows(data, "urza")
