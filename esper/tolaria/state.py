"""Everything that a run goes on from, as typed records.

``TrainingState`` is what one optimizer step follows from, model weights and seeds apart: it goes
into checkpoints and into the governor's snapshots alike. ``RunRecord`` is what the run has come to
know and has told others; no rollback undoes it.
"""

from collections.abc import Collection
from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import replace
from typing import Protocol

from torch import Tensor
from torch import nn
from torch.optim import Optimizer

from esper.common.v1 import kernel_pb2
from esper.kasmina import MorphableModel
from esper.kasmina.runtime import ModelRuntime
from esper.tamiyo.v1 import controller_pb2
from esper.tolaria import optimizer_state
from esper.tolaria import randomness
from esper.tolaria.history import EpochRecord
from esper.tolaria.history import History
from esper.tolaria.history import LifecycleEvent
from esper.tolaria.history import RollbackRecord
from esper.tolaria.history import TrialRecord
from esper.tolaria.link import Advice
from esper.tolaria.link import LinkState
from esper.tolaria.live_grafts import LiveGraftState
from esper.tolaria.optimizer_state import OptimizerState
from esper.tolaria.packing import Opaque
from esper.tolaria.protocol import GraftProtocol
from esper.tolaria.randomness import RandomState
from esper.tolaria.surprise import SurpriseState
from esper.tolaria.watch import Watch


class Stateful(Protocol):
    """Whatever can say and take its state: schedulers, scalers, samplers, averaged models."""

    def state_dict(self) -> dict[str, object]:
        """Returns the state: plain values, tensors and containers of them."""

    def load_state_dict(self, state_dict: dict[str, object]) -> object:
        """Takes a state that ``state_dict`` returned."""


@dataclass(frozen=True, slots=True)
class TrainingState:
    """What the next optimizer step follows from; weights, buffers, seeds and their bank apart.

    Attributes:
        epoch: The epoch that is running, from 0.
        step: Optimizer steps taken.
        epoch_first_step: Steps taken when the epoch began.
        optimizers: The user's optimizers.
        grafts: Seeds between germination and verdict, oldest first.
        runtime: What the model has lived through.
        fixed: Names of parameters that require no gradient.
        stateful: State of everything that the user has handed to the session, by name.
        random: The global random generators.
        surprise: What the governor takes for usual, by figure.
    """

    epoch: int
    step: int
    epoch_first_step: int
    optimizers: list[OptimizerState]
    grafts: list[LiveGraftState]
    runtime: ModelRuntime
    fixed: list[str]
    stateful: dict[str, Opaque]
    random: RandomState
    surprise: dict[str, SurpriseState]


@dataclass(frozen=True, slots=True)
class RankState:
    """What each process of a run has for itself; all else is the same in all of them.

    Attributes:
        runtime: What its model has lived through.
        stateful: State of what the user has handed to the session, by name.
        random: Its global random generators.
    """

    runtime: ModelRuntime
    stateful: dict[str, Opaque]
    random: RandomState

    @classmethod
    def of(cls, training: TrainingState) -> "RankState":
        """Returns the part of a state that belongs to its process."""
        return cls(training.runtime, training.stateful, training.random)

    def within(self, training: TrainingState) -> TrainingState:
        """Returns another process's state with this process's part in it."""
        return replace(training, runtime=self.runtime, stateful=self.stateful, random=self.random)


def of_a_newcomer(training: TrainingState) -> TrainingState:
    """Returns the state of a process that the run did not have before.

    It has measured nothing, and goes on with its own random generators.

    Args:
        training: State of the first process.
    """
    slots = {name: replace(slot, telemetry=None) for name, slot in training.runtime.slots.items()}
    runtime = replace(training.runtime, slots=slots)
    return replace(training, runtime=runtime, random=randomness.capture())


@dataclass(frozen=True, slots=True)
class AdviceState:
    """A piece of advice; all messages serialized.

    Attributes:
        epoch: Epoch at whose end it was taken.
        decision: The decision.
        kernel: Its kernel; None for none.
        weights: The kernel's weights; None for none.
    """

    epoch: int
    decision: bytes
    kernel: bytes | None
    weights: dict[str, Tensor] | None

    @classmethod
    def of(cls, advice: Advice, epoch: int) -> "AdviceState":
        """Returns the record of a piece of advice."""
        kernel = None if advice.kernel is None else advice.kernel.SerializeToString()
        weights = None if advice.weights is None else dict(advice.weights)
        return cls(epoch, advice.decision.SerializeToString(), kernel, weights)

    def advice(self) -> Advice:
        """Returns the advice."""
        decision = controller_pb2.Decision.FromString(self.decision)
        kernel = None if self.kernel is None else kernel_pb2.Kernel.FromString(self.kernel)
        return Advice(decision, kernel, self.weights)


