"""What the clients of Urza share: how blobs are cut, retried and verified."""

import hashlib
import uuid
from collections.abc import Iterator

import grpc

from esper.common.rpc import CALL_TIMEOUT_S
from esper.common.rpc import STREAM_BYTES_PER_S
from esper.common.rpc import RpcError
from esper.common.v1 import digest_pb2
from esper.urza.v1 import blob_pb2

CHUNK_BYTES = 1 << 20
PAGE_SIZE = 200
ATTEMPTS = 5
MAX_DIGESTS = 1000
_AGAIN = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.ABORTED)


def digest_of(data: bytes) -> digest_pb2.Digest:
    """Returns the digest of some bytes."""
    return digest_pb2.Digest(hash=hashlib.sha256(data).hexdigest(), size_bytes=len(data))


def new_id() -> str:
    """Returns a request id that nobody else has."""
    return str(uuid.uuid4())


def transfer_timeout_s(size_bytes: int) -> float:
    """Returns the deadline of an upload or a download, in seconds."""
    return CALL_TIMEOUT_S + size_bytes / STREAM_BYTES_PER_S


def worth_another_attempt(error: RpcError, attempt: int) -> bool:
    """Returns whether an upload should go on after its `attempt`-th try, from 0, has failed."""
    return error.code in _AGAIN and attempt < ATTEMPTS - 1


def upload_messages(
    digest: digest_pb2.Digest, data: bytes, offset: int
) -> Iterator[blob_pb2.WriteBlobRequest]:
    """Yields the messages of an upload from `offset` on; at least one, with the digest."""
    first = True
    while first or offset < len(data):
        yield blob_pb2.WriteBlobRequest(
            digest=digest if first else None,
            write_offset=offset,
            data=data[offset : offset + CHUNK_BYTES],
        )
        first = False
        offset += CHUNK_BYTES


class Download:
    """The chunks of one blob as they come; each is hashed while the next one is on its way.

    Args:
        digest: What they must turn out to be.
    """

    def __init__(self, digest: digest_pb2.Digest) -> None:
        self._digest = digest
        self._hasher = hashlib.sha256()
        self._chunks: list[bytes] = []
        self.size_bytes = 0
        """Number of bytes that have come."""

    def request(self) -> blob_pb2.ReadBlobRequest:
        """Returns the request for what has not come yet."""
        return blob_pb2.ReadBlobRequest(digest=self._digest, read_offset=self.size_bytes)

    def add(self, chunk: bytes) -> None:
        """Takes the next chunk."""
        self._hasher.update(chunk)
        self._chunks.append(chunk)
        self.size_bytes += len(chunk)

    def verified(self) -> bytes:
        """Returns the whole.

        Raises:
            RpcError: DATA_LOSS where it is not what the digest says.
        """
        data = b"".join(self._chunks)
        if (self._hasher.hexdigest(), len(data)) != (self._digest.hash, self._digest.size_bytes):
            raise RpcError(
                grpc.StatusCode.DATA_LOSS,
                f"blob {self._digest.hash} came with other bytes than its own",
            )
        return data
