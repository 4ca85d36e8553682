"""Consumer groups: who has been given which event, and what is to be given again.

Durable are, for each group, the next event that it has never been given, and the events that it has
been given and not acknowledged, each with the number of its deliveries and its visibility timeout.
A delivery is stored before it is made, so a server that dies forgets neither it nor its number.

No time of day is stored or looked at. When an event becomes visible again is known in memory alone,
by a clock that never goes back; after a start of the server, every event under way counts as
delivered when the group has its first subscriber, so it may come late once, and never early.
"""

import asyncio
import logging
import struct
import time
from collections.abc import Callable
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import field

from esper.oona.v1 import event_pb2
from esper.services.oona.topics import TopicState
from esper.services.oona.topics import group_key
from esper.services.oona.topics import group_prefix
from esper.services.oona.topics import pending_key
from esper.services.oona.topics import read_event
from esper.services.oona.topics import topic_key
from esper.services.serving.errors import exhausted
from esper.services.serving.errors import not_found
from esper.services.store.engine import Store
from esper.services.store.followers import Followers
from esper.services.store.opening import Row
from esper.services.store.waking import awaitable

LOG = logging.getLogger("esper.oona")

GROUP_TABLES = ("groups", "pending")
MAX_GROUPS = 32
"""Groups of one topic."""
MAX_PENDING = 10_000
"""Events that a group may have been given and not acknowledged; it gets no new ones then."""
MAX_BATCH_BYTES = 1 << 20

STATE = struct.Struct(">QQ")
"""Row of a group: next offset, number of pending events."""
PENDING = struct.Struct(">Id")
"""Row of a pending event: number of deliveries, visibility timeout in seconds."""
_NUMBER_BYTES = 8


@dataclass(frozen=True, eq=False)
class Member:
    """One subscriber of a group.

    Attributes:
        max_in_flight: The most events that it has at a time.
        timeout_s: How long an event that it gets is kept from the others.
    """

    max_in_flight: int
    timeout_s: float


@dataclass
class _Lease:
    member: Member | None
    deadline_s: float


@dataclass
class _Taken:
    """What one transaction took for a member."""

    deliveries: list[tuple[int, bytes, int]] = field(default_factory=list)
    gaps: list[tuple[int, int]] = field(default_factory=list)
    gone: list[int] = field(default_factory=list)
    size_bytes: int = 0

    def add(self, offset: int, content: bytes, count: int) -> None:
        self.deliveries.append((offset, content, count))
        self.size_bytes += len(content)

    def skip(self, first: int, following: int) -> None:
        if self.gaps and self.gaps[-1][1] == first:
            first = self.gaps.pop()[0]
        self.gaps.append((first, following))


