"""The log itself: topics of numbered events, and who waits for more."""

import time
from collections.abc import Callable
from concurrent.futures import Future

from google.protobuf.timestamp_pb2 import Timestamp

from esper.oona.v1 import event_pb2
from esper.services.serving.errors import out_of_range
from esper.services.store.engine import Store
from esper.services.store.followers import Followers
from esper.services.store.opening import Row
from esper.services.store.requests import RequestTable
from esper.services.store.requests import fingerprint

TABLES = ("topics", "events", "requests")
REQUEST_CAPACITY = 1_000_000
MAX_BATCH_EVENTS = 256
MAX_BATCH_BYTES = 1 << 20

_NUMBER_BYTES = 8


def _key(topic: str, offset: int) -> bytes:
    # A topic's name has no zero byte, so no topic's keys lie among another's.
    return topic.encode() + b"\0" + offset.to_bytes(_NUMBER_BYTES, "big")


class EventLog:
    """The events of one Oona. To be used from one event loop, whose threads may read.

    Args:
        store: Holds `TABLES`.
        now: Gives the time of day in seconds since 1970, for `publish_time` alone.
    """

    def __init__(self, store: Store, now: Callable[[], float] = time.time) -> None:
        self._store = store
        self._now = now
        self._requests = RequestTable(store, "requests", REQUEST_CAPACITY)
        self.followers = Followers()

    def append(self, request: event_pb2.PublishRequest) -> "Future[int]":
        """Appends an event and returns the future of its offset, done once the event is durable.

        A request id that the topic has seen before gives the offset of then and appends nothing.
        """
        scope = f"Publish:{request.topic}"
        asked = fingerprint(scope, request)

        def work(row: Row) -> int:
            known = self._requests.recall(row, scope, request.request_id, asked)
            if known is not None:
                return int.from_bytes(known, "big")
            first, offset = self._extent(row, request.topic)
            stamp = Timestamp()
            stamp.FromNanoseconds(int(self._now() * 1e9))
            event = event_pb2.Event(
                topic=request.topic,
                offset=offset,
                publish_time=stamp,
                key=request.key,
                body=request.body,
            )
            content = event.SerializeToString()
            row.put(_key(request.topic, offset), content, db=self._store.table("events"))
            self._set_extent(row, request.topic, first, offset + 1)
            number = offset.to_bytes(_NUMBER_BYTES, "big")
            self._requests.remember(row, scope, request.request_id, asked, number)
            return offset

        future = self._store.submit(work, request.ByteSize())
        future.add_done_callback(lambda _: self.followers.wake(request.topic))
        return future

    def read(self, topic: str, offset: int) -> list[event_pb2.Event]:
        """Returns the next events from `offset` on, a bounded batch; empty where there are none.

        Raises:
            ServiceError: OUT_OF_RANGE where `offset` is no longer kept, or beyond the next event.
        """
        events: list[event_pb2.Event] = []
        size_bytes = 0
        with self._store.reading() as row:
            first, following = self._extent(row, topic)
            if not first <= offset <= following:
                raise out_of_range(
                    "OFFSET",
                    f"topic {topic} holds the offsets {first} to {following}, not {offset}",
                    first_offset=str(first),
                    next_offset=str(following),
                )
            cursor = row.cursor(db=self._store.table("events"))
            going_on = cursor.set_range(_key(topic, offset))
            last = _key(topic, following)
            while going_on and cursor.key() < last:
                content = cursor.value()
                size_bytes += len(content)
                if events and (len(events) == MAX_BATCH_EVENTS or size_bytes > MAX_BATCH_BYTES):
                    break
                events.append(event_pb2.Event.FromString(content))
                going_on = cursor.next()
        return events

    def next_offset(self, topic: str) -> int:
        """Returns the offset that the next event of a topic gets."""
        with self._store.reading() as row:
            return self._extent(row, topic)[1]

    def topics(self) -> list[event_pb2.Topic]:
        """Returns every topic with its extent, by name."""
        with self._store.reading() as row:
            return [
                event_pb2.Topic(name=name.decode(), first_offset=first, next_offset=following)
                for name, value in row.cursor(db=self._store.table("topics"))
                for first, following in [_decode_extent(value)]
            ]

    def _extent(self, row: Row, topic: str) -> tuple[int, int]:
        value = row.get(topic.encode(), db=self._store.table("topics"))
        return (0, 0) if value is None else _decode_extent(value)

    def _set_extent(self, row: Row, topic: str, first: int, following: int) -> None:
        value = first.to_bytes(_NUMBER_BYTES, "big") + following.to_bytes(_NUMBER_BYTES, "big")
        row.put(topic.encode(), value, db=self._store.table("topics"))


def _decode_extent(value: bytes) -> tuple[int, int]:
    first, following = value[:_NUMBER_BYTES], value[_NUMBER_BYTES:]
    return int.from_bytes(first, "big"), int.from_bytes(following, "big")
