"""`python -m esper.services.serving NAME... --listen ADDRESS --data DIR`."""

import argparse
import asyncio
import sys
from collections.abc import Sequence
from pathlib import Path

from esper.plane.address import default_address
from esper.plane.address import default_data_dir
from esper.plane.address import parse_address
from esper.services.serving import logs
from esper.services.serving.context import StartupError
from esper.services.serving.limits import ServerLimits
from esper.services.serving.shell import ServerConfig
from esper.services.serving.shell import select
from esper.services.serving.shell import serve_process
from esper.services.store.limits import StoreLimits


def parse(arguments: Sequence[str]) -> tuple[ServerConfig, bool]:
    """Returns the configuration that the command line asks for, and whether to log as JSON.

    Raises:
        StartupError: For a service or an address that makes no sense.
    """
    parser = argparse.ArgumentParser(prog="esper.services.serving", description=__doc__)
    parser.add_argument("names", nargs="+", help="all, urza, tezzeret, tamiyo or oona")
    parser.add_argument("--listen", default=default_address(), help="unix:PATH or HOST:PORT")
    parser.add_argument("--data", type=Path, default=default_data_dir())
    parser.add_argument("--urza", help="address of the Urza to use, default this server")
    parser.add_argument("--insecure", action="store_true")
    parser.add_argument(
        "--exit-with-parent", type=Path, metavar="FOLDER", help="and remove the parent's FOLDER"
    )
    parser.add_argument("--log-json", action="store_true")
    parser.add_argument("--metrics", help="HOST:PORT of Prometheus' /metrics, default none")
    limits = StoreLimits()
    parser.add_argument("--max-blob-bytes", type=int, default=limits.max_blob_bytes)
    parser.add_argument("--max-row-bytes", type=int, default=limits.max_row_bytes)
    parser.add_argument("--keep-free-bytes", type=int, default=limits.keep_free_bytes)
    calls = ServerLimits().max_concurrent_rpcs
    parser.add_argument(
        "--max-calls", type=int, default=calls, help="at a time, default %(default)s"
    )
    options = parser.parse_args(arguments)
    try:
        address = parse_address(options.listen)
        urza = None if options.urza is None else str(parse_address(options.urza))
    except ValueError as error:
        raise StartupError(str(error)) from error
    config = ServerConfig(
        names=select(options.names),
        address=address,
        data_dir=options.data.absolute(),
        urza=urza,
        insecure=options.insecure,
        scratch=options.exit_with_parent,
        limits=ServerLimits(max_concurrent_rpcs=options.max_calls),
        metrics=options.metrics,
        store_limits=StoreLimits(
            max_row_bytes=options.max_row_bytes,
            max_blob_bytes=options.max_blob_bytes,
            keep_free_bytes=options.keep_free_bytes,
        ),
    )
    return config, options.log_json


def main(arguments: Sequence[str]) -> int:
    """Serves; returns the exit status: 0 after a clean stop, 1 with one line on stderr else."""
    try:
        config, as_json = parse(arguments)
        logs.configure(as_json)
        asyncio.run(serve_process(config))
    except StartupError as error:
        print(f"esper: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
