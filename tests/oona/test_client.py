"""Oona's client and server together, over a real socket."""

import threading
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.wrappers_pb2 import Int64Value

from esper.common.rpc import RpcError
from esper.common.rpc import decode_error
from esper.oona.client import OonaClient
from esper.oona.v1 import event_pb2
from esper.oona.v1 import event_pb2_grpc
from esper.plane import Plane
from esper.plane import connect
from esper.urza.v1 import run_pb2
from esper.urza.v1 import run_pb2_grpc


@pytest.fixture
def oona(store_plane: Plane) -> OonaClient:
    return store_plane.oona


@pytest.fixture
def stub(store_plane: Plane) -> event_pb2_grpc.EventServiceStub:
    return event_pb2_grpc.EventServiceStub(store_plane.channel("oona"))


@pytest.fixture
def topic() -> str:
    return f"t.{uuid.uuid4()}"


def number(event: event_pb2.Event) -> int:
    value = Int64Value()
    assert event.body.Unpack(value)
    return value.value


def refusal(call: Callable[[], object]) -> RpcError:
    with pytest.raises((grpc.RpcError, RpcError)) as caught:
        call()
    error = caught.value
    return error if isinstance(error, RpcError) else decode_error(error)


def test_events_come_in_order_from_any_offset(oona: OonaClient, topic: str) -> None:
    assert oona.publish(topic, Int64Value(value=0), key="run-1") == 0
    offsets = oona.publish_many(topic, [Int64Value(value=n) for n in range(1, 700)])
    assert offsets == list(range(1, 700))
    with oona.subscribe(topic, 0) as events:
        first = next(events)
        assert (first.topic, first.offset, first.key, number(first)) == (topic, 0, "run-1", 0)
        assert first.publish_time.seconds > 0
        assert [number(next(events)) for _ in range(699)] == list(range(1, 700))
    with oona.subscribe(topic, 650) as events:
        assert [next(events).offset for _ in range(3)] == [650, 651, 652]
    found = {t.name: (t.first_offset, t.next_offset) for t in oona.list_topics()}
    assert found[topic] == (0, 700)


def test_a_subscriber_waits_for_what_is_to_come(oona: OonaClient, topic: str) -> None:
    with oona.subscribe(topic, 0) as early, ThreadPoolExecutor(1) as threads:
        coming = threads.submit(lambda: [number(next(early)) for _ in range(3)])
        for value in range(3):
            assert not coming.done()
            oona.publish(topic, Int64Value(value=value))
        assert coming.result(10) == [0, 1, 2]


def test_from_now_on_means_after_the_call(oona: OonaClient, topic: str) -> None:
    oona.publish(topic, Int64Value(value=1))
    with oona.subscribe(topic) as events:
        oona.publish(topic, Int64Value(value=2))
        assert number(next(events)) == 2


def test_closing_ends_a_waiting_subscription(oona: OonaClient, topic: str) -> None:
    events = oona.subscribe(topic, 0)
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(lambda: list(events))
        oona.publish(topic, Int64Value(value=7))
        events.close()
        assert [number(event) for event in waiting.result(10)] in ([], [7])
        assert list(events) == []


def test_topics_do_not_mix(oona: OonaClient, topic: str) -> None:
    for name in (topic, f"{topic}.", f"{topic}-a"):
        oona.publish(name, Int64Value(value=len(name)))
    with oona.subscribe(topic, 0) as events:
        assert number(next(events)) == len(topic)
        oona.publish(topic, Int64Value(value=1))
        assert number(next(events)) == 1


def test_a_known_request_is_not_stored_again(oona: OonaClient, topic: str) -> None:
    with ThreadPoolExecutor(8) as threads:
        offsets = set(
            threads.map(
                lambda _: oona.publish(topic, Int64Value(value=5), request_id="once"), range(24)
            )
        )
    assert offsets == {0}
    assert oona.publish(topic, Int64Value(value=5), request_id="twice") == 1
    assert oona.publish(f"{topic}.other", Int64Value(value=5), request_id="once") == 0
    error = refusal(lambda: oona.publish(topic, Int64Value(value=6), request_id="once"))
    assert error.violations[0].field == "request_id"


