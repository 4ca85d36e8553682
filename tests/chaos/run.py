"""The run itself: start, load, kill, compare, over and over."""

import random
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from dataclasses import field
from pathlib import Path

from google.protobuf.wrappers_pb2 import Int64Value

from chaos.ledger import Ledger
from chaos.load import RUN
from chaos.load import TOPIC
from chaos.load import Followers
from chaos.load import Load
from chaos.verify import Verifier
from esper.plane import connect
from esper.plane.launch import server_command
from esper.plane.launch import server_environment

START_TIMEOUT_S = 120
CLI_EVERY = 25


@dataclass
class Outcome:
    """What a run found.

    Attributes:
        num_cycles: Number of times that the server was killed, restarted and compared.
        counts: How much was acknowledged, by kind.
        num_orphans: Files without a row that crashes had left, over all checks.
        faults: Broken promises.
    """

    num_cycles: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    num_orphans: int = 0
    faults: list[str] = field(default_factory=list)


class Server:
    """A real server on a Unix socket, to be killed and started again.

    Args:
        folder: Takes socket, data and log.
    """

    def __init__(self, folder: Path) -> None:
        self.address = f"unix:{folder}/plane.sock"
        self.data = folder / "data"
        self._log = (folder / "log").open("w")
        self._process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        """Starts it and waits until it is ready."""
        process = subprocess.Popen(
            server_command(("urza", "oona"), self.address, self.data),
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=server_environment(),
            text=True,
        )
        self._process = process
        assert process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            if not selector.select(START_TIMEOUT_S) or not process.stdout.readline():
                raise RuntimeError("the server does not start; see its log")

    def end(self, number: int = signal.SIGKILL) -> None:
        """Sends a signal and waits for the end."""
        if self._process is not None:
            self._process.send_signal(number)
            self._process.wait(60)
            assert self._process.stdout is not None
            self._process.stdout.close()
            self._process = None

    def close(self) -> None:
        """Kills it if need be."""
        self.end()
        self._log.close()


def check_by_command(*arguments: str) -> str:
    """Runs `esper urza check` and returns what it found; empty where the store is clean."""
    command = [sys.executable, "-m", "esper", "urza", "check", *arguments]
    run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    return "" if run.returncode == 0 else f"{run.stdout}{run.stderr}"


def run_chaos(
    num_cycles: int, seed: int = 0, tell: Callable[[str], None] = lambda line: None
) -> Outcome:
    """Kills a server `num_cycles` times under load, and returns what did not hold.

    Args:
        num_cycles: How often.
        seed: Of the load and of the moments.
        tell: Gets a line on every cycle.
    """
    outcome = Outcome()
    ledger = Ledger()
    verifier = Verifier(ledger)
    draw = random.Random(seed)
    folder = Path(tempfile.mkdtemp(prefix="chaos-", dir="/tmp"))
    server = Server(folder)
    try:
        server.start()
        with connect(server.address, timeout_s=60) as plane:
            plane.urza.runs.create_run(RUN.removeprefix("runs/"))
            first = Int64Value(value=-1)
            plane.oona.publish(TOPIC, first, request_id="first")
        ledger.published.add(-1)
        load, followers = Load(server.address, ledger, seed), Followers(server.address, ledger)
        load.start()
        for cycle in range(1, num_cycles + 1):
            time.sleep(draw.uniform(0.05, 1.5))
            server.end()
            server.start()
            started_s = time.monotonic()
            with connect(server.address, timeout_s=60) as plane:
                verifier.verify(plane)
                outcome.num_orphans += verifier.check(plane)
            if cycle % CLI_EVERY == 0:
                found = check_by_command("--address", server.address)
                ledger.require(not found, f"esper urza check: {found}")
            outcome.num_cycles = cycle
            took_s = time.monotonic() - started_s
            tell(f"cycle {cycle}: {ledger.counts()}, compared in {took_s:.1f} s")
            if ledger.faults:
                break
        load.stop()
        with connect(server.address, timeout_s=60) as plane:
            verifier.finish(plane)
        followers.stop()
        server.end()
        found = check_by_command("--data", str(server.data))
        ledger.require(not found, f"esper urza check: {found}")
    finally:
        server.close()
        if not ledger.faults:
            shutil.rmtree(folder, ignore_errors=True)
        else:
            tell(f"kept for inspection: {folder}")
    outcome.counts = ledger.counts()
    outcome.faults = ledger.faults
    return outcome
