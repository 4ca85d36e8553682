"""What a demo or experiment run says in the end: report.json, a table and a time line."""

import json
import platform
from collections.abc import Iterable
from collections.abc import Sequence
from dataclasses import asdict
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from esper.tolaria.history import LifecycleEvent

REPORT_FILE = "report.json"

_STATE_STYLES = {
    "GERMINATED": "cyan",
    "TRAINING": "cyan",
    "GRAFTING": "blue",
    "STABILIZATION": "blue",
    "EVALUATING": "magenta",
    "FINE_TUNING": "green",
    "FOSSILIZED": "bold green",
    "CULLED": "red",
    "CANCELLED": "yellow",
    "ROLLED_BACK": "bold red",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """One of the models that a run compares.

    Attributes:
        name: What was done, such as `grown`.
        test_accuracy: Share of test samples classified right, 0 to 1; read once.
        parameters: Trainable elements of the finished model.
        flops: Floating-point operations that its training cost, evaluation and trials included.
        wall_s: Wall-clock time of its training, in seconds.
    """

    name: str
    test_accuracy: float
    parameters: int
    flops: int
    wall_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What report.json says.

    Attributes:
        task: Name of the task.
        seed: Seed of the run.
        arms: The models compared.
        events: Lifecycle events of the grown arm, in order.
    """

    task: str
    seed: int
    arms: Sequence[Arm]
    events: Sequence[LifecycleEvent]

    def to_json(self) -> str:
        """Returns report.json; floats stand in full, so that they can be read back bit for bit."""
        document = {
            "task": self.task,
            "seed": self.seed,
            "arms": [asdict(arm) for arm in self.arms],
            "events": [event.to_json() for event in self.events],
            "versions": versions(),
        }
        return json.dumps(document, indent=2) + "\n"

    def write(self, folder: Path) -> Path:
        """Writes report.json into ``folder``, which must exist, and returns its path."""
        path = folder / REPORT_FILE
        temporary = path.with_suffix(".tmp")
        temporary.write_text(self.to_json(), encoding="utf-8")
        temporary.replace(path)
        return path


def versions() -> dict[str, str]:
    """Returns the versions that a result depends on, by name."""
    packages = {"esper": "esper-morphogen", "torch": "torch", "scikit-learn": "scikit-learn"}
    return {
        **{name: version(package) for name, package in packages.items()},
        "python": platform.python_version(),
    }


def format_count(value: float) -> str:
    """Returns a count with three digits and a unit, such as `12.3 M`; below 1000 as it is."""
    for unit in ("", " k", " M", " G"):
        if abs(value) < 999.5:
            return f"{value:.3g}{unit}"
        value /= 1000
    return f"{value:,.3g} T"


def arms_table(arms: Iterable[Arm]) -> Table:
    """Returns the arms as a table; the best test accuracy is marked."""
    arms = list(arms)
    best = max((arm.test_accuracy for arm in arms), default=0.0)
    table = Table(title="Arms", title_justify="left", header_style="bold")
    table.add_column("arm")
    for heading in ("test accuracy", "parameters", "FLOPs", "wall time"):
        table.add_column(heading, justify="right")
    for arm in arms:
        table.add_row(
            arm.name,
            f"{100 * arm.test_accuracy:.2f} %",
            f"{arm.parameters:,}",
            format_count(arm.flops),
            f"{arm.wall_s:.1f} s",
            style="bold" if arm.test_accuracy == best else None,
        )
    return table


def event_line(event: LifecycleEvent) -> Text:
    """Returns a lifecycle event as one line."""
    line = Text(f"epoch {event.epoch:>3}  step {event.step:>5}  ")
    line.append(f"{event.slot}[{event.seed}]  ", style="bold")
    line.append(f"{event.before} -> ")
    line.append(event.after, style=_STATE_STYLES.get(event.after, ""))
    if event.kernel:
        line.append(f"  kernel {event.kernel[:8]}", style="dim")
    if event.reason:
        line.append(f"  {event.reason}", style="dim")
    return line


def print_report(console: Console, report: Report) -> None:
    """Prints the table of arms and the time line of lifecycle events."""
    console.print(arms_table(report.arms))
    console.print(Text(f"Life of the seeds ({len(report.events)} events)", style="bold"))
    for event in report.events:
        console.print(event_line(event), soft_wrap=True)
    if not report.events:
        console.print("  no seed ever left DORMANT")
