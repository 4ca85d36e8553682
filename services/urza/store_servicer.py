"""The gRPC face of what an operator does with a running store."""

import asyncio
import itertools
import logging
import time
from collections.abc import AsyncIterator
from collections.abc import Iterator
from contextlib import aclosing

from esper.common.v1 import digest_pb2
from esper.services.serving.context import CallContext
from esper.services.serving.errors import invalid
from esper.services.serving.errors import unavailable
from esper.services.serving.logs import FIELDS
from esper.services.serving.steps import in_steps
from esper.services.urza import garbage
from esper.services.urza.check import Checker
from esper.services.urza.contents import Contents
from esper.services.urza.snapshot import Snapshot
from esper.services.urza.stats import read_stats
from esper.urza.v1 import store_pb2 as pb
from esper.urza.v1 import store_pb2_grpc

LOG = logging.getLogger("esper.urza.store")

MIN_PAUSE_S = 60.0
"""Between two collections that the lack of room calls for, in seconds."""
BACKUP_BATCH = 256

# The methods are documented in proto/esper/urza/v1.
# ruff: noqa: D102, N802


class StoreServicer(store_pb2_grpc.StoreServiceServicer):
    """Serves `esper.urza.v1.StoreService`, and collects garbage where blobs run out of room.

    Args:
        contents: What is stored.
        stopping: Set when the server drains; backups end then.
    """

    def __init__(self, contents: Contents, stopping: asyncio.Event) -> None:
        self._contents = contents
        self._stopping = stopping
        self._collecting = asyncio.Lock()
        self._num_backups = 0
        self._next_relief_s = 0.0
        self._relief: asyncio.Task[None] | None = None
        loop = asyncio.get_running_loop()

        def call() -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(self._relieve)

        contents.blobs.room.on_short = call

    async def GetStoreStats(
        self, request: pb.GetStoreStatsRequest, context: CallContext
    ) -> pb.GetStoreStatsResponse:
        return await asyncio.to_thread(read_stats, self._contents)

    async def CheckStore(
        self, request: pb.CheckStoreRequest, context: CallContext
    ) -> AsyncIterator[pb.CheckStoreResponse]:
        checker = Checker(self._contents, quarantine=request.quarantine)
        async with aclosing(in_steps(iter(checker))) as steps:
            async for step in steps:
                yield step

    async def CollectGarbage(
        self, request: pb.CollectGarbageRequest, context: CallContext
    ) -> pb.CollectGarbageResponse:
        grace_s = garbage.GRACE_S
        if request.HasField("grace"):
            grace_s = request.grace.seconds + request.grace.nanos * 1e-9
        if grace_s < 0:
            raise invalid("grace", f"{grace_s:g} s", "must be at least 0")
        return await self._collect(grace_s, request.dry_run)

    async def BackupStore(
        self, request: pb.BackupStoreRequest, context: CallContext
    ) -> AsyncIterator[pb.BackupStoreResponse]:
        async with self._collecting:  # waits for a collection to end; new ones see the number
            self._num_backups += 1
        try:
            taken = await asyncio.to_thread(Snapshot, self._contents.store)
            try:
                rows = taken.rows()
                while (piece := await asyncio.to_thread(next, rows, None)) is not None:
                    yield pb.BackupStoreResponse(rows=piece)
                blobs = taken.blobs()
                while batch := await asyncio.to_thread(_some, blobs):
                    for digest in batch:
                        yield pb.BackupStoreResponse(blob=digest)
            finally:
                await asyncio.shield(asyncio.to_thread(taken.close))
            yield pb.BackupStoreResponse(complete=True)
            await self._stopping.wait()
        finally:
            self._num_backups -= 1
        raise unavailable("the server is stopping; start the backup again")

    async def _collect(self, grace_s: float, dry_run: bool) -> pb.CollectGarbageResponse:
        async with self._collecting:
            if self._num_backups:
                raise unavailable("a backup is under way: nothing is removed until it has ended")
            started_s = time.monotonic()
            held = self._contents
            outcome = await asyncio.shield(
                asyncio.to_thread(garbage.collect, held.store, held.blobs, grace_s, dry_run=dry_run)
            )
        fields = {name.name: value for name, value in outcome.ListFields()}
        fields["duration_s"] = round(time.monotonic() - started_s, 3)
        LOG.info("collected garbage", extra={FIELDS: fields})
        return outcome

    def _relieve(self) -> None:
        """Collects garbage in the background, unless that has just been done."""
        if time.monotonic() >= self._next_relief_s and not self._stopping.is_set():
            self._next_relief_s = time.monotonic() + MIN_PAUSE_S
            self._relief = asyncio.create_task(self._relieve_once())

    async def _relieve_once(self) -> None:
        try:
            await self._collect(garbage.GRACE_S, dry_run=False)
        except Exception:
            LOG.exception("could not collect garbage")

    async def close(self) -> None:
        """Waits for a collection that is under way."""
        async with self._collecting:
            pass


def _some(digests: Iterator[digest_pb2.Digest]) -> list[digest_pb2.Digest]:
    return list(itertools.islice(digests, BACKUP_BATCH))
