"""Client of Oona: publish events and follow topics."""

import time
from collections.abc import Iterable
from typing import TypeAlias

import grpc
from google.protobuf.message import Message

from esper.common.following import Following
from esper.common.retries import pauses_s
from esper.common.retries import was_away
from esper.common.rpc import CALL_TIMEOUT_S
from esper.common.rpc import RpcError
from esper.common.rpc import readable_errors
from esper.oona import requests
from esper.oona.v1 import event_pb2
from esper.oona.v1 import event_pb2_grpc

Subscription: TypeAlias = Following[event_pb2.SubscribeResponse, event_pb2.Event]
"""The events of one topic, in order, without end."""

GroupSubscription: TypeAlias = Following[event_pb2.SubscribeResponse, event_pb2.SubscribeResponse]
"""What one member of a consumer group is given, without end."""


class OonaClient:
    """Writes to and reads from an event log; safe to use from several threads.

    Every call raises `esper.common.rpc.RpcError` where the server refuses it or does not answer.
    All but subscriptions are repeated for a short while where the server was away, without a second
    effect.

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
            request_id: Makes it safe to publish again after an error; empty takes a new one.
            timeout_s: Deadline of each attempt, in seconds.
        """
        return self._publish(requests.publish(topic, [message], key, request_id), timeout_s)[0]

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
            timeout_s: Deadline of each attempt at the whole, in seconds.
        """
        return self._publish(requests.publish(topic, messages, key), timeout_s)

    def _publish(self, events: list[event_pb2.PublishRequest], timeout_s: float) -> list[int]:
        pauses = pauses_s()
        while True:
            try:
                with readable_errors():
                    responses = self._events.Publish(iter(events), timeout=timeout_s)
                    return [response.offset for response in responses]
            except RpcError as error:
                pause_s = next(pauses, None)
                if pause_s is None or not was_away(error):
                    raise
            time.sleep(pause_s)

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

    def subscribe_group(
        self,
        topic: str,
        group: str,
        start_offset: int | None = None,
        visibility_timeout_s: float = 30.0,
        max_in_flight: int = 64,
    ) -> GroupSubscription:
        """Returns the events of a topic that fall to this member of a consumer group.

        Every event goes to one member, and again to one of them when it has not been acknowledged
        in time. Each response has the event and how often it has been delivered
        (`delivery_count`), or a `gap`: events that were dropped by the topic's retention before the
        group was done with them.

        Args:
            topic: The topic; one without events is waited for.
            group: The group's name, of the same form as a topic's; one that is new is made.
            start_offset: First event of a new group; None means those published after this call
                returns. A group that exists goes on where it was.
            visibility_timeout_s: How long an event is kept from the other members, 0.1 to 43200.
            max_in_flight: The most events that this member holds unacknowledged, 1 to 1024.
        """
        request = requests.subscribe_group(
            topic, group, start_offset, visibility_timeout_s, max_in_flight
        )
        call = self._events.Subscribe(request)
        call.initial_metadata()  # comes once the group's position is stored
        return GroupSubscription(call, lambda response: response)

    def acknowledge(self, topic: str, group: str, offsets: Iterable[int]) -> int:
        """Marks events as done for a group and returns how many were not before, once durable.

        Args:
            topic: The topic.
            group: The group.
            offsets: At most 1000.
        """
        request = event_pb2.AcknowledgeRequest(topic=topic, group=group, offsets=offsets)
        with readable_errors():
            return self._events.Acknowledge(request, timeout=CALL_TIMEOUT_S).num_acknowledged

    def set_retention(
        self, topic: str, max_age_s: float = 0.0, max_bytes: int = 0
    ) -> event_pb2.Topic:
        """Bounds what a topic keeps, and returns the topic.

        Args:
            topic: The topic; one that is new is made.
            max_age_s: How long an event is kept, in seconds; 0 means seven days.
            max_bytes: How much is kept; 0 means 1 GiB.
        """
        request = requests.set_retention(topic, max_age_s, max_bytes)
        with readable_errors():
            return self._events.SetRetention(request, timeout=CALL_TIMEOUT_S).topic

    def list_topics(self) -> list[event_pb2.Topic]:
        """Returns every topic with its extent and its groups, by name."""
        topics: list[event_pb2.Topic] = []
        request = event_pb2.ListTopicsRequest(page_size=requests.PAGE_SIZE)
        while True:
            with readable_errors():
                page = self._events.ListTopics(request, timeout=CALL_TIMEOUT_S)
            topics += page.topics
            if not page.next_page_token:
                return topics
            request.page_token = page.next_page_token
