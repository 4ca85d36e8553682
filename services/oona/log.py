"""The log itself: topics of numbered events, how long they stay, and who waits for more."""

import time
from collections.abc import Callable
from concurrent.futures import Future

from google.protobuf.timestamp_pb2 import Timestamp

from esper.oona.v1 import event_pb2
from esper.services.oona.clock import SteadyClock
from esper.services.oona.groups import GROUP_TABLES
from esper.services.oona.groups import list_groups
from esper.services.oona.topics import QUARANTINE_TABLE
from esper.services.oona.topics import TopicState
from esper.services.oona.topics import event_key
from esper.services.oona.topics import read_event
from esper.services.oona.topics import topic_key
from esper.services.serving.checks import effective_page_size
from esper.services.serving.errors import ServiceError
from esper.services.serving.errors import data_loss
from esper.services.serving.errors import exhausted
from esper.services.store.engine import Store
from esper.services.store.followers import Followers
from esper.services.store.opening import Row
from esper.services.store.paging import PageTokens
from esper.services.store.requests import RequestTable
from esper.services.store.requests import fingerprint
from esper.services.store.seals import seal

TABLES = ("topics", "events", QUARANTINE_TABLE, "requests", "clock", *GROUP_TABLES)
REQUEST_CAPACITY = 1_000_000
MAX_TOPICS = 10_000
MAX_BATCH_EVENTS = 256
MAX_BATCH_BYTES = 1 << 20
TRIM_ROWS = 1000
"""Events that one transaction drops at most, so that no writer waits long for it."""

CLOCK_KEY = b"last_ns"
_NUMBER_BYTES = 8


