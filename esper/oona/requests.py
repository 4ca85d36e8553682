"""The requests that both clients of Oona make."""

import uuid
from collections.abc import Iterable

from google.protobuf.message import Message

from esper.common.rpc import packed
from esper.oona.v1 import event_pb2

PAGE_SIZE = 200


def publish(
    topic: str, messages: Iterable[Message], key: str, request_id: str = ""
) -> list[event_pb2.PublishRequest]:
    """Returns a request for each message; each has an id, so that it can be sent again.

    Args:
        topic: The topic.
        messages: The bodies.
        key: The key of all.
        request_id: The id, for a single message; empty takes a new one for each.
    """
    return [
        event_pb2.PublishRequest(
            topic=topic, key=key, body=packed(message), request_id=request_id or str(uuid.uuid4())
        )
        for message in messages
    ]


def subscribe_group(
    topic: str,
    group: str,
    start_offset: int | None,
    visibility_timeout_s: float,
    max_in_flight: int,
) -> event_pb2.SubscribeRequest:
    """Asks for a member's share of a topic."""
    return event_pb2.SubscribeRequest(
        topic=topic,
        start_offset=start_offset,
        group=group,
        visibility_timeout_s=visibility_timeout_s,
        max_in_flight=max_in_flight,
    )


def set_retention(topic: str, max_age_s: float, max_bytes: int) -> event_pb2.SetRetentionRequest:
    """Asks to bound what a topic keeps."""
    retention = event_pb2.Retention(max_age_s=max_age_s, max_bytes=max_bytes)
    return event_pb2.SetRetentionRequest(
        topic=topic, retention=retention, request_id=str(uuid.uuid4())
    )
