"""What the commands that look after a store share: where it is, and how findings are printed."""

import json
from collections.abc import Callable
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import click
from google.protobuf.json_format import MessageToDict
from google.protobuf.json_format import ParseDict

from esper.common.rpc import RpcError
from esper.common.v1 import check_pb2
from esper.oona.v1 import event_pb2
from esper.plane import PlaneError
from esper.plane.offline import run_offline
from esper.urza.v1 import store_pb2

Step = TypeVar("Step", store_pb2.CheckStoreResponse, event_pb2.CheckLogResponse)
Command = TypeVar("Command", bound=Callable[..., None])


@contextmanager
def readable() -> Iterator[None]:
    """Ends the command with one line where the plane or the store refuses."""
    try:
        yield
    except (PlaneError, RpcError) as error:
        raise click.ClickException(str(error)) from error


def place(function: Command) -> Command:
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


def only_one(address: str | None, data: Path | None) -> None:
    """Refuses two places at once."""
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


DATA_OPTION = click.option(
    "--data",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    required=True,
    help="Data directory of a server that does not run.",
)


def steps(lines: Iterator[dict[str, object]], kind: type[Step]) -> Iterator[Step]:
    """Returns what an operation on a directory says as messages."""
    return (ParseDict(line, kind()) for line in lines)


def report(steps: Iterator[Step], as_json: bool) -> bool:
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


def show_backup(folder: Path, manifest: dict[str, object], as_json: bool) -> None:
    """Prints what a backup holds."""
    if as_json:
        click.echo(json.dumps(manifest))
        return
    text = f"wrote {folder}: rows {format_bytes(int(str(manifest['row_file_bytes'])))}"
    if manifest["num_blob_files"]:
        size = format_bytes(int(str(manifest["blob_file_bytes"])))
        text += f", {manifest['num_blob_files']} blob files ({size})"
    click.echo(text)


def restore_from(folder: Path, data: Path, service: str, kind: type[Step]) -> None:
    """Makes a store of a backup and prints what its check says."""
    with readable():
        lines = run_offline("restore", data, str(folder.absolute()), service=service)
        report(steps(lines, kind), as_json=False)
    click.echo(f"restored {data / service}")


def compact_rows(data: Path, service: str) -> None:
    """Rewrites the file of the rows and prints its sizes."""
    with readable():
        (sizes,) = run_offline("compact", data, service=service)
    before, after = (int(str(sizes[name])) for name in ("row_file_bytes_before", "row_file_bytes"))
    click.echo(f"file of rows: {format_bytes(before)} before, {format_bytes(after)} now")
