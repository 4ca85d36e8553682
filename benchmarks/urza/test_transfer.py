"""Urza's calls beside a bare gRPC server that carries the same bytes and does nothing with them.

And beside LMDB in the process of the benchmark, which stores the same bytes and carries them
nowhere: a read gets a row, a write is one commit with its syncs.
"""

import asyncio
import os
from collections.abc import Awaitable
from collections.abc import Callable
from collections.abc import Iterator

import lmdb
import pytest

from benchmarks.urza.conftest import ROUNDS
from benchmarks.urza.conftest import Beside
from benchmarks.urza.conftest import Pair
from benchmarks.urza.load import one_by_one
from benchmarks.urza.load import together
from esper import blueprints
from esper.urza.aio import AsyncUrzaClient
from esper.urza.transfer import digest_of
from esper.urza.v1 import blob_pb2
from esper.urza.v1 import library_pb2
from esper.urza.v1 import library_pb2_grpc

KIB = 1 << 10
MIB = 1 << 20
CALLS = 512
"""Small calls of one round, shared by all clients of it."""
FEW_CALLS = 64
"""Small calls of one round of a single client: what else the machine does hits neighbours alike."""
CLIENTS = (1, 8, 64)
KEY = b"blob"
SIZES = (4 * KIB, MIB, 64 * MIB)
NAMES = {4 * KIB: "4 KiB", MIB: "1 MiB", 64 * MIB: "64 MiB"}


def same(message: bytes) -> bytes:
    return message


def contents(size_bytes: int) -> Iterator[bytes]:
    """Yields blobs of one size that no one has stored."""
    tail = os.urandom(size_bytes - 16)
    while True:
        yield os.urandom(16) + tail


def pieces(data: bytes) -> list[bytes]:
    return [data[start : start + MIB] for start in range(0, len(data), MIB)]


