"""Runs: histories of numbered events, each chained to the one before by its hash.

The hash of an event is the SHA-256 over, in this order:

* the hash of the event before, 32 bytes; zeros for the first event,
* the sequence number, 8 bytes,
* the seconds and the nanoseconds of its time, 8 and 4 bytes,
* the type URL of its body: the number of its bytes in UTF-8, 8 bytes, then these,
* the value of its body: the number of its bytes, 8 bytes, then these.

All integers are big-endian; those of the time are signed, in two's complement.
"""

import hashlib
import struct
import time
import uuid
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
from concurrent.futures import Future

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.message import DecodeError
from google.protobuf.timestamp_pb2 import Timestamp

from esper.services.serving.checks import effective_page_size
from esper.services.serving.errors import ServiceError
from esper.services.serving.errors import aborted
from esper.services.serving.errors import data_loss
from esper.services.serving.errors import not_found
from esper.services.serving.errors import out_of_range
from esper.services.store.engine import Store
from esper.services.store.followers import Followers
from esper.services.store.opening import Row
from esper.services.store.paging import PageTokens
from esper.services.store.paging import read_page
from esper.services.store.requests import RequestTable
from esper.services.store.requests import fingerprint
from esper.services.urza.names import run_id_of
from esper.urza.v1 import run_pb2 as pb

# A run's key is its place in the order of creation, counted down, so that the newest comes first.
TABLES = ("runs", "run_ids", "run_events")
REQUEST_CAPACITY = 100_000
MAX_BATCH_EVENTS = 256
MAX_BATCH_BYTES = 1 << 20

_NUMBER_BYTES = 8
_LAST_NUMBER = (1 << 64) - 1
_NO_HASH = "0" * 64


def event_hash(previous: str, sequence: int, event_time: Timestamp, body: AnyMessage) -> str:
    """Returns the hash of an event, as 64 hexadecimal characters; this module says over what.

    Args:
        previous: Hash of the event before; empty for the first.
        sequence: Number of the event, from 0.
        event_time: When it happened.
        body: The event itself.
    """
    total = hashlib.sha256(bytes.fromhex(previous or _NO_HASH))
    total.update(struct.pack(">Qqi", sequence, event_time.seconds, event_time.nanos))
    for part in (body.type_url.encode(), body.value):
        total.update(struct.pack(">Q", len(part)))
        total.update(part)
    return total.hexdigest()


def chain(previous: str, sequence: int, event_time: Timestamp, body: AnyMessage) -> pb.RunEvent:
    """Returns the event that follows the one with the hash `previous`; it holds nothing else."""
    return pb.RunEvent(
        sequence=sequence,
        previous=previous,
        hash=event_hash(previous, sequence, event_time, body),
        event_time=Timestamp(seconds=event_time.seconds, nanos=event_time.nanos),
        body=AnyMessage(type_url=body.type_url, value=body.value),
    )


