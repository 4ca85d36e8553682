"""The log against a simple model, with restarts in between."""

import asyncio
import tempfile
from pathlib import Path

import pytest
from google.protobuf.any_pb2 import Any as AnyMessage
from hypothesis import HealthCheck
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st

from esper.oona.v1 import event_pb2
from esper.services.oona.log import MAX_BATCH_BYTES
from esper.services.oona.log import TABLES
from esper.services.oona.log import EventLog
from esper.services.serving.errors import ServiceError
from esper.services.store.engine import Store
from esper.services.store.opening import Schema


def request(topic: str, value: bytes, request_id: str = "") -> event_pb2.PublishRequest:
    body = AnyMessage(type_url="t/x", value=value)
    return event_pb2.PublishRequest(topic=topic, body=body, request_id=request_id)


def all_topics(log: EventLog) -> list[event_pb2.Topic]:
    return list(log.topics(event_pb2.ListTopicsRequest(page_size=500)).topics)


TOPICS = st.sampled_from(["a", "a.b", "a-b", "a_", "b"])
STEPS = st.lists(
    st.one_of(
        st.tuples(
            st.just("append"), TOPICS, st.binary(max_size=3), st.sampled_from(["", "1", "2"])
        ),
        st.tuples(st.just("restart"), TOPICS, st.just(b""), st.just("")),
    ),
    max_size=25,
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(STEPS)
def test_the_log_is_a_list_per_topic(steps: list[tuple[str, str, bytes, str]]) -> None:
    model: dict[str, list[bytes]] = {}
    answers: dict[tuple[str, str], tuple[bytes, int]] = {}

    async def run(folder: Path) -> None:
        store = Store(folder, Schema(TABLES, 1))
        log = EventLog(store, now=lambda: 12.5)
        for action, topic, value, request_id in steps:
            if action == "restart":
                store.close()
                store = Store(folder, Schema(TABLES, 1))
                log = EventLog(store, now=lambda: 3.0)  # a clock that jumps back has no effect
                continue
            events = model.setdefault(topic, [])
            known = answers.get((topic, request_id)) if request_id else None
            appended = asyncio.wrap_future(log.append(request(topic, value, request_id)))
            if known is not None and known[0] != value:
                with pytest.raises(ServiceError):
                    await appended
                continue
            offset = await appended
            if known is not None:
                assert offset == known[1]
                continue
            assert offset == len(events)
            events.append(value)
            if request_id:
                answers[topic, request_id] = (value, offset)
        assert [
            (topic.name, topic.first_offset, topic.next_offset) for topic in all_topics(log)
        ] == [(name, 0, len(events)) for name, events in sorted(model.items()) if events]
        for topic, events in model.items():
            for start in range(len(events) + 1):
                found = log.read(topic, start)
                assert [event.body.value for event in found] == events[start:]
                assert [event.offset for event in found] == list(range(start, len(events)))
                assert {event.topic for event in found} <= {topic}
            with pytest.raises(ServiceError) as caught:
                log.read(topic, len(events) + 1)
            assert caught.value.metadata["next_offset"] == str(len(events))
        store.close()

    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(run(Path(folder)))


def test_a_read_is_bounded_in_bytes(tmp_path: Path) -> None:
    async def run() -> None:
        store = Store(tmp_path, Schema(TABLES, 1))
        log = EventLog(store)
        big = bytes(MAX_BATCH_BYTES // 2)
        for _ in range(5):
            await asyncio.wrap_future(log.append(request("a", big)))
        assert len(log.read("a", 0)) == 1  # two and their envelopes are too much
        assert len(log.read("a", 4)) == 1
        store.close()

    asyncio.run(run())
