"""The folder of a run: what was asked for, what happened, and what came of it.

| name | content |
|---|---|
| config.yaml | the configuration with all defaults; `esper train` repeats it |
| run.json | what the run is and how it ended |
| metrics.jsonl | one line per epoch; metrics.csv has the same as a table |
| events.jsonl | one line per move of a seed |
| trials.jsonl | one line per held-out trial |
| attribution.jsonl | what each seed of the finished model is worth on the held-out data |
| rollbacks.jsonl | one line per fault that was undone |
| checkpoints/ | what the run can go on from |
| plane/ | the store of the run's own plane, with its hash-chained history |
| model/ | the finished model, see docs/model-format.md |
"""

import csv
import json
import os
from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Mapping
from dataclasses import asdict
from dataclasses import dataclass
from dataclasses import field
from pathlib import Path
from typing import TypeVar

import cattrs

from esper.tolaria.history import EpochRecord
from esper.tolaria.history import History
from esper.tolaria.history import LifecycleEvent
from esper.tolaria.history import RollbackRecord
from esper.tolaria.history import SeedAttribution
from esper.tolaria.history import TrialRecord

CONFIG_FILE = "config.yaml"
RUN_FILE = "run.json"
METRICS_FILE = "metrics.jsonl"
TABLE_FILE = "metrics.csv"
EVENTS_FILE = "events.jsonl"
TRIALS_FILE = "trials.jsonl"
ATTRIBUTION_FILE = "attribution.jsonl"
ROLLBACKS_FILE = "rollbacks.jsonl"
REPORT_FILE = "report.html"

T = TypeVar("T")


