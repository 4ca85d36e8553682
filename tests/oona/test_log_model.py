"""The log and its groups, over a real socket and with restarts, against a model of lists."""

import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest
from google.protobuf.wrappers_pb2 import Int64Value
from hypothesis import HealthCheck
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine
from hypothesis.stateful import initialize
from hypothesis.stateful import precondition
from hypothesis.stateful import rule
from hypothesis.stateful import run_state_machine_as_test

from esper.common.rpc import RpcError
from esper.oona.v1 import event_pb2
from esper.plane import Plane
from esper.plane import connect

TOPICS = st.sampled_from(["a", "a.b"])
GROUPS = st.sampled_from(["g", "h"])
LONG_S = 10_000.0
BRIEF_S = 0.1
MAX_RESTARTS = 2  # of one history: they take longest
SIZE = 2048


class Model:
    """One topic: its events, its oldest offset, and its groups."""

    def __init__(self) -> None:
        self.values: list[int] = []
        self.first = 0
        self.known: dict[str, tuple[int, int]] = {}
        self.groups: dict[str, Standing] = {}


class Standing:
    """One group.

    What it has not been given, how often it was given what is not done, and what of that was taken
    for a brief while only.
    """

    def __init__(self, following: int) -> None:
        self.following = following
        self.pending: dict[int, int] = {}
        self.visible: set[int] = set()


