"""Retention by age and size, and clocks that jump."""

import asyncio
import struct
from collections.abc import Awaitable
from collections.abc import Callable
from pathlib import Path

import pytest
from google.protobuf.any_pb2 import Any as AnyMessage

from esper.oona.v1 import event_pb2
from esper.services.oona.check import Checker
from esper.services.oona.contents import SCHEMA
from esper.services.oona.groups import Group
from esper.services.oona.groups import Groups
from esper.services.oona.groups import Member
from esper.services.oona.log import TRIM_ROWS
from esper.services.oona.log import EventLog
from esper.services.serving.errors import ServiceError
from esper.services.store.engine import Store
from esper.services.store.opening import Row
from esper.services.store.seals import unseal

YEAR_S = 365 * 86400.0
KIB = 1024


class Clocks:
    """A time of day that can be set, and a clock that cannot."""

    def __init__(self) -> None:
        self.now_s = 1_000_000.0
        self.elapsed_s = 50.0

    def now(self) -> float:
        return self.now_s

    def elapsed(self) -> float:
        return self.elapsed_s

    def pass_(self, time_s: float) -> None:
        self.now_s += time_s
        self.elapsed_s += time_s


class Oona:
    """A log and its groups that can be opened again."""

    def __init__(self, folder: Path) -> None:
        self.clocks = Clocks()
        self._folder = folder
        self.open()

    def open(self) -> None:
        self.store = Store(self._folder, SCHEMA)
        self.log = EventLog(self.store, self.clocks.now, self.clocks.elapsed)
        self.groups = Groups(self.store, self.log.followers, self.clocks.elapsed)

    def reopen(self) -> None:
        self.store.close()
        self.open()

    async def publish(self, number: int, size_bytes: int = 0) -> None:
        body = AnyMessage(type_url="t/x", value=bytes(size_bytes))
        request = event_pb2.PublishRequest(topic="a", body=body)
        futures = [asyncio.wrap_future(self.log.append(request)) for _ in range(number)]
        await asyncio.gather(*futures)

    async def retain(self, max_age_s: float = 0.0, max_bytes: int = 0) -> event_pb2.Topic:
        retention = event_pb2.Retention(max_age_s=max_age_s, max_bytes=max_bytes)
        request = event_pb2.SetRetentionRequest(topic="a", retention=retention)
        return (await asyncio.wrap_future(self.log.set_retention(request))).topic

    async def expire(self) -> None:
        while await asyncio.wrap_future(self.log.expire("a")):
            pass

    def topic(self) -> event_pb2.Topic:
        (found,) = self.log.topics(event_pb2.ListTopicsRequest()).topics
        return found

    def extent(self) -> tuple[int, int]:
        return self.topic().first_offset, self.topic().next_offset

    def times_s(self) -> list[float]:
        events = self.log.read("a", self.topic().first_offset)
        return [event.publish_time.ToNanoseconds() / 1e9 for event in events]


def run(folder: Path, work: Callable[[Oona], Awaitable[None]]) -> None:
    async def main() -> None:
        oona = Oona(folder)
        try:
            await work(oona)
        finally:
            oona.store.close()

    asyncio.run(main())


def test_a_topic_stays_within_its_size(tmp_path: Path) -> None:
    async def work(oona: Oona) -> None:
        await oona.retain(max_bytes=100 * KIB)
        await oona.publish(95, KIB)
        assert oona.extent()[0] == 0
        await oona.publish(50, KIB)
        first, following = oona.extent()
        assert following == 145
        assert 90 <= following - first <= 100
        assert oona.topic().size_bytes <= 100 * KIB
        with pytest.raises(ServiceError) as caught:
            oona.log.read("a", first - 1)
        assert (caught.value.code.name, caught.value.reason) == ("OUT_OF_RANGE", "COMPACTED")
        assert caught.value.metadata["first_offset"] == str(first)
        await oona.publish(1, 200 * KIB)  # too large by itself: the newest always stays
        assert oona.extent() == (145, 146)
        oona.reopen()
        assert oona.extent() == (145, 146)

    run(tmp_path, work)


def test_a_smaller_size_takes_effect_at_once_or_bit_by_bit(tmp_path: Path) -> None:
    async def work(oona: Oona) -> None:
        await oona.publish(TRIM_ROWS + 500, 100)
        topic = await oona.retain(max_bytes=KIB)
        assert topic.first_offset == TRIM_ROWS
        assert topic.retention == event_pb2.Retention(max_age_s=7 * 86400, max_bytes=KIB)
        await oona.expire()
        assert oona.topic().size_bytes <= KIB
        assert len(oona.log.read("a", oona.extent()[0])) == oona.extent()[1] - oona.extent()[0]

    run(tmp_path, work)


def test_old_events_go(tmp_path: Path) -> None:
    async def work(oona: Oona) -> None:
        await oona.retain(max_age_s=100)
        for _ in range(3):
            await oona.publish(2)
            oona.clocks.pass_(60)
        await oona.expire()  # published 180, 120 and 60 seconds ago
        assert oona.extent() == (4, 6)
        oona.clocks.pass_(1000)
        await oona.expire()
        assert oona.extent() == (5, 6)  # the newest stays

    run(tmp_path, work)


