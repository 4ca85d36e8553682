"""A run's figures in MLflow; needs the extra ``mlflow``."""

import json
import time
from collections.abc import Mapping

from mlflow.entities import Metric
from mlflow.tracking import MlflowClient

from esper.kasmina import SeedLifecycleState
from esper.tolaria.history import LifecycleEvent
from esper.tolaria.runs.loggers import Scalars

EVENTS_FILE = "growth_events.jsonl"


class MlflowLogger:
    """A ``RunLogger`` that opens a run in MLflow.

    Figures are metrics at the optimizer's steps. Every seed has a metric too, the number of the
    state that it moves to; with their reasons the moves are in the artifact growth_events.jsonl.

    Args:
        experiment: Name of the experiment, which is made where there is none.
        run_name: Name of the run; ``None`` lets MLflow choose one.
        tracking_uri: Where MLflow keeps its runs; ``None`` asks ``MLFLOW_TRACKING_URI``.
        parameters: What the run is shown with, such as its configuration.

    Attributes:
        run_id: MLflow's id of the run.
    """

    def __init__(
        self,
        *,
        experiment: str = "esper",
        run_name: str | None = None,
        tracking_uri: str | None = None,
        parameters: Mapping[str, object] | None = None,
    ) -> None:
        self._client = MlflowClient(tracking_uri)
        known = self._client.get_experiment_by_name(experiment)
        number = (
            self._client.create_experiment(experiment) if known is None else known.experiment_id
        )
        self.run_id: str = self._client.create_run(number, run_name=run_name).info.run_id
        for name, value in (parameters or {}).items():
            self._client.log_param(self.run_id, name, value)
        self._events: list[LifecycleEvent] = []

    def log_scalars(self, values: Scalars, step: int) -> None:
        """Takes the figures at an optimizer step."""
        now_ms = round(time.time() * 1000)
        metrics = [Metric(name, value, now_ms, step) for name, value in values.items()]
        self._client.log_batch(self.run_id, metrics=metrics)

    def log_event(self, event: LifecycleEvent) -> None:
        """Takes a move of a seed."""
        self._events.append(event)
        # No brackets: MLflow does not take them in names.
        name = f"seeds/{event.slot}/{event.seed}"
        self._client.log_metric(
            self.run_id, name, SeedLifecycleState[event.after].value, step=event.step
        )

    def close(self) -> None:
        """Writes what is left and ends the run."""
        lines = [json.dumps(dict(event.to_json())) + "\n" for event in self._events]
        self._client.log_text(self.run_id, "".join(lines), EVENTS_FILE)
        self._client.set_terminated(self.run_id)
