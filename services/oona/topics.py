"""The rows of topics: how far each extends, how much it holds, how long it keeps it."""

import struct
from dataclasses import dataclass

from esper.oona.v1 import event_pb2
from esper.services.serving.errors import out_of_range
from esper.services.store.opening import Database
from esper.services.store.opening import Row
from esper.services.store.seals import unseal

QUARANTINE_TABLE = "event_quarantine"
"""Damaged events, under the keys that they had."""

DEFAULT_MAX_AGE_S = 7 * 24 * 3600.0
DEFAULT_MAX_BYTES = 1 << 30

_FORM = struct.Struct(">QQQdQ")
_NUMBER_BYTES = 8


@dataclass
class TopicState:
    """What is known of one topic.

    Attributes:
        first: Oldest offset kept.
        following: Offset of the next event.
        size_bytes: Size of the rows of the events kept.
        max_age_s: As in `esper.oona.v1.Retention`; 0 is the default.
        max_bytes: Likewise.
    """

    first: int = 0
    following: int = 0
    size_bytes: int = 0
    max_age_s: float = 0.0
    max_bytes: int = 0

    def encode(self) -> bytes:
        """Returns the row's value."""
        return _FORM.pack(
            self.first, self.following, self.size_bytes, self.max_age_s, self.max_bytes
        )

    @classmethod
    def decode(cls, value: bytes | None) -> "TopicState":
        """Returns what a row's value says; no value is a new topic."""
        return cls() if value is None else cls(*_FORM.unpack(value))

    def retention(self) -> event_pb2.Retention:
        """Returns what bounds the topic, with the defaults filled in."""
        return event_pb2.Retention(
            max_age_s=self.max_age_s or DEFAULT_MAX_AGE_S,
            max_bytes=self.max_bytes or DEFAULT_MAX_BYTES,
        )

    def require_offset(self, topic: str, offset: int) -> None:
        """Raises OUT_OF_RANGE unless `offset` is kept, or that of the next event."""
        if not self.first <= offset <= self.following:
            raise out_of_range(
                "COMPACTED" if offset < self.first else "OFFSET",
                f"topic {topic} holds the offsets {self.first} to {self.following}, not {offset}",
                first_offset=str(self.first),
                next_offset=str(self.following),
            )

    def has_too_much(self) -> bool:
        """Returns whether the oldest event must go for want of room; the newest never must."""
        too_large = self.size_bytes > (self.max_bytes or DEFAULT_MAX_BYTES)
        return too_large and self.following - self.first > 1


def topic_key(topic: str) -> bytes:
    """Returns the key of a topic's row."""
    return topic.encode()


def event_key(topic: str, offset: int) -> bytes:
    """Returns the key of an event's row."""
    # A topic's name has no zero byte, so no topic's keys lie among another's.
    return topic.encode() + b"\0" + offset.to_bytes(_NUMBER_BYTES, "big")


def read_event(row: Row, events: Database, topic: str, offset: int) -> bytes | None:
    """Returns an event as it was stored; None where it is damaged or not there."""
    key = event_key(topic, offset)
    return unseal(key, row.get(key, db=events))


def group_prefix(topic: str) -> bytes:
    """Returns what the keys of the rows of a topic's groups begin with."""
    return topic.encode() + b"\0"


def group_key(topic: str, group: str) -> bytes:
    """Returns the key of a group's row."""
    return group_prefix(topic) + group.encode()


def pending_key(topic: str, group: str, offset: int) -> bytes:
    """Returns the key of the row of an event that a group has been given and not acknowledged."""
    return group_key(topic, group) + b"\0" + offset.to_bytes(_NUMBER_BYTES, "big")
