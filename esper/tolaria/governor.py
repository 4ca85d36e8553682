"""The governor: finds what harms a run, and undoes it.

It looks at losses, gradients, weights and held-out losses. What it finds is a fault: the run goes
back to its last good snapshot, the seed held responsible leaves its place, and training goes on.
Without a fault it changes nothing.

The seed held responsible is one whose own weights are not finite, else the newest that acts on the
host. Where there is none the data is: the batches since the last sound look are left out.
"""

import logging
import math
from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor
from torch import nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from esper.common.v1 import lifecycle_pb2
from esper.common.v1 import signal_pb2
from esper.config import GovernorConfig
from esper.kasmina import SeedLifecycleState
from esper.kasmina import Transition
from esper.tolaria.history import RollbackRecord
from esper.tolaria.live_grafts import SeedKey
from esper.tolaria.protocol import BLENDED
from esper.tolaria.ranks import ALONE
from esper.tolaria.ranks import Ranks
from esper.tolaria.snapshots import Snapshot
from esper.tolaria.snapshots import SnapshotRing
from esper.tolaria.state import TrainingParts
from esper.tolaria.state import TrainingState
from esper.tolaria.surprise import collapsed
from esper.tolaria.watch import Finding
from esper.tolaria.watch import is_sound

_log = logging.getLogger("esper")

State = SeedLifecycleState

_LEARNING = (
    lifecycle_pb2.SEED_STATE_TRAINING,
    lifecycle_pb2.SEED_STATE_GRAFTING,
    lifecycle_pb2.SEED_STATE_FINE_TUNING,
)


class TrainingFault(RuntimeError):
    """Losses or gradients that stay broken however often the run goes back."""


@dataclass(frozen=True, slots=True)
class Run:
    """What the governor may do to the run that it watches.

    Attributes:
        capture: Returns the training state between two steps.
        restore: Puts it back once the model is.
        moved: Is told of every seed whose state changed by going back.
        undone: Is told of every rollback.
    """

    capture: Callable[[], TrainingState]
    restore: Callable[[TrainingState], None]
    moved: Callable[[Transition], None]
    undone: Callable[[RollbackRecord], None]


