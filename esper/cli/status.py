"""`esper status`: shows a running plane."""

import json
from collections.abc import Iterator
from dataclasses import asdict
from dataclasses import dataclass
from itertools import islice

import click
from rich.console import Console
from rich.table import Table

from esper.common.rpc import RpcError
from esper.plane import Plane
from esper.plane import PlaneError
from esper.plane import connect
from esper.plane.address import default_address

COUNT_LIMIT = 10_000
"""Stored things are counted up to here, so that a large library is not read through."""


@dataclass(frozen=True)
class Status:
    """What a plane says of itself.

    Attributes:
        address: Where it answers.
        version: Its release.
        contract: Digest of its protocol.
        uptime_s: Time since it was ready, in seconds.
        data_dir: Directory of its stores.
        services: Health of each service by full name.
        counts: Number of blueprints, kernels and topics, where their services are served.
        more: Which of the counts stopped at `COUNT_LIMIT`.
    """

    address: str
    version: str
    contract: str
    uptime_s: float
    data_dir: str
    services: dict[str, str]
    counts: dict[str, int]
    more: list[str]


def read_status(plane: Plane, address: str) -> Status:
    """Asks a plane for everything that `esper status` shows."""
    info = plane.info
    counts: dict[str, int] = {}
    more = []
    if any(name.startswith("esper.urza.") for name in info.services):
        for name, records in (
            ("blueprints", plane.urza.list_blueprints()),
            ("kernels", plane.urza.list_kernels()),
        ):
            counts[name] = _count(records)
            if counts[name] == COUNT_LIMIT:
                more.append(name)
    if any(name.startswith("esper.oona.") for name in info.services):
        counts["topics"] = len(plane.oona.list_topics())
    return Status(
        address=address,
        version=info.version,
        contract=info.contract,
        uptime_s=round(info.uptime_s, 3),
        data_dir=info.data_dir,
        services=plane.health(),
        counts=counts,
        more=more,
    )


def _count(records: Iterator[object]) -> int:
    return sum(1 for _ in islice(records, COUNT_LIMIT))


def format_duration(seconds: float) -> str:
    """Returns a time as `1 d 2 h`, `3 min 4 s` or `5 s`: its two largest units."""
    remaining = int(seconds)
    parts: list[str] = []
    for unit, size in (("d", 86_400), ("h", 3_600), ("min", 60), ("s", 1)):
        count, remaining = divmod(remaining, size)
        if count or parts:
            parts.append(f"{count} {unit}")
    return " ".join(parts[:2]) or "0 s"


def show(status: Status, console: Console) -> None:
    """Prints a status as tables."""
    facts = Table(title="Plane", show_header=False, title_justify="left")
    facts.add_row("address", status.address)
    facts.add_row("version", status.version)
    facts.add_row("contract", status.contract[:12])
    facts.add_row("uptime", format_duration(status.uptime_s))
    facts.add_row("data", status.data_dir)
    for name, count in status.counts.items():
        facts.add_row(name, f"{count}+" if name in status.more else str(count))
    console.print(facts)
    services = Table("service", "health", title="Services", title_justify="left")
    for name, health in status.services.items():
        colour = "green" if health == "SERVING" else "red"
        services.add_row(name, f"[{colour}]{health}[/{colour}]")
    console.print(services)


@click.command()
@click.option("--address", metavar="ADDRESS", help="Default: $ESPER_PLANE, else that of serve.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option(
    "--timeout",
    type=click.FloatRange(min=0, min_open=True),
    default=3.0,
    show_default=True,
    help="Seconds to wait for an answer.",
)
def command(address: str | None, as_json: bool, timeout: float) -> None:
    """Show a running plane: version, services with their health, uptime and what is stored.

    Exit status 1 where nothing answers, or something that speaks another protocol.
    """
    place = address or default_address()
    try:
        with connect(place, timeout_s=timeout) as plane:
            status = read_status(plane, place)
    except (PlaneError, RpcError) as error:
        raise click.ClickException(str(error)) from error
    if as_json:
        click.echo(json.dumps(asdict(status), indent=2))
    else:
        show(status, Console())
