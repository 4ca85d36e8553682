"""What the clients of Urza share: how blobs are cut, retried and verified."""

import hashlib
import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Self

import grpc

from esper.common.retries import was_away
from esper.common.rpc import CALL_TIMEOUT_S
from esper.common.rpc import STREAM_BYTES_PER_S
from esper.common.rpc import RpcError
from esper.common.v1 import digest_pb2
from esper.urza.framing import Bytes
from esper.urza.framing import UploadChunk
from esper.urza.v1 import blob_pb2

CHUNK_BYTES = 1 << 20
HASHED_ASIDE_BYTES = 4 << 20
"""From this size on a download is hashed by a thread of its own, and an upload by asyncio's."""
ATTEMPTS = 5


def digest_of(data: bytes) -> digest_pb2.Digest:
    """Returns the digest of some bytes."""
    return digest_pb2.Digest(hash=hashlib.sha256(data).hexdigest(), size_bytes=len(data))


def transfer_timeout_s(size_bytes: int) -> float:
    """Returns the deadline of an upload or a download, in seconds."""
    return CALL_TIMEOUT_S + size_bytes / STREAM_BYTES_PER_S


def worth_another_attempt(error: RpcError, attempt: int) -> bool:
    """Returns whether a transfer should go on after its `attempt`-th try, from 0, has failed."""
    overtaken = error.code is grpc.StatusCode.ABORTED
    return (overtaken or was_away(error)) and attempt < ATTEMPTS - 1


def upload_chunks(digest: digest_pb2.Digest, data: bytes, offset: int) -> Iterator[UploadChunk]:
    """Yields the chunks of an upload from `offset` on; at least one, with the digest."""
    view = memoryview(data)
    first = True
    while first or offset < len(data):
        head = blob_pb2.WriteBlobRequest(digest=digest if first else None, write_offset=offset)
        yield UploadChunk(head, view[offset : offset + CHUNK_BYTES])
        first = False
        offset += CHUNK_BYTES


class Download:
    """The chunks of one blob as they come, hashed while the others are on their way.

    To be used as a context manager, which ends the thread that hashes.

    Args:
        digest: What they must turn out to be.
    """

    def __init__(self, digest: digest_pb2.Digest) -> None:
        self._digest = digest
        self._hasher = hashlib.sha256()
        self._hashing = ThreadPoolExecutor(1) if digest.size_bytes >= HASHED_ASIDE_BYTES else None
        # Its buffer grows in place, and becomes the result as it is: chunks that were kept and
        # joined would each need fresh pages, and the whole a second time.
        self._whole = io.BytesIO()
        self.size_bytes = 0
        """Number of bytes that have come."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._hashing is not None:
            self._hashing.shutdown(cancel_futures=True)

    def request(self) -> blob_pb2.ReadBlobRequest:
        """Returns the request for what has not come yet."""
        return blob_pb2.ReadBlobRequest(digest=self._digest, read_offset=self.size_bytes)

    def add(self, chunk: Bytes) -> None:
        """Takes the next chunk."""
        if self._hashing is None:
            self._hasher.update(chunk)
        else:
            self._hashing.submit(self._hasher.update, chunk)
        self._whole.write(chunk)
        self.size_bytes += len(chunk)

    def verified(self) -> bytes:
        """Returns the whole.

        Raises:
            RpcError: DATA_LOSS where it is not what the digest says.
        """
        data = self._whole.getvalue()
        if self._hashing is not None:
            self._hashing.shutdown()
        if (self._hasher.hexdigest(), len(data)) != (self._digest.hash, self._digest.size_bytes):
            raise RpcError(
                grpc.StatusCode.DATA_LOSS,
                f"blob {self._digest.hash} came with other bytes than its own",
            )
        return data
