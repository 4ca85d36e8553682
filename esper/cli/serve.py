"""`esper serve`: runs the plane, or some of its services."""

import os
import sys
from pathlib import Path

import click

from esper.plane.address import default_address
from esper.plane.address import default_data_dir
from esper.plane.launch import server_command
from esper.plane.launch import server_environment

SERVICES = ("all", "urza", "tezzeret", "tamiyo", "oona")


@click.command()
@click.argument("services", nargs=-1, required=True, type=click.Choice(SERVICES), metavar="NAME...")
@click.option(
    "--listen",
    metavar="ADDRESS",
    help="unix:PATH or HOST:PORT; port 0 takes a free one. Default: $ESPER_PLANE, else a socket in "
    "a directory of yours under $XDG_RUNTIME_DIR or /tmp.",
)
@click.option(
    "--data",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    help="Directory of the stores, created where missing; one server to a store. "
    "Default: $XDG_DATA_HOME/esper or ~/.local/share/esper.",
)
@click.option(
    "--urza",
    metavar="ADDRESS",
    help="Where tezzeret and tamiyo find Urza. Default: this server.",
)
@click.option(
    "--insecure",
    is_flag=True,
    help="Serve plain text even where other machines can reach it.",
)
@click.option("--log-json", is_flag=True, help="Write log lines as JSON.")
@click.option(
    "--metrics",
    metavar="HOST:PORT",
    help="Serve Prometheus metrics over HTTP on /metrics there. Default: none.",
)
@click.option(
    "--max-blob-bytes",
    type=click.IntRange(min=0),
    help="Quota of the blobs, uploads under way included. Default: the disk.",
)
@click.option(
    "--max-row-bytes",
    type=click.IntRange(min=1 << 20),
    help="Largest size of the file with the rows of a store. Default: 1 TiB.",
)
@click.option(
    "--keep-free-bytes",
    type=click.IntRange(min=0),
    help="Room on the disk below which writes are refused. Default: 64 MiB.",
)
@click.option(
    "--max-calls",
    type=click.IntRange(min=1),
    help="Calls under way at a time, streams included; more are refused. Default: 1024.",
)
def command(
    services: tuple[str, ...],
    listen: str | None,
    data: Path | None,
    urza: str | None,
    insecure: bool,
    log_json: bool,
    metrics: str | None,
    **limits: int | None,
) -> None:
    """Run the plane (NAME `all`), or some of its services: urza, tezzeret, tamiyo, oona.

    Prints one line when ready, logs to stderr, and stops on SIGTERM or Ctrl-C once the calls under
    way have ended, with exit status 0. Every server also answers health checks and reflection; a
    unary call that sets no deadline gets one of 60 seconds.
    """
    server = server_command(
        services,
        listen or default_address(),
        data or default_data_dir(),
        urza=urza,
        insecure=insecure,
        log_json=log_json,
        metrics=metrics,
        limits={name: value for name, value in limits.items() if value is not None},
    )
    sys.stdout.flush()
    os.execve(server[0], server, server_environment())
