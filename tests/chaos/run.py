"""The run itself: start, load, kill, compare, over and over."""

import json
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

from chaos.followers import Followers
from chaos.ledger import Ledger
from chaos.load import AWAY
from chaos.load import RETENTION_BYTES
from chaos.load import RUN
from chaos.load import SHORT_RETENTION_BYTES
from chaos.load import SHORT_TOPIC
from chaos.load import TOPIC
from chaos.load import Load
from chaos.verify import Verifier
from esper.common.rpc import RpcError
from esper.plane import Plane
from esper.plane import PlaneError
from esper.plane import connect
from esper.plane.launch import server_command
from esper.plane.launch import server_environment

START_TIMEOUT_S = 600
CALL_TIMEOUT_S = 120.0
EVERYTHING_EVERY = 25
"""Cycles after which everything is compared, and every worker must have got on."""
MAX_PAUSE_S = 1.5
KILLED_STARTS = 0.15
"""Share of the cycles in which the server is killed once more while it starts."""
MAX_START_S = 0.6


@dataclass
class Outcome:
    """What a run found.

    Attributes:
        num_cycles: Number of times that the server was killed under load, restarted and compared.
        num_kills: Number of kills, those of servers that were still starting included.
        counts: How much was acknowledged, by kind.
        num_orphans: Files without a row that crashes had left, over all checks.
        faults: Broken promises.
    """

    num_cycles: int = 0
    num_kills: int = 0
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

    def launch(self) -> None:
        """Starts it."""
        self._process = subprocess.Popen(
            server_command(("urza", "oona"), self.address, self.data),
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=server_environment(),
            text=True,
        )

    def start(self) -> None:
        """Starts it and waits until it is ready."""
        self.launch()
        process = self._process
        assert process is not None
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


def check_by_command(*arguments: str) -> tuple[list[str], int]:
    """Runs `esper urza check` and returns what it found, and the number of orphans.

    What it found is empty where it exited with status 0 after a whole check without a problem.
    """
    command = [sys.executable, "-m", "esper", "urza", "check", "--json", *arguments]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    steps = [json.loads(line) for line in run.stdout.splitlines()]
    problems = [
        str(step["finding"])
        for step in steps
        if "finding" in step and step["finding"]["kind"] != "FINDING_KIND_ORPHAN"
    ]
    summaries = [step["summary"] for step in steps if "summary" in step]
    if run.returncode or len(summaries) != 2:  # of the store and of the log
        problems.append(f"status {run.returncode}: {run.stderr}")
    elif not all(summary["structureChecked"] for summary in summaries):
        problems.append("the structure was not checked")
    return problems, sum(int(summary.get("numOrphans", 0)) for summary in summaries)


def run_chaos(
    num_cycles: int, seed: int = 0, tell: Callable[[str], None] = lambda line: None
) -> Outcome:
    """Kills a server `num_cycles` times under load, and returns what did not hold.

    Args:
        num_cycles: How often.
        seed: Of the load, of the moments and of the samples.
        tell: Gets a line on every cycle.
    """
    outcome = Outcome()
    ledger = Ledger()
    verifier = Verifier(ledger, seed)
    draw = random.Random(seed)
    folder = Path(tempfile.mkdtemp(prefix="chaos-", dir="/tmp"))
    server = Server(folder)
    tell(f"seed {seed}, in {folder}")
    try:
        server.start()
        _patiently(server.address, _prepare)
        load, followers = Load(server.address, ledger, seed), Followers(server.address, ledger)
        load.start()
        answered_before = ledger.answers.copy()
        for cycle in range(1, num_cycles + 1):
            started_s = time.monotonic()
            load.refill()
            time.sleep(draw.uniform(0.05, MAX_PAUSE_S))
            server.end()
            outcome.num_kills += 1
            if draw.random() < KILLED_STARTS:
                server.launch()
                time.sleep(draw.uniform(0, MAX_START_S))
                server.end()
                outcome.num_kills += 1
            server.start()
            restarted_s = time.monotonic()
            everything = cycle % EVERYTHING_EVERY == 0
            _patiently(server.address, lambda p, e=everything: verifier.verify(p, everything=e))
            compared_s = time.monotonic()
            problems, num_orphans = check_by_command("--address", server.address)
            ledger.require(not problems, f"esper urza check: {problems}")
            outcome.num_orphans += num_orphans
            outcome.num_cycles = cycle
            ended_s = time.monotonic()
            what = "everything" if everything else "news and a sample"
            tell(
                f"cycle {cycle}: {ended_s - started_s:.1f} s, of which "
                f"{compared_s - restarted_s:.1f} s to compare {what} and "
                f"{ended_s - compared_s:.1f} s to check; {ledger.counts()}"
            )
            if everything:
                idle = [w for w in load.workers if ledger.answers[w] == answered_before[w]]
                ledger.require(not idle, f"{idle} got nowhere for {EVERYTHING_EVERY} cycles")
                answered_before = ledger.answers.copy()
            if ledger.faults:
                break
        load.stop()
        if not ledger.faults:
            _patiently(server.address, verifier.finish)
        followers.stop()
        server.end()
        problems, _ = check_by_command("--data", str(server.data))
        ledger.require(not problems, f"esper urza check: {problems}")
    finally:
        server.close()
        if not ledger.faults and outcome.num_cycles == num_cycles:
            shutil.rmtree(folder, ignore_errors=True)
        else:
            tell(f"kept for inspection: {folder}")
    outcome.counts = ledger.counts()
    outcome.faults = ledger.faults
    return outcome


def _prepare(plane: Plane) -> None:
    if not any(run.name == RUN for run in plane.urza.runs.list_runs()):
        plane.urza.runs.create_run(RUN.removeprefix("runs/"))
    plane.oona.set_retention(TOPIC, max_bytes=RETENTION_BYTES)
    plane.oona.set_retention(SHORT_TOPIC, max_bytes=SHORT_RETENTION_BYTES)


def _patiently(address: str, work: Callable[[Plane], None]) -> None:
    """Does something with the server that runs, and again where a busy machine let a call wait."""
    while True:
        try:
            with connect(address, timeout_s=CALL_TIMEOUT_S) as plane:
                work(plane)
            return
        except PlaneError:
            time.sleep(0.1)
        except RpcError as error:
            if error.code not in AWAY:
                raise