class EventLog:
    """The events of one Oona. To be made and used on one event loop, whose threads may read.

    Args:
        store: Holds `TABLES`.
        now: Gives the system's time of day in seconds since 1970; looked at only here.
        elapsed: Gives the seconds since some moment, never going back.

    Attributes:
        store: The rows.
        followers: Wakes those that follow a topic, by its name.
    """

    def __init__(
        self,
        store: Store,
        now: Callable[[], float] = time.time,
        elapsed: Callable[[], float] = time.monotonic,
    ) -> None:
        self.followers = Followers()
        self.store = store
        self._events = store.table("events")
        self._topics = store.table("topics")
        self._requests = RequestTable(store, "requests", REQUEST_CAPACITY)
        self._tokens = PageTokens(store)
        with store.reading() as row:
            last = row.get(CLOCK_KEY, db=store.table("clock")) or b""
        self._clock = SteadyClock(int.from_bytes(last, "big"), now, elapsed)

    def append(self, request: event_pb2.PublishRequest) -> "Future[int]":
        """Appends an event and returns the future of its offset, done once the event is durable.

        A request id that the topic has seen before gives the offset of then and appends nothing.
        What is too much for the topic then is dropped in the same transaction.
        """
        scope = f"Publish:{request.topic}"
        asked = fingerprint(scope, request)

        def work(row: Row) -> int:
            known = self._requests.recall(row, scope, request.request_id, asked)
            if known is not None:
                return int.from_bytes(known, "big")
            state = self._open(row, request.topic)
            offset = state.following
            now_ns = self._clock.now_ns()
            stamp = Timestamp()
            stamp.FromNanoseconds(now_ns)
            event = event_pb2.Event(
                topic=request.topic,
                offset=offset,
                publish_time=stamp,
                key=request.key,
                body=request.body,
            )
            key = event_key(request.topic, offset)
            content = seal(key, event.SerializeToString())
            row.put(key, content, db=self._events)
            row.put(CLOCK_KEY, now_ns.to_bytes(_NUMBER_BYTES, "big"), db=self.store.table("clock"))
            state.following += 1
            state.size_bytes += len(content)
            self._trim(row, request.topic, state)
            row.put(topic_key(request.topic), state.encode(), db=self._topics)
            number = offset.to_bytes(_NUMBER_BYTES, "big")
            self._requests.remember(row, scope, request.request_id, asked, number)
            return offset

        future = self.store.submit(work, request.ByteSize())
        future.add_done_callback(lambda _: self.followers.wake(request.topic))
        return future

    def read(self, topic: str, offset: int) -> list[event_pb2.Event]:
        """Returns the next events from `offset` on, a bounded batch; empty where there are none.

        It ends before an event that is damaged.

        Raises:
            ServiceError: OUT_OF_RANGE where `offset` is no longer kept, or beyond the next event;
                DATA_LOSS where the very event is damaged.
        """
        contents: list[bytes] = []
        size_bytes = 0
        with self.store.reading() as row:
            state = self._state(row, topic)
            state.require_offset(topic, offset)
            for number in range(offset, min(state.following, offset + MAX_BATCH_EVENTS)):
                content = read_event(row, self._events, topic, number)
                if content is None:
                    if not contents:
                        raise _damaged(topic, number)
                    break
                size_bytes += len(content)
                if contents and size_bytes > MAX_BATCH_BYTES:
                    break
                contents.append(content)
        return [event_pb2.Event.FromString(content) for content in contents]

    def next_offset(self, topic: str) -> int:
        """Returns the offset that the next event of a topic gets."""
        with self.store.reading() as row:
            return self._state(row, topic).following

    def topics(self, request: event_pb2.ListTopicsRequest) -> event_pb2.ListTopicsResponse:
        """Returns a page of the topics with their groups, by name."""
        start = self._tokens.decode("topics", request.page_token)
        size = effective_page_size(request.page_size)
        response = event_pb2.ListTopicsResponse()
        with self.store.reading() as row:
            cursor = row.cursor(db=self._topics)
            going_on = cursor.set_range(start)
            while going_on and len(response.topics) < size:
                name = cursor.key().decode()
                response.topics.append(
                    self._described(row, name, TopicState.decode(cursor.value()))
                )
                going_on = cursor.next()
            if going_on:
                response.next_page_token = self._tokens.encode("topics", cursor.key())
        return response

    def set_retention(
        self, request: event_pb2.SetRetentionRequest
    ) -> "Future[event_pb2.SetRetentionResponse]":
        """Bounds what a topic keeps, and drops what is too much of it, or as much as can go."""
        asked = fingerprint("SetRetention", request)

        def work(row: Row) -> event_pb2.SetRetentionResponse:
            known = self._requests.recall(row, "SetRetention", request.request_id, asked)
            if known is not None:
                return event_pb2.SetRetentionResponse.FromString(known)
            state = self._open(row, request.topic)
            state.max_age_s = request.retention.max_age_s
            state.max_bytes = request.retention.max_bytes
            self._trim(row, request.topic, state)
            row.put(topic_key(request.topic), state.encode(), db=self._topics)
            response = event_pb2.SetRetentionResponse(
                topic=self._described(row, request.topic, state)
            )
            answer = response.SerializeToString()
            self._requests.remember(row, "SetRetention", request.request_id, asked, answer)
            return response

        return self.store.submit(work, request.ByteSize())

    def topic_names(self) -> list[str]:
        """Returns the names of all topics."""
        with self.store.reading() as row:
            return [key.decode() for key, _ in row.cursor(db=self._topics)]

    def expire(self, topic: str) -> "Future[bool]":
        """Drops what is too old or too much; the future tells whether there may be more of it."""

        def work(row: Row) -> bool:
            state = self._state(row, topic)
            self._trim(row, topic, state)
            oldest_ns = self._clock.now_ns() - int(state.retention().max_age_s * 1e9)
            dropped = 0
            while dropped < TRIM_ROWS and state.following - state.first > 1:
                content = read_event(row, self._events, topic, state.first)
                # A damaged event that has become the oldest goes: its time is not known.
                if content is not None:
                    event = event_pb2.Event.FromString(content)
                    if event.publish_time.ToNanoseconds() >= oldest_ns:
                        break
                self._drop_first(row, topic, state)
                dropped += 1
            if row.get(topic_key(topic), db=self._topics) != state.encode():
                row.put(topic_key(topic), state.encode(), db=self._topics)
            return dropped == TRIM_ROWS or state.has_too_much()

        return self.store.submit(work, frees=True)

    def _trim(self, row: Row, topic: str, state: TopicState) -> None:
        """Drops the oldest events while there are too many bytes of them."""
        for _ in range(TRIM_ROWS):
            if not state.has_too_much():
                return
            self._drop_first(row, topic, state)

    def _drop_first(self, row: Row, topic: str, state: TopicState) -> None:
        key = event_key(topic, state.first)
        content = row.pop(key, db=self._events)
        state.size_bytes -= len(content or b"")
        state.first += 1
        row.delete(key, db=self.store.table(QUARANTINE_TABLE))

    def _state(self, row: Row, topic: str) -> TopicState:
        return TopicState.decode(row.get(topic_key(topic), db=self._topics))

    def _open(self, row: Row, topic: str) -> TopicState:
        """Returns the state of a topic that is about to be written."""
        value = row.get(topic_key(topic), db=self._topics)
        if value is None and row.stat(self._topics)["entries"] >= MAX_TOPICS:
            raise exhausted("TOO_MANY_TOPICS", f"there are {MAX_TOPICS} topics already")
        return TopicState.decode(value)

    def _described(self, row: Row, name: str, state: TopicState) -> event_pb2.Topic:
        return event_pb2.Topic(
            name=name,
            first_offset=state.first,
            next_offset=state.following,
            size_bytes=state.size_bytes,
            retention=state.retention(),
            groups=list_groups(row, self.store, name),
        )


def _damaged(topic: str, offset: int) -> ServiceError:
    return data_loss(
        f"event {offset} of topic {topic} was damaged at rest: go on behind it",
        topic=topic,
        offset=str(offset),
        next_offset=str(offset + 1),
    )