@dataclass(frozen=True, slots=True)
class RunRecord:
    """What a run has come to know.

    Attributes:
        run: Its id.
        events: Lifecycle events.
        epochs: Epoch records.
        refusals: Decisions that were not carried out.
        trials: Held-out trials; each has spent its share of the significance.
        rollbacks: Faults that were undone.
        num_attempts: Rollbacks since the last good snapshot.
        spent: Floating-point operations by category.
        decisions: All advice taken, in order.
        memory: What the policy remembers of the run.
        pending: Advice that had arrived and was not taken.
        told: The run's history as told to Urza, each event as a serialized Any.
    """

    run: str
    events: list[LifecycleEvent]
    epochs: list[EpochRecord]
    refusals: list[str]
    trials: list[TrialRecord]
    rollbacks: list[RollbackRecord]
    num_attempts: int
    spent: dict[str, float]
    decisions: list[AdviceState]
    memory: bytes
    pending: list[AdviceState]
    told: list[bytes]

    def history(self) -> History:
        """Returns the history that the run goes on with."""
        return History(
            list(self.events),
            list(self.epochs),
            list(self.refusals),
            list(self.trials),
            list(self.rollbacks),
        )

    def link_state(self) -> LinkState:
        """Returns where the run's link to the plane goes on."""
        pending = tuple(state.advice() for state in self.pending)
        return LinkState(self.memory, pending, self.told)


@dataclass(frozen=True, slots=True)
class TrainingParts:
    """What training changes, in one place.

    Attributes:
        model: The growing model.
        optimizers: The user's optimizers.
        protocol: The live grafts.
        stateful: What the user has handed to the session, by name.
        watch: Knows what losses and gradients are usual.
    """

    model: MorphableModel
    optimizers: Sequence[Optimizer]
    protocol: GraftProtocol
    stateful: Mapping[str, Stateful]
    watch: Watch

    def capture(self, epoch: int, step: int, epoch_first_step: int) -> TrainingState:
        """Returns the state between two steps; its tensors are those of the parts themselves."""
        names = parameter_names(self.model)
        optimizers = [optimizer_state.capture(optimizer, names) for optimizer in self.optimizers]
        for optimizer, state in zip(self.optimizers, optimizers, strict=True):
            self.protocol.enter_fossils(optimizer, state, names)
        return TrainingState(
            epoch=epoch,
            step=step,
            epoch_first_step=epoch_first_step,
            optimizers=optimizers,
            grafts=self.protocol.state(names),
            runtime=self.model.runtime(),
            fixed=[name for p, name in names.items() if not p.requires_grad],
            stateful={name: Opaque(part.state_dict()) for name, part in self.stateful.items()},
            random=randomness.capture(),
            surprise=self.watch.state(),
        )

    def restore(self, state: TrainingState, leave: Collection[str] = ()) -> None:
        """Puts the parts into a state; the model's weights and seeds are restored already.

        Args:
            state: The state.
            leave: Names of stateful parts that stay as they are.

        Raises:
            ValueError: If optimizers or stateful parts are others than those of the state.
        """
        self._check(state)
        parameters = dict(self.model.named_parameters())
        for name, parameter in parameters.items():
            parameter.requires_grad_(name not in state.fixed)
        self.model.resume(state.runtime)
        for optimizer, saved in zip(self.optimizers, state.optimizers, strict=True):
            optimizer_state.restore(optimizer, saved, parameters)
        self.protocol.resume(state.grafts, parameters)
        self.watch.resume(state.surprise)
        for name, part in self.stateful.items():
            if name in leave:
                continue
            content = state.stateful[name].value
            assert isinstance(content, dict), "state_dict() returns a dict"
            part.load_state_dict(content)
        randomness.restore(state.random)

    def positions(self) -> set[str]:
        """Returns the names of stateful parts that are data, whose state is a position."""
        return {
            name
            for name, part in self.stateful.items()
            if isinstance(part, Iterable) and not isinstance(part, nn.Module)
        }

    def _check(self, state: TrainingState) -> None:
        if self.stateful.keys() != state.stateful.keys():
            raise ValueError(
                f"stateful names {sorted(self.stateful)}, but the saved run had "
                f"{sorted(state.stateful)}"
            )
        if len(self.optimizers) != len(state.optimizers):
            raise ValueError(
                f"the session has {len(self.optimizers)} optimizers, but the saved run had "
                f"{len(state.optimizers)}"
            )


def parameter_names(model: nn.Module) -> dict[nn.Parameter, str]:
    """Returns the names of a model's parameters; a tied one has its first name."""
    return {parameter: name for name, parameter in model.named_parameters()}
