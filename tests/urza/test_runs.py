"""Histories of runs, by client and server over a real socket."""

import threading
from collections.abc import Callable
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.timestamp_pb2 import Timestamp
from google.protobuf.wrappers_pb2 import Int64Value

from esper.common.rpc import RpcError
from esper.common.rpc import decode_error
from esper.plane import Plane
from esper.urza.runs import RunClient
from esper.urza.v1 import run_pb2 as pb
from esper.urza.v1 import run_pb2_grpc

Stub = run_pb2_grpc.RunServiceStub


@pytest.fixture
def runs(store_plane: Plane) -> RunClient:
    return store_plane.urza.runs


@pytest.fixture
def stub(store_plane: Plane) -> Stub:
    return Stub(store_plane.channel("urza"))


@pytest.fixture
def run(runs: RunClient) -> pb.Run:
    return runs.create_run(task="digits")


def numbers(*values: int) -> list[Int64Value]:
    return [Int64Value(value=value) for value in values]


def value_of(event: pb.RunEvent) -> int:
    value = Int64Value()
    assert event.body.Unpack(value)
    return value.value


def refusal(call: Callable[[], object]) -> RpcError:
    with pytest.raises((RpcError, grpc.RpcError)) as caught:
        call()
    error = caught.value
    return error if isinstance(error, RpcError) else decode_error(error)


def test_a_run_makes_the_round_trip(runs: RunClient) -> None:
    before = Timestamp()
    before.GetCurrentTime()
    run = runs.create_run("round-trip", task="digits")
    assert (run.name, run.task, run.num_events, run.head) == ("runs/round-trip", "digits", 0, "")
    assert run.create_time.ToNanoseconds() >= before.ToNanoseconds() - 1000
    assert runs.get_run(run.name) == run
    assert runs.verify_run(run.name) == pb.VerifyRunResponse(intact=True)
    first = runs.append_run_events(run.name, numbers(10, 11), 0)
    assert first.num_events == 2
    packed = AnyMessage()
    packed.Pack(Int64Value(value=12))
    second = runs.append_run_events(run.name, [packed], 2)
    with runs.watch_run(run.name) as watch:
        events = [next(watch) for _ in range(3)]
    assert [value_of(event) for event in events] == [10, 11, 12]
    assert [event.sequence for event in events] == [0, 1, 2]
    assert [event.previous for event in events] == ["", *(event.hash for event in events[:2])]
    assert (events[1].hash, events[2].hash) == (first.head, second.head)
    assert all(event.event_time.ToNanoseconds() >= before.ToNanoseconds() for event in events)
    grown = runs.get_run(run.name)
    assert (grown.num_events, grown.head) == (3, second.head)
    assert runs.verify_run(run.name) == pb.VerifyRunResponse(intact=True, num_events=3)
    with pytest.raises(ValueError, match="at least one"):
        runs.append_run_events(run.name, [], 3)


def test_the_server_chooses_an_id_and_no_id_is_given_twice(runs: RunClient) -> None:
    names = {runs.create_run().name for _ in range(3)}
    assert len(names) == 3
    runs.create_run("taken", task="first")
    error = refusal(lambda: runs.create_run("taken"))
    assert error.code is grpc.StatusCode.ALREADY_EXISTS
    assert error.metadata == {"name": "runs/taken"}
    assert runs.get_run("runs/taken").task == "first"


@pytest.mark.parametrize("run_id", ["", "retried"])
def test_a_retried_creation_opens_one_run(stub: Stub, run_id: str) -> None:
    request = pb.CreateRunRequest(run_id=run_id, request_id=f"retry-{run_id}")
    assert stub.CreateRun(request).run == stub.CreateRun(request).run
    other = pb.CreateRunRequest(run_id=run_id, task="other", request_id=request.request_id)
    assert [v.field for v in refusal(lambda: stub.CreateRun(other)).violations] == ["request_id"]


def test_runs_are_listed_newest_first_in_pages(runs: RunClient, stub: Stub) -> None:
    names = [runs.create_run(f"listed-{number}").name for number in range(5)][::-1]
    assert [run.name for run in runs.list_runs()][:5] == names
    page = stub.ListRuns(pb.ListRunsRequest(page_size=2))
    assert [run.name for run in page.runs] == names[:2]
    runs.create_run("listed-meanwhile")
    runs.append_run_events(names[2], numbers(1), 0)
    page = stub.ListRuns(pb.ListRunsRequest(page_size=3, page_token=page.next_page_token))
    assert [run.name for run in page.runs] == names[2:]
    assert page.runs[0].num_events == 1