def test_a_clock_that_jumps_while_the_server_runs_changes_nothing(tmp_path: Path) -> None:
    async def work(oona: Oona) -> None:
        await oona.retain(max_age_s=100)
        await oona.publish(2)
        for jump_s in (YEAR_S, -2 * YEAR_S):
            oona.clocks.now_s += jump_s
            oona.clocks.pass_(20)
            await oona.publish(1)
            await oona.expire()
        assert oona.extent() == (0, 4)  # nothing went too early
        assert oona.times_s() == pytest.approx([1_000_000, 1_000_000, 1_000_020, 1_000_040])
        oona.clocks.pass_(90)
        await oona.expire()
        assert oona.extent() == (3, 4)  # nothing stays too long

    run(tmp_path, work)


def test_a_clock_that_was_set_back_between_two_starts_stands_still(tmp_path: Path) -> None:
    async def work(oona: Oona) -> None:
        await oona.retain(max_age_s=100)
        await oona.publish(1)
        oona.clocks.pass_(30)
        await oona.publish(1)
        oona.clocks.now_s -= YEAR_S
        oona.reopen()
        await oona.publish(1)
        assert oona.times_s() == pytest.approx([1_000_000, 1_000_030, 1_000_030])
        oona.clocks.pass_(80)
        await oona.expire()
        assert oona.extent() == (1, 3)
        oona.clocks.pass_(80)
        await oona.publish(1)
        await oona.expire()
        assert oona.extent() == (3, 4)

    run(tmp_path, work)


# ---------------------------------------------------------------- groups


def given(responses: list[event_pb2.SubscribeResponse]) -> list[tuple[int, int]]:
    return [(r.event.offset, r.delivery_count) for r in responses if r.HasField("event")]


async def members(oona: Oona, timeout_s: float, max_in_flight: int) -> tuple[Group, Member]:
    return await oona.groups.join("a", "g", 0), Member(max_in_flight, timeout_s)


def test_timeouts_do_not_heed_the_time_of_day(tmp_path: Path) -> None:
    async def work(oona: Oona) -> None:
        await oona.publish(2)
        group, member = await members(oona, 30.0, 5)
        assert given(await group.claim(member)) == [(0, 1), (1, 1)]
        for jump_s in (YEAR_S, -3 * YEAR_S):
            oona.clocks.now_s += jump_s
            assert await group.claim(member) == []
        assert group.wait_s(member) == pytest.approx(30)
        oona.clocks.pass_(29)
        assert await group.claim(member) == []
        oona.clocks.now_s -= YEAR_S
        oona.clocks.pass_(1.5)
        assert given(await group.claim(member)) == [(0, 2), (1, 2)]
        oona.clocks.now_s -= YEAR_S
        oona.reopen()
        group, member = await members(oona, 30.0, 5)
        assert await group.claim(member) == []  # a start counts as a delivery
        oona.clocks.pass_(30.5)
        assert given(await group.claim(member)) == [(0, 3), (1, 3)]

    run(tmp_path, work)


def test_a_group_is_told_what_it_has_missed(tmp_path: Path) -> None:
    async def work(oona: Oona) -> None:
        await oona.retain(max_bytes=10 * KIB)
        await oona.publish(4, KIB)
        group, member = await members(oona, 30.0, 3)
        assert given(await group.claim(member)) == [(0, 1), (1, 1), (2, 1)]
        await oona.groups.acknowledge("a", "g", [1])
        await oona.publish(20, KIB)
        first = oona.extent()[0]
        oona.clocks.pass_(31)
        responses = await group.claim(member)
        gaps = [(r.gap.first_offset, r.gap.next_offset) for r in responses if r.HasField("gap")]
        assert gaps == [(0, 1), (2, first)]  # 1 was done
        assert given(responses) == [(first + n, 1) for n in range(3)]
        (state,) = oona.topic().groups
        assert (state.next_offset, state.num_pending) == (first + 3, 3)

    run(tmp_path, work)


def test_a_store_of_the_first_schema_is_brought_up_to_date(tmp_path: Path) -> None:
    async def work(oona: Oona) -> None:
        await oona.publish(3, KIB)
        expected = oona.topic()
        times_s = oona.times_s()

        def make_old(row: Row) -> None:
            row.put(b"a", struct.pack(">QQ", 0, 3), db=oona.store.table("topics"))
            events = oona.store.table("events")
            for key, value in list(row.cursor(db=events)):
                row.put(key, unseal(key, value) or b"", db=events)
            row.drop(oona.store.table("clock"), delete=False)
            row.put(b"schema_version", b"1", db=oona.store.table("meta"))

        await asyncio.wrap_future(oona.store.submit(make_old))
        oona.clocks.now_s -= YEAR_S
        oona.reopen()
        assert oona.topic() == expected
        assert [step.WhichOneof("event") for step in Checker(oona.store)] == ["summary"]
        await oona.publish(1)
        assert oona.times_s()[:3] == times_s
        assert oona.times_s()[3] >= times_s[2]

    run(tmp_path, work)