def test_many_publishers_lose_nothing(oona: OonaClient, topic: str) -> None:
    def publish(worker: int) -> list[int]:
        return oona.publish_many(topic, [Int64Value(value=1000 * worker + n) for n in range(100)])

    with ThreadPoolExecutor(8) as threads:
        offsets = [offset for part in threads.map(publish, range(8)) for offset in part]
    assert sorted(offsets) == list(range(800))
    with oona.subscribe(topic, 0) as events:
        values = [number(next(events)) for _ in range(800)]
    assert sorted(values) == [1000 * worker + n for worker in range(8) for n in range(100)]
    for worker in range(8):  # each publisher's own order is kept
        own = [value for value in values if value // 1000 == worker]
        assert own == sorted(own)


def test_what_came_before_a_bad_event_is_stored_and_acknowledged(
    oona: OonaClient, stub: event_pb2_grpc.EventServiceStub, topic: str
) -> None:
    body = AnyMessage()
    body.Pack(Int64Value(value=1))
    good = event_pb2.PublishRequest(topic=topic, body=body)
    responses = stub.Publish(iter([good, good, event_pb2.PublishRequest(topic=topic), good]))
    assert [next(responses).offset for _ in range(2)] == [0, 1]
    error = refusal(lambda: next(responses))
    assert [violation.field for violation in error.violations] == ["body"]
    assert next(t.next_offset for t in oona.list_topics() if t.name == topic) == 2


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"topic": ""}, "topic"),
        ({"topic": "A"}, "topic"),
        ({"topic": "a b"}, "topic"),
        ({"topic": "a\n"}, "topic"),
        ({"topic": "a/b"}, "topic"),
        ({"topic": "\N{LATIN SMALL LETTER E WITH ACUTE}"}, "topic"),
        ({"topic": "a" * 129}, "topic"),
        ({"key": "\N{BULLET}" * 86}, "key"),
        ({"request_id": "a b"}, "request_id"),
        ({"body": AnyMessage()}, "body"),
        ({"body": AnyMessage(type_url="t/x", value=bytes((1 << 20) + 1))}, "body"),
    ],
)
def test_bad_events_are_refused_by_field(
    stub: event_pb2_grpc.EventServiceStub, fields: dict[str, object], field: str
) -> None:
    good: dict[str, object] = {"topic": "a", "body": AnyMessage(type_url="t/x")}
    request = event_pb2.PublishRequest(**{**good, **fields})
    error = refusal(lambda: list(stub.Publish(iter([request]))))
    assert error.code is grpc.StatusCode.INVALID_ARGUMENT
    assert [violation.field for violation in error.violations] == [field]


def test_the_largest_event_passes(oona: OonaClient, topic: str) -> None:
    body = AnyMessage(type_url="t/x", value=bytes(1 << 20))
    assert oona.publish(topic, body) == 0
    with oona.subscribe(topic, 0) as events:
        assert next(events).body == body


def test_bad_subscriptions_are_refused(
    oona: OonaClient, stub: event_pb2_grpc.EventServiceStub, topic: str
) -> None:
    assert refusal(lambda: next(oona.subscribe("A", 0))).violations[0].field == "topic"
    error = refusal(lambda: next(oona.subscribe(topic, -1)))
    assert error.violations[0].field == "start_offset"
    oona.publish(topic, Int64Value())
    error = refusal(lambda: next(oona.subscribe(topic, 2)))
    assert error.code is grpc.StatusCode.OUT_OF_RANGE
    assert error.metadata == {"first_offset": "0", "next_offset": "1"}
    assert error.reason == "OFFSET"
    for fields in ({"visibility_timeout_s": 1.0}, {"max_in_flight": 1}):
        alone = event_pb2.SubscribeRequest(topic=topic, **fields)
        error = refusal(lambda alone=alone: next(stub.Subscribe(alone)))
        assert [violation.field for violation in error.violations] == list(fields)


