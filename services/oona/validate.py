"""What is wrong with a request to Oona; pure functions over the messages."""

import re

from esper.oona.v1 import event_pb2
from esper.services.serving.checks import check_number
from esper.services.serving.checks import check_page_size
from esper.services.serving.errors import FieldViolation
from esper.services.store.requests import check_request_id

TOPIC = re.compile(r"[a-z0-9._-]{1,128}", re.ASCII)
MAX_KEY_BYTES = 256
MAX_BODY_BYTES = 1 << 20
MAX_OFFSETS = 1000
MAX_IN_FLIGHT = 1024
MIN_TIMEOUT_S, MAX_TIMEOUT_S = 0.1, 43_200.0
MAX_AGE_S = 100 * 365.25 * 24 * 3600
MIN_BYTES = 1024


def check_topic(topic: str) -> list[FieldViolation]:
    """Checks the form of a topic's name."""
    if TOPIC.fullmatch(topic):
        return []
    rule = "must be 1 to 128 of a-z, 0-9, dot, hyphen and underscore"
    return [FieldViolation("topic", topic, rule)]


def check_group(group: str) -> list[FieldViolation]:
    """Checks the form of a group's name."""
    if TOPIC.fullmatch(group):
        return []
    rule = "must be 1 to 128 of a-z, 0-9, dot, hyphen and underscore"
    return [FieldViolation("group", group, rule)]


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
    """Checks topic, offset and what belongs to a group."""
    found = check_topic(request.topic)
    if request.HasField("start_offset"):
        found += check_number("start_offset", request.start_offset, low=0)
    if request.group:
        found += check_group(request.group)
        if request.visibility_timeout_s != 0:
            timeout_s = request.visibility_timeout_s
            found += check_number("visibility_timeout_s", timeout_s, MIN_TIMEOUT_S, MAX_TIMEOUT_S)
        found += check_number("max_in_flight", request.max_in_flight, 0, MAX_IN_FLIGHT)
        return found
    for field in ("visibility_timeout_s", "max_in_flight"):
        if getattr(request, field) != 0:
            found.append(FieldViolation(field, getattr(request, field), "needs a group"))
    return found


def acknowledge(request: event_pb2.AcknowledgeRequest) -> list[FieldViolation]:
    """Checks topic, group and offsets."""
    found = [*check_topic(request.topic), *check_group(request.group)]
    if len(request.offsets) > MAX_OFFSETS:
        rule = f"are too many: at most {MAX_OFFSETS}"
        return [*found, FieldViolation("offsets", len(request.offsets), rule)]
    for index, offset in enumerate(request.offsets):
        found += check_number(f"offsets[{index}]", offset, low=0)
    return found


def set_retention(request: event_pb2.SetRetentionRequest) -> list[FieldViolation]:
    """Checks topic, bounds and request id."""
    found = [*check_topic(request.topic), *check_request_id(request.request_id)]
    retention = request.retention
    if retention.max_age_s != 0:
        found += check_number("retention.max_age_s", retention.max_age_s, 1, MAX_AGE_S)
    if retention.max_bytes != 0:
        found += check_number("retention.max_bytes", retention.max_bytes, low=MIN_BYTES)
    return found


def list_topics(request: event_pb2.ListTopicsRequest) -> list[FieldViolation]:
    """Checks page size."""
    return check_page_size(request.page_size)