class Group:
    """One group of one topic, as far as this server process has to do with it.

    Args:
        store: Holds the rows.
        topic: The topic's name.
        name: The group's name.
        followers: Wakes the members, by `followed`.
        elapsed: Seconds since some moment, never going back.
    """

    def __init__(
        self,
        store: Store,
        topic: str,
        name: str,
        followers: Followers,
        elapsed: Callable[[], float],
    ) -> None:
        self.followed = f"{topic}\0{name}"
        self._followers = followers
        self._store = store
        self._topic = topic
        self._name = name
        self._elapsed = elapsed
        self._leases: dict[int, _Lease] = {}
        self._taking = asyncio.Lock()
        self._key = group_key(topic, name)
        self._groups = store.table("groups")
        self._pending = store.table("pending")
        with store.reading() as row:
            prefix = self._key + b"\0"
            cursor = row.cursor(db=self._pending)
            going_on = cursor.set_range(prefix)
            while going_on and cursor.key().startswith(prefix):
                _, timeout_s = PENDING.unpack(cursor.value())
                offset = int.from_bytes(cursor.key()[len(prefix) :], "big")
                self._leases[offset] = _Lease(None, elapsed() + timeout_s)
                going_on = cursor.next()

    async def claim(self, member: Member) -> list[event_pb2.SubscribeResponse]:
        """Returns what a member gets next: gaps, events to be given again, then new ones.

        Durable when it returns; empty where there is nothing, or the member has its fill.
        """
        # Not cancelled with its caller: what the transaction took must be known here afterwards.
        taking = asyncio.ensure_future(self._claim(member))
        try:
            return await asyncio.shield(taking)
        except asyncio.CancelledError:
            taking.add_done_callback(lambda task: self._give_back(member, task))
            raise

    def _give_back(
        self, member: Member, taking: "asyncio.Task[list[event_pb2.SubscribeResponse]]"
    ) -> None:
        if not taking.cancelled() and taking.exception() is None:
            self.release(member, taking.result())

    async def _claim(self, member: Member) -> list[event_pb2.SubscribeResponse]:
        async with self._taking:
            now_s = self._elapsed()
            held = sum(lease.deadline_s > now_s for lease in self._of(member))
            room = member.max_in_flight - held
            if room <= 0:
                return []
            expired = sorted(
                offset for offset, lease in self._leases.items() if lease.deadline_s <= now_s
            )[:room]
            taken = await awaitable(
                self._store.submit(lambda row: self._take(row, expired, room, member.timeout_s))
            )
            for offset in taken.gone:
                self._leases.pop(offset, None)
            deadline_s = self._elapsed() + member.timeout_s
            for offset, _, _ in taken.deliveries:
                self._leases[offset] = _Lease(member, deadline_s)
        responses = [
            event_pb2.SubscribeResponse(
                gap=event_pb2.Gap(first_offset=first, next_offset=following)
            )
            for first, following in taken.gaps
        ]
        for _, content, count in taken.deliveries:
            event = event_pb2.Event.FromString(content)
            responses.append(event_pb2.SubscribeResponse(event=event, delivery_count=count))
        return responses

    def holds(self, member: Member, offset: int) -> bool:
        """Returns whether an event is the member's: given to it, not acknowledged, not visible."""
        lease = self._leases.get(offset)
        return lease is not None and lease.member is member and lease.deadline_s > self._elapsed()

    def release(self, member: Member, unsent: Sequence[event_pb2.SubscribeResponse]) -> None:
        """Makes events visible that were claimed for a member and never sent to it."""
        for response in unsent:
            if response.HasField("event") and self.holds(member, response.event.offset):
                self._leases[response.event.offset].deadline_s = self._elapsed()
        self._followers.wake(self.followed)

    def wait_s(self, member: Member) -> float | None:
        """Returns how long a member that got nothing waits for an event to become visible.

        None means until there is news.
        """
        now_s = self._elapsed()
        own = [lease.deadline_s for lease in self._of(member) if lease.deadline_s > now_s]
        full = len(own) >= member.max_in_flight
        deadlines = own if full else [lease.deadline_s for lease in self._leases.values()]
        return max(min(deadlines) - now_s, 0.0) if deadlines else None

    def forget(self, acknowledged: Sequence[int]) -> None:
        """Takes note of events that are done."""
        for offset in acknowledged:
            self._leases.pop(offset, None)
        self._followers.wake(self.followed)

    def _of(self, member: Member) -> list[_Lease]:
        return [lease for lease in self._leases.values() if lease.member is member]

    def _take(self, row: Row, expired: list[int], room: int, timeout_s: float) -> _Taken:
        taken = _Taken()
        topic = TopicState.decode(row.get(topic_key(self._topic), db=self._store.table("topics")))
        events = self._store.table("events")
        following, pending = before = _load(row, self._store, self._topic, self._name)
        for offset in expired:
            key = pending_key(self._topic, self._name, offset)
            value = row.get(key, db=self._pending)
            if value is None:
                taken.gone.append(offset)  # acknowledged meanwhile
                continue
            content = read_event(row, events, self._topic, offset)
            if content is None:
                row.delete(key, db=self._pending)
                pending -= 1
                taken.gone.append(offset)
                taken.skip(offset, offset + 1)
                continue
            if taken.deliveries and taken.size_bytes + len(content) > MAX_BATCH_BYTES:
                break
            count = PENDING.unpack(value)[0] + 1
            row.put(key, PENDING.pack(count, timeout_s), db=self._pending)
            taken.add(offset, content, count)
        if following < topic.first:
            taken.skip(following, topic.first)
            following = topic.first
        while following < topic.following and len(taken.deliveries) < room:
            content = read_event(row, events, self._topic, following)
            if content is None:
                LOG.error("event %d of topic %s was damaged at rest", following, self._topic)
                taken.skip(following, following + 1)
                following += 1
                continue
            too_much = taken.size_bytes + len(content) > MAX_BATCH_BYTES
            if pending >= MAX_PENDING or (taken.deliveries and too_much):
                break
            key = pending_key(self._topic, self._name, following)
            row.put(key, PENDING.pack(1, timeout_s), db=self._pending)
            taken.add(following, content, 1)
            following += 1
            pending += 1
        if (following, pending) != before:
            row.put(self._key, STATE.pack(following, pending), db=self._groups)
        return taken


