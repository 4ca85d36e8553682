"""Client of Oona for asyncio: the calls of `esper.oona.client`, under the same names."""

import asyncio
from collections.abc import Iterable
from typing import TypeAlias

import grpc
from google.protobuf.message import Message

from esper.common.following import AsyncFollowing
from esper.common.retries import pauses_s
from esper.common.retries import was_away
from esper.common.rpc import CALL_TIMEOUT_S
from esper.common.rpc import RpcError
from esper.common.rpc import readable_errors
from esper.oona import requests
from esper.oona.v1 import event_pb2
from esper.oona.v1 import event_pb2_grpc

AsyncSubscription: TypeAlias = AsyncFollowing[event_pb2.SubscribeResponse, event_pb2.Event]
"""The events of one topic, in order, without end."""

AsyncGroupSubscription: TypeAlias = AsyncFollowing[
    event_pb2.SubscribeResponse, event_pb2.SubscribeResponse
]
"""What one member of a consumer group is given, without end."""


class AsyncOonaClient:
    """`esper.oona.client.OonaClient` for one event loop; see there for what each call does.

    Args:
        channel: An open channel to a server of Oona.
    """

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._events: event_pb2_grpc.EventServiceAsyncStub = event_pb2_grpc.EventServiceStub(
            channel
        )

    async def publish(
        self,
        topic: str,
        message: Message,
        key: str = "",
        request_id: str = "",
        timeout_s: float = CALL_TIMEOUT_S,
    ) -> int:
        """Appends one event and returns its offset, once it is durable."""
        events = requests.publish(topic, [message], key, request_id)
        return (await self._publish(events, timeout_s))[0]

    async def publish_many(
        self,
        topic: str,
        messages: Iterable[Message],
        key: str = "",
        timeout_s: float = CALL_TIMEOUT_S,
    ) -> list[int]:
        """Appends events in order and returns their offsets, once all are durable."""
        return await self._publish(requests.publish(topic, messages, key), timeout_s)

    async def _publish(self, events: list[event_pb2.PublishRequest], timeout_s: float) -> list[int]:
        pauses = pauses_s()
        while True:
            try:
                with readable_errors():
                    responses = self._events.Publish(iter(events), timeout=timeout_s)
                    return [response.offset async for response in responses]
            except RpcError as error:
                pause_s = next(pauses, None)
                if pause_s is None or not was_away(error):
                    raise
            await asyncio.sleep(pause_s)

    async def subscribe(self, topic: str, start_offset: int | None = None) -> AsyncSubscription:
        """Returns the events of a topic from an offset on, then those that follow."""
        request = event_pb2.SubscribeRequest(topic=topic, start_offset=start_offset)
        call = self._events.Subscribe(request)
        if start_offset is None:
            await call.initial_metadata()  # comes once the server has noted the position
        return AsyncSubscription(call, lambda response: response.event)

    async def subscribe_group(
        self,
        topic: str,
        group: str,
        start_offset: int | None = None,
        visibility_timeout_s: float = 30.0,
        max_in_flight: int = 64,
    ) -> AsyncGroupSubscription:
        """Returns the events of a topic that fall to this member of a consumer group."""
        request = requests.subscribe_group(
            topic, group, start_offset, visibility_timeout_s, max_in_flight
        )
        call = self._events.Subscribe(request)
        await call.initial_metadata()  # comes once the group's position is stored
        return AsyncGroupSubscription(call, lambda response: response)

    async def acknowledge(self, topic: str, group: str, offsets: Iterable[int]) -> int:
        """Marks events as done for a group and returns how many were not before, once durable."""
        request = event_pb2.AcknowledgeRequest(topic=topic, group=group, offsets=offsets)
        with readable_errors():
            answer = await self._events.Acknowledge(request, timeout=CALL_TIMEOUT_S)
        return answer.num_acknowledged

    async def set_retention(
        self, topic: str, max_age_s: float = 0.0, max_bytes: int = 0
    ) -> event_pb2.Topic:
        """Bounds what a topic keeps, and returns the topic."""
        request = requests.set_retention(topic, max_age_s, max_bytes)
        with readable_errors():
            return (await self._events.SetRetention(request, timeout=CALL_TIMEOUT_S)).topic

    async def list_topics(self) -> list[event_pb2.Topic]:
        """Returns every topic with its extent and its groups, by name."""
        topics: list[event_pb2.Topic] = []
        request = event_pb2.ListTopicsRequest(page_size=requests.PAGE_SIZE)
        while True:
            with readable_errors():
                page = await self._events.ListTopics(request, timeout=CALL_TIMEOUT_S)
            topics += page.topics
            if not page.next_page_token:
                return topics
            request.page_token = page.next_page_token
