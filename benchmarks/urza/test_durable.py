"""Durable small writes of many clients, beside one synced LMDB commit per write."""

import asyncio
import os
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

import grpc
import lmdb
import pytest
from google.protobuf import any_pb2
from google.protobuf import timestamp_pb2

from esper.urza.transfer import digest_of
from esper.urza.v1 import blob_pb2
from esper.urza.v1 import blob_pb2_grpc
from esper.urza.v1 import run_pb2
from esper.urza.v1 import run_pb2_grpc

CLIENTS = 64
BYTES = 256
EVENTS = 64
"""Events that one client appends in one stream."""


@pytest.fixture
def environment() -> Iterator[lmdb.Environment]:
    """LMDB alone, on the disk of the library."""
    with (
        tempfile.TemporaryDirectory(prefix="eb-", dir="/tmp") as folder,
        lmdb.open(str(Path(folder)), map_size=1 << 30) as opened,
    ):
        yield opened


def commits(environment: lmdb.Environment, number: int) -> None:
    """Writes so many rows, each with a commit and a sync of its own."""
    for _ in range(number):
        with environment.begin(write=True) as row:
            row.put(os.urandom(16), os.urandom(BYTES))


def blobs(address: str) -> None:
    """Stores one small blob per client, all at once."""

    async def one(stub: blob_pb2_grpc.BlobServiceStub) -> None:
        data = os.urandom(BYTES)
        request = blob_pb2.WriteBlobRequest(digest=digest_of(data), data=data)
        await stub.WriteBlob(iter([request]), timeout=60)

    async def run() -> None:
        async with grpc.aio.insecure_channel(address) as channel:
            stub = blob_pb2_grpc.BlobServiceStub(channel)
            await asyncio.gather(*(one(stub) for _ in range(CLIENTS)))

    asyncio.run(run())


def histories(address: str) -> None:
    """Appends `EVENTS` events per client to a run of its own, all at once."""
    body = any_pb2.Any(type_url="type.googleapis.com/bytes", value=os.urandom(BYTES))
    now = timestamp_pb2.Timestamp()
    now.GetCurrentTime()

    async def one(stub: run_pb2_grpc.RunServiceStub) -> None:
        run_id = uuid.uuid4().hex
        await stub.CreateRun(run_pb2.CreateRunRequest(run_id=run_id), timeout=60)
        requests = [
            run_pb2.AppendRunEventsRequest(
                run=f"runs/{run_id}", body=body, expected_sequence=sequence, event_time=now
            )
            for sequence in range(EVENTS)
        ]
        await stub.AppendRunEvents(iter(requests), timeout=60)

    async def run() -> None:
        async with grpc.aio.insecure_channel(address) as channel:
            stub = run_pb2_grpc.RunServiceStub(channel)
            await asyncio.gather(*(one(stub) for _ in range(CLIENTS)))

    asyncio.run(run())


def test_small_blobs_of_many_clients(side_by_side, pair, environment: lmdb.Environment) -> None:
    side_by_side(
        f"{CLIENTS} durable blobs of {CLIENTS} clients",
        lambda: blobs(pair.address),
        {"one commit per write": lambda: commits(environment, CLIENTS)},
        rounds=9,
    )


def test_events_of_many_clients(side_by_side, pair, environment: lmdb.Environment) -> None:
    number = CLIENTS * EVENTS
    side_by_side(
        f"{number} durable events of {CLIENTS} clients",
        lambda: histories(pair.address),
        # A sixteenth of them, as the whole would take minutes; the ratio is multiplied back.
        {"one commit per write, of a 16th": lambda: commits(environment, number // 16)},
        rounds=5,
    )
