"""Where a run is, what has happened in it, and who is told."""

from dataclasses import dataclass

from google.protobuf.message import Message

from esper.kasmina import SeedLifecycleState
from esper.kasmina import Transition
from esper.tolaria.history import EpochRecord
from esper.tolaria.history import History
from esper.tolaria.history import LifecycleEvent
from esper.tolaria.history import RollbackRecord
from esper.tolaria.link import PlaneLink
from esper.tolaria.live_grafts import LiveGraft
from esper.tolaria.replay import SilentLink
from esper.urza.v1 import library_pb2

State = SeedLifecycleState

_VERDICTS = {
    State.FOSSILIZED: library_pb2.FIELD_VERDICT_FOSSILIZED,
    State.CULLED: library_pb2.FIELD_VERDICT_CULLED,
    State.CANCELLED: library_pb2.FIELD_VERDICT_CANCELLED,
    State.ROLLED_BACK: library_pb2.FIELD_VERDICT_ROLLED_BACK,
}


@dataclass(slots=True)
class Clock:
    """Where a run is.

    Attributes:
        epoch: The epoch that is running, from 0.
        step: Optimizer steps taken.
        epoch_first_step: Steps taken when the epoch began.
    """

    epoch: int = 0
    step: int = 0
    epoch_first_step: int = 0

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the epoch that is running."""
        return self.step - self.epoch_first_step


class Chronicle:
    """Writes down what happens in a run, and tells the plane.

    Args:
        run: Id of the run.
        clock: Where the run is.
        history: What has happened so far; added to.

    Attributes:
        link: Who is told; nobody until the run has opened its link.
    """

    def __init__(self, run: str, clock: Clock, history: History) -> None:
        self.link: PlaneLink | SilentLink = SilentLink()
        self._run = run
        self._clock = clock
        self._history = history

    def move(self, transition: Transition, graft: LiveGraft | None = None) -> None:
        """Notes a lifecycle move.

        Args:
            transition: The move.
            graft: The graft under way in that seed; ``None`` where others have planted it, or the
                run went back: then no kernel has come to its verdict.
        """
        event = LifecycleEvent.of(transition, self._clock.epoch, self._clock.step)
        self._history.events.append(event)
        self._tell("lifecycle", event.to_proto(self._run))
        if graft is None:
            return
        if transition.after is State.FOSSILIZED:
            self.link.mark_deployed(graft.kernel_name)
        report = _field_report(self._run, transition, graft)
        if report is not None:
            self.link.report(report)

    def rollback(self, record: RollbackRecord) -> None:
        """Notes that the run went back."""
        self._history.rollbacks.append(record)
        self._tell("rollback", record.to_proto(self._run))

    def epoch(self, record: EpochRecord) -> None:
        """Tells the plane of an epoch, which is in the history already."""
        self._tell("epoch", record.to_proto(self._run))

    def _tell(self, topic: str, message: Message) -> None:
        self.link.publish(f"system.events.{topic}", message)
        self.link.record(message)


def _field_report(
    run: str, transition: Transition, graft: LiveGraft
) -> library_pb2.FieldReport | None:
    """Returns what Urza is told of a graft that has reached its verdict; ``None`` before that.

    Args:
        run: Id of the run.
        transition: The move of its seed.
        graft: The graft.
    """
    verdict = _VERDICTS.get(transition.after)
    if verdict is None:
        return None
    report = library_pb2.FieldReport(
        kernel=graft.kernel_name,
        run=run,
        slot=transition.slot,
        seed=transition.seed,
        verdict=verdict,
        reason=transition.reason,
    )
    if (trial := graft.trial) is not None:
        report.gain, report.gain_low, report.gain_high = trial.gain, trial.low, trial.high
        report.p_value, report.num_samples = trial.p_value, trial.num_samples
    return report