def test_an_unexpected_sequence_stores_nothing(runs: RunClient, run: pb.Run) -> None:
    head = runs.append_run_events(run.name, numbers(1, 2), 0).head
    for sequence in (0, 1, 3):
        with pytest.raises(RpcError) as caught:
            runs.append_run_events(run.name, numbers(7, 8), sequence)
        error = caught.value
        assert error.code is grpc.StatusCode.ABORTED
        assert error.reason == "SEQUENCE_MISMATCH"
        assert error.metadata == {"num_events": "2", "head": head}
        assert runs.get_run(run.name).num_events == 2


@pytest.mark.parametrize(
    ("sequences", "bad", "stored"),
    [
        ([0, 1, 5, 2, 3], {}, 2),  # the right numbers after a wrong one are not stored either
        (list(range(300)), {200: {"body": None}}, 200),
        (list(range(5)), {3: {"run": "runs/other"}}, 3),
    ],
)
def test_a_refused_message_ends_the_stream_behind_what_is_stored(
    runs: RunClient,
    stub: Stub,
    run: pb.Run,
    sequences: list[int],
    bad: dict[int, dict[str, object]],
    stored: int,
) -> None:
    body = AnyMessage()
    body.Pack(Int64Value(value=1))
    requests = []
    for number, sequence in enumerate(sequences):
        fields = {"run": run.name, "expected_sequence": sequence, "body": body}
        requests.append(pb.AppendRunEventsRequest(**{**fields, **bad.get(number, {})}))
    error = refusal(lambda: stub.AppendRunEvents(iter(requests)))
    expected = grpc.StatusCode.INVALID_ARGUMENT if bad else grpc.StatusCode.ABORTED
    assert error.code is expected
    assert runs.get_run(run.name).num_events == stored
    assert runs.verify_run(run.name) == pb.VerifyRunResponse(intact=True, num_events=stored)


def test_long_streams_are_stored_in_order(runs: RunClient, run: pb.Run) -> None:
    answer = runs.append_run_events(run.name, numbers(*range(2000)), 0)
    assert answer.num_events == 2000
    with runs.watch_run(run.name, start_sequence=700) as watch:
        assert [value_of(next(watch)) for _ in range(1300)] == list(range(700, 2000))
    assert runs.verify_run(run.name) == pb.VerifyRunResponse(intact=True, num_events=2000)


def test_an_event_without_a_time_gets_that_of_its_arrival(
    runs: RunClient, stub: Stub, run: pb.Run
) -> None:
    body = AnyMessage(type_url="t/x")
    before = Timestamp()
    before.GetCurrentTime()
    stub.AppendRunEvents(iter([pb.AppendRunEventsRequest(run=run.name, body=body)]))
    with runs.watch_run(run.name) as watch:
        assert next(watch).event_time.ToNanoseconds() >= before.ToNanoseconds()


def test_of_two_writers_at_one_place_one_is_aborted(runs: RunClient, run: pb.Run) -> None:
    start = threading.Barrier(2)

    def write(writer: int, sequence: int) -> bool:
        start.wait(20)
        try:
            runs.append_run_events(run.name, numbers(writer), sequence)
        except RpcError as error:
            assert error.code is grpc.StatusCode.ABORTED
            return False
        return True

    winners = []
    with ThreadPoolExecutor(2) as threads:
        for sequence in range(20):
            outcome = list(threads.map(write, (0, 1), (sequence, sequence)))
            assert sorted(outcome) == [False, True]
            winners.append(outcome.index(True))
    with runs.watch_run(run.name) as watch:
        assert [value_of(next(watch)) for _ in range(20)] == winners
    assert runs.verify_run(run.name) == pb.VerifyRunResponse(intact=True, num_events=20)


def test_a_watch_resumes_without_gap_or_repeat(runs: RunClient, run: pb.Run) -> None:
    total = 200

    def write() -> None:
        for sequence in range(total):
            runs.append_run_events(run.name, numbers(sequence), sequence)

    seen: list[int] = []
    with ThreadPoolExecutor(1) as threads:
        writing = threads.submit(write)
        while len(seen) < total:
            with runs.watch_run(run.name, start_sequence=len(seen)) as watch:
                for _ in range(min(37, total - len(seen))):
                    event = next(watch)
                    assert event.sequence == value_of(event)
                    seen.append(event.sequence)
        writing.result(20)
    assert seen == list(range(total))


def test_a_watch_follows_and_ends_when_closed(runs: RunClient, run: pb.Run) -> None:
    watch = runs.watch_run(run.name)
    values: list[int] = []
    come = threading.Semaphore(0)

    def follow() -> None:
        for event in watch:
            values.append(value_of(event))
            come.release()

    thread = threading.Thread(target=follow)
    thread.start()
    for sequence in range(3):
        runs.append_run_events(run.name, numbers(sequence), sequence)
        assert come.acquire(timeout=20)
    watch.close()
    thread.join(20)
    assert not thread.is_alive()
    assert values == [0, 1, 2]