class Runs:
    """The runs of one Urza. To be used from one event loop, whose threads may read.

    Writes return a future that is done when they are durable; what they find wrong is raised by the
    future. Requests are expected to have been validated.

    Args:
        store: Holds `TABLES` and `requests`.
        now: Gives the time of day in seconds since 1970, for `create_time` alone.
    """

    def __init__(self, store: Store, now: Callable[[], float] = time.time) -> None:
        self._store = store
        self._now = now
        self._requests = RequestTable(store, "requests", REQUEST_CAPACITY)
        self._tokens = PageTokens(store)
        self.followers = Followers()

    def create(self, request: pb.CreateRunRequest) -> "Future[pb.CreateRunResponse]":
        """Opens a run; one that exists fails the future with ALREADY_EXISTS."""
        asked = fingerprint("CreateRun", request)
        run_id = request.run_id or str(uuid.uuid4())

        def work(row: Row) -> pb.CreateRunResponse:
            known = self._requests.recall(row, "CreateRun", request.request_id, asked)
            if known is not None:
                return pb.CreateRunResponse.FromString(known)
            name = f"runs/{run_id}"
            if row.get(run_id.encode(), db=self._store.table("run_ids")) is not None:
                raise ServiceError(
                    grpc.StatusCode.ALREADY_EXISTS,
                    "ALREADY_EXISTS",
                    f"{name} exists already",
                    metadata={"name": name},
                )
            stamp = Timestamp()
            stamp.FromNanoseconds(int(self._now() * 1e9))
            run = pb.Run(name=name, task=request.task, create_time=stamp)
            newest = row.cursor(db=self._store.table("runs"))
            number = int.from_bytes(newest.key(), "big") - 1 if newest.first() else _LAST_NUMBER
            key = number.to_bytes(_NUMBER_BYTES, "big")
            row.put(run_id.encode(), key, db=self._store.table("run_ids"))
            row.put(key, run.SerializeToString(), db=self._store.table("runs"))
            response = pb.CreateRunResponse(run=run)
            answer = response.SerializeToString()
            self._requests.remember(row, "CreateRun", request.request_id, asked, answer)
            return response

        return self._store.submit(work, request.ByteSize())

    def get(self, name: str) -> pb.Run:
        """Returns a run.

        Raises:
            ServiceError: NOT_FOUND.
        """
        with self._store.reading() as row:
            return self._load(row, name)[1]

    def list_page(self, request: pb.ListRunsRequest) -> pb.ListRunsResponse:
        """Returns a page of runs, newest first."""
        start = self._tokens.decode("runs", request.page_token)
        size = effective_page_size(request.page_size)
        with self._store.reading() as row:
            rows, following = read_page(row, self._store.table("runs"), b"", start, size)
        token = "" if following is None else self._tokens.encode("runs", following)
        runs = [pb.Run.FromString(value) for _, value in rows]
        return pb.ListRunsResponse(runs=runs, next_page_token=token)

    def append(
        self, name: str, requests: Sequence[pb.AppendRunEventsRequest]
    ) -> "Future[tuple[pb.Run, ServiceError | None]]":
        """Appends events up to the first whose expected sequence is not its own.

        The future gives the run as it then is, and ABORTED where there was such an event: the ones
        before it are durable, and neither it nor those after it are stored.

        Args:
            name: Name of the run; one that does not exist fails the future with NOT_FOUND.
            requests: The events in order, each with its time.
        """

        def work(row: Row) -> tuple[pb.Run, ServiceError | None]:
            key, run = self._load(row, name)
            problem = None
            for request in requests:
                if request.expected_sequence != run.num_events:
                    problem = _unexpected(run, request.expected_sequence)
                    break
                event = chain(run.head, run.num_events, request.event_time, request.body)
                place = key + run.num_events.to_bytes(_NUMBER_BYTES, "big")
                row.put(place, _encoded(event), db=self._store.table("run_events"))
                run.head = event.hash
                run.num_events += 1
            row.put(key, run.SerializeToString(), db=self._store.table("runs"))
            return run, problem

        future = self._store.submit(work, sum(request.ByteSize() for request in requests))
        future.add_done_callback(lambda _: self.followers.wake(name))
        return future

    def read(self, name: str, sequence: int) -> list[pb.RunEvent]:
        """Returns the next events from `sequence` on, a bounded batch; empty where there are none.

        Raises:
            ServiceError: NOT_FOUND; OUT_OF_RANGE where `sequence` is beyond the next event;
                DATA_LOSS where an event is missing or cannot be read.
        """
        with self._store.reading() as row:
            key, run = self._load(row, name)
            if sequence > run.num_events:
                raise out_of_range(
                    "SEQUENCE",
                    f"{name} has {run.num_events} events, so {sequence} is beyond the next",
                    num_events=str(run.num_events),
                )
            rows = self._rows(row, key, sequence, run.num_events)
        if not rows and sequence < run.num_events:
            raise _lost(name)
        try:
            return [pb.RunEvent.FromString(content) for content in rows]
        except DecodeError as error:
            raise _lost(name) from error

    def verify(self, name: str) -> Iterator[pb.VerifyRunResponse | None]:
        """Recomputes the chain batch by batch; yields None between them and the outcome last.

        Events appended meanwhile are checked too.

        Raises:
            ServiceError: NOT_FOUND.
        """
        previous = ""
        sequence = 0
        while True:
            with self._store.reading() as row:
                key, run = self._load(row, name)
                rows = self._rows(row, key, sequence, run.num_events)
                at_end = sequence + len(rows) >= run.num_events
                beyond = key + (sequence + len(rows)).to_bytes(_NUMBER_BYTES, "big")
                surplus = row.get(beyond, db=self._store.table("run_events")) is not None
            for content in rows:
                found = _verified(content, previous, sequence)
                if found is None:
                    yield _broken(sequence)
                    return
                previous = found
                sequence += 1
            if at_end:
                if surplus:
                    yield _broken(sequence)
                elif run.num_events < sequence or run.head != previous:
                    yield _broken(max(sequence - 1, 0))
                else:
                    yield pb.VerifyRunResponse(intact=True, num_events=sequence)
                return
            if not rows:
                yield _broken(sequence)
                return
            yield None

    def _load(self, row: Row, name: str) -> tuple[bytes, pb.Run]:
        """Returns the key and the record of a run."""
        key = row.get(run_id_of("name", name).encode(), db=self._store.table("run_ids"))
        if key is None:
            raise not_found(name)
        content = row.get(key, db=self._store.table("runs"))
        try:
            return key, pb.Run.FromString(content or b"\0")  # no message, as the record is missing
        except DecodeError as error:
            raise data_loss(f"the record of {name} cannot be read", name=name) from error

    def _rows(self, row: Row, key: bytes, start: int, end: int) -> list[bytes]:
        """Returns the rows of events from `start` on: a bounded batch, up to a gap or to `end`."""
        rows: list[bytes] = []
        size_bytes = 0
        cursor = row.cursor(db=self._store.table("run_events"))
        going_on = cursor.set_range(key + start.to_bytes(_NUMBER_BYTES, "big"))
        while going_on and start + len(rows) < end and len(rows) < MAX_BATCH_EVENTS:
            place = key + (start + len(rows)).to_bytes(_NUMBER_BYTES, "big")
            if cursor.key() != place or size_bytes > MAX_BATCH_BYTES:
                break
            content = cursor.value()
            size_bytes += len(content)
            rows.append(content)
            going_on = cursor.next()
        return rows


def _encoded(event: pb.RunEvent) -> bytes:
    return event.SerializeToString(deterministic=True)


def _verified(content: bytes, previous: str, sequence: int) -> str | None:
    """Returns the hash of a row that is to the byte what the chain makes of it; else None."""
    try:
        event = pb.RunEvent.FromString(content)
    except DecodeError:
        return None
    expected = chain(previous, sequence, event.event_time, event.body)
    return expected.hash if content == _encoded(expected) else None


def _broken(sequence: int) -> pb.VerifyRunResponse:
    return pb.VerifyRunResponse(intact=False, num_events=sequence, first_broken=sequence)


def _lost(name: str) -> ServiceError:
    return data_loss(f"{name} has lost events; VerifyRun says which", name=name)


def _unexpected(run: pb.Run, expected: int) -> ServiceError:
    return aborted(
        "SEQUENCE_MISMATCH",
        f"the next event of {run.name} gets the sequence {run.num_events}, not {expected}",
        num_events=str(run.num_events),
        head=run.head,
    )
