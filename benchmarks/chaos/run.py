"""Kills a training run, its plane or both, again and again, and shows that nothing is lost.

    python benchmarks/chaos/run.py --kills 100 --out results.json

A reference run is never killed. Then the same run is made with kill -9 at random moments until the
kills are spent; a killed process is started again and goes on. When a run is through before the
kills are, another begins. Every run must end with the digest of the reference, and Urza must hold
one intact history of it with as many events as the reference has.
"""

import json
import os
import random
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import click

from esper.plane import connect
from esper.plane.launch import server_command
from esper.plane.launch import server_environment

TRAINER = Path(__file__).with_name("trainer.py")
TARGETS = ("trainer", "plane", "both")
RUN_TIMEOUT_S = 600.0
LIFE_SHARE = 0.5
"""Longest time between two kills, over the time that the reference takes from start to end. It
grows while the run makes no progress between kills."""


class Arena:
    """A plane and a trainer in processes of their own.

    Args:
        folder: Where the plane's data and the checkpoints are; short, for a socket lies in it.
        epochs: Length of the run.
    """

    def __init__(self, folder: Path, epochs: int) -> None:
        self.folder = folder
        self.address = f"unix:{folder}/plane.sock"
        self._epochs = epochs
        self._plane: subprocess.Popen[bytes] | None = None
        self._trainer: subprocess.Popen[str] | None = None

    def start_plane(self) -> None:
        """Starts the plane on its data, and returns once it answers."""
        with (self.folder / "plane.log").open("ab") as log:
            self._plane = subprocess.Popen(
                server_command(("all",), self.address, self.folder / "data"),
                stdout=subprocess.PIPE,
                stderr=log,
                env=server_environment(),
            )
        assert self._plane.stdout is not None
        assert self._plane.stdout.readline().startswith(b"esper plane ready"), "no plane"

    def start_trainer(self) -> None:
        """Starts the trainer; it goes on from its newest checkpoint."""
        command = [sys.executable, str(TRAINER), str(self.folder / "run")]
        command += ["--plane", self.address, "--epochs", str(self._epochs)]
        with (self.folder / "trainer.log").open("ab") as log:
            self._trainer = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=log, text=True, env=_environment()
            )

    def kill(self, target: str) -> None:
        """Kills trainer, plane or both with SIGKILL and starts again what was killed."""
        for name in ("plane", "trainer") if target == "both" else (target,):
            process = self._plane if name == "plane" else self._trainer
            assert process is not None
            process.send_signal(signal.SIGKILL)
            process.wait()
            if process.stdout is not None:
                process.stdout.close()
        if target != "trainer":
            self.start_plane()
        if target != "plane":
            self.start_trainer()

    def ended(self, timeout_s: float) -> str | None:
        """Returns the trainer's last word, or None where it still runs after the time-out."""
        assert self._trainer is not None and self._trainer.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._trainer.stdout, selectors.EVENT_READ)
            if not selector.select(timeout_s):
                return None
        words = self._trainer.stdout.read()
        if self._trainer.wait() != 0:
            log = (self.folder / "trainer.log").read_text(errors="replace")
            raise RuntimeError(f"the trainer failed: {log[-2000:]}")
        return words.strip()

    def last_checkpoint(self) -> str:
        """Returns the name of the newest checkpoint; empty before the first."""
        return max((path.name for path in (self.folder / "run").glob("step-*")), default="")

    def history(self) -> tuple[bool, int]:
        """Returns whether Urza holds one intact history, and how many events it has."""
        with connect(self.address, timeout_s=30) as plane:
            (run,) = plane.urza.runs.list_runs()
            verdict = plane.urza.runs.verify_run(run.name)
        return verdict.intact, verdict.num_events

    def close(self) -> None:
        """Ends both processes."""
        for process in (self._trainer, self._plane):
            if process is not None:
                process.kill()
                process.wait()
                if process.stdout is not None:
                    process.stdout.close()


def _environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}


def _one_run(
    epochs: int, kills: int, draw: random.Random, life_s: float = 0.0
) -> tuple[str, tuple[bool, int], Counter[str], float]:
    """Makes one run with up to so many kills.

    Args:
        epochs: Length of the run.
        kills: Most kills.
        draw: Draws when to kill what.
        life_s: Longest time between two kills, in seconds.

    Returns:
        The trainer's last word, what Urza holds, the kills made by target, and the seconds taken.
    """
    folder = Path(tempfile.mkdtemp(prefix="ec-", dir="/tmp"))
    arena = Arena(folder, epochs)
    made: Counter[str] = Counter()
    started_s = time.monotonic()
    try:
        arena.start_plane()
        arena.start_trainer()
        word, longest_s, reached = None, life_s, ""
        while word is None:
            left = kills - made.total()
            word = arena.ended(draw.uniform(0.0, longest_s) if left > 0 else RUN_TIMEOUT_S)
            if word is None and left == 0:
                raise RuntimeError(f"the run did not end within {RUN_TIMEOUT_S:g} s")
            if word is None:
                target = draw.choice(TARGETS)
                arena.kill(target)
                made[target] += 1
                # Starting takes a while, on a busy machine longer: some steps must fit in a life.
                before, reached = reached, arena.last_checkpoint()
                longest_s = life_s if reached != before else 1.25 * longest_s
        return word, arena.history(), made, time.monotonic() - started_s
    finally:
        arena.close()
        shutil.rmtree(folder, ignore_errors=True)


@click.command()
@click.option("--kills", default=100, show_default=True, help="Kills over all runs.")
@click.option("--kills-per-run", default=10, show_default=True)
@click.option("--epochs", default=8, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), help="Where to write the results (JSON).")
def main(kills: int, kills_per_run: int, epochs: int, seed: int, out: Path | None) -> None:
    """Runs the reference, then killed runs until the kills are spent; fails on any difference."""
    draw = random.Random(seed)
    reference, history, _, reference_s = _one_run(epochs, 0, draw)
    grown = int(reference.split()[2])
    click.echo(f"reference: {grown} seeds kept, {history[1]} events, {reference_s:.1f} s")
    if not history[0] or grown == 0:
        raise click.ClickException("the reference run proves nothing: nothing grew in it")
    total: Counter[str] = Counter()
    runs: list[dict[str, object]] = []
    while total.total() < kills:
        wanted = min(kills_per_run, kills - total.total())
        word, found, made, took_s = _one_run(epochs, wanted, draw, LIFE_SHARE * reference_s)
        total += made
        equal = word == reference and found == history
        runs.append({"kills": dict(made), "equal": equal, "seconds": round(took_s, 1)})
        click.echo(f"run {len(runs)}: {dict(made)} killed, {'equal' if equal else 'DIFFERENT'}")
        if not equal:
            click.echo(f"  expected {reference} {history}\n  found    {word} {found}")
    result = {"seed": seed, "epochs": epochs, "kills": dict(total), "runs": runs}
    if out is not None:
        out.write_text(json.dumps(result, indent=2) + "\n")
    click.echo(f"{total.total()} kills {dict(total)} over {len(runs)} runs")
    if not all(run["equal"] for run in runs):
        raise click.ClickException("a run ended differently")


if __name__ == "__main__":
    main()
