"""Client of Urza's runs: record a training as a hash-chained history, read it, verify it."""

from collections.abc import Iterable
from collections.abc import Iterator
from typing import TypeAlias

import grpc
from google.protobuf.message import Message

from esper.common.following import Following
from esper.common.rpc import CALL_TIMEOUT_S
from esper.common.rpc import readable_errors
from esper.urza import requests
from esper.urza.v1 import run_pb2
from esper.urza.v1 import run_pb2_grpc

RunWatch: TypeAlias = Following[run_pb2.WatchRunResponse, run_pb2.RunEvent]
"""The events of one run, in order, without end."""


class RunClient:
    """Writes and reads histories of runs; safe to use from several threads.

    Every call raises `esper.common.rpc.RpcError` where the server refuses it or does not answer.
    All but `append_run_events` and `watch_run` are repeated for a short while where the server was
    away, without a second effect.

    Args:
        channel: An open channel to a server of Urza.
    """

    def __init__(self, channel: grpc.Channel) -> None:
        self._runs = run_pb2_grpc.RunServiceStub(channel)

    def create_run(self, run_id: str = "", task: str = "") -> run_pb2.Run:
        """Opens a run and returns it.

        Args:
            run_id: Last part of its name: 1 to 64 of a-z, 0-9 and hyphen. Empty lets the server
                choose.
            task: What is trained, for people; at most 256 characters.

        Raises:
            RpcError: ALREADY_EXISTS where another run has the id.
        """
        request = requests.create_run(run_id, task)
        with readable_errors():
            return self._runs.CreateRun(request, timeout=CALL_TIMEOUT_S).run

    def append_run_events(
        self,
        name: str,
        messages: Iterable[Message],
        expected_sequence: int,
        timeout_s: float = CALL_TIMEOUT_S,
    ) -> run_pb2.AppendRunEventsResponse:
        """Appends events that happen now and returns the run's new extent, once all are durable.

        After an error, `get_run` tells how many events the run has: some of these may be among
        them, and then the first ones.

        Args:
            name: `runs/{id}`.
            messages: The bodies, at least one, each packed into an Any unless it is one.
            expected_sequence: Sequence number that the first must get.
            timeout_s: Deadline of the whole, in seconds.

        Raises:
            RpcError: ABORTED where the run has another number of events, as another writer was
                faster; the metadata say how many (`num_events`).
            ValueError: Where there is no message.
        """
        events = requests.append_run_events(name, messages, expected_sequence)
        with readable_errors():
            return self._runs.AppendRunEvents(iter(events), timeout=timeout_s)

    def get_run(self, name: str) -> run_pb2.Run:
        """Returns the record of `runs/{id}`."""
        request = run_pb2.GetRunRequest(name=name)
        with readable_errors():
            return self._runs.GetRun(request, timeout=CALL_TIMEOUT_S).run

    def list_runs(self) -> Iterator[run_pb2.Run]:
        """Yields all runs, newest first."""
        request = run_pb2.ListRunsRequest(page_size=requests.PAGE_SIZE)
        while True:
            with readable_errors():
                page = self._runs.ListRuns(request, timeout=CALL_TIMEOUT_S)
            yield from page.runs
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    def watch_run(self, name: str, start_sequence: int = 0) -> RunWatch:
        """Returns the events of a run from a sequence number on, then those that follow.

        Args:
            name: `runs/{id}`.
            start_sequence: First event wanted; the run's number of events waits for the next.
        """
        request = run_pb2.WatchRunRequest(name=name, start_sequence=start_sequence)
        return RunWatch(self._runs.WatchRun(request), lambda response: response.event)

    def verify_run(self, name: str, timeout_s: float = CALL_TIMEOUT_S) -> run_pb2.VerifyRunResponse:
        """Recomputes the hash chain of a run and returns whether, or where, it is broken.

        Args:
            name: `runs/{id}`.
            timeout_s: Deadline, in seconds.
        """
        request = run_pb2.VerifyRunRequest(name=name)
        with readable_errors():
            return self._runs.VerifyRun(request, timeout=timeout_s)
