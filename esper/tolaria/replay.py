"""Decisions from a recorded run in place of a plane."""

from collections.abc import Sequence

from google.protobuf.message import Message

from esper.common.v1 import kernel_pb2
from esper.tamiyo.v1 import controller_pb2
from esper.tolaria.link import Advice
from esper.tolaria.link import LinkState
from esper.tolaria.state import AdviceState
from esper.urza.v1 import library_pb2


class ReplayLink:
    """Stands where a session has its link to the plane, and answers from a record.

    What a plane would be told is told to nobody: a replayed run leaves no trace outside.

    Args:
        decisions: The advice that the recorded run took, in order.
    """

    failure: str | None = None

    def __init__(self, decisions: Sequence[AdviceState]) -> None:
        self._decisions = tuple(decisions)

    def compile(self, signatures: Sequence[kernel_pb2.KernelSignature]) -> None:
        """Does nothing: the recorded kernels come with the decisions."""

    def observe(self, observation: controller_pb2.Observation) -> None:
        """Does nothing: the decisions have been taken."""

    def publish(self, topic: str, message: Message) -> None:
        """Does nothing."""

    def record(self, message: Message) -> None:
        """Does nothing."""

    def report(self, report: library_pb2.FieldReport) -> None:
        """Does nothing."""

    def mark_deployed(self, kernel_name: str) -> None:
        """Does nothing."""

    def wait(self, epoch: int, timeout_s: float) -> list[Advice]:
        """Returns the advice that the recorded run took at the end of an epoch."""
        return [state.advice() for state in self._decisions if state.epoch == epoch]

    def take(self) -> list[Advice]:
        """Returns nothing: recorded advice belongs to its epoch, see ``wait``."""
        return []

    def state(self) -> LinkState:
        """Returns the state of a link that was never used."""
        return LinkState()

    def close(self) -> None:
        """Does nothing."""
