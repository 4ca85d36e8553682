"""Servers for the tests: real ones, on real sockets."""

import asyncio
import os
import selectors
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import hypothesis
import pytest

from esper.plane import Plane
from esper.plane import connect
from esper.plane.address import parse_address
from esper.plane.launch import server_command
from esper.plane.launch import server_environment
from esper.services.serving.shell import ServerConfig
from esper.services.serving.shell import serve

START_TIMEOUT_S = 100

# The same examples in every run; ``--hypothesis-profile=default`` looks for new ones.
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None)
hypothesis.settings.load_profile("repeatable")


@dataclass
class ServerProcess:
    """A server of its own process; `address` is where it said that it listens."""

    process: "subprocess.Popen[str]"
    address: str
    data: Path
    log: Path

    def stop(self, number: int = signal.SIGTERM, timeout_s: float = 20) -> int:
        """Sends a signal and returns the exit status."""
        self.process.send_signal(number)
        return self.process.wait(timeout_s)


@pytest.fixture
def short_dir() -> Iterator[Path]:
    """A directory whose path is short enough for a Unix socket."""
    folder = Path(tempfile.mkdtemp(prefix="et-", dir="/tmp"))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def start_server(short_dir: Path) -> Iterator[Callable[..., ServerProcess]]:
    """Starts server processes; those still running are killed at the end of the test."""
    started: list[subprocess.Popen[str]] = []

    def start(
        *names: str,
        listen: str | None = None,
        data: Path | None = None,
        prefix: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
        **options: object,
    ) -> ServerProcess:
        data = data or short_dir / "data"
        listen = listen or f"unix:{short_dir}/plane.sock"
        log = short_dir / f"log-{len(started)}"
        with log.open("w") as stderr:
            process = subprocess.Popen(
                [*prefix, *server_command(names or ("urza", "oona"), listen, data, **options)],
                stdout=subprocess.PIPE,
                stderr=stderr,
                env=server_environment() | (environment or {}),
                text=True,
            )
        started.append(process)
        assert process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            assert selector.select(START_TIMEOUT_S), "the server says nothing"
        line = process.stdout.readline()
        assert line.startswith("esper plane ready: "), log.read_text()
        return ServerProcess(process, line.split(" on ")[1].strip(), data, log)

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


@dataclass
class ThreadServer:
    """A server in a thread of the test process."""

    address: str
    data: Path
    stop: Callable[[], None]


def run_in_thread(folder: Path, names: tuple[str, ...]) -> ThreadServer:
    """Serves from a thread until `stop` is called."""
    address = f"unix:{folder}/plane.sock"
    config = ServerConfig(names, parse_address(address), folder / "data")
    started: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = []

    async def run() -> None:
        stopping = asyncio.Event()
        started.append((asyncio.get_running_loop(), stopping))
        await serve(config, stopping)

    thread = threading.Thread(target=lambda: asyncio.run(run()))
    thread.start()

    def stop() -> None:
        loop, stopping = started[0]
        loop.call_soon_threadsafe(stopping.set)
        thread.join(20)
        assert not thread.is_alive()

    return ThreadServer(address, config.data_dir, stop)


@pytest.fixture(scope="session")
def serve_in_thread() -> Callable[[Path, tuple[str, ...]], ThreadServer]:
    """Serves from threads, for tests that start and stop servers often."""
    return run_in_thread


@pytest.fixture(scope="session")
def store_plane() -> Iterator[Plane]:
    """One connection to one Urza and Oona for all tests that can share a library."""
    folder = Path(tempfile.mkdtemp(prefix="et-", dir="/tmp"))
    server = run_in_thread(folder, ("urza", "oona"))
    with connect(server.address, timeout_s=START_TIMEOUT_S) as plane:
        yield plane
    server.stop()
    shutil.rmtree(folder)


def process_is_gone(pid: int, timeout_s: float = 15) -> bool:
    """Returns whether a process ends in time; a zombie has ended."""
    deadline_s = time.monotonic() + timeout_s
    while time.monotonic() < deadline_s:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state == "Z":
            return True
        time.sleep(0.05)
    return False


@pytest.fixture
def wait_gone() -> Callable[[int], bool]:
    """Waits for the end of a process that is not a child of the test."""
    return process_is_gone


# Servers started by tests inherit it; spinning OpenMP threads would slow the others down.
os.environ.setdefault("OMP_NUM_THREADS", "1")
