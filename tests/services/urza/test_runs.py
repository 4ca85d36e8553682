"""The chain of a run's events at rest: any change is found, and nothing acknowledged is lost."""

import asyncio
import hashlib
import signal
import threading
from collections.abc import Callable
from collections.abc import Iterator

import grpc
import pytest
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.timestamp_pb2 import Timestamp
from google.protobuf.wrappers_pb2 import Int64Value
from hypothesis import given
from hypothesis import strategies as st

from esper.common.rpc import RpcError
from esper.plane import connect
from esper.services.serving.errors import ServiceError
from esper.services.store.engine import Store
from esper.services.store.opening import Row
from esper.services.store.opening import Schema
from esper.services.urza.library import TABLES as LIBRARY_TABLES
from esper.services.urza.runs import MAX_BATCH_EVENTS
from esper.services.urza.runs import TABLES
from esper.services.urza.runs import Runs
from esper.services.urza.runs import event_hash
from esper.urza.runs import RunClient
from esper.urza.v1 import run_pb2

NAME = "runs/a"
MIN_TIME_S, MAX_TIME_S = -62135596800, 253402300799

times = st.builds(
    Timestamp, seconds=st.integers(MIN_TIME_S, MAX_TIME_S), nanos=st.integers(0, 999_999_999)
)
bodies = st.builds(
    AnyMessage, type_url=st.text(min_size=1, max_size=20), value=st.binary(max_size=40)
)
histories = st.lists(st.tuples(times, bodies), min_size=1, max_size=6)


def reference_hash(event: run_pb2.RunEvent) -> str:
    """The documented form, written down once more."""
    url = event.body.type_url.encode("utf-8")
    content = bytes.fromhex(event.previous) if event.sequence else bytes(32)
    content += event.sequence.to_bytes(8, "big")
    content += event.event_time.seconds.to_bytes(8, "big", signed=True)
    content += event.event_time.nanos.to_bytes(4, "big", signed=True)
    content += len(url).to_bytes(8, "big") + url
    content += len(event.body.value).to_bytes(8, "big") + event.body.value
    return hashlib.sha256(content).hexdigest()


class History:
    """One run in a store of its own, whose rows a test may edit."""

    def __init__(self, store: Store, events: list[tuple[Timestamp, AnyMessage]]) -> None:
        self._store = store
        # None of its methods that are called here needs the loop, once it is made.
        self.runs = asyncio.run(self._record(events))

    async def _record(self, events: list[tuple[Timestamp, AnyMessage]]) -> Runs:
        runs = Runs(self._store)
        await asyncio.wrap_future(runs.create(run_pb2.CreateRunRequest(run_id=NAME[5:])))
        requests = [
            run_pb2.AppendRunEventsRequest(expected_sequence=number, event_time=time, body=body)
            for number, (time, body) in enumerate(events)
        ]
        run, problem = await asyncio.wrap_future(runs.append(NAME, requests))
        assert problem is None
        assert run.num_events == len(events)
        return runs

    def rows(self, table: str) -> list[tuple[bytes, bytes]]:
        with self._store.reading() as row:
            return list(row.cursor(db=self._store.table(table)))

    def edit(self, table: str, key: bytes, value: bytes | None) -> None:
        def work(row: Row) -> None:
            if value is None:
                row.delete(key, db=self._store.table(table))
            else:
                row.put(key, value, db=self._store.table(table))

        self._store.submit(work).result(20)

    def edit_run(self, **fields: int | str) -> None:
        ((key, value),) = self.rows("runs")
        run = run_pb2.Run.FromString(value)
        for field, content in fields.items():
            setattr(run, field, content)
        self.edit("runs", key, run.SerializeToString())

    def verify(self) -> run_pb2.VerifyRunResponse:
        *_, outcome = self.runs.verify(NAME)
        assert outcome is not None
        return outcome


@pytest.fixture(scope="module")
def new_history(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Callable[[list[tuple[Timestamp, AnyMessage]]], History]]:
    """Makes histories; each takes the store from the one before."""
    store = Store(tmp_path_factory.mktemp("runs"), Schema((*LIBRARY_TABLES, *TABLES), 1))

    def clear(row: Row) -> None:
        for table in TABLES:
            row.drop(store.table(table), delete=False)

    def make(events: list[tuple[Timestamp, AnyMessage]]) -> History:
        store.submit(clear).result(20)
        return History(store, events)

    yield make
    store.close()


NewHistory = Callable[[list[tuple[Timestamp, AnyMessage]]], History]


