"""The gRPC face of the blobs."""

import asyncio
from collections.abc import AsyncIterator
from collections.abc import Callable
from collections.abc import Iterator
from concurrent.futures import Executor
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import TypeVar

import grpc

from esper.common.v1 import digest_pb2
from esper.services.serving import metrics
from esper.services.serving.context import CallContext
from esper.services.serving.errors import invalid
from esper.services.serving.errors import require
from esper.services.store.waking import awaitable
from esper.services.urza import validate
from esper.services.urza.blobs import BlobStore
from esper.services.urza.in_order import InOrder
from esper.services.urza.names import check_digest
from esper.services.urza.uploads import INLINE_BYTES
from esper.services.urza.uploads import WRITTEN_ASIDE_BYTES
from esper.services.urza.uploads import Upload
from esper.urza.framing import UploadChunk
from esper.urza.framing import decode_upload
from esper.urza.framing import encode_download
from esper.urza.v1 import blob_pb2
from esper.urza.v1 import blob_pb2_grpc

T = TypeVar("T")

SERVICE = "esper.urza.v1.BlobService"
MAX_WAITING = 2
"""Chunks of one upload that wait to be hashed or are; it is read no further then. More would only
be left to be hashed alone once all has come."""
LOOKED_FOR_BYTES = 8 << 20
"""How much of an upload comes before it is seen whether another writer was faster."""

_WRITTEN = metrics.TRANSFERRED.labels("written")
_READ = metrics.TRANSFERRED.labels("read")

# The methods are documented in proto/esper/urza/v1.
# ruff: noqa: D102, N802


class BlobServicer(blob_pb2_grpc.BlobServiceServicer):
    """Serves `esper.urza.v1.BlobService`."""

    def __init__(self, blobs: BlobStore) -> None:
        self._blobs = blobs
        self._threads = ThreadPoolExecutor(thread_name_prefix="blobs")

    def add_to(self, server: grpc.aio.Server) -> None:
        """Registers the methods."""
        write: grpc.RpcMethodHandler[UploadChunk, blob_pb2.WriteBlobResponse]
        write = grpc.stream_unary_rpc_method_handler(
            self.WriteBlob, decode_upload, blob_pb2.WriteBlobResponse.SerializeToString
        )
        read: grpc.RpcMethodHandler[blob_pb2.ReadBlobRequest, bytes]
        read = grpc.unary_stream_rpc_method_handler(
            self.ReadBlob, blob_pb2.ReadBlobRequest.FromString, encode_download
        )
        blob_pb2_grpc.add_BlobServiceServicer_to_server(self, server)
        # In place of the generated ones, which copy the bytes of every chunk several times.
        server.add_registered_method_handlers(SERVICE, {"WriteBlob": write, "ReadBlob": read})

    def close(self) -> None:
        """Ends the threads; called once, after the last call has ended."""
        self._threads.shutdown()

    async def WriteBlob(  # type: ignore[override]  # has chunks that are decoded otherwise
        self, chunks: AsyncIterator[UploadChunk], context: CallContext
    ) -> blob_pb2.WriteBlobResponse:
        chunk = await anext(aiter(chunks), None)
        if chunk is None:
            raise invalid("digest", None, "is required in the first message")
        require(validate.begin_write(chunk.head))
        digest = chunk.head.digest
        whole = blob_pb2.WriteBlobResponse(committed_size=digest.size_bytes)
        with self._executor(digest) as executor:
            opening = _do(executor, partial(self._blobs.begin, digest, chunk.head.write_offset))
            try:
                upload = await asyncio.shield(opening)
            except asyncio.CancelledError:
                opening.add_done_callback(_abandon)
                raise
            if upload is None:
                return whole
            held: int | None = None
            try:
                if await self._receive(upload, digest, chunk, chunks, executor):
                    held = digest.size_bytes
            finally:
                if held is None:
                    # Shielded: gRPC may cancel a call twice, and what has come must be kept all
                    # the same.
                    held = await asyncio.shield(_do(executor, upload.interrupt))
            return blob_pb2.WriteBlobResponse(committed_size=held)

    async def _receive(
        self,
        upload: Upload,
        digest: digest_pb2.Digest,
        chunk: UploadChunk,
        chunks: AsyncIterator[UploadChunk],
        executor: Executor | None,
    ) -> bool:
        """Takes the chunks of an upload, the first of which is here; returns whether it is done."""
        writing = InOrder(executor, MAX_WAITING if digest.size_bytes >= WRITTEN_ASIDE_BYTES else 1)
        received = chunk.head.write_offset
        looked_at = received
        while True:
            received += len(chunk.data)
            _WRITTEN.inc(len(chunk.data))
            await writing.add(partial(upload.write, chunk.head.write_offset, chunk.data))
            if received >= digest.size_bytes:
                break
            following = await anext(aiter(chunks), None)
            if following is None:
                break
            chunk = following
            if received - looked_at < LOOKED_FOR_BYTES:
                continue
            looked_at = received
            if self._blobs.contains(digest):  # another writer was faster
                await writing.settle()
                await _do(executor, upload.drop)
                return True
        await writing.settle()
        if not upload.complete:
            return False
        await awaitable(await _do(executor, upload.finish))
        return True

    @contextmanager
    def _executor(self, digest: digest_pb2.Digest) -> Iterator[Executor | None]:
        """Gives what does the work of an upload; None does it at once."""
        if digest.size_bytes <= INLINE_BYTES:  # a hop to a thread costs more than all there is
            yield None
        elif digest.size_bytes < WRITTEN_ASIDE_BYTES:
            yield self._threads
        else:
            thread = ThreadPoolExecutor(1, "blob")
            try:
                yield thread
            finally:
                thread.shutdown(wait=False)

    async def ReadBlob(  # type: ignore[override]  # and encoded
        self, request: blob_pb2.ReadBlobRequest, context: CallContext
    ) -> AsyncIterator[bytes]:
        require(validate.read_blob(request))
        chunks = self._blobs.read(request.digest, request.read_offset, request.read_limit)
        executor = None if request.digest.size_bytes <= INLINE_BYTES else self._threads
        left = request.digest.size_bytes - request.read_offset
        if request.read_limit:
            left = min(left, request.read_limit)
        # One chunk is read and hashed while the one before is on its way.
        reading = _do(executor, partial(next, chunks, None))
        while (chunk := await reading) is not None:
            left -= len(chunk)
            if left:
                reading = _do(executor, partial(next, chunks, None))
            _READ.inc(len(chunk))
            yield chunk
            if not left:
                break

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


def _do(executor: Executor | None, work: Callable[[], T]) -> "asyncio.Future[T]":
    """Has work done by an executor, or at once."""
    if executor is not None:
        return asyncio.get_running_loop().run_in_executor(executor, work)
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
