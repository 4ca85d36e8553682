"""One upload of a blob."""

import contextlib
import errno
import hashlib
import threading
from concurrent.futures import Future
from pathlib import Path
from typing import Protocol

from esper.common.v1 import digest_pb2
from esper.services.serving.errors import exhausted
from esper.services.serving.errors import invalid
from esper.services.serving.errors import unavailable
from esper.services.serving.limits import MAX_CHUNK_BYTES
from esper.services.store.limits import RETRY_AFTER_S
from esper.services.urza.writing import Buffers
from esper.services.urza.writing import FileWriting
from esper.urza.framing import Bytes

INLINE_BYTES = 64 << 10
"""Blobs up to this size are kept in the row; larger ones are files."""
WRITTEN_ASIDE_BYTES = 4 << 20
"""From this size on an upload is written by a thread of its own, beside the hashing."""


class Destination(Protocol):
    """Where uploads go."""

    def enter_content(self, digest: digest_pb2.Digest, content: bytes) -> "Future[None]":
        """Stores a verified small blob."""

    def enter_file(self, digest: digest_pb2.Digest, path: Path) -> "Future[None]":
        """Stores a verified and synced file."""

    def park(self, path: Path, name: str) -> None:
        """Keeps the file of an interrupted upload."""

    def end_upload(self, digest: digest_pb2.Digest) -> None:
        """Gives back what the upload was promised."""


class Upload:
    """One upload under way. Every one ends with `finish`, `interrupt` or `drop`.

    Args:
        blobs: Where it will be stored.
        digest: What it must turn out to be.
        path: The file that it writes, with what was uploaded before.
        buffers: Memory for its writing.
    """

    def __init__(
        self, blobs: Destination, digest: digest_pb2.Digest, path: Path, buffers: Buffers
    ) -> None:
        self._blobs = blobs
        self._digest = digest
        self._path = path
        # A cancelled call is tidied up while its last chunks may still be on the way in.
        self._lock = threading.Lock()
        self._hasher = hashlib.sha256()
        self._content = bytearray()
        self._ended = False
        self.size_bytes = 0
        """Number of bytes held so far."""
        self._file: FileWriting | None = None
        if digest.size_bytes > INLINE_BYTES:
            self._hash_what_is_held()
            aside = digest.size_bytes >= WRITTEN_ASIDE_BYTES
            self._file = FileWriting(path, buffers, aside=aside)

    def _hash_what_is_held(self) -> None:
        with contextlib.suppress(FileNotFoundError), self._path.open("rb", buffering=0) as file:
            while chunk := file.read(MAX_CHUNK_BYTES):
                self._hasher.update(chunk)
                self.size_bytes += len(chunk)

    @property
    def complete(self) -> bool:
        """Whether as many bytes are held as the digest says."""
        return self.size_bytes == self._digest.size_bytes

    def write(self, offset: int, data: Bytes) -> None:
        """Appends a chunk; does nothing to an upload that has ended.

        Raises:
            ServiceError: INVALID_ARGUMENT for a gap, an overlap, or bytes beyond the size;
                RESOURCE_EXHAUSTED where the disk is full.
        """
        with self._lock:
            if self._ended:  # the call was cancelled, and nobody is told
                return
            if offset != self.size_bytes:
                raise invalid("write_offset", offset, f"must be {self.size_bytes}, the bytes held")
            if len(data) > MAX_CHUNK_BYTES:
                raise invalid(
                    "data", f"{len(data)} bytes", f"must be at most {MAX_CHUNK_BYTES} bytes"
                )
            if self.size_bytes + len(data) > self._digest.size_bytes:
                rule = f"must not go beyond the size of the blob, {self._digest.size_bytes} bytes"
                raise invalid("data", f"{len(data)} bytes at {offset}", rule)
            self._hasher.update(data)
            if self._file is None:
                self._content += data
            else:
                try:
                    self._file.add(data)
                except OSError as error:
                    raise _disk_error(error) from error
            self.size_bytes += len(data)

    def finish(self) -> "Future[None]":
        """Verifies the bytes and stores them; the future is done once they are durable.

        Raises:
            ServiceError: INVALID_ARGUMENT where the bytes are not what the digest says; they are
                dropped then. RESOURCE_EXHAUSTED where the disk is full, UNAVAILABLE where it fails;
                they are dropped, too, where it fails to sync.
        """
        with self._lock:
            assert self.complete
            found = self._hasher.hexdigest()
            if found != self._digest.hash:
                self._drop()
                raise invalid("digest.hash", self._digest.hash, f"is not that of the data, {found}")
            if self._file is None:
                durable = self._blobs.enter_content(self._digest, bytes(self._content))
            else:
                try:
                    self._file.settle()
                except OSError as error:
                    raise _disk_error(error) from error
                try:
                    self._file.sync()
                    durable = self._blobs.enter_file(self._digest, self._path)
                except OSError as error:
                    # What a sync that failed has left is unknown, and the next one may wrongly
                    # succeed: nobody goes on from it.
                    self._drop()
                    raise _disk_error(error) from error
                self._file.close()
            self._ended = True
            durable.add_done_callback(lambda _: self._blobs.end_upload(self._digest))
            return durable

    def interrupt(self) -> int:
        """Keeps what has come so far for a later writer, and returns how much that is in bytes."""
        with self._lock:
            if self._ended or self._file is None or self.size_bytes == 0:
                self._drop()
                return 0
            try:
                held = self._file.sync()
                self._blobs.park(self._path, self._digest.hash)
            except OSError:  # what cannot be kept is not
                self._drop()
                return 0
            self._file.close()
            self._end()
            return held

    def drop(self) -> None:
        """Forgets what has come."""
        with self._lock:
            self._drop()

    def _drop(self) -> None:
        if self._ended:
            return
        if self._file is not None:
            self._file.close()
            self._path.unlink(missing_ok=True)
        self._end()

    def _end(self) -> None:
        self._ended = True
        self._blobs.end_upload(self._digest)


def _disk_error(error: OSError) -> Exception:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return exhausted("DISK_FULL", "no room on the disk of the store", RETRY_AFTER_S)
    return unavailable(f"the disk of the store failed: {error.strerror}")
