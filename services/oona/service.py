"""Oona's gRPC face: a thin adapter over the log."""

import asyncio
from collections.abc import AsyncIterator

import grpc

from esper.oona.v1 import event_pb2
from esper.oona.v1 import event_pb2_grpc
from esper.services.oona import log as rows
from esper.services.oona import validate
from esper.services.oona.log import EventLog
from esper.services.serving.context import CallContext
from esper.services.serving.context import ServiceContext
from esper.services.serving.errors import require
from esper.services.serving.errors import unavailable
from esper.services.serving.errors import unimplemented
from esper.services.store.engine import Store
from esper.services.store.opening import Schema

SCHEMA = Schema(rows.TABLES, version=1)
MAX_UNACKNOWLEDGED = 64
"""Events of one Publish stream that may wait for their commit; it is read no further then."""

# The methods are documented in proto/esper/oona/v1.
# ruff: noqa: D102, N802


class EventServicer(event_pb2_grpc.EventServiceServicer):
    """Serves `esper.oona.v1.EventService`.

    Args:
        log: The events.
        stopping: Set when the server drains; subscriptions end then.
    """

    def __init__(self, log: EventLog, stopping: asyncio.Event) -> None:
        self._log = log
        self._stopping = stopping

    async def Publish(
        self,
        request_iterator: AsyncIterator[event_pb2.PublishRequest],
        context: CallContext,
    ) -> AsyncIterator[event_pb2.PublishResponse]:
        # Offsets to come, in order; then None, or what was wrong with the request after them.
        pending: asyncio.Queue[tuple[str, asyncio.Future[int]] | Exception | None]
        pending = asyncio.Queue(MAX_UNACKNOWLEDGED)

        async def append_all() -> None:
            end: Exception | None = None
            try:
                async for request in request_iterator:
                    require(validate.publish(request))
                    offset = asyncio.wrap_future(self._log.append(request))
                    await pending.put((request.request_id, offset))
            except Exception as problem:  # raised below, once what came before is acknowledged
                end = problem
            await pending.put(end)

        appending = asyncio.create_task(append_all())
        try:
            while isinstance(entry := await pending.get(), tuple):
                request_id, offset = entry
                yield event_pb2.PublishResponse(offset=await offset, request_id=request_id)
            if entry is not None:
                raise entry
        finally:
            appending.cancel()

    async def Subscribe(
        self, request: event_pb2.SubscribeRequest, context: CallContext
    ) -> AsyncIterator[event_pb2.SubscribeResponse]:
        require(validate.subscribe(request))
        if request.group:
            raise unimplemented("esper.oona.v1.EventService/Subscribe with a group")
        offset = request.start_offset
        if not request.HasField("start_offset"):
            offset = self._log.next_offset(request.topic)
        # The headers tell the caller that events from now on will come.
        await context.send_initial_metadata(())
        stopping = asyncio.create_task(self._stopping.wait())
        try:
            with self._log.followers.following(request.topic) as news:
                while not self._stopping.is_set():
                    news.clear()
                    events = await asyncio.to_thread(self._log.read, request.topic, offset)
                    for event in events:
                        yield event_pb2.SubscribeResponse(event=event)
                    offset += len(events)
                    if not events:
                        arrival = asyncio.create_task(news.wait())
                        await asyncio.wait((arrival, stopping), return_when=asyncio.FIRST_COMPLETED)
                        arrival.cancel()
        finally:
            stopping.cancel()
        raise unavailable("the server is stopping; subscribe again from the next offset")

    async def Acknowledge(
        self, request: event_pb2.AcknowledgeRequest, context: CallContext
    ) -> event_pb2.AcknowledgeResponse:
        raise unimplemented("esper.oona.v1.EventService/Acknowledge")

    async def SetRetention(
        self, request: event_pb2.SetRetentionRequest, context: CallContext
    ) -> event_pb2.SetRetentionResponse:
        raise unimplemented("esper.oona.v1.EventService/SetRetention")

    async def ListTopics(
        self, request: event_pb2.ListTopicsRequest, context: CallContext
    ) -> event_pb2.ListTopicsResponse:
        topics = await asyncio.to_thread(self._log.topics)
        return event_pb2.ListTopicsResponse(topics=topics)


class OonaService:
    """Oona as a service of the shell; its store is `oona` in the data directory.

    Raises:
        StartupError: Where the directory cannot be used.
    """

    full_names = ("esper.oona.v1.EventService",)

    def __init__(self, context: ServiceContext) -> None:
        self._store = Store(context.data_dir / "oona", SCHEMA)
        self._servicer = EventServicer(EventLog(self._store), context.stopping)

    def add_to(self, server: grpc.aio.Server) -> None:
        """Registers the servicer."""
        event_pb2_grpc.add_EventServiceServicer_to_server(self._servicer, server)

    async def close(self) -> None:
        """Closes the store after its last write."""
        await asyncio.to_thread(self._store.close)


def create(context: ServiceContext) -> OonaService:
    """Returns the service."""
    return OonaService(context)