def rss_bytes(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no VmRSS")


def test_a_slow_subscriber_costs_the_server_no_memory(
    start_server: Callable[..., object],
) -> None:
    server = start_server("oona")
    body = AnyMessage(type_url="t/x", value=bytes(1 << 20))
    with connect(server.address, timeout_s=20) as plane:
        plane.oona.publish_many("a", [body] * 4)
        with plane.oona.subscribe("a", 0) as slow:
            next(slow)
            before = rss_bytes(server.process.pid)
            for _ in range(5):
                plane.oona.publish_many("a", [body] * 20)
            growth = rss_bytes(server.process.pid) - before
            assert [next(slow).offset for _ in range(103)] == list(range(1, 104))
    assert growth < 64 << 20  # 100 MiB were published that nobody had read


def test_events_outlive_the_server_and_the_reader_goes_on(
    start_server: Callable[..., object],
) -> None:
    server = start_server("oona")
    with connect(server.address, timeout_s=20) as plane:
        plane.oona.publish_many("a", [Int64Value(value=n) for n in range(5)])
        events = plane.oona.subscribe("a", 0)
        seen = [number(next(events)) for _ in range(3)]
        server.stop(9)
        error = refusal(lambda: list(events))
        assert error.code is grpc.StatusCode.UNAVAILABLE
        start_server("oona")
        wait_until_back(plane)
        assert plane.oona.publish("a", Int64Value(value=5)) == 5
        with plane.oona.subscribe("a", len(seen)) as events:
            assert seen + [number(next(events)) for _ in range(3)] == list(range(6))


def wait_until_back(plane: Plane) -> None:
    ready = threading.Event()

    def watch(state: grpc.ChannelConnectivity) -> None:
        if state is grpc.ChannelConnectivity.READY:
            ready.set()

    plane.channel("oona").subscribe(watch, try_to_connect=True)
    assert ready.wait(20)
    plane.channel("oona").unsubscribe(watch)


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"topic": ""}, "topic"),
        ({"topic": "No Topic"}, "topic"),
        ({"topic": "x" * 129}, "topic"),
        ({"topic": "a", "request_id": "with space"}, "request_id"),
        ({"topic": "a", "retention": {"max_age_s": 0.5}}, "retention.max_age_s"),
        ({"topic": "a", "retention": {"max_age_s": -1.0}}, "retention.max_age_s"),
        ({"topic": "a", "retention": {"max_age_s": float("nan")}}, "retention.max_age_s"),
        ({"topic": "a", "retention": {"max_age_s": float("inf")}}, "retention.max_age_s"),
        ({"topic": "a", "retention": {"max_bytes": 1023}}, "retention.max_bytes"),
        ({"topic": "a", "retention": {"max_bytes": -1}}, "retention.max_bytes"),
    ],
)
def test_senseless_retention_is_refused(
    stub: event_pb2_grpc.EventServiceStub, fields: dict[str, object], field: str
) -> None:
    request = event_pb2.SetRetentionRequest(**fields)
    error = refusal(lambda: stub.SetRetention(request, timeout=60))
    assert error.code is grpc.StatusCode.INVALID_ARGUMENT
    assert [violation.field for violation in error.violations] == [field]


def test_topics_are_listed_in_pages_whose_tokens_are_their_own(
    oona: OonaClient, stub: event_pb2_grpc.EventServiceStub, store_plane: Plane, topic: str
) -> None:
    for number in range(3):
        oona.publish(f"{topic}.{number}", Int64Value(value=number))
    names, token = [], ""
    while True:
        request = event_pb2.ListTopicsRequest(page_size=2, page_token=token)
        page = stub.ListTopics(request, timeout=60)
        assert len(page.topics) <= 2
        names += [found.name for found in page.topics]
        if not (token := page.next_page_token):
            break
        last = token
    assert names == sorted(set(names))
    assert {f"{topic}.{number}" for number in range(3)} <= set(names)
    for _ in range(2):
        store_plane.urza.runs.create_run()
    runs = run_pb2_grpc.RunServiceStub(store_plane.channel("urza"))
    foreign = runs.ListRuns(run_pb2.ListRunsRequest(page_size=1), timeout=60).next_page_token
    changed = ("A" if last[0] != "A" else "B") + last[1:]
    for bad in ("x", foreign, last[:-1], last + "A", changed, "\u00e9", "x" * 5000):
        request = event_pb2.ListTopicsRequest(page_token=bad)
        error = refusal(lambda r=request: stub.ListTopics(r, timeout=60))
        assert error.code is grpc.StatusCode.INVALID_ARGUMENT
        assert [violation.field for violation in error.violations] == ["page_token"]
    request = event_pb2.ListTopicsRequest(page_size=-1)
    error = refusal(lambda: stub.ListTopics(request, timeout=60))
    assert [violation.field for violation in error.violations] == ["page_size"]
