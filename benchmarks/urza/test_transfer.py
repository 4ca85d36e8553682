"""Urza's calls beside a bare gRPC server that carries the same bytes and does nothing with them."""

import asyncio
import itertools
import os
from collections.abc import Awaitable
from collections.abc import Callable
from collections.abc import Iterator

import grpc
import pytest

from esper import blueprints
from esper.urza.transfer import digest_of
from esper.urza.v1 import library_pb2
from esper.urza.v1 import library_pb2_grpc

MIB = 1 << 20
CALLS = 512
"""Calls of one round, shared by all clients of it."""


def same(message: bytes) -> bytes:
    return message


def contents(size_bytes: int) -> Iterator[bytes]:
    """Yields blobs of one size that no one has stored."""
    tail = os.urandom(size_bytes - 16)
    while True:
        yield os.urandom(16) + tail


def pieces(data: bytes) -> list[bytes]:
    return [data[start : start + MIB] for start in range(0, len(data), MIB)]


def test_a_small_read(side_by_side, pair) -> None:
    stored = pair.plane.urza.create_blueprint(blueprints.get("bottleneck"))
    answer = library_pb2.GetBlueprintResponse(blueprint=stored).SerializeToString()
    bare = pair.bare.unary_unary("/bare/Unary", same, same)
    side_by_side(
        "read a blueprint",
        lambda: [pair.plane.urza.get_blueprint(stored.name) for _ in range(20)],
        {"bare echo": lambda: [bare(answer) for _ in range(20)]},
    )


@pytest.mark.parametrize("size_bytes", [4 << 10, MIB, 64 * MIB])
def test_write_a_blob(side_by_side, pair, size_bytes: int) -> None:
    fresh = contents(size_bytes)
    sent = pieces(next(fresh))
    bare = pair.bare.stream_unary("/bare/Upload", same, same)
    side_by_side(
        f"write {size_bytes >> 10} KiB, durable",
        lambda: pair.plane.urza.write_blob(next(fresh)),
        {"bare stream": lambda: bare(iter(sent))},
        rounds=9,
    )


@pytest.mark.parametrize("size_bytes", [4 << 10, MIB, 64 * MIB])
def test_read_a_blob(side_by_side, pair, size_bytes: int) -> None:
    digest = pair.plane.urza.write_blob(next(contents(size_bytes)))
    bare = pair.bare.unary_stream("/bare/Download", same, same)
    asked = str(size_bytes).encode()
    side_by_side(
        f"read {size_bytes >> 10} KiB, verified",
        lambda: pair.plane.urza.read_blob(digest),
        {"bare stream": lambda: b"".join(bare(asked))},
        rounds=9,
    )


def _together(
    clients: int, address: str, call: Callable[[grpc.aio.Channel], Callable[[], Awaitable[object]]]
) -> None:
    """Makes `CALLS` calls, `clients` of them at a time."""

    async def run() -> None:
        async with grpc.aio.insecure_channel(address) as channel:
            once = call(channel)
            left = itertools.repeat(None, CALLS)

            async def client() -> None:
                for _ in left:
                    await once()

            await asyncio.gather(*(client() for _ in range(clients)))

    asyncio.run(run())


@pytest.mark.parametrize("clients", [1, 8, 64])
def test_small_reads_of_many_clients(side_by_side, pair, clients: int) -> None:
    stored = pair.plane.urza.create_blueprint(blueprints.get("bottleneck"))
    request = library_pb2.GetBlueprintRequest(name=stored.name)
    answer = library_pb2.GetBlueprintResponse(blueprint=stored).SerializeToString()

    def ours(channel: grpc.aio.Channel) -> Callable[[], Awaitable[object]]:
        stub = library_pb2_grpc.LibraryServiceStub(channel)
        return lambda: stub.GetBlueprint(request, timeout=30)

    def bare(channel: grpc.aio.Channel) -> Callable[[], Awaitable[object]]:
        echo = channel.unary_unary("/bare/Unary", same, same)
        return lambda: echo(answer, timeout=30)

    side_by_side(
        f"{CALLS} reads of {clients} clients",
        lambda: _together(clients, pair.address, ours),
        {"bare echo": lambda: _together(clients, pair.bare_address, bare)},
        rounds=5,
    )


def test_the_last_blob_is_the_one_that_was_written(pair) -> None:
    """What is timed above really moves bytes."""
    data = next(contents(3 * MIB))
    assert pair.plane.urza.read_blob(pair.plane.urza.write_blob(data)) == data
    assert pair.plane.urza.find_missing_blobs([digest_of(data)]) == []
