"""What happened in a run: lifecycle events and one record per epoch."""

from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import field

from esper.kasmina import Transition
from esper.oona.v1 import event_pb2


@dataclass(frozen=True, slots=True, kw_only=True)
class LifecycleEvent:
    """One move of one seed.

    Attributes:
        epoch: Epoch in which it happened, from 0.
        step: Optimizer steps taken before it.
        slot: Name of the slot.
        seed: Index of the seed in the slot.
        before: Name of the state before.
        after: Name of the state after.
        kernel: Digest of the kernel concerned; empty for none.
        reason: Why, in a sentence.
    """

    epoch: int
    step: int
    slot: str
    seed: int
    before: str
    after: str
    kernel: str
    reason: str

    @classmethod
    def of(cls, transition: Transition, epoch: int, step: int) -> "LifecycleEvent":
        """Returns the event of a move.

        Args:
            transition: The move.
            epoch: Epoch in which it happened.
            step: Optimizer steps taken before it.
        """
        return cls(
            epoch=epoch,
            step=step,
            slot=transition.slot,
            seed=transition.seed,
            before=transition.before.name,
            after=transition.after.name,
            kernel=transition.kernel,
            reason=transition.reason,
        )

    def to_json(self) -> dict[str, int | str]:
        """Returns the event as it stands in report.json and growth_history.jsonl."""
        return {
            "epoch": self.epoch,
            "step": self.step,
            "slot": self.slot,
            "seed": self.seed,
            "from": self.before,
            "to": self.after,
            "kernel": self.kernel,
            "reason": self.reason,
        }

    def to_proto(self, run: str) -> event_pb2.LifecycleEvent:
        """Returns the event as it is published."""
        event = event_pb2.LifecycleEvent(
            run=run,
            epoch=self.epoch,
            step=self.step,
            slot=self.slot,
            seed=self.seed,
            to=self.after,
            kernel=self.kernel,
            reason=self.reason,
        )
        setattr(event, "from", self.before)  # a keyword of Python, a field of the contract
        return event


@dataclass(frozen=True, slots=True, kw_only=True)
class EpochRecord:
    """One epoch.

    Attributes:
        epoch: The epoch, from 0.
        step: Optimizer steps taken by its end.
        train_loss: Mean training loss; ``None`` if the user did not tell.
        held_out_loss: Mean held-out loss at its end, after the verdicts; ``None`` in an epoch that
            does not measure it.
        parameters: Trainable elements of the model at its end.
        flops: Floating-point operations spent by its end, trials and probes included.
        alphas: Alpha of every seed that holds a kernel, by (slot, seed).
    """

    epoch: int
    step: int
    train_loss: float | None
    held_out_loss: float | None
    parameters: int
    flops: int
    alphas: Mapping[tuple[str, int], float]

    def to_proto(self, run: str) -> event_pb2.EpochEvent:
        """Returns the epoch as it is published."""
        event = event_pb2.EpochEvent(
            run=run,
            epoch=self.epoch,
            step=self.step,
            num_parameters=self.parameters,
        )
        if self.train_loss is not None:
            event.train_loss = self.train_loss
        if self.held_out_loss is not None:
            event.held_out_loss = self.held_out_loss
        return event


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialRecord:
    """One held-out trial.

    Attributes:
        epoch: Epoch at whose end it was held, from 0.
        slot: Name of the slot.
        seed: Index of the seed in the slot.
        kernel: Digest of its kernel.
        accepted: Whether the seed was kept.
        gain: Mean held-out loss without the seed minus that with it.
        low: Lower end of the gain's 95 percent confidence interval.
        high: Upper end of it.
        price: Loss that the seed's cost had to buy.
        p_value: One-sided p value of the paired t test that the gain exceeds the price.
        level: Level that the p value was compared with.
        flops_per_sample: Forward floating-point operations that the seed costs per sample.
    """

    epoch: int
    slot: str
    seed: int
    kernel: str
    accepted: bool
    gain: float
    low: float
    high: float
    price: float
    p_value: float
    level: float
    flops_per_sample: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SeedAttribution:
    """What one live seed is worth in the model as it stands.

    Attributes:
        slot: Name of the slot.
        seed: Index of the seed in the slot.
        state: Name of its state.
        kernel: Digest of its kernel.
        gain: Mean held-out loss with this seed alone muted, minus that of the model as it is.
        low: Lower end of the gain's 95 percent confidence interval, paired by sample.
        high: Upper end of it.
        num_samples: Number of held-out samples.
    """

    slot: str
    seed: int
    state: str
    kernel: str
    gain: float
    low: float
    high: float
    num_samples: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RollbackRecord:
    """One fault and how it was undone.

    Attributes:
        epoch: Epoch in which it was found, from 0.
        step: Optimizer steps taken by then.
        to_step: Steps taken in the state that the run went back to.
        reason: What was wrong, in a sentence.
        seeds: The seeds held responsible, as (slot, seed); they were removed.
    """

    epoch: int
    step: int
    to_step: int
    reason: str
    seeds: list[tuple[str, int]]

    def to_proto(self, run: str) -> event_pb2.RollbackEvent:
        """Returns the rollback as it is published."""
        return event_pb2.RollbackEvent(
            run=run,
            epoch=self.epoch,
            step=self.step,
            to_step=self.to_step,
            reason=self.reason,
            seeds=[f"{slot}[{seed}]" for slot, seed in self.seeds],
        )


@dataclass(slots=True)
class History:
    """The record of a run.

    Attributes:
        events: Lifecycle events in order.
        epochs: One record per epoch.
        refusals: Decisions that were not carried out, with the reason.
        trials: Held-out trials in order.
        rollbacks: Faults that were undone, in order.
        plane_failure: Why the plane was lost, known when the session is closed; ``None`` if it
            was there to the end.
    """

    events: list[LifecycleEvent] = field(default_factory=list)
    epochs: list[EpochRecord] = field(default_factory=list)
    refusals: list[str] = field(default_factory=list)
    trials: list[TrialRecord] = field(default_factory=list)
    rollbacks: list[RollbackRecord] = field(default_factory=list)
    plane_failure: str | None = None

    def held_out_losses(self) -> list[float]:
        """Returns the mean held-out losses that were measured, in order."""
        return [one.held_out_loss for one in self.epochs if one.held_out_loss is not None]
