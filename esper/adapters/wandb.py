"""A run's figures in Weights & Biases; needs the extra ``wandb``."""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import wandb

from esper.kasmina import SeedLifecycleState
from esper.tolaria.history import LifecycleEvent
from esper.tolaria.runs.loggers import Scalars

STEP = "optimizer_step"


class WandbLogger:
    """A ``RunLogger`` that opens a run in Weights & Biases.

    Figures are drawn over the optimizer's steps. Every seed has one too, the number of the state
    that it moves to; with their reasons the moves are the run's table ``growth_events``.

    Args:
        project: Name of the project.
        run_name: Name of the run; ``None`` lets W&B choose one.
        folder: Where W&B keeps its files; ``None`` is its own choice.
        mode: ``offline`` keeps the run on this machine; ``None`` asks ``WANDB_MODE``.
        parameters: What the run is shown with, such as its configuration.
    """

    def __init__(
        self,
        *,
        project: str = "esper",
        run_name: str | None = None,
        folder: Path | None = None,
        mode: Literal["online", "offline", "disabled"] | None = None,
        parameters: Mapping[str, object] | None = None,
    ) -> None:
        self._run = wandb.init(
            project=project,
            name=run_name,
            dir=None if folder is None else str(folder),
            mode=mode,
            config=dict(parameters or {}),
        )
        self._run.define_metric("*", step_metric=STEP)
        self._moves: list[list[object]] = []

    def log_scalars(self, values: Scalars, step: int) -> None:
        """Takes the figures at an optimizer step."""
        self._run.log({**values, STEP: step})

    def log_event(self, event: LifecycleEvent) -> None:
        """Takes a move of a seed."""
        state = SeedLifecycleState[event.after].value
        self._run.log({f"seeds/{event.slot}/{event.seed}": state, STEP: event.step})
        self._moves.append(
            [event.step, event.slot, event.seed, event.before, event.after, event.reason]
        )

    def close(self) -> None:
        """Writes what is left and ends the run."""
        columns = ["step", "slot", "seed", "from", "to", "reason"]
        self._run.log({"growth_events": wandb.Table(columns=columns, data=self._moves)})
        self._run.finish()