def calls_of(size_bytes: int) -> int:
    """Returns how many transfers of a size make a round."""
    return min(max(32 * MIB // size_bytes, 1), 128)


def putting(rows: lmdb.Environment, fresh: Iterator[bytes]) -> Callable[[], None]:
    def put() -> None:
        with rows.begin(write=True) as row:
            row.put(KEY, next(fresh))

    return put


def getting(rows: lmdb.Environment, data: bytes) -> Callable[[], None]:
    with rows.begin(write=True) as row:
        row.put(KEY, data)

    def get() -> None:
        with rows.begin() as row:
            assert len(row.get(KEY) or b"") == len(data)

    return get


@pytest.mark.parametrize("size_bytes", SIZES, ids=NAMES.values())
def test_write_a_blob(beside: Beside, pair: Pair, rows: lmdb.Environment, size_bytes: int) -> None:
    fresh = contents(size_bytes)
    sent = pieces(next(fresh))
    bare = pair.bare.stream_unary("/bare/Upload", same, same)
    urza, calls = pair.plane.urza, calls_of(size_bytes)
    beside(
        f"write {NAMES[size_bytes]}, durable",
        lambda: one_by_one(lambda: urza.write_blob(next(fresh)), calls, size_bytes),
        {
            "bare stream": lambda: one_by_one(lambda: bare(iter(sent)), calls, size_bytes),
            "LMDB": lambda: one_by_one(putting(rows, fresh), calls, size_bytes),
        },
    )


def test_write_a_blob_of_known_digest(beside: Beside, pair: Pair) -> None:
    size_bytes = 64 * MIB
    fresh = contents(size_bytes)
    sent = pieces(next(fresh))
    bare = pair.bare.stream_unary("/bare/Upload", same, same)
    # The contract's own messages, as generated code would send and take them.
    request = blob_pb2.WriteBlobRequest
    messages = pair.bare.stream_unary("/bare/UploadMessages", request.SerializeToString, same)
    known = iter([(data, digest_of(data)) for data, _ in zip(fresh, range(8), strict=False)])
    beside(
        "write 64 MiB, durable, digest known",
        lambda: one_by_one(lambda: pair.plane.urza.write_blob(*next(known)), 1, size_bytes),
        {
            "bare stream": lambda: one_by_one(lambda: bare(iter(sent)), 1, size_bytes),
            "bare stream of messages": lambda: one_by_one(
                lambda: messages(request(data=piece) for piece in sent), 1, size_bytes
            ),
        },
    )


@pytest.mark.parametrize("size_bytes", SIZES, ids=NAMES.values())
def test_read_a_blob(beside: Beside, pair: Pair, rows: lmdb.Environment, size_bytes: int) -> None:
    urza, calls = pair.plane.urza, calls_of(size_bytes)
    data = next(contents(size_bytes))
    digest = urza.write_blob(data)
    get = getting(rows, data)
    bare = pair.bare.unary_stream("/bare/Download", same, same)
    asked = str(size_bytes).encode()
    beside(
        f"read {NAMES[size_bytes]}, verified",
        lambda: one_by_one(lambda: urza.read_blob(digest), calls, size_bytes),
        {
            "bare stream": lambda: one_by_one(lambda: b"".join(bare(asked)), calls, size_bytes),
            "LMDB": lambda: one_by_one(get, calls, size_bytes),
        },
    )


MANY = pytest.mark.parametrize(
    ("size_bytes", "clients"),
    [(4 * KIB, 8), (4 * KIB, 64), (MIB, 8), (MIB, 64), (64 * MIB, 8)],
    ids=lambda value: NAMES.get(value, value),
)


@MANY
def test_many_clients_write_blobs(
    beside: Beside,
    pair: Pair,
    rows: lmdb.Environment,
    runner: asyncio.Runner,
    size_bytes: int,
    clients: int,
) -> None:
    fresh = contents(size_bytes)
    urza = AsyncUrzaClient(pair.ours)
    sent = pieces(next(fresh))
    upload = pair.bare_async.stream_unary("/bare/Upload", same, same)

    async def bare_write() -> bytes:
        return await upload(iter(sent))

    _many(
        beside,
        runner,
        f"write {NAMES[size_bytes]}, {clients} clients",
        lambda: urza.write_blob(next(fresh)),
        bare_write,
        putting(rows, fresh),
        clients,
        size_bytes,
    )


@MANY
def test_many_clients_read_a_blob(
    beside: Beside,
    pair: Pair,
    rows: lmdb.Environment,
    runner: asyncio.Runner,
    size_bytes: int,
    clients: int,
) -> None:
    urza = AsyncUrzaClient(pair.ours)
    data = next(contents(size_bytes))
    digest = pair.plane.urza.write_blob(data)
    download = pair.bare_async.unary_stream("/bare/Download", same, same)
    asked = str(size_bytes).encode()

    async def bare_read() -> bytes:
        return b"".join([chunk async for chunk in download(asked)])

    _many(
        beside,
        runner,
        f"read {NAMES[size_bytes]}, {clients} clients",
        lambda: urza.read_blob(digest),
        bare_read,
        getting(rows, data),
        clients,
        size_bytes,
    )


def _many(
    beside: Beside,
    runner: asyncio.Runner,
    group: str,
    ours: Callable[[], Awaitable[object]],
    bare: Callable[[], Awaitable[object]],
    lmdb_alone: Callable[[], None],
    clients: int,
    size_bytes: int,
) -> None:
    calls = max(calls_of(size_bytes), clients)
    beside(
        group,
        lambda: runner.run(together(ours, clients, calls, size_bytes)),
        {
            "bare stream": lambda: runner.run(together(bare, clients, calls, size_bytes)),
            "LMDB": lambda: one_by_one(lmdb_alone, calls, size_bytes),
        },
        rounds=ROUNDS if size_bytes < 64 * MIB else 3,
    )


@pytest.mark.parametrize("clients", CLIENTS)
def test_small_reads(
    beside: Beside, pair: Pair, rows: lmdb.Environment, runner: asyncio.Runner, clients: int
) -> None:
    stored = pair.plane.urza.create_blueprint(blueprints.get("bottleneck"))
    answer = library_pb2.GetBlueprintResponse(blueprint=stored).SerializeToString()
    name = f"read a blueprint, {clients} clients"
    get = getting(rows, stored.SerializeToString())
    if clients == 1:
        bare = pair.bare.unary_unary("/bare/Unary", same, same)
        # Carries the message as a client meets it: serialized on the way out, parsed on the way in.
        kind = library_pb2.GetBlueprintResponse
        told = kind(blueprint=stored)
        message = pair.bare.unary_unary("/bare/Unary", kind.SerializeToString, kind.FromString)
        beside(
            name,
            lambda: one_by_one(lambda: pair.plane.urza.get_blueprint(stored.name), FEW_CALLS),
            {
                "bare echo": lambda: one_by_one(lambda: bare(answer, timeout=30), FEW_CALLS),
                "bare echo of messages": lambda: one_by_one(
                    lambda: message(told, timeout=30), FEW_CALLS
                ),
                "LMDB": lambda: one_by_one(get, FEW_CALLS),
            },
            rounds=ROUNDS * CALLS // FEW_CALLS,
        )
        return
    request = library_pb2.GetBlueprintRequest(name=stored.name)
    stub = library_pb2_grpc.LibraryServiceStub(pair.ours)
    echo = pair.bare_async.unary_unary("/bare/Unary", same, same)
    beside(
        name,
        lambda: runner.run(
            together(lambda: stub.GetBlueprint(request, timeout=30), clients, CALLS)
        ),
        {
            "bare echo": lambda: runner.run(
                together(lambda: echo(answer, timeout=30), clients, CALLS)
            ),
            "LMDB": lambda: one_by_one(get, CALLS),
        },
    )


def test_the_last_blob_is_the_one_that_was_written(pair: Pair) -> None:
    """What is timed above really moves bytes."""
    data = next(contents(3 * MIB))
    assert pair.plane.urza.read_blob(pair.plane.urza.write_blob(data)) == data
    assert pair.plane.urza.find_missing_blobs([digest_of(data)]) == []
