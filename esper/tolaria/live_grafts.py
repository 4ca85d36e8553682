"""Seeds between germination and verdict, at work and as data."""

from dataclasses import dataclass

from esper.common.v1 import kernel_pb2
from esper.tamiyo.v1 import controller_pb2
from esper.tolaria.evaluation import Trial
from esper.tolaria.optimizers import NewbornOptimizer
from esper.tolaria.optimizers import NewbornState

SeedKey = tuple[str, int]
"""Slot and seed."""


@dataclass(slots=True)
class LiveGraft:
    """A seed between germination and verdict.

    Attributes:
        slot: Name of the slot.
        seed: Index of the seed in the slot.
        kernel_name: Resource name, ``kernels/{digest}``.
        kernel: The kernel at work.
        plan: How it is brought in, complete.
        optimizer: Trains the seed's parameters; ``None`` for a kernel without parameters.
        stage_steps: Optimizer steps since the last lifecycle move.
        trial: Outcome of the held-out trial, once there was one.
    """

    slot: str
    seed: int
    kernel_name: str
    kernel: kernel_pb2.Kernel
    plan: controller_pb2.GraftPlan
    optimizer: NewbornOptimizer | None
    stage_steps: int = 0
    trial: Trial | None = None

    @property
    def key(self) -> SeedKey:
        """Slot and seed."""
        return self.slot, self.seed

    @property
    def passed(self) -> bool:
        """Whether its last trial was passed."""
        return self.trial is not None and self.trial.accepted


@dataclass(frozen=True, slots=True)
class LiveGraftState:
    """A live graft as data, its kernel and weights apart: the model holds them.

    Attributes:
        slot: Name of the slot.
        seed: Index of the seed in the slot.
        kernel_name: Resource name of the kernel.
        plan: The plan, serialized.
        stage_steps: Optimizer steps since the last lifecycle move.
        trial: Outcome of the held-out trial, once there was one.
        optimizer: Its optimizer; None for a kernel without parameters.
    """

    slot: str
    seed: int
    kernel_name: str
    plan: bytes
    stage_steps: int
    trial: Trial | None
    optimizer: NewbornState | None
