"""Operations on the store of a server that does not run, in a process of their own."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from esper.plane.errors import PlaneError
from esper.plane.launch import server_environment


def run_offline(
    operation: str, data_dir: Path, *arguments: str, service: str = "urza"
) -> Iterator[dict[str, object]]:
    """Yields what an operation on the store of a service in `data_dir` says, line by line.

    Args:
        operation: `check`, `backup`, `restore` or `compact`; of Urza `stats` or `gc`, too.
        data_dir: Data directory of the server.
        arguments: Further arguments of the operation.
        service: `urza` or `oona`.

    Raises:
        PlaneError: Where it fails; with what it said.
    """
    # -P: a file of the user's working directory must not stand in for a module.
    command = [
        sys.executable,
        "-P",
        "-m",
        f"esper.services.{service}.offline",
        operation,
        str(data_dir),
        *arguments,
    ]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=server_environment(),
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        for line in process.stdout:
            yield json.loads(line)
        problem = process.stderr.read()
    if process.returncode:
        lines = problem.strip().splitlines()
        raise PlaneError(lines[-1].removeprefix("esper: ") if lines else f"{operation} failed")
