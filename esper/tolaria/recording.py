"""The history of a run in Urza: told once, whoever dies in between.

A run that goes on from a checkpoint tells again what it does again, and a plane that has lost its
data is told everything. So the recorder compares what it has to say with what Urza has, and
appends only what is new. A run that repeats itself to the bit leaves no trace of the interruption;
one that goes on differently says so by a `ResumeEvent`, for the chain of hashes cannot be undone.
"""

from collections.abc import Sequence

import grpc
from google.protobuf import any_pb2
from google.protobuf.message import Message

from esper.common.rpc import RpcError
from esper.common.rpc import packed
from esper.oona.v1 import event_pb2
from esper.urza.runs import RunClient


class RunRecorder:
    """Tells Urza the history of one run.

    ``add`` belongs to the training thread, the other methods to the thread that talks to the plane.

    Args:
        run: Id of the run.
        messages: What has been added before, where the run goes on from a checkpoint.
    """

    def __init__(self, run: str, messages: Sequence[bytes] = ()) -> None:
        self._run = run
        self._messages = [any_pb2.Any.FromString(message) for message in messages]
        self._told: list[any_pb2.Any] | None = None  # what holds in Urza; None before it was asked
        self._num_events = 0  # of the run in Urza, superseded ones included
        self._num_matched = 0  # of our messages, how many are known to be in Urza

    def __len__(self) -> int:
        return len(self._messages)

    @property
    def messages(self) -> list[bytes]:
        """All that was added, each as a serialized Any."""
        return [message.SerializeToString(deterministic=True) for message in self._messages]

    def add(self, message: Message) -> None:
        """Adds an event; ``flush`` sends it."""
        self._messages.append(packed(message))

    def disconnect(self) -> None:
        """Says that the connection was lost, so that Urza must be asked again for what it has."""
        self._told = None

    def flush(self, runs: RunClient) -> None:
        """Makes Urza's history of the run that of this recorder.

        Raises:
            RpcError: If Urza refuses or is not there; a later call goes on.
        """
        if self._told is None:
            self._told = self._open(runs)
            self._num_matched = 0
        while self._num_matched < min(len(self._messages), len(self._told)):
            if self._messages[self._num_matched] != self._told[self._num_matched]:
                kept = event_pb2.ResumeEvent(run=self._run, num_kept=self._num_matched)
                self._append(runs, [packed(kept)])
                del self._told[self._num_matched :]
                break
            self._num_matched += 1
        if new := self._messages[len(self._told) :]:
            self._append(runs, new)
            self._told += new
            self._num_matched = len(self._told)

    def _append(self, runs: RunClient, events: Sequence[Message]) -> None:
        extent = runs.append_run_events(f"runs/{self._run}", events, self._num_events)
        self._num_events = extent.num_events

    def _open(self, runs: RunClient) -> list[any_pb2.Any]:
        """Opens the run, or returns the events that hold of the one that is there."""
        try:
            self._num_events = runs.create_run(self._run).num_events
        except RpcError as error:
            if error.code is not grpc.StatusCode.ALREADY_EXISTS:
                raise
            self._num_events = runs.get_run(f"runs/{self._run}").num_events
        return effective_events(runs, self._run, self._num_events)


def effective_events(runs: RunClient, run: str, num_events: int) -> list[any_pb2.Any]:
    """Returns the bodies of a run's events that no later `ResumeEvent` supersedes.

    Args:
        runs: Client of Urza.
        run: Id of the run.
        num_events: How many of its events to read.
    """
    events: list[any_pb2.Any] = []
    resumed = event_pb2.ResumeEvent()
    with runs.watch_run(f"runs/{run}") as history:
        for _ in range(num_events):
            body = next(history).body
            if body.Unpack(resumed):
                del events[resumed.num_kept :]
            else:
                events.append(body)
    return events