class Governor:
    """Watches one run.

    Args:
        parts: Model, optimizers, grafts under way, and the watch over losses and gradients.
        config: What counts as a fault, and how far it is undone.
        run: What may be done to the run.
        ranks: All processes of the run; what they find is the same, as they see the same.

    Attributes:
        drawn: Batches that the epoch has drawn, where it is known.
        left_out: Which of them, counted from 1, are left out.
        gave_up: Whether it has given up.
        num_attempts: Rollbacks since the last good snapshot.
        num_rollbacks: Rollbacks in all.
    """

    def __init__(
        self, parts: TrainingParts, config: GovernorConfig, run: Run, ranks: Ranks = ALONE
    ) -> None:
        self.drawn = 0
        self.left_out = range(0)
        self.gave_up = False
        self.num_attempts = 0
        self.num_rollbacks = 0
        self._model = parts.model
        self._optimizers = tuple(parts.optimizers)
        self._protocol = parts.protocol
        self._watch = parts.watch
        self._config = config
        self._run = run
        self._ranks = ranks
        self._ring = SnapshotRing(config.snapshots, config.max_snapshot_bytes)
        self._sound_drawn = 0  # batches drawn when all was well last
        self._due = False  # the snapshot that the epoch starts with
        self._warned = False
        # Sharded tensors are gathered in a forward, and may be so until the step after it.
        self._sharded = any(hasattr(p, "to_local") for p in parts.model.parameters())
        self._hook: RemovableHandle | None = None  # while a snapshot is due
        self._await_start()

    def __deepcopy__(self, memo: dict[int, object]) -> "Governor":
        return self  # a copy of the model takes the hook along; nothing is watched there

    @property
    def snapshot_bytes(self) -> int:
        """Memory that the snapshots take."""
        return self._ring.num_bytes

    def close(self) -> None:
        """Lets go of model and memory."""
        self._started()
        self._ring.clear()

    def start_afresh(self, *, epoch: bool) -> None:
        """Lets the next step start from a snapshot of its own; all others are dropped with it.

        Args:
            epoch: Whether an epoch begins.
        """
        self._await_start()
        self._watch.forget_figures()  # no checkpoint holds them
        if epoch:
            self.drawn = self._sound_drawn = 0
            self.left_out = range(0)

    def before_batch(self) -> None:
        """Takes the snapshot that is due, before anything of the coming step has happened."""
        if not self._sharded:
            self._start()

    def after_optimizer(self, optimizer: Optimizer, step: int) -> bool:
        """Judges a step of an optimizer, right after it.

        Args:
            optimizer: The one that has stepped.
            step: Optimizer steps taken by the run.

        Returns:
            Whether the run went back to an earlier state.

        Raises:
            TrainingFault: If it has gone back in vain as often as it may.
        """
        if step % self._config.check_every_steps or not self._is_on:
            return False
        number = self._optimizers.index(optimizer)
        self._watch.note_gradients(number, optimizer)
        if number > 0:
            return False
        for graft in self._protocol.live.values():
            parameters = self._model.seed_parameters(*graft.key)
            self._watch.note_weights(f"weights of {graft.slot}[{graft.seed}]", parameters)
        return self._conclude(*self._watch.look(step))

    def after_step(self, step: int) -> None:
        """Takes a snapshot of the run after a step where one is due."""
        if self._due:
            self._start()
        elif step % self._config.snapshot_every_steps == 0 and self._is_on:
            self._take()

    def settle(self) -> None:
        """Looks closely at the run between two steps, until nothing is wrong with it.

        Raises:
            TrainingFault: As ``after_optimizer``.
        """
        while self._is_on:
            step, finding = self._watch.look_closely()
            if finding is None and self._ranks.sum([float(not is_sound(self._model.host))])[0] > 0:
                finding = Finding("the host's weights are not finite", is_finite=False)
            if not self._conclude(step, finding):
                return

    def check_held_out(self, before: Sequence[float], loss: float, num_steps: int) -> bool:
        """Judges a held-out loss.

        Args:
            before: Mean held-out losses of the run so far, in order.
            loss: The one to judge.
            num_steps: Steps since the one before: so many false alarms may there be.

        Returns:
            Whether the run went back to an earlier state, whose loss has to be measured again.

        Raises:
            TrainingFault: As ``after_optimizer``.
        """
        if not self._is_on:
            return False
        if not math.isfinite(loss):
            return self._conclude(-1, Finding("held-out loss not finite", is_finite=False))
        rate = min(0.5, self._config.false_alarm_rate * max(1, num_steps))
        if not collapsed([*filter(math.isfinite, before), loss], rate):
            return False
        reason = f"held-out loss {loss:.4g} after {before[-1]:.4g}"
        self._ring.distrust()
        return self._conclude(-1, Finding(reason, is_finite=True))

    def check_seeds(self, signals: Sequence[signal_pb2.HealthSignal]) -> None:
        """Removes the seeds under way that cannot come to anything, by what an epoch has shown.

        A seed that computed anything not finite is rolled back; the host needs no rollback, as such
        rows add nothing. A seed that no gradient reaches is dead, and culled.
        """
        if not self._is_on:
            return
        for signal in signals:
            key = (signal.slot, signal.seed)
            if key not in self._protocol.live:
                continue
            if signal.num_nonfinite_rows > 0:
                rows = f"{signal.num_nonfinite_rows} rows of it were not finite"
                self._remove(key, rows)
            elif (
                signal.state in _LEARNING
                and signal.HasField("weight_gradient_norm")
                and signal.weight_gradient_norm == 0.0
                and self._model.seed_state(*key) is not State.GERMINATED
            ):
                self._model.cull(*key, reason="dead: no gradient has reached it in an epoch")

    @property
    def _is_on(self) -> bool:
        return self._config.enabled and not self.gave_up

    def _before_forward(self, module: nn.Module, args: tuple[object, ...]) -> None:
        if module is self._model and module.training:
            self.before_batch()

    def _await_start(self) -> None:
        self._due = True
        if self._hook is None:
            self._hook = self._model.register_forward_pre_hook(self._before_forward)

    def _started(self) -> None:
        self._due = False
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def _start(self) -> None:
        if self._due and self._is_on:
            self._ring.clear()
            self._take(good=True)
        self._started()

    def _take(self, *, good: bool = False) -> None:
        self._watch.note_weights("host's weights", list(self._model.host.parameters()))
        self._ring.take(self._model, self._run.capture(), self.drawn, good=good)
        if good and self._ring.newest is None and not self._warned:
            self._warned = True
            _log.warning(
                "esper: max_snapshot_bytes is %d, too little for a snapshot: faults of the run can "
                "be found but not undone",
                self._config.max_snapshot_bytes,
            )

    def _conclude(self, step: int, finding: Finding | None) -> bool:
        if finding is not None:
            return self._undo(finding)
        if step >= 0 and not self._watch.suspicious:
            self._sound_drawn = self.drawn
            if self._ring.trust(step):
                self.num_attempts = 0
        return False

    def _undo(self, finding: Finding) -> bool:
        self._ring.distrust()
        if self.num_attempts >= self._config.max_rollbacks and finding.is_finite:
            _log.warning("esper: %s comes back, and is taken for usual", finding.reason)
            self._watch.forget_usual()
            self.num_attempts = 0
            return False
        self.num_attempts += 1
        if self.num_attempts > 1:
            self._ring.step_back()
        snapshot = self._ring.newest
        if snapshot is None and finding.is_finite:
            return False
        if snapshot is None or self.num_attempts > self._config.max_rollbacks:
            return self._give_up(finding, snapshot)
        self._go_back(snapshot, finding, self._responsible())
        return True

    def _responsible(self) -> list[SeedKey]:
        live = list(self._protocol.live)
        broken = [key for key in live if not _is_finite(self._model.seed_parameters(*key))]
        acting = [key for key in live if self._model.seed_state(*key) in BLENDED]
        return broken or acting[-1:]

    def _go_back(self, snapshot: Snapshot, finding: Finding, seeds: list[SeedKey]) -> None:
        present = self._run.capture()
        before = self._states()
        drawn, sound = self.drawn, self._sound_drawn
        self._watch.forget_figures()
        snapshot.restore(self._model, self._run.restore)
        self.drawn = self._sound_drawn = snapshot.drawn
        self.left_out = range(0) if seeds else range(max(sound, snapshot.drawn) + 1, drawn + 1)
        for key, (state, kernel) in self._states().items():
            if state is not before[key][0]:
                reason = f"back at step {snapshot.step}: {finding.reason}"
                self._run.moved(Transition(*key, before[key][0], state, kernel, reason))
        record = RollbackRecord(
            epoch=present.epoch,
            step=present.step,
            to_step=snapshot.step,
            reason=finding.reason,
            seeds=seeds,
        )
        _log.warning(
            "esper: step %d: %s; back to step %d%s",
            record.step,
            record.reason,
            record.to_step,
            "".join(f", without {slot}[{seed}]" for slot, seed in seeds),
        )
        self.num_rollbacks += 1
        self._run.undone(record)
        for key in seeds:
            self._remove(key, finding.reason)
        if seeds:  # the snapshots before still hold them
            self._ring.clear()
            self._take(good=True)

    def _remove(self, key: SeedKey, reason: str) -> None:
        if key not in self._protocol.live:
            return
        if self._model.seed_state(*key) is State.GERMINATED:
            self._model.advance(*key, State.TRAINING, reason="step boundary reached")
        self._model.advance(*key, State.ROLLED_BACK, reason=reason)
        self._model.set_embargo(*key, self._config.embargo_steps)

    def _give_up(self, finding: Finding, snapshot: Snapshot | None) -> bool:
        self.gave_up = True
        if snapshot is not None:
            self._go_back(snapshot, finding, [])
        what = (
            f"{finding.reason}: the run has gone back {self.num_attempts} times in vain"
            if snapshot is not None
            else f"{finding.reason}, and there is no snapshot to go back to"
        )
        if self._config.give_up == "raise":
            raise TrainingFault(what)
        _log.warning("esper: %s; it goes on without governor and new growth", what)
        return snapshot is not None

    def _states(self) -> Mapping[SeedKey, tuple[State, str]]:
        stats = self._model.get_layer_stats()
        return {
            (name, seed.seed): (seed.state, seed.kernel)
            for name, slot in stats.items()
            for seed in slot.seeds
        }


def _is_finite(weights: Sequence[Tensor]) -> bool:
    return all(bool(weight.isfinite().all()) for weight in weights)
