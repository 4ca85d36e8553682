"""Oona's gRPC face: a thin adapter over the log."""

import asyncio
import logging
from collections import deque
from collections.abc import AsyncGenerator
from collections.abc import AsyncIterator
from contextlib import aclosing

import grpc

from esper.oona.v1 import event_pb2
from esper.oona.v1 import event_pb2_grpc
from esper.services.oona import validate
from esper.services.oona.check import Checker
from esper.services.oona.contents import FOLDER
from esper.services.oona.contents import SCHEMA
from esper.services.oona.groups import Groups
from esper.services.oona.groups import Member
from esper.services.oona.log import EventLog
from esper.services.serving.context import CallContext
from esper.services.serving.context import ServiceContext
from esper.services.serving.errors import ServiceError
from esper.services.serving.errors import require
from esper.services.serving.errors import unavailable
from esper.services.serving.steps import in_steps
from esper.services.store.copies import RowSnapshot
from esper.services.store.engine import Store
from esper.services.store.followers import first_of
from esper.services.store.waking import awaitable

LOG = logging.getLogger("esper.oona")

EXPIRY_INTERVAL_S = 20.0
DEFAULT_IN_FLIGHT = 64
DEFAULT_TIMEOUT_S = 30.0
MAX_UNACKNOWLEDGED = 64
"""Events of one Publish stream that may wait for their commit; it is read no further then."""

# The methods are documented in proto/esper/oona/v1.
# ruff: noqa: D102, N802


class EventServicer(event_pb2_grpc.EventServiceServicer):
    """Serves `esper.oona.v1.EventService`.

    Args:
        log: The events.
        groups: The consumer groups of its topics.
        stopping: Set when the server drains; subscriptions end then.
    """

    def __init__(self, log: EventLog, groups: Groups, stopping: asyncio.Event) -> None:
        self._log = log
        self._groups = groups
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
                    offset = awaitable(self._log.append(request))
                    offset.add_done_callback(_take_note)
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
        responses = self._shared if request.group else self._independent
        async with aclosing(responses(request, context)) as stream:
            async for response in stream:
                yield response
        raise unavailable("the server is stopping; subscribe again")

    async def _independent(
        self, request: event_pb2.SubscribeRequest, context: CallContext
    ) -> AsyncGenerator[event_pb2.SubscribeResponse, None]:
        offset = request.start_offset
        if not request.HasField("start_offset"):
            offset = self._log.next_offset(request.topic)
        # The headers tell the caller that events from now on will come.
        await context.send_initial_metadata(())
        with self._log.followers.following(request.topic) as news:
            while not self._stopping.is_set():
                news.clear()
                events = await asyncio.to_thread(self._log.read, request.topic, offset)
                for event in events:
                    yield event_pb2.SubscribeResponse(event=event)
                offset += len(events)
                if not events:
                    await first_of(news, self._stopping)

    async def _shared(
        self, request: event_pb2.SubscribeRequest, context: CallContext
    ) -> AsyncGenerator[event_pb2.SubscribeResponse, None]:
        start = request.start_offset if request.HasField("start_offset") else None
        group = await self._groups.join(request.topic, request.group, start)
        member = Member(
            request.max_in_flight or DEFAULT_IN_FLIGHT,
            request.visibility_timeout_s or DEFAULT_TIMEOUT_S,
        )
        await context.send_initial_metadata(())
        unsent: deque[event_pb2.SubscribeResponse] = deque()
        try:
            with self._log.followers.following(request.topic, group.followed) as news:
                while not self._stopping.is_set():
                    news.clear()
                    unsent.extend(await group.claim(member))
                    if not unsent:
                        await first_of(news, self._stopping, timeout_s=group.wait_s(member))
                    while unsent:
                        response = unsent.popleft()
                        # A caller that reads slowly may find that its time for an event is over.
                        if response.HasField("gap") or group.holds(member, response.event.offset):
                            yield response
        finally:
            group.release(member, unsent)

    async def Acknowledge(
        self, request: event_pb2.AcknowledgeRequest, context: CallContext
    ) -> event_pb2.AcknowledgeResponse:
        require(validate.acknowledge(request))
        number = await self._groups.acknowledge(request.topic, request.group, request.offsets)
        return event_pb2.AcknowledgeResponse(num_acknowledged=number)

    async def SetRetention(
        self, request: event_pb2.SetRetentionRequest, context: CallContext
    ) -> event_pb2.SetRetentionResponse:
        require(validate.set_retention(request))
        return await awaitable(self._log.set_retention(request))

    async def ListTopics(
        self, request: event_pb2.ListTopicsRequest, context: CallContext
    ) -> event_pb2.ListTopicsResponse:
        require(validate.list_topics(request))
        return await asyncio.to_thread(self._log.topics, request)

    async def CheckLog(
        self, request: event_pb2.CheckLogRequest, context: CallContext
    ) -> AsyncIterator[event_pb2.CheckLogResponse]:
        checker = Checker(self._log.store, quarantine=request.quarantine)
        async with aclosing(in_steps(iter(checker))) as steps:
            async for step in steps:
                yield step

    async def BackupLog(
        self, request: event_pb2.BackupLogRequest, context: CallContext
    ) -> AsyncIterator[event_pb2.BackupLogResponse]:
        taken = await asyncio.to_thread(RowSnapshot, self._log.store)
        try:
            async with aclosing(in_steps(taken.rows())) as pieces:
                async for piece in pieces:
                    yield event_pb2.BackupLogResponse(rows=piece)
        finally:
            await asyncio.shield(asyncio.to_thread(taken.close))


def _take_note(offset: "asyncio.Future[int]") -> None:
    """Looks at the outcome of an event whose stream may have ended before it."""
    if not offset.cancelled():
        offset.exception()


class OonaService:
    """Oona as a service of the shell; its store is `oona` in the data directory.

    Raises:
        StartupError: Where the directory cannot be used.
    """

    full_names = ("esper.oona.v1.EventService",)

    def __init__(self, context: ServiceContext) -> None:
        self._store = Store(context.data_dir / FOLDER, SCHEMA, context.limits)
        self._log = EventLog(self._store)
        groups = Groups(self._store, self._log.followers)
        self._servicer = EventServicer(self._log, groups, context.stopping)
        self._expiring = asyncio.create_task(self._expire())

    def add_to(self, server: grpc.aio.Server) -> None:
        """Registers the servicer."""
        event_pb2_grpc.add_EventServiceServicer_to_server(self._servicer, server)

    async def close(self) -> None:
        """Closes the store after its last write."""
        self._expiring.cancel()
        await asyncio.to_thread(self._store.close)

    async def _expire(self) -> None:
        """Drops what topics keep no longer, now and then."""
        while True:
            await asyncio.sleep(EXPIRY_INTERVAL_S)
            try:
                for topic in await asyncio.to_thread(self._log.topic_names):
                    while await awaitable(self._log.expire(topic)):
                        pass
            except ServiceError as error:  # a disk that is full or fails: the next turn tries again
                LOG.warning("topics could not be trimmed: %s", error)


def create(context: ServiceContext) -> OonaService:
    """Returns the service."""
    return OonaService(context)