class RunFolderError(ValueError):
    """A folder that is not one of a run, or is damaged."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EpochMetrics:
    """One epoch of a run, as it is logged. ``None`` is what was not measured.

    Attributes:
        epoch: The epoch, from 0.
        step: Optimizer steps taken by its end.
        train_loss: Mean training loss.
        held_out_loss: Mean held-out loss at its end.
        parameters: Trainable elements of the model.
        flops: Floating-point operations spent by its end, trials and probes included.
        learning_rate: Of the first parameter group, at its end.
        samples_per_s: Training samples per second of wall-clock time, growth included.
        wall_s: Wall-clock time of the epoch, in seconds.
        rollbacks: Faults that were undone in it.
    """

    epoch: int
    step: int
    train_loss: float | None
    held_out_loss: float | None
    parameters: int
    flops: int
    learning_rate: float
    samples_per_s: float
    wall_s: float
    rollbacks: int = 0


@dataclass(slots=True, kw_only=True)
class RunInfo:
    """What run.json says.

    Attributes:
        run: Id of the run; Urza keeps its history as ``runs/{run}``.
        task: Name of the task.
        epochs: Planned length.
        status: ``running``, ``finished`` or ``failed``; a run that was killed stays ``running``.
        plane: Address of the plane that keeps its history; ``None`` for one in the folder.
        versions: What it was made with, by name.
        results: Figures of the finished model by name, such as ``test_accuracy``.
    """

    run: str
    task: str
    epochs: int
    status: str
    plane: str | None
    versions: dict[str, str]
    results: dict[str, float] = field(default_factory=dict)


class RunFolder:
    """Reads and writes the folder of a run; every file appears whole or not at all.

    Args:
        path: The folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def name(self) -> str:
        """Last part of its path."""
        return self.path.resolve().name

    @property
    def model_path(self) -> Path:
        """Where the finished model stands."""
        return self.path / "model"

    def exists(self) -> bool:
        """Returns whether a run has begun here."""
        return (self.path / RUN_FILE).exists()

    def check_free(self) -> None:
        """Refuses a folder that holds a run.

        Raises:
            ValueError: If it does.
        """
        if self.exists():
            raise ValueError(
                f"{self.path} holds a run already: resume it, or choose another folder"
            )

    def config_text(self) -> str:
        """Returns config.yaml.

        Raises:
            RunFolderError: If there is none.
        """
        try:
            return (self.path / CONFIG_FILE).read_text(encoding="utf-8")
        except FileNotFoundError:
            raise RunFolderError(f"{self.path} is no run: it has no {CONFIG_FILE}") from None

    def write_info(self, info: RunInfo) -> None:
        """Writes run.json."""
        self._write(RUN_FILE, json.dumps(asdict(info), indent=2) + "\n")

    def write_config(self, text: str) -> None:
        """Writes config.yaml."""
        self._write(CONFIG_FILE, text)

    def write_epochs(self, epochs: Iterable[EpochMetrics]) -> None:
        """Writes the epochs as lines and as a table."""
        rows = [asdict(epoch) for epoch in epochs]
        self._write(METRICS_FILE, _lines(rows))
        temporary = self.path / f".{TABLE_FILE}"
        with temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, EpochMetrics.__dataclass_fields__)
            writer.writeheader()
            writer.writerows(rows)
        temporary.replace(self.path / TABLE_FILE)

    def write_history(self, history: History) -> None:
        """Writes lifecycle events, trials and rollbacks."""
        self._write(EVENTS_FILE, _lines(event.to_json() for event in history.events))
        self._write(TRIALS_FILE, _lines(asdict(trial) for trial in history.trials))
        self._write(ROLLBACKS_FILE, _lines(asdict(record) for record in history.rollbacks))

    def write_attribution(self, records: Iterable[SeedAttribution]) -> None:
        """Writes what each seed of the finished model is worth."""
        self._write(ATTRIBUTION_FILE, _lines(asdict(record) for record in records))

    def info(self) -> RunInfo:
        """Returns run.json.

        Raises:
            RunFolderError: If it is missing or damaged.
        """
        try:
            document = json.loads((self.path / RUN_FILE).read_text(encoding="utf-8"))
            return _CONVERTER.structure(document, RunInfo)
        except FileNotFoundError:
            raise RunFolderError(f"{self.path} is no run: it has no {RUN_FILE}") from None
        except (json.JSONDecodeError, cattrs.BaseValidationError, TypeError) as error:
            raise RunFolderError(f"{self.path / RUN_FILE} is damaged: {error}") from error

    def epochs(self) -> list[EpochMetrics]:
        """Returns the epochs that ended; empty before the first."""
        return list(self._rows(METRICS_FILE, EpochMetrics))

    def trials(self) -> list[TrialRecord]:
        """Returns the held-out trials."""
        return list(self._rows(TRIALS_FILE, TrialRecord))

    def attribution(self) -> list[SeedAttribution]:
        """Returns what each seed of the finished model is worth; empty before it is finished."""
        return list(self._rows(ATTRIBUTION_FILE, SeedAttribution))

    def rollbacks(self) -> list[RollbackRecord]:
        """Returns the faults that were undone."""
        return list(self._rows(ROLLBACKS_FILE, RollbackRecord))

    def events(self) -> list[LifecycleEvent]:
        """Returns the moves of the seeds."""
        names = {"from": "before", "to": "after"}
        return [
            _structured(LifecycleEvent, {names.get(key, key): row[key] for key in row}, self.path)
            for row in self._objects(EVENTS_FILE)
        ]

    def history(self) -> History:
        """Returns what is known of the run as a history; alphas are told by the events alone."""
        epochs = [
            EpochRecord(
                epoch=one.epoch,
                step=one.step,
                train_loss=one.train_loss,
                held_out_loss=one.held_out_loss,
                parameters=one.parameters,
                flops=one.flops,
                alphas={},
            )
            for one in self.epochs()
        ]
        return History(self.events(), epochs, [], self.trials(), self.rollbacks())

    def _rows(self, file: str, kind: type[T]) -> Iterator[T]:
        return (_structured(kind, row, self.path / file) for row in self._objects(file))

    def _objects(self, file: str) -> Iterator[dict[str, object]]:
        path = self.path / file
        if not path.exists():
            return
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                raise RunFolderError(f"{path}:{number} is damaged: {error}") from error

    def _write(self, file: str, text: str) -> None:
        temporary = self.path / f".{file}"
        with temporary.open("w", encoding="utf-8") as handle:
            handle.write(text)
            handle.flush()
            os.fsync(handle.fileno())
        temporary.replace(self.path / file)


_CONVERTER = cattrs.Converter(forbid_extra_keys=True)


def _structured(kind: type[T], row: Mapping[str, object], path: Path) -> T:
    try:
        return _CONVERTER.structure(row, kind)
    except (cattrs.BaseValidationError, TypeError) as error:
        raise RunFolderError(f"{path} is damaged: {error}") from error


def _lines(rows: Iterable[Mapping[str, object]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def find_runs(root: Path) -> list[RunFolder]:
    """Returns the runs in a folder and its folders, by path."""
    return [RunFolder(path.parent) for path in sorted(root.glob(f"**/{RUN_FILE}"))]
