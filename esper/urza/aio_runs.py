"""Client of Urza's runs for asyncio: the calls of `esper.urza.runs`, under the same names."""

from collections.abc import AsyncIterator
from collections.abc import Iterable
from typing import TypeAlias

import grpc
from google.protobuf.message import Message

from esper.common.following import AsyncFollowing
from esper.common.rpc import CALL_TIMEOUT_S
from esper.common.rpc import readable_errors
from esper.urza import requests
from esper.urza.v1 import run_pb2
from esper.urza.v1 import run_pb2_grpc

AsyncRunWatch: TypeAlias = AsyncFollowing[run_pb2.WatchRunResponse, run_pb2.RunEvent]
"""The events of one run, in order, without end."""


class AsyncRunClient:
    """`esper.urza.runs.RunClient` for one event loop; see there for what each call does.

    Args:
        channel: An open channel to a server of Urza.
    """

    def __init__(self, channel: grpc.aio.Channel) -> None:
        # The stubs' own types speak of channels without asyncio only.
        self._runs: run_pb2_grpc.RunServiceAsyncStub = run_pb2_grpc.RunServiceStub(channel)

    async def create_run(self, run_id: str = "", task: str = "") -> run_pb2.Run:
        """Opens a run and returns it."""
        request = requests.create_run(run_id, task)
        with readable_errors():
            return (await self._runs.CreateRun(request, timeout=CALL_TIMEOUT_S)).run

    async def append_run_events(
        self,
        name: str,
        messages: Iterable[Message],
        expected_sequence: int,
        timeout_s: float = CALL_TIMEOUT_S,
    ) -> run_pb2.AppendRunEventsResponse:
        """Appends events that happen now and returns the run's new extent, once all are durable."""
        events = requests.append_run_events(name, messages, expected_sequence)
        with readable_errors():
            return await self._runs.AppendRunEvents(iter(events), timeout=timeout_s)

    async def get_run(self, name: str) -> run_pb2.Run:
        """Returns the record of `runs/{id}`."""
        request = run_pb2.GetRunRequest(name=name)
        with readable_errors():
            return (await self._runs.GetRun(request, timeout=CALL_TIMEOUT_S)).run

    async def list_runs(self) -> AsyncIterator[run_pb2.Run]:
        """Yields all runs, newest first."""
        request = run_pb2.ListRunsRequest(page_size=requests.PAGE_SIZE)
        while True:
            with readable_errors():
                page = await self._runs.ListRuns(request, timeout=CALL_TIMEOUT_S)
            for run in page.runs:
                yield run
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    def watch_run(self, name: str, start_sequence: int = 0) -> AsyncRunWatch:
        """Returns the events of a run from a sequence number on, then those that follow."""
        request = run_pb2.WatchRunRequest(name=name, start_sequence=start_sequence)
        return AsyncRunWatch(self._runs.WatchRun(request), lambda response: response.event)

    async def verify_run(
        self, name: str, timeout_s: float = CALL_TIMEOUT_S
    ) -> run_pb2.VerifyRunResponse:
        """Recomputes the hash chain of a run and returns whether, or where, it is broken."""
        request = run_pb2.VerifyRunRequest(name=name)
        with readable_errors():
            return await self._runs.VerifyRun(request, timeout=timeout_s)