class LogMachine(RuleBasedStateMachine):
    serve: Callable[..., object]

    @initialize()
    def begin(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="et-", dir="/tmp"))
        self.topics: dict[str, Model] = {}
        self.restarts = 0
        self.start()

    def start(self) -> None:
        self.server = type(self).serve(self.folder, ("oona",))
        self.plane: Plane = connect(self.server.address, timeout_s=30)
        self.oona = self.plane.oona

    def teardown(self) -> None:
        if hasattr(self, "plane"):
            self.plane.close()
            self.server.stop()
            shutil.rmtree(self.folder)

    def trim(self, name: str) -> None:
        """Takes over what retention has dropped; the newest is never among it."""
        model = self.topics[name]
        told = next(topic for topic in self.oona.list_topics() if topic.name == name)
        assert model.first <= told.first_offset
        assert told.first_offset < max(len(model.values), 1)
        assert told.next_offset == len(model.values)
        limit = told.retention.max_bytes
        assert told.size_bytes <= limit or told.next_offset - told.first_offset == 1
        model.first = told.first_offset

    @rule(topic=TOPICS, value=st.integers(0, 3), key=st.sampled_from(["", "1", "2"]))
    def publish(self, topic: str, value: int, key: str) -> None:
        model = self.topics.setdefault(topic, Model())
        known = model.known.get(key) if key else None
        if known is not None and known[0] != value:
            with pytest.raises(RpcError) as caught:
                self.oona.publish(topic, Int64Value(value=value), request_id=key)
            assert [v.field for v in caught.value.violations] == ["request_id"]
            return
        offset = self.oona.publish(topic, Int64Value(value=value), request_id=key)
        if known is not None:
            assert offset == known[1]
            return
        assert offset == len(model.values)
        model.values.append(value)
        model.known[key] = (value, offset)
        self.trim(topic)

    @rule(topic=TOPICS, number=st.integers(1, 30))
    def publish_many(self, topic: str, number: int) -> None:
        model = self.topics.setdefault(topic, Model())
        start = len(model.values)
        offsets = self.oona.publish_many(topic, [Int64Value(value=n) for n in range(number)])
        assert offsets == list(range(start, start + number))
        model.values += range(number)
        self.trim(topic)

    @rule(topic=TOPICS, max_bytes=st.sampled_from([0, SIZE]))
    def retain(self, topic: str, max_bytes: int) -> None:
        self.topics.setdefault(topic, Model())
        self.oona.set_retention(topic, max_bytes=max_bytes)
        self.trim(topic)

    @rule(topic=TOPICS, start=st.integers(0, 200))
    def read(self, topic: str, start: int) -> None:
        model = self.topics.get(topic, Model())
        end = len(model.values)
        start = min(start, end + 1)
        with self.oona.subscribe(topic, start) as events:
            if not model.first <= start <= end:
                with pytest.raises(RpcError) as caught:
                    next(events)
                reason = "COMPACTED" if start < model.first else "OFFSET"
                assert (caught.value.code, caught.value.reason) == (
                    grpc.StatusCode.OUT_OF_RANGE,
                    reason,
                )
                return
            for offset, event in zip(range(start, end), events, strict=False):
                value = Int64Value()
                assert event.body.Unpack(value)
                assert (event.offset, value.value) == (offset, model.values[offset])

    @rule(topic=TOPICS, group=GROUPS, brief=st.booleans(), number=st.integers(0, 9))
    def consume(self, topic: str, group: str, brief: bool, number: int) -> None:
        """Takes all that a group can be given now, and neither more nor less comes."""
        self.publish_many(topic, number)
        model = self.topics[topic]
        standing = model.groups.get(group)
        if standing is None:
            standing = model.groups[group] = Standing(model.first)
            self.oona.subscribe_group(topic, group, model.first).close()
        due = {n for n in standing.visible if n >= model.first}
        new = range(max(standing.following, model.first), len(model.values))
        wanted = due | set(new)
        if not wanted:
            return
        if due:
            time.sleep(BRIEF_S)  # what was taken for a brief while is visible again
        timeout_s = BRIEF_S if brief else LONG_S
        got: set[int] = set()
        gaps: list[event_pb2.Gap] = []
        with self.oona.subscribe_group(topic, group, None, timeout_s, len(wanted)) as member:
            for response in member:
                if response.HasField("gap"):
                    gaps.append(response.gap)
                    continue
                offset = response.event.offset
                value = Int64Value()
                assert response.event.body.Unpack(value)
                assert value.value == model.values[offset]
                # A slow test may be given it twice before it goes on.
                assert response.delivery_count > standing.pending.get(offset, 0)
                standing.pending[offset] = response.delivery_count
                got.add(offset)
                if got >= wanted:
                    break
        self.oona.list_topics()  # answered after the end of the subscription has come through
        assert got == wanted
        gone = {n for gap in gaps for n in range(gap.first_offset, gap.next_offset)}
        assert all(n < model.first for n in gone)
        assert set(range(standing.following, model.first)) <= gone
        standing.visible -= got | gone
        standing.visible |= got if brief else set()
        standing.following = len(model.values)
        for offset in gone:
            standing.pending.pop(offset, None)

    @rule(topic=TOPICS, group=GROUPS, offsets=st.lists(st.integers(0, 60), max_size=20))
    def acknowledge(self, topic: str, group: str, offsets: list[int]) -> None:
        model = self.topics.get(topic, Model())
        standing = model.groups.get(group)
        if standing is None:
            with pytest.raises(RpcError) as caught:
                self.oona.acknowledge(topic, group, offsets)
            assert caught.value.code is grpc.StatusCode.NOT_FOUND
            return
        offsets = [offset for offset in offsets if offset >= model.first]
        done = set(offsets) & set(standing.pending)
        assert self.oona.acknowledge(topic, group, offsets) == len(done)
        for offset in done:
            del standing.pending[offset]
            standing.visible.discard(offset)

    @precondition(lambda self: self.restarts < MAX_RESTARTS)
    @rule()
    def restart(self) -> None:
        self.restarts += 1
        self.plane.close()
        self.server.stop()
        self.start()
        told = {topic.name: topic for topic in self.oona.list_topics()}
        for name, model in self.topics.items():
            if name not in told:
                assert not model.values
                continue
            self.trim(name)
            groups = {group.name: group for group in told[name].groups}
            assert set(groups) == set(model.groups)
            for group_name, standing in model.groups.items():
                assert groups[group_name].next_offset == standing.following
                kept = [offset for offset in standing.pending if offset >= model.first]
                assert len(kept) <= groups[group_name].num_pending <= len(standing.pending)


def test_the_log_is_what_a_simple_model_is(serve_in_thread: Callable[..., object]) -> None:
    class Machine(LogMachine):
        serve = staticmethod(serve_in_thread)

    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=14,
            stateful_step_count=25,
            deadline=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        ),
    )
