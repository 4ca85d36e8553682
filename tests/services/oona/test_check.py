"""What the check of a log finds, and how a log with damage in it is served."""

import asyncio
import os
from collections.abc import Callable
from collections.abc import Iterator
from pathlib import Path

import pytest
from google.protobuf.wrappers_pb2 import BytesValue

from esper.common.rpc import packed
from esper.common.v1 import check_pb2
from esper.oona.v1 import event_pb2
from esper.services.oona.check import Checker
from esper.services.oona.contents import SCHEMA
from esper.services.oona.groups import PENDING
from esper.services.oona.groups import STATE
from esper.services.oona.groups import Groups
from esper.services.oona.groups import Member
from esper.services.oona.log import EventLog
from esper.services.oona.topics import TopicState
from esper.services.oona.topics import event_key
from esper.services.oona.topics import group_key
from esper.services.oona.topics import pending_key
from esper.services.oona.topics import topic_key
from esper.services.serving.errors import ServiceError
from esper.services.store.engine import Store
from esper.services.store.limits import StoreLimits
from esper.services.store.opening import Row

NUM_EVENTS = 12
GIVEN = 3


async def fill(store: Store) -> None:
    """Two topics of events, one of them with a group that holds a few."""
    log = EventLog(store)
    groups = Groups(store, log.followers)
    for topic in ("a", "a.b"):
        for number in range(NUM_EVENTS):
            body = packed(BytesValue(value=os.urandom(50)))
            request = event_pb2.PublishRequest(topic=topic, body=body, request_id=f"{number}")
            await asyncio.wrap_future(log.append(request))
    await asyncio.wrap_future(
        log.set_retention(
            event_pb2.SetRetentionRequest(
                topic="a.b", retention=event_pb2.Retention(max_bytes=1024)
            )
        )
    )
    group = await groups.join("a", "g", 0)
    await group.claim(Member(GIVEN, 30.0))


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(tmp_path / "oona", SCHEMA)
    asyncio.run(fill(store))
    yield store
    store.close()


def check(store: Store, *, quarantine: bool = False) -> list[check_pb2.Finding]:
    steps = list(Checker(store, quarantine=quarantine))
    found = [step.finding for step in steps[:-1]]
    summary = steps[-1].summary
    assert summary.structure_checked
    assert (summary.num_topics, summary.num_groups) == (2, 1)
    assert summary.num_problems == len(found)
    return found


def change(store: Store, work: Callable[[Row], object]) -> None:
    store.submit(work).result(30)


