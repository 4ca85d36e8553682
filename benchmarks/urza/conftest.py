"""A library and a bare server, each a process of its own, on a Unix socket and on loopback TCP."""

import asyncio
import dataclasses
import os
import selectors
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import grpc
import lmdb
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.urza.load import Figures
from benchmarks.urza.load import Load
from benchmarks.urza.load import figures
from esper.plane import Plane
from esper.plane import connect
from esper.plane.channel import make_async_channel
from esper.plane.channel import make_channel
from esper.plane.launch import server_command
from esper.plane.launch import server_environment

START_TIMEOUT_S = 60.0
TRANSPORTS = ("unix", "tcp")
ROUNDS = 7
SYNCS = 50
MAP_BYTES = 4 << 30


@dataclass
class Pair:
    """The library and the bare server on one transport, each with a channel for asyncio."""

    transport: str
    plane: Plane
    ours: grpc.aio.Channel
    bare: grpc.Channel
    bare_async: grpc.aio.Channel


Beside = Callable[..., None]
_ROWS: list[tuple[str, str, Figures, float | None]] = []


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


def stop(process: subprocess.Popen[str]) -> None:
    """Ends a server that `start` has started."""
    process.kill()
    process.wait()
    assert process.stdout is not None
    process.stdout.close()


@pytest.fixture(scope="session")
def runner() -> Iterator[asyncio.Runner]:
    """One event loop for all channels."""
    with asyncio.Runner() as opened:
        yield opened


@pytest.fixture(scope="session", params=TRANSPORTS)
def pair(request: pytest.FixtureRequest, runner: asyncio.Runner) -> Iterator[Pair]:
    """Both servers on one transport, over one disk: that of `$TMPDIR`."""
    with tempfile.TemporaryDirectory(prefix="eb-") as folder:
        unix = request.param == "unix"
        listen = f"unix:{folder}/plane.sock" if unix else "127.0.0.1:0"
        bare_listen = f"unix:{folder}/bare.sock" if unix else "127.0.0.1:0"
        environment = server_environment()
        script = str(Path(__file__).with_name("echo.py"))
        data = Path(folder) / "data"
        ours, line = start(server_command(("urza", "oona"), listen, data), environment)
        bare, bare_line = start([sys.executable, script, bare_listen], environment)
        address, bare_address = line.split(" on ")[1], bare_line.split(" on ")[1]

        async def opened() -> tuple[grpc.aio.Channel, grpc.aio.Channel]:
            return make_async_channel(address), make_async_channel(bare_address)

        try:
            with connect(address, START_TIMEOUT_S) as plane, make_channel(bare_address) as channel:
                ours_async, bare_async = runner.run(opened())
                yield Pair(request.param, plane, ours_async, channel, bare_async)
                runner.run(ours_async.close())
                runner.run(bare_async.close())
        finally:
            stop(ours)
            stop(bare)


@pytest.fixture
def rows() -> Iterator[lmdb.Environment]:
    """LMDB alone, on the disk of `pair`."""
    with (
        tempfile.TemporaryDirectory(prefix="eb-") as folder,
        lmdb.open(folder, map_size=MAP_BYTES) as opened,
    ):
        yield opened


@pytest.fixture
def beside(benchmark: BenchmarkFixture, request: pytest.FixtureRequest) -> Beside:
    """Times rounds of our load, each right after one of every alternative.

    pytest-benchmark times ours; rates, percentiles and ratios of all stand in its JSON as
    ``extra_info``, and in a table at the end.
    """

    def run(
        group: str,
        ours: Callable[[], Load],
        others: Mapping[str, Callable[[], Load]],
        rounds: int = ROUNDS,
    ) -> None:
        loads: dict[str, list[Load]] = {name: [] for name in ("ours", *others)}

        def others_first() -> None:
            for name, load in others.items():
                loads[name].append(load())

        others_first()
        ours()
        for kept in loads.values():
            kept.clear()
        benchmark.group = group
        benchmark.pedantic(lambda: loads["ours"].append(ours()), setup=others_first, rounds=rounds)
        found = {name: figures(kept) for name, kept in loads.items()}
        benchmark.extra_info.update(
            {name: dataclasses.asdict(figure) for name, figure in found.items()}
        )
        transport = request.node.callspec.params.get("pair", "")
        for name, figure in found.items():
            ratio = None if name == "ours" else found["ours"].per_second / figure.per_second
            benchmark.extra_info[f"rate over {name}"] = ratio
            _ROWS.append((f"{group} {transport}", name, figure, ratio))

    return run


def sync_latency_ms(folder: str) -> float:
    """Returns the median time of a sync of 4 KiB on the disk of a folder, in milliseconds."""
    times = []
    with tempfile.TemporaryFile(dir=folder) as file:
        for _ in range(SYNCS):
            file.write(bytes(4096))
            file.flush()
            began_s = time.perf_counter()
            os.fdatasync(file.fileno())
            times.append(time.perf_counter() - began_s)
    return 1e3 * sorted(times)[SYNCS // 2]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Prints rates and latencies of all, and our rate over that of each alternative."""
    if not _ROWS:
        return
    terminalreporter.section("rates and latencies, interleaved")
    folder = tempfile.gettempdir()
    terminalreporter.write_line(f"a sync in {folder} takes {sync_latency_ms(folder):.2f} ms")
    for group, name, figure, ratio in _ROWS:
        share = "" if ratio is None else f"  ours is {ratio:.2f} times that"
        terminalreporter.write_line(f"{group:38s} {name:22s} {figure}{share}")
