"""A library and a bare server, each a process of its own, on a Unix socket and on loopback TCP."""

import selectors
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest

from esper.plane import Plane
from esper.plane import connect
from esper.plane.channel import make_channel
from esper.plane.launch import server_command
from esper.plane.launch import server_environment

START_TIMEOUT_S = 60.0
TRANSPORTS = ("unix", "tcp")


@dataclass
class Pair:
    """The library and the bare server on one transport."""

    plane: Plane
    address: str
    bare: grpc.Channel
    bare_address: str


def start(command: list[str], environment: dict[str, str]) -> tuple[subprocess.Popen[str], str]:
    """Starts a server and returns it with the line that says that it is ready."""
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment, text=True
    )
    assert process.stdout is not None
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        assert selector.select(START_TIMEOUT_S), f"{command} says nothing"
    return process, process.stdout.readline().strip()


@pytest.fixture(scope="session", params=TRANSPORTS)
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    """Both servers on one transport, over one disk."""
    with tempfile.TemporaryDirectory(prefix="eb-", dir="/tmp") as folder:
        unix = request.param == "unix"
        listen = f"unix:{folder}/plane.sock" if unix else "127.0.0.1:0"
        bare_listen = f"unix:{folder}/bare.sock" if unix else "127.0.0.1:0"
        environment = server_environment()
        script = str(Path(__file__).with_name("echo.py"))
        ours, line = start(server_command(("urza",), listen, Path(folder) / "data"), environment)
        bare, bare_line = start([sys.executable, script, bare_listen], environment)
        address, bare_address = line.split(" on ")[1], bare_line.split(" on ")[1]
        try:
            with connect(address, START_TIMEOUT_S) as plane, make_channel(bare_address) as channel:
                yield Pair(plane, address, channel, bare_address)
        finally:
            for process in (ours, bare):
                process.kill()
                process.wait()
                assert process.stdout is not None
                process.stdout.close()
