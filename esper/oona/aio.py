"""Client of Oona for asyncio: the calls of `esper.oona.client`, under the same names."""

from collections.abc import Iterable
from typing import TypeAlias

import grpc
from google.protobuf.message import Message

from esper.common.following import AsyncFollowing
from esper.common.rpc import CALL_TIMEOUT_S
from esper.common.rpc import packed
from esper.common.rpc import readable_errors
from esper.oona.v1 import event_pb2
from esper.oona.v1 import event_pb2_grpc

AsyncSubscription: TypeAlias = AsyncFollowing[event_pb2.SubscribeResponse, event_pb2.Event]
"""The events of one topic, in order, without end."""


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
        request = event_pb2.PublishRequest(
            topic=topic, key=key, body=packed(message), request_id=request_id
        )
        return (await self._publish([request], timeout_s))[0]

    async def publish_many(
        self,
        topic: str,
        messages: Iterable[Message],
        key: str = "",
        timeout_s: float = CALL_TIMEOUT_S,
    ) -> list[int]:
        """Appends events in order and returns their offsets, once all are durable."""
        requests = [
            event_pb2.PublishRequest(topic=topic, key=key, body=packed(message))
            for message in messages
        ]
        return await self._publish(requests, timeout_s)

    async def _publish(
        self, requests: list[event_pb2.PublishRequest], timeout_s: float
    ) -> list[int]:
        with readable_errors():
            responses = self._events.Publish(iter(requests), timeout=timeout_s)
            return [response.offset async for response in responses]

    async def subscribe(self, topic: str, start_offset: int | None = None) -> AsyncSubscription:
        """Returns the events of a topic from an offset on, then those that follow."""
        request = event_pb2.SubscribeRequest(topic=topic, start_offset=start_offset)
        call = self._events.Subscribe(request)
        if start_offset is None:
            await call.initial_metadata()  # comes once the server has noted the position
        return AsyncSubscription(call, lambda response: response.event)

    async def list_topics(self) -> list[event_pb2.Topic]:
        """Returns every topic with its extent, by name."""
        with readable_errors():
            request = event_pb2.ListTopicsRequest()
            return list((await self._events.ListTopics(request, timeout=CALL_TIMEOUT_S)).topics)
