"""The demonstration: grow a small model on real data, beside the controls it must beat.

Four models learn the same task from the same batches with the same optimizer. The grown one goes
first, because its cost is the budget of the controls:

* ``static small``: the host without growth, for as many epochs.
* ``static small, equal compute``: the host, until it has cost what the grown model cost.
* ``static final size, equal compute``: a plain host as large as the grown model ended, until it
  has cost the same.

All costs are counted (see ``TrainingCost``); growth statistics, held-out evaluation and trials are
on the grown model's bill. Test data is read once per finished model.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from esper.artifacts import save
from esper.config import Candidate
from esper.config import EsperConfig
from esper.config import GraftConfig
from esper.kasmina import MorphableModel
from esper.kasmina import wrap
from esper.tolaria import tasks
from esper.tolaria.cost import TrainingCost
from esper.tolaria.history import EpochRecord
from esper.tolaria.history import History
from esper.tolaria.link import Address
from esper.tolaria.mode import Mode
from esper.tolaria.plots import plot_growth
from esper.tolaria.report import Arm
from esper.tolaria.report import Report
from esper.tolaria.trainer import Trainer
from esper.tolaria.trainer import train_epoch

EPOCHS = 30
LEARNING_RATE = 0.01
# Chosen on validation data with seeds 10 to 15, see docs/results.
GROWTH = EsperConfig(
    candidates=(Candidate(blueprint="widen"),),
    graft=GraftConfig(training_steps=5, ramp_steps=10, stabilization_steps=5),
    telemetry_interval=2,
)
GROWN = "grown"
STATIC_SMALL = "static small"
STATIC_SMALL_EQUAL = "static small, equal compute"
STATIC_FINAL_EQUAL = "static final size, equal compute"

Progress = Callable[[str, float, str], None]
"""Told (arm, share done from 0 to 1, what to show beside it)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoResult:
    """What a demonstration leaves behind.

    Attributes:
        report: What report.json says.
        history: The grown arm's history.
    """

    report: Report
    history: History


def run(
    out: Path,
    *,
    seed: int = 0,
    epochs: int = EPOCHS,
    mode: Mode = "lockstep",
    plane: Address | None = None,
    progress: Progress = lambda arm, share, text: None,
) -> DemoResult:
    """Runs all arms and writes ``report.json``, ``growth.png`` and ``model/`` into ``out``.

    Args:
        out: Folder for the results; made where it does not exist.
        seed: Seed of initial weights, batches and growth.
        epochs: Epochs of the grown and of the small static arm; at least 1.
        mode: ``lockstep`` or ``async``, see ``Session``.
        plane: Address of a plane, or ``None`` to start an embedded one.
        progress: Told how far each arm has come.

    Raises:
        ValueError: If ``epochs`` is below 1.
        OSError: If ``out`` cannot be written.
    """
    out.mkdir(parents=True, exist_ok=True)
    task = tasks.get("digits")
    model = wrap(task.host(seed), target_layers=["net"], seeds_per_layer=3)
    grown, history = _grow(task, model, seed, epochs, mode, plane, progress)
    budget = grown.flops
    final_size = matching_size(task, grown.parameters)
    arms = [
        _static(task, STATIC_SMALL, task.host(seed), seed, progress, epochs=epochs),
        _static(task, STATIC_SMALL_EQUAL, task.host(seed), seed, progress, flops=budget),
        _static(
            task, STATIC_FINAL_EQUAL, task.host(seed, final_size), seed, progress, flops=budget
        ),
        grown,
    ]
    report = Report(task=task.name, seed=seed, arms=arms, events=history.events)
    save(model, out / "model", task=task.name, history=history.events)
    plot_growth(history, out / "growth.png")
    report.write(out)
    return DemoResult(report=report, history=history)


def matching_size(task: tasks.Task, parameters: int) -> int:
    """Returns the hidden width at which a plain host has nearest to ``parameters`` parameters."""
    one, two = (_num_parameters(task.host(0, size)) for size in (1, 2))
    return max(1, round(1 + (parameters - one) / (two - one)))


def _grow(
    task: tasks.Task,
    model: MorphableModel,
    seed: int,
    epochs: int,
    mode: Mode,
    plane: Address | None,
    progress: Progress,
) -> tuple[Arm, History]:
    def show(record: EpochRecord) -> None:
        text = f"{record.parameters} parameters"
        if record.held_out_loss is not None:
            text += f", held-out loss {record.held_out_loss:.3f}"
        progress(GROWN, (record.epoch + 1) / epochs, text)

    started = time.perf_counter()
    trainer = Trainer(
        model,
        torch.optim.Adam(model.parameters(), lr=LEARNING_RATE),
        train=lambda epoch: task.train_batches(seed, epoch),
        held_out=task.held_out_batches(),
        loss=task.loss,
        epochs=epochs,
        plane=plane,
        mode=mode,
        config=GROWTH,
        on_epoch=show,
    )
    history = trainer.fit()
    arm = Arm(
        name=GROWN,
        test_accuracy=task.accuracy(model, task.test),
        parameters=model.num_parameters(),
        flops=history.epochs[-1].flops,
        wall_s=time.perf_counter() - started,
    )
    return arm, history


def _static(
    task: tasks.Task,
    name: str,
    model: nn.Module,
    seed: int,
    progress: Progress,
    *,
    epochs: int | None = None,
    flops: int | None = None,
) -> Arm:
    """Trains a plain model for so many epochs, or until it has cost so many operations."""
    started = time.perf_counter()
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    cost = TrainingCost(model, task.loss, task.held_out_batches())
    epoch = 0
    while (epochs is not None and epoch < epochs) or (flops is not None and cost.total < flops):
        for batch in task.train_batches(seed, epoch):
            if flops is not None and cost.total >= flops:
                break
            train_epoch(model, optimizer, [batch], task.loss)
        epoch += 1
        share = epoch / epochs if epochs is not None else cost.total / (flops or 1)
        progress(name, min(1.0, share), f"epoch {epoch}")
    cost.close()
    return Arm(
        name=name,
        test_accuracy=task.accuracy(model, task.test),
        parameters=_num_parameters(model),
        flops=cost.total,
        wall_s=time.perf_counter() - started,
    )


def _num_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
