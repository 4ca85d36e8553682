"""Where the figures of a run go besides its folder."""

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from esper.tolaria.history import LifecycleEvent
from esper.tolaria.runs.folder import EpochMetrics

Scalars = Mapping[str, float]


def scalars(metrics: EpochMetrics) -> dict[str, float]:
    """Returns the figures of an epoch that were measured, by name."""
    named = {
        "loss/train": metrics.train_loss,
        "loss/held_out": metrics.held_out_loss,
        "growth/parameters": metrics.parameters,
        "growth/flops": metrics.flops,
        "growth/rollbacks": metrics.rollbacks,
        "training/learning_rate": metrics.learning_rate,
        "training/samples_per_s": metrics.samples_per_s,
    }
    return {name: float(value) for name, value in named.items() if value is not None}


class RunLogger(Protocol):
    """Takes what happens in a run. Its calls come in order, from one thread."""

    def log_scalars(self, values: Scalars, step: int) -> None:
        """Takes the figures at an optimizer step."""

    def log_event(self, event: LifecycleEvent) -> None:
        """Takes a move of a seed."""

    def close(self) -> None:
        """Writes what is left."""


class TensorBoardLogger:
    """Scalars and the growth time line for TensorBoard; needs the package ``tensorboard``.

    Args:
        folder: Where its event files go.
    """

    def __init__(self, folder: Path) -> None:
        # Imported here: it is an extra, and slow to load.
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder))

    def log_scalars(self, values: Scalars, step: int) -> None:
        """Takes the figures at an optimizer step."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def log_event(self, event: LifecycleEvent) -> None:
        """Adds a line to the text of the event's seed."""
        text = f"{event.before} -> {event.after}  {event.reason}"
        tag = f"growth/{event.slot}[{event.seed}]"
        self._writer.add_text(tag, text, event.step)

    def close(self) -> None:
        """Writes what is left."""
        self._writer.close()