def numbered(count: int) -> list[tuple[Timestamp, AnyMessage]]:
    return [
        (Timestamp(seconds=number), AnyMessage(type_url="t/x", value=str(number).encode()))
        for number in range(count)
    ]


def broken(sequence: int) -> run_pb2.VerifyRunResponse:
    return run_pb2.VerifyRunResponse(intact=False, num_events=sequence, first_broken=sequence)


@given(events=histories)
def test_hashes_are_the_documented_ones(
    new_history: NewHistory, events: list[tuple[Timestamp, AnyMessage]]
) -> None:
    history = new_history(events)
    stored = history.runs.read(NAME, 0)
    previous = ""
    for number, (event, (time, body)) in enumerate(zip(stored, events, strict=True)):
        assert (event.sequence, event.previous) == (number, previous)
        assert (event.event_time, event.body) == (time, body)
        assert event.hash == reference_hash(event)
        previous = event.hash
    assert history.runs.get(NAME).head == previous
    whole = run_pb2.VerifyRunResponse(intact=True, num_events=len(events))
    assert history.verify() == whole


def test_the_hash_of_a_known_event() -> None:
    body = AnyMessage(type_url="u", value=b"v")
    content = "00" * 32 + "00" * 8 + "ff" * 8 + "00000007" + "00" * 7 + "0175" + "00" * 7 + "0176"
    known = hashlib.sha256(bytes.fromhex(content)).hexdigest()
    assert event_hash("", 0, Timestamp(seconds=-1, nanos=7), body) == known


@given(events=histories, data=st.data())
def test_any_edited_byte_is_found(
    new_history: NewHistory, events: list[tuple[Timestamp, AnyMessage]], data: st.DataObject
) -> None:
    history = new_history(events)
    rows = history.rows("run_events")
    for _ in range(4):
        sequence = data.draw(st.integers(0, len(rows) - 1), label="event")
        key, value = rows[sequence]
        offset = data.draw(st.integers(0, len(value) - 1), label="offset")
        flip = data.draw(st.integers(1, 255), label="flip")
        edited = value[:offset] + bytes([value[offset] ^ flip]) + value[offset + 1 :]
        history.edit("run_events", key, edited)
        assert history.verify() == broken(sequence)
        history.edit("run_events", key, value)
    assert history.verify().intact


def test_every_byte_of_an_event_counts(new_history: NewHistory) -> None:
    # The Unix epoch and an empty body leave empty parts, which must not hide an edit either.
    history = new_history([(Timestamp(), AnyMessage(type_url="t/x"))])
    ((key, value),) = history.rows("run_events")
    for offset in range(len(value)):
        for edited in (
            value[:offset] + bytes([value[offset] ^ 8]) + value[offset + 1 :],
            value[:offset] + value[offset + 1 :],
        ):
            history.edit("run_events", key, edited)
            assert history.verify() == broken(0), offset
    history.edit("run_events", key, value + b"\x78\x01")  # a field that nobody knows
    assert history.verify() == broken(0)


@pytest.mark.parametrize("count", [3, MAX_BATCH_EVENTS, 2 * MAX_BATCH_EVENTS + 5])
def test_events_removed_added_or_moved_are_found(new_history: NewHistory, count: int) -> None:
    history = new_history(numbered(count))
    rows = history.rows("run_events")
    for place in {0, 1, count - 2, count - 1}:
        key, value = rows[place]
        history.edit("run_events", key, None)
        assert history.verify() == broken(place)
        history.edit("run_events", key, rows[place - 1][1])
        assert history.verify() == broken(place)
        history.edit("run_events", key, value)
    surplus = rows[-1][0][:-8] + count.to_bytes(8, "big")
    history.edit("run_events", surplus, rows[-1][1])
    assert history.verify() == broken(count)
    history.edit("run_events", surplus, None)
    assert history.verify() == run_pb2.VerifyRunResponse(intact=True, num_events=count)


def test_a_history_cut_short_is_found(new_history: NewHistory) -> None:
    history = new_history(numbered(4))
    head = history.runs.get(NAME).head
    for fields, first_broken in (
        ({"num_events": 3}, 3),
        ({"num_events": 5}, 4),
        ({"head": "0" * 64}, 3),
    ):
        history.edit_run(**fields)
        assert history.verify() == broken(first_broken)
        history.edit_run(num_events=4, head=head)
    # An event rewritten together with its hash breaks the one after it.
    key, value = history.rows("run_events")[1]
    event = run_pb2.RunEvent.FromString(value)
    event.body.value = b"forged"
    event.hash = reference_hash(event)
    history.edit("run_events", key, event.SerializeToString(deterministic=True))
    assert history.verify() == broken(2)