class Groups:
    """The consumer groups of one Oona. To be made and used on one event loop.

    Args:
        store: Holds the rows.
        followers: Wakes the members of a group, by its `followed`.
        elapsed: Seconds since some moment, never going back.
    """

    def __init__(
        self, store: Store, followers: Followers, elapsed: Callable[[], float] = time.monotonic
    ) -> None:
        self._store = store
        self._followers = followers
        self._elapsed = elapsed
        self._groups: dict[tuple[str, str], Group] = {}

    async def join(self, topic: str, name: str, start: int | None) -> Group:
        """Returns a group, which is made where it is new.

        Args:
            topic: The topic's name.
            name: The group's name.
            start: First event that a new group gets; None means those from now on.

        Raises:
            ServiceError: OUT_OF_RANGE where a new group cannot start there; RESOURCE_EXHAUSTED
                where the topic has too many groups.
        """

        def work(row: Row) -> None:
            table = self._store.table("groups")
            if row.get(group_key(topic, name), db=table) is not None:
                return
            if len(list_groups(row, self._store, topic)) >= MAX_GROUPS:
                raise exhausted("TOO_MANY_GROUPS", f"topic {topic} has {MAX_GROUPS} groups already")
            state = TopicState.decode(row.get(topic_key(topic), db=self._store.table("topics")))
            if start is not None:
                state.require_offset(topic, start)
            first = state.following if start is None else start
            row.put(group_key(topic, name), STATE.pack(first, 0), db=table)

        await awaitable(self._store.submit(work))
        group = self._groups.get((topic, name))
        if group is None:
            group = Group(self._store, topic, name, self._followers, self._elapsed)
            self._groups[topic, name] = group
        return group

    async def acknowledge(self, topic: str, name: str, offsets: Sequence[int]) -> int:
        """Marks events as done for a group, durably, and returns how many were not before.

        Raises:
            ServiceError: NOT_FOUND where there is no such group.
        """

        def work(row: Row) -> list[int]:
            following, pending = _load(row, self._store, topic, name)
            done = [
                offset
                for offset in dict.fromkeys(offsets)
                if row.delete(pending_key(topic, name, offset), db=self._store.table("pending"))
            ]
            if done:
                state = STATE.pack(following, pending - len(done))
                row.put(group_key(topic, name), state, db=self._store.table("groups"))
            return done

        done = await awaitable(self._store.submit(work))
        group = self._groups.get((topic, name))
        if group is not None:
            group.forget(done)
        return len(done)


def _load(row: Row, store: Store, topic: str, name: str) -> tuple[int, int]:
    """Returns a group's next offset and the number of its pending events."""
    value = row.get(group_key(topic, name), db=store.table("groups"))
    if value is None:
        raise not_found(f"group {name} of topic {topic}")
    following, pending = STATE.unpack(value)
    return following, pending


def list_groups(row: Row, store: Store, topic: str) -> list[event_pb2.ConsumerGroup]:
    """Returns the groups of a topic, by name."""
    found = []
    prefix = group_prefix(topic)
    cursor = row.cursor(db=store.table("groups"))
    going_on = cursor.set_range(prefix)
    while going_on and cursor.key().startswith(prefix):
        following, pending = STATE.unpack(cursor.value())
        found.append(
            event_pb2.ConsumerGroup(
                name=cursor.key()[len(prefix) :].decode(),
                next_offset=following,
                num_pending=pending,
            )
        )
        going_on = cursor.next()
    return found
