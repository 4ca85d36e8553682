"""`esper urza`: looks after a store, served or not."""

import json
from collections.abc import Callable
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import click
from google.protobuf.json_format import MessageToDict
from google.protobuf.json_format import ParseDict
from rich.console import Console
from rich.table import Table

from esper.common.rpc import RpcError
from esper.common.v1 import check_pb2
from esper.oona.admin import LogAdmin
from esper.oona.v1 import event_pb2
from esper.plane import Plane
from esper.plane import PlaneError
from esper.plane import connect
from esper.plane.address import default_address
from esper.plane.offline import run_offline
from esper.urza.admin import StoreAdmin
from esper.urza.v1 import store_pb2

Step = TypeVar("Step", store_pb2.CheckStoreResponse, event_pb2.CheckLogResponse)
Command = TypeVar("Command", bound=Callable[..., None])


@click.group()
def command() -> None:
    """Look after a store: figures, check, garbage collection, backup.

    With --address (default: $ESPER_PLANE, else that of serve) the running server does it, beside
    its other work. With --data it is done on the directory of a server that does not run.
    """


@contextmanager
def _readable() -> Iterator[None]:
    try:
        yield
    except (PlaneError, RpcError) as error:
        raise click.ClickException(str(error)) from error


@contextmanager
def _admin(address: str | None) -> Iterator[StoreAdmin]:
    with _readable(), connect(address or default_address()) as plane:
        yield StoreAdmin(plane.channel("urza"))


def _place(function: Command) -> Command:
    """Adds the options that say where the store is."""
    function = click.option("--json", "as_json", is_flag=True, help="Print JSON.")(function)
    function = click.option(
        "--data",
        type=click.Path(file_okay=False, exists=True, path_type=Path),
        metavar="DIR",
        help="Data directory of a server that does not run.",
    )(function)
    return click.option("--address", metavar="ADDRESS", help="Address of the running server.")(
        function
    )


def _only_one(address: str | None, data: Path | None) -> None:
    if address is not None and data is not None:
        raise click.UsageError("--address and --data exclude each other")


def format_bytes(number: int) -> str:
    """Returns a size as `17 B`, `1.5 MiB` and the like."""
    size = float(number)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


@command.command()
@_place
def stats(address: str | None, data: Path | None, as_json: bool) -> None:
    """Show how much is stored and how much room there is."""
    _only_one(address, data)
    if data is None:
        with _admin(address) as admin:
            found = admin.stats()
    else:
        with _readable():
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
@_place
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
    _only_one(address, data)
    with _readable():
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
            sound &= _report(store, as_json)
        if served["oona"]:
            log = LogAdmin(plane.channel("oona")).check(quarantine=quarantine)
            sound &= _report(log, as_json)
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
            sound &= _report(_steps(lines, store_pb2.CheckStoreResponse), as_json)
        except PlaneError as error:
            failures.append(error)
    if (data / "oona").exists():
        try:
            lines = run_offline("check", data, *arguments, service="oona")
            sound &= _report(_steps(lines, event_pb2.CheckLogResponse), as_json)
        except PlaneError as error:
            failures.append(error)
    if failures:
        raise PlaneError("; ".join(map(str, failures)))
    return sound


def _steps(lines: Iterator[dict[str, object]], kind: type[Step]) -> Iterator[Step]:
    return (ParseDict(line, kind()) for line in lines)


def _report(steps: Iterator[Step], as_json: bool) -> bool:
    """Prints findings as they come, then the summary; returns whether there was no problem."""
    sound = None
    for step in steps:
        if as_json:
            click.echo(json.dumps(MessageToDict(step, always_print_fields_with_no_presence=True)))
        elif step.HasField("finding"):
            finding = step.finding
            kind = check_pb2.FindingKind.Name(finding.kind).removeprefix("FINDING_KIND_").lower()
            aside = " (moved to quarantine)" if finding.quarantined else ""
            click.echo(f"{kind}: {finding.name}: {finding.detail}{aside}")
        if step.HasField("summary"):
            if not as_json:
                click.echo(_summed_up(step))
            sound = step.summary.num_problems == 0
    if sound is None:
        raise PlaneError("the check ended before its summary")
    return sound


def _summed_up(step: store_pb2.CheckStoreResponse | event_pb2.CheckLogResponse) -> str:
    if isinstance(step, event_pb2.CheckLogResponse):
        log = step.summary
        extent = (
            f"log: {log.num_topics} topics, {log.num_events} events "
            f"({format_bytes(log.event_bytes)}), {log.num_groups} groups: "
            f"{log.num_problems} problems"
        )
    else:
        store = step.summary
        extent = (
            f"store: {store.num_rows} rows, {store.num_blobs} blobs "
            f"({format_bytes(store.blob_bytes)}): {store.num_problems} problems, "
            f"{store.num_orphans} orphans"
        )
    whole = step.summary.structure_checked
    return extent if whole else f"{extent}, structure not checked for lack of room"


@command.command()
@_place
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
    _only_one(address, data)
    if data is None:
        with _admin(address) as admin:
            outcome = admin.collect_garbage(grace, dry_run=dry_run)
    else:
        arguments = [] if grace is None else ["--grace", str(grace)]
        arguments += ["--dry-run"] if dry_run else []
        with _readable():
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
@_place
def backup(folder: Path, address: str | None, data: Path | None, as_json: bool) -> None:
    """Write a backup of the store to FOLDER, a new one or that of an earlier backup.

    A snapshot of one moment, verified while it is written; blobs that FOLDER has are not copied
    again. Nothing is removed from the store meanwhile.
    """
    _only_one(address, data)
    if data is None:
        with _admin(address) as admin:
            manifest = admin.backup(folder)
    else:
        with _readable():
            (manifest,) = run_offline("backup", data, str(folder.absolute()))
    if as_json:
        click.echo(json.dumps(manifest))
        return
    click.echo(
        f"wrote {folder}: rows {format_bytes(int(str(manifest['row_file_bytes'])))}, "
        f"{manifest['num_blob_files']} blob files "
        f"({format_bytes(int(str(manifest['blob_file_bytes'])))})"
    )


_DATA = click.option(
    "--data",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    required=True,
    help="Data directory of a server that does not run.",
)


@command.command()
@click.argument("folder", type=click.Path(file_okay=False, exists=True, path_type=Path))
@_DATA
def restore(folder: Path, data: Path) -> None:
    """Make a store of the backup in FOLDER, after checking it; DIR must hold none.

    The store appears whole or not at all.
    """
    with _readable():
        lines = run_offline("restore", data, str(folder.absolute()))
        _report(_steps(lines, store_pb2.CheckStoreResponse), as_json=False)
    click.echo(f"restored {data}")


@command.command()
@_DATA
def compact(data: Path) -> None:
    """Rewrite the file with the rows without the free pages in it."""
    with _readable():
        (sizes,) = run_offline("compact", data)
    before, after = (int(str(sizes[name])) for name in ("row_file_bytes_before", "row_file_bytes"))
    click.echo(f"file of rows: {format_bytes(before)} before, {format_bytes(after)} now")