def test_nothing_of_a_batch_is_stored_from_a_wrong_sequence_on(new_history: NewHistory) -> None:
    history = new_history(numbered(2))

    async def append(*sequences: int) -> tuple[run_pb2.Run, ServiceError | None]:
        requests = [
            run_pb2.AppendRunEventsRequest(expected_sequence=sequence) for sequence in sequences
        ]
        return await asyncio.wrap_future(history.runs.append(NAME, requests))

    for sequences, stored in (((7, 2, 3), 2), ((2, 3, 7, 4), 4)):
        run, problem = asyncio.run(append(*sequences))
        assert problem is not None
        assert problem.code is grpc.StatusCode.ABORTED
        assert run == history.runs.get(NAME)
        assert history.verify() == run_pb2.VerifyRunResponse(intact=True, num_events=stored)


def test_what_cannot_be_read_is_data_loss(new_history: NewHistory) -> None:
    history = new_history(numbered(3))
    key, value = history.rows("run_events")[1]
    for edited in (None, b"\xff"):
        history.edit("run_events", key, edited)
        with pytest.raises(ServiceError, match="has lost events") as caught:
            for sequence in (0, 1):
                history.runs.read(NAME, sequence)
        assert caught.value.code is grpc.StatusCode.DATA_LOSS
        history.edit("run_events", key, value)
    assert len(history.runs.read(NAME, 0)) == 3
    ((key, _),) = history.rows("runs")
    for edited in (None, b"\xff"):
        history.edit("runs", key, edited)
        with pytest.raises(ServiceError, match="cannot be read") as caught:
            history.runs.get(NAME)
        assert caught.value.code is grpc.StatusCode.DATA_LOSS


def value_of(event: run_pb2.RunEvent) -> int:
    value = Int64Value()
    assert event.body.Unpack(value)
    return value.value


def test_kill_loses_no_acknowledged_event_and_appending_goes_on(
    start_server: Callable[..., object],
) -> None:
    server = start_server("urza")
    acknowledged = 0
    for cycle in range(2):
        with connect(server.address, timeout_s=30) as plane:
            if cycle == 0:
                plane.urza.runs.create_run("crash", task="digits")
            enough = threading.Event()

            def load(runs: RunClient, target: int, enough: threading.Event) -> None:
                nonlocal acknowledged
                sequence = runs.get_run("runs/crash").num_events
                while True:
                    batch = [Int64Value(value=sequence + n) for n in range(3)]
                    try:
                        answer = runs.append_run_events("runs/crash", batch, sequence)
                    except RpcError:
                        return  # the server is gone
                    sequence += len(batch)
                    assert answer.num_events == sequence
                    acknowledged = sequence
                    if sequence >= target:
                        enough.set()

            thread = threading.Thread(
                target=load, args=(plane.urza.runs, 150 * (cycle + 1), enough)
            )
            thread.start()
            assert enough.wait(60)
            server.stop(signal.SIGKILL)
            thread.join(60)
            assert not thread.is_alive()
        server = start_server("urza")
    with connect(server.address, timeout_s=30) as plane:
        runs = plane.urza.runs
        run = runs.get_run("runs/crash")
        # At most the one batch under way may be there without an answer.
        assert acknowledged <= run.num_events <= acknowledged + 3
        last = Int64Value(value=run.num_events)
        total = runs.append_run_events(run.name, [last], run.num_events).num_events
        with runs.watch_run(run.name) as watch:
            events = [next(watch) for _ in range(total)]
        assert [event.sequence for event in events] == list(range(total))
        assert [value_of(event) for event in events] == list(range(total))
        assert runs.verify_run(run.name) == run_pb2.VerifyRunResponse(intact=True, num_events=total)


def test_a_server_that_stops_sends_watchers_away(start_server: Callable[..., object]) -> None:
    server = start_server("urza")
    with connect(server.address, timeout_s=30) as plane:
        runs = plane.urza.runs
        runs.create_run("drain")
        runs.append_run_events("runs/drain", [Int64Value(value=1)], 0)
        watch = runs.watch_run("runs/drain")
        assert next(watch).sequence == 0
        # Well under the grace after which calls that do not end are cut off.
        assert server.stop(timeout_s=4) == 0
        with pytest.raises(RpcError, match="watch again") as caught:
            next(watch)
        assert caught.value.code is grpc.StatusCode.UNAVAILABLE
        start_server("urza")
        runs.append_run_events(
            "runs/drain", [Int64Value(value=2)], runs.get_run("runs/drain").num_events
        )
        with runs.watch_run("runs/drain", start_sequence=1) as again:
            assert value_of(next(again)) == 2
