"""Urza's gRPC face: the blobs' adapter, and the service as a whole."""

import asyncio
from collections.abc import AsyncIterator
from collections.abc import Callable
from functools import partial
from typing import TypeVar

import grpc

from esper.services.serving.context import CallContext
from esper.services.serving.context import ServiceContext
from esper.services.serving.errors import invalid
from esper.services.serving.errors import require
from esper.services.urza import validate
from esper.services.urza.blobs import BlobStore
from esper.services.urza.contents import FOLDER
from esper.services.urza.contents import open_contents
from esper.services.urza.library_servicer import LibraryServicer
from esper.services.urza.names import check_digest
from esper.services.urza.run_servicer import RunServicer
from esper.services.urza.store_servicer import StoreServicer
from esper.services.urza.uploads import Upload
from esper.urza.v1 import blob_pb2
from esper.urza.v1 import blob_pb2_grpc
from esper.urza.v1 import library_pb2_grpc
from esper.urza.v1 import run_pb2_grpc
from esper.urza.v1 import store_pb2_grpc

T = TypeVar("T")

# The methods are documented in proto/esper/urza/v1.
# ruff: noqa: D102, N802


class BlobServicer(blob_pb2_grpc.BlobServiceServicer):
    """Serves `esper.urza.v1.BlobService`."""

    def __init__(self, blobs: BlobStore) -> None:
        self._blobs = blobs

    async def WriteBlob(
        self,
        request_iterator: AsyncIterator[blob_pb2.WriteBlobRequest],
        context: CallContext,
    ) -> blob_pb2.WriteBlobResponse:
        first = await anext(aiter(request_iterator), None)
        if first is None:
            raise invalid("digest", None, "is required in the first message")
        require(validate.begin_write(first))
        digest = first.digest
        opening = asyncio.ensure_future(
            asyncio.to_thread(self._blobs.begin, digest, first.write_offset)
        )
        try:
            upload = await asyncio.shield(opening)
        except asyncio.CancelledError:
            opening.add_done_callback(_abandon)
            raise
        if upload is None:
            return blob_pb2.WriteBlobResponse(committed_size=digest.size_bytes)
        finished = False
        # One chunk is hashed and written while the next one is on its way.
        received = first.write_offset + len(first.data)
        writing = _in_thread(partial(upload.write, first.write_offset, first.data))
        try:
            while received < digest.size_bytes:
                request = await anext(aiter(request_iterator), None)
                await writing
                if request is None:
                    break
                if self._blobs.contains(digest):  # another writer was faster
                    finished = True
                    await asyncio.to_thread(upload.drop)
                    return blob_pb2.WriteBlobResponse(committed_size=digest.size_bytes)
                received += len(request.data)
                writing = _in_thread(partial(upload.write, request.write_offset, request.data))
            await writing
            if upload.complete:
                durable = await asyncio.to_thread(upload.finish)
                finished = True
                await asyncio.wrap_future(durable)
                return blob_pb2.WriteBlobResponse(committed_size=digest.size_bytes)
        finally:
            if not finished:
                # Shielded: gRPC may cancel a call twice, and what has come must be kept all the
                # same.
                held = await asyncio.shield(asyncio.to_thread(upload.interrupt))
        return blob_pb2.WriteBlobResponse(committed_size=held)

    async def ReadBlob(
        self, request: blob_pb2.ReadBlobRequest, context: CallContext
    ) -> AsyncIterator[blob_pb2.ReadBlobResponse]:
        require(validate.read_blob(request))
        chunks = self._blobs.read(request.digest, request.read_offset, request.read_limit)
        # One chunk is read and hashed while the one before is on its way.
        reading = _in_thread(partial(next, chunks, None))
        while (chunk := await reading) is not None:
            reading = _in_thread(partial(next, chunks, None))
            yield blob_pb2.ReadBlobResponse(data=chunk)

    async def FindMissingBlobs(
        self, request: blob_pb2.FindMissingBlobsRequest, context: CallContext
    ) -> blob_pb2.FindMissingBlobsResponse:
        require(validate.find_missing(request))
        missing = await asyncio.to_thread(self._blobs.missing, request.digests)
        return blob_pb2.FindMissingBlobsResponse(missing=missing)

    async def QueryWrite(
        self, request: blob_pb2.QueryWriteRequest, context: CallContext
    ) -> blob_pb2.QueryWriteResponse:
        require(check_digest("digest", request.digest))
        committed, complete = self._blobs.committed(request.digest)
        return blob_pb2.QueryWriteResponse(committed_size=committed, complete=complete)


def _in_thread(work: Callable[[], T]) -> "asyncio.Task[T]":
    return asyncio.create_task(asyncio.to_thread(work))


def _abandon(opening: "asyncio.Future[Upload | None]") -> None:
    """Gives an upload back that was opened for a call which had been cancelled meanwhile."""
    if not opening.cancelled() and opening.exception() is None:
        upload = opening.result()
        if upload is not None:
            upload.interrupt()


class UrzaService:
    """Urza as a service of the shell; its store is `urza` in the data directory.

    Raises:
        StartupError: Where the directory cannot be used.
    """

    full_names = (
        "esper.urza.v1.BlobService",
        "esper.urza.v1.LibraryService",
        "esper.urza.v1.RunService",
        "esper.urza.v1.StoreService",
    )

    def __init__(self, context: ServiceContext) -> None:
        self._contents = open_contents(context.data_dir / FOLDER, context.limits)
        held = self._contents
        self._blob_servicer = BlobServicer(held.blobs)
        self._library_servicer = LibraryServicer(held.library, context.stopping)
        self._run_servicer = RunServicer(held.runs, context.stopping)
        self._store_servicer = StoreServicer(held, context.stopping)

    def add_to(self, server: grpc.aio.Server) -> None:
        """Registers the servicers."""
        blob_pb2_grpc.add_BlobServiceServicer_to_server(self._blob_servicer, server)
        library_pb2_grpc.add_LibraryServiceServicer_to_server(self._library_servicer, server)
        run_pb2_grpc.add_RunServiceServicer_to_server(self._run_servicer, server)
        store_pb2_grpc.add_StoreServiceServicer_to_server(self._store_servicer, server)

    async def close(self) -> None:
        """Closes the store after its last write."""
        await self._store_servicer.close()
        await asyncio.to_thread(self._contents.store.close)


def create(context: ServiceContext) -> UrzaService:
    """Returns the service."""
    return UrzaService(context)
