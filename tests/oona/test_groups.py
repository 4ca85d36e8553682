"""Consumer groups by client and server together, over a real socket."""

import itertools
import signal
import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.wrappers_pb2 import Int64Value

from esper.common.rpc import RpcError
from esper.common.rpc import decode_error
from esper.oona.client import GroupSubscription
from esper.oona.client import OonaClient
from esper.oona.v1 import event_pb2
from esper.plane import Plane
from esper.plane import connect

LONG_S = 600.0


@pytest.fixture
def oona(store_plane: Plane) -> OonaClient:
    return store_plane.oona


@pytest.fixture
def topic() -> str:
    return f"t.{uuid.uuid4()}"


def publish(oona: OonaClient, topic: str, number: int) -> None:
    oona.publish_many(topic, [Int64Value(value=n) for n in range(number)])


def take(members: GroupSubscription, number: int) -> list[tuple[int, int]]:
    """Returns offset and delivery count of the next events."""
    return [(r.event.offset, r.delivery_count) for r in itertools.islice(members, number)]


def group_of(oona: OonaClient, topic: str) -> event_pb2.ConsumerGroup:
    (found,) = next(t for t in oona.list_topics() if t.name == topic).groups
    return found


def refusal(call: Callable[[], object]) -> RpcError:
    with pytest.raises((grpc.RpcError, RpcError)) as caught:
        call()
    error = caught.value
    return error if isinstance(error, RpcError) else decode_error(error)


def test_members_share_the_events_between_them(oona: OonaClient, topic: str) -> None:
    publish(oona, topic, 300)
    lock = threading.Lock()
    got: list[int] = []
    done = threading.Event()

    def work(member: GroupSubscription) -> int:
        own = 0
        for response in member:
            with lock:
                got.append(response.event.offset)
                if len(got) == 300:
                    done.set()
            own += 1
            oona.acknowledge(topic, "g", [response.event.offset])
        return own

    members = [oona.subscribe_group(topic, "g", 0, LONG_S, max_in_flight=4) for _ in range(3)]
    with ThreadPoolExecutor(3) as threads:
        shares = [threads.submit(work, member) for member in members]
        assert done.wait(30)
        while group_of(oona, topic).num_pending:
            time.sleep(0.01)
        for member in members:
            member.close()
    assert sorted(got) == list(range(300))
    assert all(share.result(10) > 20 for share in shares)
    assert group_of(oona, topic) == event_pb2.ConsumerGroup(name="g", next_offset=300)


def test_groups_do_not_take_from_each_other(oona: OonaClient, topic: str) -> None:
    publish(oona, topic, 3)
    for name in ("a", "b"):
        with oona.subscribe_group(topic, name, 0) as member:
            assert take(member, 3) == [(0, 1), (1, 1), (2, 1)]
    oona.acknowledge(topic, "a", [0, 1, 2])
    groups = next(t for t in oona.list_topics() if t.name == topic).groups
    assert [(g.name, g.next_offset, g.num_pending) for g in groups] == [("a", 3, 0), ("b", 3, 3)]


def test_what_is_not_acknowledged_in_time_is_delivered_again(oona: OonaClient, topic: str) -> None:
    publish(oona, topic, 4)
    started_s = time.monotonic()
    with oona.subscribe_group(topic, "g", 0, visibility_timeout_s=0.5) as slow:
        assert take(slow, 4) == [(0, 1), (1, 1), (2, 1), (3, 1)]
    assert oona.acknowledge(topic, "g", [1, 3]) == 2
    with oona.subscribe_group(topic, "g", visibility_timeout_s=0.5) as other:
        assert take(other, 2) == [(0, 2), (2, 2)]
        assert time.monotonic() - started_s > 0.5
        assert take(other, 2) == [(0, 3), (2, 3)]  # to itself again, as nobody else is there
        assert time.monotonic() - started_s > 1.0


def test_an_event_is_kept_from_the_others_until_its_time(oona: OonaClient, topic: str) -> None:
    publish(oona, topic, 2)
    with (
        oona.subscribe_group(topic, "g", 0, LONG_S, max_in_flight=2) as first,
        oona.subscribe_group(topic, "g", 0, LONG_S) as second,
    ):
        assert take(first, 2) == [(0, 1), (1, 1)]
        publish(oona, topic, 1)
        assert take(second, 1) == [(2, 1)]


def test_a_member_is_given_no_more_than_it_may_hold(oona: OonaClient, topic: str) -> None:
    publish(oona, topic, 10)
    with oona.subscribe_group(topic, "g", 0, LONG_S, max_in_flight=3) as member:
        assert take(member, 3) == [(0, 1), (1, 1), (2, 1)]
        time.sleep(0.2)
        assert group_of(oona, topic).next_offset == 3
        assert oona.acknowledge(topic, "g", [1]) == 1
        assert take(member, 1) == [(3, 1)]
        assert group_of(oona, topic).num_pending == 3


def test_a_member_that_leaves_gives_back_what_it_was_not_sent(oona: OonaClient, topic: str) -> None:
    body = AnyMessage(type_url="t/x", value=bytes(15 << 10))
    oona.publish_many(topic, [body] * 64)
    with oona.subscribe_group(topic, "g", 0, LONG_S) as member:
        assert take(member, 1) == [(0, 1)]
    with oona.subscribe_group(topic, "g", visibility_timeout_s=LONG_S) as member:
        again = take(member, 20)  # more than the connection holds of what was on its way
    assert [count for _, count in again] == [2] * 20
    assert [offset for offset, _ in again] == list(range(again[0][0], again[0][0] + 20))


