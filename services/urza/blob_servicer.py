"""The gRPC face of the blobs."""

import asyncio
from collections.abc import AsyncIterator
from collections.abc import Callable
from functools import partial
from typing import Any
from typing import TypeAlias
from typing import TypeVar

import grpc

from esper.services.serving.context import CallContext
from esper.services.serving.errors import invalid
from esper.services.serving.errors import require
from esper.services.store.waking import awaitable
from esper.services.urza import validate
from esper.services.urza.blobs import BlobStore
from esper.services.urza.names import check_digest
from esper.services.urza.uploads import INLINE_BYTES
from esper.services.urza.uploads import Upload
from esper.urza.framing import UploadChunk
from esper.urza.framing import decode_upload
from esper.urza.framing import encode_download
from esper.urza.v1 import blob_pb2
from esper.urza.v1 import blob_pb2_grpc

T = TypeVar("T")

_Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"

SERVICE = "esper.urza.v1.BlobService"

# The methods are documented in proto/esper/urza/v1.
# ruff: noqa: D102, N802


class BlobServicer(blob_pb2_grpc.BlobServiceServicer):
    """Serves `esper.urza.v1.BlobService`."""

    def __init__(self, blobs: BlobStore) -> None:
        self._blobs = blobs

    def add_to(self, server: grpc.aio.Server) -> None:
        """Registers the methods."""
        streams: dict[str, _Handler] = {
            "WriteBlob": grpc.stream_unary_rpc_method_handler(
                self.WriteBlob, decode_upload, blob_pb2.WriteBlobResponse.SerializeToString
            ),
            "ReadBlob": grpc.unary_stream_rpc_method_handler(
                self.ReadBlob, blob_pb2.ReadBlobRequest.FromString, encode_download
            ),
        }
        blob_pb2_grpc.add_BlobServiceServicer_to_server(self, server)
        # In place of the generated ones, which copy the bytes of every chunk several times.
        server.add_registered_method_handlers(SERVICE, streams)

    async def WriteBlob(  # type: ignore[override]  # has chunks that are decoded otherwise
        self, chunks: AsyncIterator[UploadChunk], context: CallContext
    ) -> blob_pb2.WriteBlobResponse:
        chunk = await anext(aiter(chunks), None)
        if chunk is None:
            raise invalid("digest", None, "is required in the first message")
        require(validate.begin_write(chunk.head))
        digest = chunk.head.digest
        whole = blob_pb2.WriteBlobResponse(committed_size=digest.size_bytes)
        # A hop to a thread costs more than all that there is to do for a small blob.
        do = _at_once if digest.size_bytes <= INLINE_BYTES else _in_thread
        opening = do(partial(self._blobs.begin, digest, chunk.head.write_offset))
        try:
            upload = await asyncio.shield(opening)
        except asyncio.CancelledError:
            opening.add_done_callback(_abandon)
            raise
        if upload is None:
            return whole
        finished = False
        # One chunk is hashed and written while the next one is on its way.
        received = chunk.head.write_offset + len(chunk.data)
        writing = do(partial(upload.write, chunk.head.write_offset, chunk.data))
        try:
            while received < digest.size_bytes:
                chunk = await anext(aiter(chunks), None)
                await writing
                if chunk is None:
                    break
                if self._blobs.contains(digest):  # another writer was faster
                    finished = True
                    await do(upload.drop)
                    return whole
                received += len(chunk.data)
                writing = do(partial(upload.write, chunk.head.write_offset, chunk.data))
            await writing
            if upload.complete:
                durable = await do(upload.finish)
                finished = True
                await awaitable(durable)
                return whole
        finally:
            if not finished:
                # Shielded: gRPC may cancel a call twice, and what has come must be kept all the
                # same.
                held = await asyncio.shield(do(upload.interrupt))
        return blob_pb2.WriteBlobResponse(committed_size=held)

    async def ReadBlob(  # type: ignore[override]  # and encoded
        self, request: blob_pb2.ReadBlobRequest, context: CallContext
    ) -> AsyncIterator[bytes]:
        require(validate.read_blob(request))
        chunks = self._blobs.read(request.digest, request.read_offset, request.read_limit)
        do = _at_once if request.digest.size_bytes <= INLINE_BYTES else _in_thread
        # One chunk is read and hashed while the one before is on its way.
        reading = do(partial(next, chunks, None))
        while (chunk := await reading) is not None:
            reading = do(partial(next, chunks, None))
            yield chunk

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


def _in_thread(work: Callable[[], T]) -> "asyncio.Future[T]":
    return asyncio.get_running_loop().run_in_executor(None, work)


def _at_once(work: Callable[[], T]) -> "asyncio.Future[T]":
    done: asyncio.Future[T] = asyncio.get_running_loop().create_future()
    try:
        done.set_result(work())
    except Exception as problem:  # raised where the outcome is awaited
        done.set_exception(problem)
    return done


def _abandon(opening: "asyncio.Future[Upload | None]") -> None:
    """Gives an upload back that was opened for a call which had been cancelled meanwhile."""
    if not opening.cancelled() and opening.exception() is None:
        upload = opening.result()
        if upload is not None:
            upload.interrupt()
