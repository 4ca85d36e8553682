"""The asyncio clients against the servers that the others talk to."""

import asyncio
import inspect
import os
import signal
from collections.abc import AsyncIterator
from collections.abc import Awaitable
from collections.abc import Callable

import grpc
import pytest
from google.protobuf import wrappers_pb2

from esper import blueprints
from esper.common.rpc import RpcError
from esper.common.v1 import blueprint_pb2
from esper.common.v1 import kernel_pb2
from esper.oona.aio import AsyncOonaClient
from esper.oona.client import OonaClient
from esper.plane import Plane
from esper.plane.channel import make_async_channel
from esper.urza.aio import AsyncUrzaClient
from esper.urza.aio_runs import AsyncRunClient
from esper.urza.cache import BlobCache
from esper.urza.client import UrzaClient
from esper.urza.runs import RunClient
from esper.urza.transfer import digest_of
from esper.urza.v1 import library_pb2

TIMEOUT_S = 60


def in_loop(
    plane: Plane, work: Callable[[AsyncUrzaClient, AsyncOonaClient], Awaitable[None]]
) -> None:
    async def run() -> None:
        async with make_async_channel(plane.addresses["urza"]) as channel:
            async with asyncio.timeout(TIMEOUT_S):
                await work(AsyncUrzaClient(channel), AsyncOonaClient(channel))

    asyncio.run(run())


async def collect(items: AsyncIterator[object]) -> list[object]:
    return [item async for item in items]


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [(UrzaClient, AsyncUrzaClient), (RunClient, AsyncRunClient), (OonaClient, AsyncOonaClient)],
)
def test_both_kinds_of_client_have_the_same_calls(theirs: type, ours: type) -> None:
    def calls(kind: type) -> dict[str, list[inspect.Parameter]]:
        return {
            name: list(inspect.signature(member).parameters.values())
            for name, member in inspect.getmembers(kind, inspect.isfunction)
            if not name.startswith("_")
        }

    assert calls(ours) == calls(theirs)


@pytest.mark.parametrize("size", [0, 1, 70_000, (3 << 20) + 5])
def test_blobs_make_the_round_trip(store_plane: Plane, size: int) -> None:
    async def work(urza: AsyncUrzaClient, oona: AsyncOonaClient) -> None:
        data = os.urandom(size)
        digest = await urza.write_blob(data)
        assert digest == digest_of(data)
        assert await urza.read_blob(digest) == data
        assert await urza.find_missing_blobs([digest, digest_of(data + b"x")]) == [
            digest_of(data + b"x")
        ]
        assert store_plane.urza.read_blob(digest) == data

    in_loop(store_plane, work)


def test_many_clients_of_one_loop(store_plane: Plane) -> None:
    async def work(urza: AsyncUrzaClient, oona: AsyncOonaClient) -> None:
        blobs = [os.urandom(1000) for _ in range(64)]
        digests = await asyncio.gather(*map(urza.write_blob, blobs))
        assert await asyncio.gather(*map(urza.read_blob, digests)) == blobs

    in_loop(store_plane, work)


def test_a_cached_blob_is_fetched_once(store_plane: Plane, tmp_path) -> None:
    cache = BlobCache(tmp_path, 1 << 20)
    digest = store_plane.urza.write_blob(data := os.urandom(100))

    async def run() -> None:
        async with make_async_channel(store_plane.addresses["urza"]) as channel:
            urza = AsyncUrzaClient(channel, cache)
            assert [await urza.read_blob(digest) for _ in range(3)] == [data] * 3

    asyncio.run(run())
    assert (cache.hits, cache.misses) == (2, 1)


def test_the_library(store_plane: Plane) -> None:
    place = kernel_pb2.KernelSignature(
        slot_kind=kernel_pb2.SLOT_KIND_LINEAR,
        chunk_width=4242,
        source_width=4242,
        source=blueprint_pb2.SEED_SOURCE_OUTPUT,
        dtype=kernel_pb2.DATA_TYPE_FLOAT32,
        device_class=kernel_pb2.DEVICE_CLASS_CPU,
    )
    kernel = blueprints.lower(blueprints.get("bottleneck"), place)

    async def work(urza: AsyncUrzaClient, oona: AsyncOonaClient) -> None:
        blueprint = await urza.create_blueprint(blueprints.get("bottleneck"))
        assert (await urza.get_blueprint(blueprint.name)).name == blueprint.name
        async with await urza.watch() as changes:
            record = await urza.create_kernel(kernel, tags=["async-test"])
            while not (change := await anext(changes)).HasField("kernel"):
                pass
            assert change.kernel.name == record.name
        assert await urza.get_kernel(record.name) == record
        found = await collect(urza.list_kernels(library_pb2.KernelFilter(tags=["async-test"])))
        assert found == [record]
        report = await urza.record_field_report(
            library_pb2.FieldReport(
                kernel=record.name, run="r1", slot="a", verdict=library_pb2.FIELD_VERDICT_CULLED
            )
        )
        assert await collect(urza.list_field_reports(record.name)) == [report]
        ancestors = (await urza.lineage(record.name)).ancestors
        assert [edge.parent for edge in ancestors] == [blueprint.name]
        with pytest.raises(RpcError) as caught:
            await urza.update_kernel_state(
                record.name, library_pb2.KERNEL_STATE_DEPLOYED, etag=record.etag
            )
        assert caught.value.reason == "ILLEGAL_MOVE"

    in_loop(store_plane, work)