def test_acknowledging_is_harmless_to_repeat(oona: OonaClient, topic: str) -> None:
    publish(oona, topic, 3)
    with oona.subscribe_group(topic, "g", 0, max_in_flight=2) as member:
        take(member, 2)
    assert oona.acknowledge(topic, "g", [0, 0, 1, 2, 99]) == 2
    assert oona.acknowledge(topic, "g", [0, 1]) == 0
    with oona.subscribe_group(topic, "g") as member:
        assert take(member, 1) == [(2, 1)]  # it had not been given, so it is not done


def test_a_new_group_starts_where_it_is_told(oona: OonaClient, topic: str) -> None:
    publish(oona, topic, 3)
    with oona.subscribe_group(topic, "late") as member:
        publish(oona, topic, 1)
        assert take(member, 1) == [(3, 1)]
    with oona.subscribe_group(topic, "mid", 1) as member:
        assert take(member, 1) == [(1, 1)]
    error = refusal(lambda: next(oona.subscribe_group(topic, "far", 5)))
    assert (error.code, error.reason) == (grpc.StatusCode.OUT_OF_RANGE, "OFFSET")
    with oona.subscribe_group(topic, "mid", 77, LONG_S) as member:  # it exists: goes on
        oona.acknowledge(topic, "mid", range(1, 4))
        publish(oona, topic, 1)
        offsets = [offset for offset, _ in take(member, 1)]
    assert offsets and offsets[0] <= 4


def test_a_topic_has_a_bounded_number_of_groups(oona: OonaClient, topic: str) -> None:
    for number in range(32):
        oona.subscribe_group(topic, f"g{number}").close()
    error = refusal(lambda: next(oona.subscribe_group(topic, "one-more")))
    assert (error.code, error.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "TOO_MANY_GROUPS")


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"group": "A"}, "group"),
        ({"group": "a b"}, "group"),
        ({"group": "x" * 129}, "group"),
        ({"visibility_timeout_s": 0.01}, "visibility_timeout_s"),
        ({"visibility_timeout_s": -1.0}, "visibility_timeout_s"),
        ({"visibility_timeout_s": float("nan")}, "visibility_timeout_s"),
        ({"visibility_timeout_s": 1e6}, "visibility_timeout_s"),
        ({"max_in_flight": -1}, "max_in_flight"),
        ({"max_in_flight": 1025}, "max_in_flight"),
        ({"start_offset": -1}, "start_offset"),
    ],
)
def test_senseless_members_are_refused(
    oona: OonaClient, topic: str, fields: dict[str, object], field: str
) -> None:
    error = refusal(lambda: next(oona.subscribe_group(**{"topic": topic, "group": "g", **fields})))
    assert error.code is grpc.StatusCode.INVALID_ARGUMENT
    assert [violation.field for violation in error.violations] == [field]


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"topic": ""}, "topic"),
        ({"topic": "A"}, "topic"),
        ({"group": ""}, "group"),
        ({"group": "a/b"}, "group"),
        ({"offsets": [0, -1]}, "offsets[1]"),
        ({"offsets": range(1001)}, "offsets"),
    ],
)
def test_senseless_acknowledgements_are_refused(
    oona: OonaClient, topic: str, fields: dict[str, object], field: str
) -> None:
    good: dict[str, object] = {"topic": topic, "group": "g", "offsets": [0]}
    error = refusal(lambda: oona.acknowledge(**{**good, **fields}))
    assert error.code is grpc.StatusCode.INVALID_ARGUMENT
    assert [violation.field for violation in error.violations] == [field]


def test_a_group_that_does_not_exist_is_not_found(oona: OonaClient, topic: str) -> None:
    error = refusal(lambda: oona.acknowledge(topic, "nobody", [0]))
    assert error.code is grpc.StatusCode.NOT_FOUND


def test_kill_loses_no_acknowledgement_and_nothing_else(
    start_server: Callable[..., object],
) -> None:
    server = start_server("oona")
    with connect(server.address, timeout_s=20) as plane:
        publish(plane.oona, "a", 10)
        member = plane.oona.subscribe_group("a", "g", 0, 4.0, max_in_flight=6)
        assert take(member, 6) == [(n, 1) for n in range(6)]
        assert plane.oona.acknowledge("a", "g", [0, 2, 4]) == 3
        assert take(member, 3) == [(6, 1), (7, 1), (8, 1)]
        server.stop(signal.SIGKILL)
        assert refusal(lambda: list(member)).code is grpc.StatusCode.UNAVAILABLE
        server = start_server("oona")
    with connect(server.address, timeout_s=20) as plane:
        assert plane.oona.acknowledge("a", "g", [6]) == 1  # what was delivered can still be done
        with plane.oona.subscribe_group("a", "g", visibility_timeout_s=LONG_S) as member:
            assert take(member, 1) == [(9, 1)]
            again = take(member, 5)
        assert again == [(1, 2), (3, 2), (5, 2), (7, 2), (8, 2)]
        assert group_of(plane.oona, "a").num_pending == 6
