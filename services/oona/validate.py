"""What is wrong with a request to Oona; pure functions over the messages."""

import re

from esper.oona.v1 import event_pb2
from esper.services.serving.checks import check_number
from esper.services.serving.errors import FieldViolation
from esper.services.store.requests import check_request_id

TOPIC = re.compile(r"[a-z0-9._-]{1,128}", re.ASCII)
MAX_KEY_BYTES = 256
MAX_BODY_BYTES = 1 << 20


def check_topic(topic: str) -> list[FieldViolation]:
    """Checks the form of a topic's name."""
    if TOPIC.fullmatch(topic):
        return []
    rule = "must be 1 to 128 of a-z, 0-9, dot, hyphen and underscore"
    return [FieldViolation("topic", topic, rule)]


def publish(request: event_pb2.PublishRequest) -> list[FieldViolation]:
    """Checks every field of an event."""
    found = [*check_topic(request.topic), *check_request_id(request.request_id)]
    if len(request.key.encode()) > MAX_KEY_BYTES:
        rule = f"must have at most {MAX_KEY_BYTES} bytes"
        found.append(FieldViolation("key", request.key, rule))
    if not request.HasField("body") or not request.body.type_url:
        found.append(FieldViolation("body", None, "is required"))
    elif len(request.body.value) > MAX_BODY_BYTES:
        size = f"{len(request.body.value)} bytes"
        found.append(FieldViolation("body", size, f"must have at most {MAX_BODY_BYTES} bytes"))
    return found


def subscribe(request: event_pb2.SubscribeRequest) -> list[FieldViolation]:
    """Checks topic and offset."""
    found = check_topic(request.topic)
    if request.HasField("start_offset"):
        found += check_number("start_offset", request.start_offset, low=0)
    return found