def flip(store: Store, key: bytes) -> None:
    """Changes one bit of an event at rest."""

    def work(row: Row) -> None:
        value = bytearray(row.get(key, db=store.table("events")) or b"")
        value[len(value) // 2] ^= 1
        row.put(key, bytes(value), db=store.table("events"))

    change(store, work)


def test_a_log_is_sound_as_it_is_written(store: Store) -> None:
    assert check(store) == []


def _swap(row: Row, store: Store) -> None:
    events = store.table("events")
    one, other = event_key("a", 2), event_key("a", 3)
    values = row.get(one, db=events), row.get(other, db=events)
    row.put(one, values[1] or b"", db=events)
    row.put(other, values[0] or b"", db=events)


def _state(row: Row, store: Store, **changes: int) -> None:
    table = store.table("topics")
    state = TopicState.decode(row.get(topic_key("a"), db=table))
    for name, value in changes.items():
        setattr(state, name, value)
    row.put(topic_key("a"), state.encode(), db=table)


@pytest.mark.parametrize(
    ("harm", "kind", "name"),
    [
        (
            lambda row, store: row.delete(event_key("a", 5), db=store.table("events")),
            check_pb2.FINDING_KIND_DAMAGED,
            "topics/a",
        ),
        (
            lambda row, store: row.delete(event_key("a", NUM_EVENTS - 1), db=store.table("events")),
            check_pb2.FINDING_KIND_DAMAGED,
            "topics/a",
        ),
        (_swap, check_pb2.FINDING_KIND_DAMAGED, "topics/a/events/2"),
        (
            lambda row, store: row.put(event_key("a", 99), b"x", db=store.table("events")),
            check_pb2.FINDING_KIND_INDEX,
            "topics/a/events/99",
        ),
        (
            lambda row, store: row.put(event_key("b", 0), b"x", db=store.table("events")),
            check_pb2.FINDING_KIND_DANGLING,
            "topics/b",
        ),
        (
            lambda row, store: _state(row, store, size_bytes=7),
            check_pb2.FINDING_KIND_INDEX,
            "topics/a",
        ),
        (
            lambda row, store: _state(row, store, following=NUM_EVENTS + 1),
            check_pb2.FINDING_KIND_DAMAGED,
            "topics/a",
        ),
        (
            lambda row, store: row.put(
                group_key("a", "g"), STATE.pack(NUM_EVENTS + 1, GIVEN), db=store.table("groups")
            ),
            check_pb2.FINDING_KIND_INDEX,
            "topics/a/groups/g",
        ),
        (
            lambda row, store: row.delete(pending_key("a", "g", 1), db=store.table("pending")),
            check_pb2.FINDING_KIND_INDEX,
            "topics/a/groups/g",
        ),
        (
            lambda row, store: row.put(
                pending_key("a", "other", 1), PENDING.pack(1, 1.0), db=store.table("pending")
            ),
            check_pb2.FINDING_KIND_DANGLING,
            "topics/a/groups/other",
        ),
        (
            lambda row, store: row.delete(
                b"o" + (3).to_bytes(8, "big"), db=store.table("requests")
            ),
            check_pb2.FINDING_KIND_INDEX,
            "requests",
        ),
    ],
)
def test_what_does_not_fit_is_found(
    store: Store, harm: Callable[[Row, Store], object], kind: int, name: str
) -> None:
    change(store, lambda row: harm(row, store))
    found = {(finding.kind, finding.name) for finding in check(store)}
    assert (kind, name) in found


def test_without_room_for_a_copy_the_rows_themselves_are_checked(tmp_path: Path) -> None:
    filled = Store(tmp_path / "oona", SCHEMA)
    asyncio.run(fill(filled))
    flip(filled, event_key("a", 4))
    filled.close()
    store = Store(tmp_path / "oona", SCHEMA, StoreLimits(keep_free_bytes=1 << 60))
    try:
        for quarantine in (False, True):
            *findings, last = Checker(store, quarantine=quarantine)
            told = [(step.finding.name, step.finding.quarantined) for step in findings]
            assert told == [("topics/a/events/4", quarantine)]
            assert not last.summary.structure_checked
        assert [step.WhichOneof("event") for step in Checker(store)] == ["summary"]
    finally:
        store.close()


def test_a_damaged_event_is_told_put_aside_and_gone_round(store: Store) -> None:
    flip(store, event_key("a", 5))

    async def serve() -> None:
        log = EventLog(store)
        assert [event.offset for event in log.read("a", 0)] == [0, 1, 2, 3, 4]
        with pytest.raises(ServiceError) as refused:
            log.read("a", 5)
        assert refused.value.code.name == "DATA_LOSS"
        assert refused.value.metadata["next_offset"] == "6"
        assert [event.offset for event in log.read("a", 6)] == list(range(6, NUM_EVENTS))
        group = await Groups(store, log.followers).join("a", f"g{os.urandom(4).hex()}", 3)
        given = await group.claim(Member(100, 30.0))
        gaps = [(r.gap.first_offset, r.gap.next_offset) for r in given if r.HasField("gap")]
        offsets = [r.event.offset for r in given if r.HasField("event")]
        assert gaps == [(5, 6)]
        assert offsets == [3, 4, *range(6, NUM_EVENTS)]

    asyncio.run(serve())
    for _ in range(2):
        (finding,) = [f for f in list(Checker(store)) if f.HasField("finding")]
        assert (finding.finding.name, finding.finding.quarantined) == ("topics/a/events/5", False)
    steps = list(Checker(store, quarantine=True))
    assert steps[0].finding.quarantined
    assert [step.WhichOneof("event") for step in Checker(store)] == ["summary"]
    asyncio.run(serve())


def test_retention_goes_past_what_was_damaged(store: Store) -> None:
    flip(store, event_key("a", 0))
    flip(store, event_key("a", 1))
    list(Checker(store, quarantine=True))
    flip(store, event_key("a", 2))

    async def expire() -> None:
        now_s = [0.0]
        log = EventLog(store, elapsed=lambda: now_s[0])
        retention = event_pb2.Retention(max_age_s=60)
        request = event_pb2.SetRetentionRequest(topic="a", retention=retention)
        await asyncio.wrap_future(log.set_retention(request))
        now_s[0] = 61.0
        await asyncio.wrap_future(log.expire("a"))
        topic, _ = log.topics(event_pb2.ListTopicsRequest()).topics
        assert (topic.first_offset, topic.next_offset) == (NUM_EVENTS - 1, NUM_EVENTS)

    asyncio.run(expire())
    assert check(store) == []
    assert store.table_sizes()["event_quarantine"] == 0
