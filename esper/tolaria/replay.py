"""What stands where a session has its link to the plane: a recorded run, or nothing."""

from collections.abc import Sequence

from google.protobuf.message import Message

from esper.common.v1 import kernel_pb2
from esper.tamiyo.v1 import controller_pb2
from esper.tolaria.link import Advice
from esper.tolaria.link import LinkState
from esper.tolaria.state import AdviceState
from esper.urza.v1 import library_pb2


class SilentLink:
    """Tells nobody anything and is told nothing: the link of a process that others decide for."""

    failure: str | None = None

    def compile(self, signatures: Sequence[kernel_pb2.KernelSignature]) -> None:
        """Does nothing."""

    def observe(self, observation: controller_pb2.Observation) -> None:
        """Does nothing."""

    def publish(self, topic: str, message: Message) -> None:
        """Does nothing."""

    def record(self, message: Message) -> None:
        """Does nothing."""

    def report(self, report: library_pb2.FieldReport) -> None:
        """Does nothing."""

    def mark_deployed(self, kernel_name: str) -> None:
        """Does nothing."""

    def wait(self, epoch: int, timeout_s: float) -> list[Advice]:
        """Returns nothing."""
        return []

    def take(self) -> list[Advice]:
        """Returns nothing."""
        return []

    def state(self) -> LinkState:
        """Returns the state of a link that was never used."""
        return LinkState()

    def close(self) -> None:
        """Does nothing."""


class ReplayLink(SilentLink):
    """Answers from a record.

    What a plane would be told is told to nobody: a replayed run leaves no trace outside. Recorded
    advice belongs to its epoch, so ``take`` returns nothing.

    Args:
        decisions: The advice that the recorded run took, in order.
    """

    def __init__(self, decisions: Sequence[AdviceState]) -> None:
        self._decisions = tuple(decisions)

    def wait(self, epoch: int, timeout_s: float) -> list[Advice]:
        """Returns the advice that the recorded run took at the end of an epoch."""
        return [state.advice() for state in self._decisions if state.epoch == epoch]