def test_histories_of_runs(store_plane: Plane) -> None:
    async def work(urza: AsyncUrzaClient, oona: AsyncOonaClient) -> None:
        run = await urza.runs.create_run(task="digits")
        bodies = [wrappers_pb2.Int32Value(value=number) for number in range(5)]
        extent = await urza.runs.append_run_events(run.name, bodies[:3], 0)
        assert extent.num_events == 3
        with pytest.raises(RpcError) as caught:
            await urza.runs.append_run_events(run.name, bodies[3:], 2)
        assert caught.value.code is grpc.StatusCode.ABORTED
        with pytest.raises(ValueError, match="at least one message"):
            await urza.runs.append_run_events(run.name, [], 3)
        watch = urza.runs.watch_run(run.name, 1)
        seen = [await anext(watch) for _ in range(2)]
        await urza.runs.append_run_events(run.name, bodies[3:], 3)
        seen += [await anext(watch) for _ in range(2)]
        watch.close()
        assert [event.sequence for event in seen] == [1, 2, 3, 4]
        verdict = await urza.runs.verify_run(run.name)
        assert (verdict.intact, verdict.num_events) == (True, 5)
        assert run.name in [found.name async for found in urza.runs.list_runs()]
        assert store_plane.urza.runs.get_run(run.name).num_events == 5

    in_loop(store_plane, work)


def test_errors_name_field_and_rule(store_plane: Plane) -> None:
    async def work(urza: AsyncUrzaClient, oona: AsyncOonaClient) -> None:
        with pytest.raises(RpcError) as caught:
            await urza.get_kernel("kernels/none")
        assert caught.value.code is grpc.StatusCode.INVALID_ARGUMENT
        assert [violation.field for violation in caught.value.violations] == ["name"]
        with pytest.raises(RpcError) as caught:
            await oona.publish("No Topic", wrappers_pb2.Int32Value(value=1))
        assert caught.value.violations[0].field == "topic"

    in_loop(store_plane, work)


def test_an_upload_goes_on_after_a_restart(start_server: Callable[..., object]) -> None:
    server = start_server()
    partial = server.data / "urza" / "blobs" / "partial"
    data = os.urandom(48 << 20)

    async def work() -> None:
        async with make_async_channel(server.address) as channel, asyncio.timeout(2 * TIMEOUT_S):
            urza = AsyncUrzaClient(channel)
            writing = asyncio.create_task(urza.write_blob(data))
            while not any(path.stat().st_size >= 2 << 20 for path in partial.iterdir()):
                await asyncio.sleep(0.002)
            server.stop(signal.SIGKILL)
            assert not writing.done()
            await asyncio.to_thread(start_server)
            assert await urza.read_blob(await writing) == data

    asyncio.run(work())


def test_a_server_that_does_not_answer_is_given_up(start_server: Callable[..., object]) -> None:
    server = start_server("oona")

    async def work() -> None:
        async with make_async_channel(server.address) as channel, asyncio.timeout(TIMEOUT_S):
            oona = AsyncOonaClient(channel)
            assert await oona.list_topics() == []
            server.process.send_signal(signal.SIGSTOP)
            with pytest.raises(RpcError) as caught:
                await oona.publish("t", wrappers_pb2.Int32Value(value=1), timeout_s=0.5)
            assert caught.value.code is grpc.StatusCode.DEADLINE_EXCEEDED
            server.process.send_signal(signal.SIGCONT)
            # The event may have been stored: nobody knows, unless it was given a request id.
            await oona.publish("u", wrappers_pb2.Int32Value(value=1))

    asyncio.run(work())


def test_events_are_followed(store_plane: Plane) -> None:
    topic = f"async.{os.urandom(4).hex()}"

    async def work(urza: AsyncUrzaClient, oona: AsyncOonaClient) -> None:
        bodies = [wrappers_pb2.Int32Value(value=value) for value in range(5)]
        assert await oona.publish_many(topic, bodies[:3]) == [0, 1, 2]
        async with await oona.subscribe(topic, 1) as events:
            assert await oona.publish(topic, bodies[3], request_id="once") == 3
            assert await oona.publish(topic, bodies[3], request_id="once") == 3
            assert [(await anext(events)).offset for _ in range(3)] == [1, 2, 3]
            waiting = asyncio.ensure_future(anext(events, None))
            await asyncio.sleep(0)
            events.close()
            assert await waiting is None
        assert topic in [found.name for found in await oona.list_topics()]

    in_loop(store_plane, work)


def test_members_of_a_group_share_a_topic(store_plane: Plane) -> None:
    topic = f"async.{os.urandom(4).hex()}"

    async def work(urza: AsyncUrzaClient, oona: AsyncOonaClient) -> None:
        await oona.publish_many(topic, [wrappers_pb2.Int32Value(value=n) for n in range(4)])
        first = await oona.subscribe_group(topic, "readers", 0, max_in_flight=2)
        second = await oona.subscribe_group(topic, "readers", 0, max_in_flight=2)
        async with first, second:
            got = [(await anext(member)).event.offset for member in (first, first, second, second)]
        assert sorted(got) == [0, 1, 2, 3]
        assert await oona.acknowledge(topic, "readers", got) == 4
        assert (await oona.set_retention(topic, max_bytes=1 << 20)).name == topic

    in_loop(store_plane, work)
