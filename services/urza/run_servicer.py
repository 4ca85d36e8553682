"""The gRPC face of the runs."""

import asyncio
from collections.abc import AsyncIterator

from esper.services.serving.context import CallContext
from esper.services.serving.errors import invalid
from esper.services.serving.errors import require
from esper.services.serving.errors import unavailable
from esper.services.store.followers import first_of
from esper.services.store.waking import awaitable
from esper.services.urza import validate
from esper.services.urza.names import check_run_name
from esper.services.urza.runs import Runs
from esper.urza.v1 import run_pb2
from esper.urza.v1 import run_pb2_grpc

MAX_WAITING = 64
"""Events of one stream that may wait for their commit; it is read no further then."""

# The methods are documented in proto/esper/urza/v1.
# ruff: noqa: D102, N802


class RunServicer(run_pb2_grpc.RunServiceServicer):
    """Serves `esper.urza.v1.RunService`.

    Args:
        runs: The runs.
        stopping: Set when the server drains; watchers are sent away then.
    """

    def __init__(self, runs: Runs, stopping: asyncio.Event) -> None:
        self._runs = runs
        self._stopping = stopping

    async def CreateRun(
        self, request: run_pb2.CreateRunRequest, context: CallContext
    ) -> run_pb2.CreateRunResponse:
        require(validate.create_run(request))
        return await awaitable(self._runs.create(request))

    async def AppendRunEvents(
        self,
        request_iterator: AsyncIterator[run_pb2.AppendRunEventsRequest],
        context: CallContext,
    ) -> run_pb2.AppendRunEventsResponse:
        # Events to come, in order; then None, or what was wrong with the message after them.
        waiting: asyncio.Queue[run_pb2.AppendRunEventsRequest | Exception | None]
        waiting = asyncio.Queue(MAX_WAITING)
        name = ""

        async def take_all() -> None:
            nonlocal name
            end: Exception | None = None
            try:
                async for request in request_iterator:
                    name = name or request.run
                    require(validate.append_run_event(request, name))
                    if not request.HasField("event_time"):
                        request.event_time.GetCurrentTime()
                    await waiting.put(request)
            except Exception as problem:  # raised below, once what came before is durable
                end = problem
            await waiting.put(end)

        taking = asyncio.create_task(take_all())
        answer: run_pb2.AppendRunEventsResponse | None = None
        try:
            entry = await waiting.get()
            while isinstance(entry, run_pb2.AppendRunEventsRequest):
                # One batch after the other: none may be stored behind one that was refused.
                batch = []
                while isinstance(entry, run_pb2.AppendRunEventsRequest):
                    batch.append(entry)
                    if waiting.empty() or len(batch) == MAX_WAITING:
                        break
                    entry = waiting.get_nowait()
                run, problem = await awaitable(self._runs.append(name, batch))
                if problem is not None:
                    raise problem
                answer = run_pb2.AppendRunEventsResponse(num_events=run.num_events, head=run.head)
                if isinstance(entry, run_pb2.AppendRunEventsRequest):
                    entry = await waiting.get()
            if entry is not None:
                raise entry
        finally:
            taking.cancel()
        if answer is None:
            raise invalid("run", None, "is required in the first message")
        return answer

    async def GetRun(
        self, request: run_pb2.GetRunRequest, context: CallContext
    ) -> run_pb2.GetRunResponse:
        require(check_run_name("name", request.name))
        return run_pb2.GetRunResponse(run=self._runs.get(request.name))

    async def ListRuns(
        self, request: run_pb2.ListRunsRequest, context: CallContext
    ) -> run_pb2.ListRunsResponse:
        require(validate.list_runs(request))
        return await asyncio.to_thread(self._runs.list_page, request)

    async def WatchRun(
        self, request: run_pb2.WatchRunRequest, context: CallContext
    ) -> AsyncIterator[run_pb2.WatchRunResponse]:
        require(validate.watch_run(request))
        sequence = request.start_sequence
        with self._runs.followers.following(request.name) as news:
            while not self._stopping.is_set():
                news.clear()
                events = await asyncio.to_thread(self._runs.read, request.name, sequence)
                for event in events:
                    yield run_pb2.WatchRunResponse(event=event)
                sequence += len(events)
                if not events:
                    await first_of(news, self._stopping)
        raise unavailable("the server is stopping; watch again from the next sequence number")

    async def VerifyRun(
        self, request: run_pb2.VerifyRunRequest, context: CallContext
    ) -> run_pb2.VerifyRunResponse:
        require(check_run_name("name", request.name))
        steps = self._runs.verify(request.name)
        outcome = None
        while outcome is None:
            outcome = await asyncio.to_thread(next, steps)
        return outcome
