"""Durable small writes of many clients, beside one synced LMDB commit per write."""

import asyncio
import os
import uuid
from collections.abc import Awaitable
from collections.abc import Callable

import grpc
import lmdb
import pytest
from google.protobuf import any_pb2
from google.protobuf import timestamp_pb2

from benchmarks.urza.conftest import Beside
from benchmarks.urza.conftest import Pair
from benchmarks.urza.load import Load
from benchmarks.urza.load import one_by_one
from benchmarks.urza.load import together
from esper import blueprints
from esper.common.v1 import blueprint_pb2
from esper.common.v1 import kernel_pb2
from esper.oona.v1 import event_pb2
from esper.oona.v1 import event_pb2_grpc
from esper.urza.transfer import digest_of
from esper.urza.v1 import blob_pb2
from esper.urza.v1 import blob_pb2_grpc
from esper.urza.v1 import library_pb2
from esper.urza.v1 import library_pb2_grpc
from esper.urza.v1 import run_pb2
from esper.urza.v1 import run_pb2_grpc

CLIENTS = 64
CALLS = 1024
COMMITS = 64
"""Rows of a round of bare LMDB; its rate does not depend on how many there are."""
BYTES = 256
EVENTS = 32
"""Events that one client sends in one stream."""

Write = Callable[[], Awaitable[object]]
Writer = Callable[[grpc.aio.Channel], Write]

BODY = any_pb2.Any(type_url="type.googleapis.com/bytes", value=bytes(BYTES))
LINEAR = kernel_pb2.KernelSignature(
    slot_kind=kernel_pb2.SLOT_KIND_LINEAR,
    chunk_width=64,
    source_width=64,
    source=blueprint_pb2.SEED_SOURCE_OUTPUT,
    dtype=kernel_pb2.DATA_TYPE_FLOAT32,
    device_class=kernel_pb2.DEVICE_CLASS_CPU,
)


@pytest.fixture
def one_commit_per_write(rows: lmdb.Environment) -> Callable[[], Load]:
    """LMDB alone: a commit and its syncs for every row."""

    def write() -> None:
        with rows.begin(write=True) as row:
            row.put(os.urandom(16), os.urandom(BYTES))

    return lambda: one_by_one(write, COMMITS)


def blob(channel: grpc.aio.Channel) -> Write:
    stub = blob_pb2_grpc.BlobServiceStub(channel)

    async def write() -> None:
        data = os.urandom(BYTES)
        request = blob_pb2.WriteBlobRequest(digest=digest_of(data), data=data)
        await stub.WriteBlob(iter([request]), timeout=60)

    return write


def report(channel: grpc.aio.Channel) -> Write:
    stub = library_pb2_grpc.LibraryServiceStub(channel)
    kernel = blueprints.lower(blueprints.get("bottleneck"), LINEAR)
    name = f"kernels/{blueprints.kernel_digest(kernel)}"

    def write() -> Awaitable[object]:
        told = library_pb2.FieldReport(
            kernel=name, run="runs/0", slot="slot", verdict=library_pb2.FIELD_VERDICT_FOSSILIZED
        )
        return stub.RecordFieldReport(
            library_pb2.RecordFieldReportRequest(report=told, request_id=uuid.uuid4().hex),
            timeout=60,
        )

    return write


def run(channel: grpc.aio.Channel) -> Write:
    stub = run_pb2_grpc.RunServiceStub(channel)
    return lambda: stub.CreateRun(run_pb2.CreateRunRequest(run_id=uuid.uuid4().hex), timeout=60)


def event(channel: grpc.aio.Channel) -> Write:
    stub = event_pb2_grpc.EventServiceStub(channel)
    request = event_pb2.PublishRequest(topic="bench", body=BODY)

    async def write() -> None:
        async for _ in stub.Publish(iter([request]), timeout=60):
            pass

    return write


def events(channel: grpc.aio.Channel) -> Write:
    stub = event_pb2_grpc.EventServiceStub(channel)
    requests = [event_pb2.PublishRequest(topic="bench", body=BODY)] * EVENTS

    async def write() -> None:
        async for _ in stub.Publish(iter(requests), timeout=60):
            pass

    return write


def history(channel: grpc.aio.Channel) -> Write:
    stub = run_pb2_grpc.RunServiceStub(channel)
    now = timestamp_pb2.Timestamp()
    now.GetCurrentTime()

    async def write() -> None:
        run_id = uuid.uuid4().hex
        await stub.CreateRun(run_pb2.CreateRunRequest(run_id=run_id), timeout=60)
        requests = [
            run_pb2.AppendRunEventsRequest(
                run=f"runs/{run_id}", body=BODY, expected_sequence=sequence, event_time=now
            )
            for sequence in range(EVENTS)
        ]
        await stub.AppendRunEvents(iter(requests), timeout=60)

    return write


@pytest.mark.parametrize(
    ("writer", "each"),
    [
        (blob, 1),
        (report, 1),
        (run, 1),
        (event, 1),
        (events, EVENTS),
        (history, EVENTS),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_durable_writes_of_many_clients(
    beside: Beside,
    pair: Pair,
    runner: asyncio.Runner,
    one_commit_per_write: Callable[[], Load],
    writer: Writer,
    each: int,
) -> None:
    pair.plane.urza.create_blueprint(blueprints.get("bottleneck"))
    pair.plane.urza.create_kernel(blueprints.lower(blueprints.get("bottleneck"), LINEAR))
    write = writer(pair.ours)
    calls = max(CALLS // each, CLIENTS)

    def load() -> Load:
        done = runner.run(together(write, CLIENTS, calls))
        done.operations *= each
        return done

    beside(
        f"durable {writer.__name__}, {CLIENTS} clients",
        load,
        {"one commit per write": one_commit_per_write},
    )
