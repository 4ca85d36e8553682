"""How a server is started, by `esper serve` and by the embedded plane."""

import os
import sys
from collections.abc import Mapping
from collections.abc import Sequence
from pathlib import Path

MODULE = "esper.services.serving"


def server_command(
    services: Sequence[str],
    address: str,
    data_dir: Path,
    *,
    urza: str | None = None,
    insecure: bool = False,
    scratch: Path | None = None,
    log_json: bool = False,
    metrics: str | None = None,
    limits: Mapping[str, int] | None = None,
) -> list[str]:
    """Returns the command line of a server.

    Args:
        services: `all`, or some of `urza`, `tezzeret`, `tamiyo`, `oona`.
        address: Where to listen, `unix:PATH` or `HOST:PORT`.
        data_dir: Directory of the stores.
        urza: Address of the Urza that the other services use; None means the server itself.
        insecure: Accept plain text on an address that other machines reach.
        scratch: Stop once stdin ends or the parent process is gone, and remove this folder then.
        log_json: Log lines as JSON.
        metrics: `HOST:PORT` on which Prometheus finds `/metrics`; None serves none.
        limits: How much each store may take, in bytes: `max_blob_bytes`, `max_row_bytes`,
            `keep_free_bytes`; and `max_calls` at a time. The server's own defaults for what is not
            named.
    """
    # -P: a file of the user's working directory must not stand in for a module of the server.
    command = [sys.executable, "-P", "-m", MODULE, *services]
    command += ["--listen", address, "--data", str(data_dir)]
    if urza is not None:
        command += ["--urza", urza]
    if insecure:
        command.append("--insecure")
    if scratch is not None:
        command += ["--exit-with-parent", str(scratch)]
    if log_json:
        command.append("--log-json")
    if metrics is not None:
        command += ["--metrics", metrics]
    for name, value in (limits or {}).items():
        command += [f"--{name.replace('_', '-')}", str(value)]
    return command


def server_environment() -> dict[str, str]:
    """Returns this process's environment with defaults that keep a server from crowding it.

    OpenMP workers that spin between two uses can slow a training process on the same cores down
    many times over; a server computes little and has one thread unless the environment says
    otherwise.
    """
    environment = dict(os.environ)
    environment.setdefault("OMP_NUM_THREADS", "1")
    environment.setdefault("OMP_WAIT_POLICY", "passive")
    return environment
