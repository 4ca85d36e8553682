"""Client of Oona: publish events and follow topics."""

from collections.abc import Iterable
from typing import TypeAlias

import grpc
from google.protobuf.message import Message

from esper.common.following import Following
from esper.common.rpc import CALL_TIMEOUT_S
from esper.common.rpc import packed
from esper.common.rpc import readable_errors
from esper.oona.v1 import event_pb2
from esper.oona.v1 import event_pb2_grpc

Subscription: TypeAlias = Following[event_pb2.SubscribeResponse, event_pb2.Event]
"""The events of one topic, in order, without end."""


class OonaClient:
    """Writes to and reads from an event log; safe to use from several threads.

    Every call raises `esper.common.rpc.RpcError` where the server refuses it or does not answer.

    Args:
        channel: An open channel to a server of Oona.
    """

    def __init__(self, channel: grpc.Channel) -> None:
        self._events = event_pb2_grpc.EventServiceStub(channel)

    def publish(
        self,
        topic: str,
        message: Message,
        key: str = "",
        request_id: str = "",
        timeout_s: float = CALL_TIMEOUT_S,
    ) -> int:
        """Appends one event and returns its offset, once it is durable.

        Args:
            topic: 1 to 128 of a-z, 0-9, dot, hyphen and underscore.
            message: The event's body, packed into an Any unless it is one.
            key: Groups related events, such as a run's id.
            request_id: Makes it safe to publish again after an error; empty means none.
            timeout_s: Deadline, in seconds.
        """
        request = event_pb2.PublishRequest(
            topic=topic, key=key, body=packed(message), request_id=request_id
        )
        return self._publish([request], timeout_s)[0]

    def publish_many(
        self,
        topic: str,
        messages: Iterable[Message],
        key: str = "",
        timeout_s: float = CALL_TIMEOUT_S,
    ) -> list[int]:
        """Appends events in order and returns their offsets, once all are durable.

        Args:
            topic: As for `publish`.
            messages: The bodies.
            key: As for `publish`, the same for all.
            timeout_s: Deadline of the whole, in seconds.
        """
        requests = [
            event_pb2.PublishRequest(topic=topic, key=key, body=packed(message))
            for message in messages
        ]
        return self._publish(requests, timeout_s)

    def _publish(self, requests: list[event_pb2.PublishRequest], timeout_s: float) -> list[int]:
        with readable_errors():
            responses = self._events.Publish(iter(requests), timeout=timeout_s)
            return [response.offset for response in responses]

    def subscribe(self, topic: str, start_offset: int | None = None) -> Subscription:
        """Returns the events of a topic from an offset on, then those that follow.

        Args:
            topic: The topic; one without events is waited for.
            start_offset: First event wanted; None means those published after this call returns.
        """
        request = event_pb2.SubscribeRequest(topic=topic, start_offset=start_offset)
        call = self._events.Subscribe(request)
        if start_offset is None:
            call.initial_metadata()  # comes once the server has noted the position
        return Subscription(call, lambda response: response.event)

    def list_topics(self) -> list[event_pb2.Topic]:
        """Returns every topic with its extent, by name."""
        with readable_errors():
            request = event_pb2.ListTopicsRequest()
            return list(self._events.ListTopics(request, timeout=CALL_TIMEOUT_S).topics)
