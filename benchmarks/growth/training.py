"""Trains the arms of an arena: plain models, and models that grow with a session in the loop."""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from dataclasses import field

import torch
from torch import nn
from torch.optim import Optimizer

import esper
from esper.config import EsperConfig
from esper.kasmina import MorphableModel
from esper.kasmina import SeedLifecycleState
from esper.kasmina import Transition
from esper.tolaria import History
from esper.tolaria.cost import TrainingCost
from esper.tolaria.tasks import LabelledBatch
from esper.tolaria.tasks import Split
from esper.tolaria.tasks import Task

State = SeedLifecycleState
Births = list[tuple[str, int, object, dict[str, torch.Tensor]]]
"""(slot, seed, kernel, weights at birth) of grafts."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """How a model is trained, growth apart.

    Attributes:
        learning_rate: Peak learning rate of Adam.
        hold: Share of the steps at the peak, before the cosine decay to zero.
        warm_up: Steps over which the learning rate rises at the start.
    """

    learning_rate: float
    hold: float = 0.5
    warm_up: int = 10

    def rate(self, step: int, steps: int) -> float:
        """Returns the learning rate of a step, from 0, of so many."""
        progress = step / steps
        decay = 1.0
        if progress > self.hold:
            decay = 0.5 * (1.0 + math.cos(math.pi * (progress - self.hold) / (1.0 - self.hold)))
        return self.learning_rate * decay * min(1.0, (step + 1) / self.warm_up)


@dataclass(kw_only=True, slots=True)
class Trained:
    """A trained model with its bill.

    Attributes:
        model: The model.
        flops: Floating-point operations that training cost, everything included.
        by_category: The same by category.
        wall_s: Wall-clock time of its training in seconds.
        births: Grafts that were kept, with the weights they were born with.
        history: History of a grown model.
    """

    model: nn.Module
    flops: int
    by_category: dict[str, int]
    wall_s: float
    births: Births = field(default_factory=list)
    history: History | None = None

    @property
    def parameters(self) -> int:
        """Trainable elements."""
        return sum(parameter.numel() for parameter in self.model.parameters())


def stream(task: Task, seed: int) -> Iterator[LabelledBatch]:
    """Yields the task's training batches, epoch after epoch without end."""
    epoch = 0
    while True:
        yield from task.train_batches(seed, epoch)
        epoch += 1


def train_static(
    task: Task, model: nn.Module, recipe: Recipe, seed: int, *, steps: int = 0, flops: int = 0
) -> Trained:
    """Trains a plain model, or one that has grown already, without growth.

    Args:
        task: The task.
        model: The model.
        recipe: How it is trained.
        seed: Seed of the batches.
        steps: Optimizer steps; 0 takes as many as ``flops`` pay for.
        flops: Budget in floating-point operations.
    """
    started = time.perf_counter()
    cost = TrainingCost(model, task.loss, task.train_batches(seed, 0))
    if steps == 0:
        steps = max(1, int(flops / (cost.step_flops_per_sample() * task.batch_size)))
    optimizer = torch.optim.Adam(model.parameters(), lr=recipe.learning_rate)
    batches = stream(task, seed)
    for step in range(steps):
        train_step(task, model, optimizer, next(batches), recipe.rate(step, steps))
    cost.close()
    return Trained(
        model=model,
        flops=cost.total,
        by_category=cost.by_category,
        wall_s=time.perf_counter() - started,
    )


def train_step(
    task: Task, model: nn.Module, optimizer: Optimizer, batch: LabelledBatch, rate: float
) -> float:
    """Takes one optimizer step at a learning rate; returns the batch's mean loss."""
    model.train()
    for group in optimizer.param_groups:
        group["lr"] = rate
    loss = task.loss(model, batch).mean()
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    return float(loss.detach())


def train_grown(
    task: Task,
    model: MorphableModel,
    recipe: Recipe,
    config: EsperConfig,
    seed: int,
    *,
    plane: str,
    steps: int,
    epochs: int,
    held_out: Split,
) -> Trained:
    """Trains a wrapped model and lets it grow.

    Args:
        task: The task.
        model: The wrapped model.
        recipe: How it is trained.
        config: How it grows.
        seed: Seed of the batches.
        plane: Address of a plane.
        steps: Optimizer steps.
        epochs: Number of equal parts of the run; growth acts at the end of each.
        held_out: Data of the accept test.
    """
    started = time.perf_counter()
    births: dict[tuple[str, int], tuple[object, dict[str, torch.Tensor]]] = {}

    def note_birth(move: Transition) -> None:
        if move.after is State.GERMINATED:
            graft = model.slots[move.slot].graft(move.seed)
            weights = {name: p.detach().clone() for name, p in graft.named_parameters()}
            births[move.slot, move.seed] = (graft.kernel, weights)

    optimizer = torch.optim.Adam(model.parameters(), lr=recipe.learning_rate)
    batches = stream(task, seed)
    model.observers.append(note_birth)
    session = esper.session(
        model,
        optimizer,
        epochs=epochs,
        held_out=held_out.batches(task.batch_size),
        loss=task.loss,
        plane=plane,
        mode="lockstep",
        config=config,
    )
    with session:
        step = 0
        for epoch in range(epochs):
            losses = []
            while step < steps * (epoch + 1) // epochs:
                rate = recipe.rate(step, steps)
                losses.append(train_step(task, model, optimizer, next(batches), rate))
                step += 1
            session.epoch_end(train_loss=sum(losses) / len(losses))
    if session.history.plane_failure is not None:
        raise RuntimeError(f"the plane was lost: {session.history.plane_failure}")
    kept = [(*key, *births[key]) for key in births if model.seed_state(*key) is State.FOSSILIZED]
    return Trained(
        model=model,
        flops=session.cost.total,
        by_category=session.cost.by_category,
        wall_s=time.perf_counter() - started,
        births=kept,
        history=session.history,
    )


def with_births(task: Task, model: MorphableModel, births: Births) -> MorphableModel:
    """Plants all grafts in a new model from the start, with the weights of their birth."""
    with torch.no_grad():
        model.eval()(task.validation.inputs[:1])  # tells the slots their widths
    model.enable_telemetry(False)
    for slot, seed, kernel, weights in births:
        model.load_kernel(slot, seed, kernel, weights)
        for state in ("TRAINING", "GRAFTING", "STABILIZATION", "EVALUATING", "FOSSILIZED"):
            model.advance(slot, seed, state)
    return model