def test_a_watch_from_beyond_the_next_event_is_refused(runs: RunClient, run: pb.Run) -> None:
    error = refusal(lambda: next(runs.watch_run(run.name, start_sequence=1)))
    assert error.code is grpc.StatusCode.OUT_OF_RANGE
    assert error.metadata == {"num_events": "0"}


def test_runs_that_do_not_exist_are_not_found(runs: RunClient) -> None:
    name = "runs/absent"
    calls: Iterable[Callable[[], object]] = (
        lambda: runs.get_run(name),
        lambda: runs.append_run_events(name, numbers(1), 0),
        lambda: next(runs.watch_run(name)),
        lambda: runs.verify_run(name),
    )
    for call in calls:
        error = refusal(call)
        assert error.code is grpc.StatusCode.NOT_FOUND
        assert error.metadata == {"name": name}


@pytest.mark.parametrize(
    "name",
    [
        "",
        "runs/",
        "run/a",
        "runs/A",
        "runs/a/b",
        "runs/a\n",
        "runs/" + "a" * 65,
        "a",
        "runs/\u00e4",
    ],
)
def test_bad_names_are_refused(runs: RunClient, name: str) -> None:
    calls: dict[str, Callable[[], object]] = {
        "get": lambda: runs.get_run(name),
        "watch": lambda: next(runs.watch_run(name)),
        "verify": lambda: runs.verify_run(name),
        "append": lambda: runs.append_run_events(name, numbers(1), 0),
    }
    for method, call in calls.items():
        error = refusal(call)
        assert error.code is grpc.StatusCode.INVALID_ARGUMENT
        field = "run" if method == "append" else "name"
        assert [violation.field for violation in error.violations] == [field]


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"run_id": "A"}, "run_id"),
        ({"run_id": "a_b"}, "run_id"),
        ({"run_id": "a" * 65}, "run_id"),
        ({"task": "x" * 257}, "task"),
        ({"request_id": "two words"}, "request_id"),
        ({"request_id": "x" * 65}, "request_id"),
    ],
)
def test_senseless_creations_are_refused(stub: Stub, fields: dict[str, str], field: str) -> None:
    error = refusal(lambda: stub.CreateRun(pb.CreateRunRequest(**fields)))
    assert error.code is grpc.StatusCode.INVALID_ARGUMENT
    assert [violation.field for violation in error.violations] == [field]


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"run": ""}, "run"),
        ({"expected_sequence": -1}, "expected_sequence"),
        ({"event_time": Timestamp(seconds=-62135596801)}, "event_time.seconds"),
        ({"event_time": Timestamp(seconds=253402300800)}, "event_time.seconds"),
        ({"event_time": Timestamp(nanos=-1)}, "event_time.nanos"),
        ({"event_time": Timestamp(nanos=1_000_000_000)}, "event_time.nanos"),
        ({"body": None}, "body"),
        ({"body": AnyMessage(value=b"no type")}, "body"),
        ({"body": AnyMessage(type_url="t/x", value=bytes(1 << 20))}, "body"),
    ],
)
def test_senseless_events_are_refused(
    runs: RunClient, stub: Stub, run: pb.Run, fields: dict[str, object], field: str
) -> None:
    good = {"run": run.name, "body": AnyMessage(type_url="t/x")}
    request = pb.AppendRunEventsRequest(**{**good, **fields})
    error = refusal(lambda: stub.AppendRunEvents(iter([request])))
    assert error.code is grpc.StatusCode.INVALID_ARGUMENT
    assert [violation.field for violation in error.violations] == [field]
    assert runs.get_run(run.name) == run


def test_an_empty_stream_is_refused(stub: Stub) -> None:
    error = refusal(lambda: stub.AppendRunEvents(iter([])))
    assert [violation.field for violation in error.violations] == ["run"]


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (pb.ListRunsRequest(page_size=-1), "page_size"),
        (pb.ListRunsRequest(page_token="!"), "page_token"),
        (pb.ListRunsRequest(page_token="AAAA"), "page_token"),
        (pb.ListRunsRequest(page_token="\u00e4"), "page_token"),
    ],
)
def test_senseless_listings_are_refused(
    stub: Stub, request_: pb.ListRunsRequest, field: str
) -> None:
    error = refusal(lambda: stub.ListRuns(request_))
    assert error.code is grpc.StatusCode.INVALID_ARGUMENT
    assert [violation.field for violation in error.violations] == [field]


def test_negative_start_of_a_watch_is_refused(runs: RunClient, run: pb.Run) -> None:
    error = refusal(lambda: next(runs.watch_run(run.name, start_sequence=-1)))
    assert [violation.field for violation in error.violations] == ["start_sequence"]
