"""One upload of a blob."""

import contextlib
import errno
import hashlib
import io
import os
import threading
from collections import deque
from concurrent.futures import Future
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

from esper.common.v1 import digest_pb2
from esper.services.serving.errors import exhausted
from esper.services.serving.errors import invalid
from esper.services.serving.errors import unavailable
from esper.services.serving.limits import MAX_CHUNK_BYTES
from esper.services.store.limits import RETRY_AFTER_S
from esper.urza.framing import Bytes

SYNC_BYTES = 8 << 20
"""How much of a file is written before the disk is set to work on it."""
INLINE_BYTES = 64 << 10
"""Blobs up to this size are kept in the row; larger ones are files."""
HASHED_ASIDE_BYTES = 4 << 20
"""From this size on an upload is hashed by a thread of its own, beside the writing."""
MAX_UNHASHED = 8
"""Chunks of one upload that are written and wait to be hashed."""


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
    """

    def __init__(self, blobs: Destination, digest: digest_pb2.Digest, path: Path) -> None:
        self._blobs = blobs
        self._digest = digest
        self._path = path
        # A cancelled call is tidied up while its last chunks may still be on the way in.
        self._lock = threading.Lock()
        self._hashing = HashingAside(digest.size_bytes)
        self._content = bytearray()
        self._ended = False
        self._syncing: EarlySync | None = None
        self.size_bytes = 0
        """Number of bytes held so far."""
        is_small = digest.size_bytes <= INLINE_BYTES
        self._file = None if is_small else path.open("a+b", buffering=0)
        if self._file is not None:
            self._syncing = EarlySync(self._file.fileno())
            self._file.seek(0)
            while chunk := self._file.read(MAX_CHUNK_BYTES):
                self._hashing.add(chunk)
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
            if self._file is None or self._syncing is None:
                self._content += data
            else:
                try:
                    _write_all(self._file, data)
                    self._syncing.note(len(data))
                except OSError as error:
                    raise _disk_error(error) from error
            self._hashing.add(data)
            self.size_bytes += len(data)

    def finish(self) -> "Future[None]":
        """Verifies the bytes and stores them; the future is done once they are durable.

        Raises:
            ServiceError: INVALID_ARGUMENT where the bytes are not what the digest says; they are
                dropped then. RESOURCE_EXHAUSTED where the disk is full, UNAVAILABLE where it fails;
                they are dropped, too.
        """
        with self._lock:
            assert self.complete
            found = self._hashing.hexdigest()
            if found != self._digest.hash:
                self._drop()
                raise invalid("digest.hash", self._digest.hash, f"is not that of the data, {found}")
            if self._file is None:
                durable = self._blobs.enter_content(self._digest, bytes(self._content))
            else:
                try:
                    self._sync_and_close()
                    durable = self._blobs.enter_file(self._digest, self._path)
                except OSError as error:
                    # What a sync that failed has left is unknown, and the next one may wrongly
                    # succeed: nobody goes on from it.
                    self._drop()
                    raise _disk_error(error) from error
            self._ended = True
            self._hashing.close()
            durable.add_done_callback(lambda _: self._blobs.end_upload(self._digest))
            return durable

    def interrupt(self) -> int:
        """Keeps what has come so far for a later writer, and returns how much that is in bytes."""
        with self._lock:
            if self._file is None or self.size_bytes == 0:
                self._drop()
                return 0
            try:
                if not self._file.closed:
                    self._sync_and_close()
                self._blobs.park(self._path, self._digest.hash)
            except OSError:  # a full disk: what cannot be kept is not
                self._drop()
                return 0
            self._end()
            return self.size_bytes

    def drop(self) -> None:
        """Forgets what has come."""
        with self._lock:
            self._drop()

    def _sync_and_close(self) -> None:
        if self._file is not None and self._syncing is not None:
            self._syncing.end()
            os.fsync(self._file.fileno())
            self._file.close()

    def _drop(self) -> None:
        if self._file is not None and self._syncing is not None:
            with contextlib.suppress(OSError):
                self._syncing.end()
            self._file.close()
            self._path.unlink(missing_ok=True)
        self._end()

    def _end(self) -> None:
        if not self._ended:
            self._ended = True
            self._hashing.close()
            self._blobs.end_upload(self._digest)


class HashingAside:
    """The SHA-256 of bytes that come in pieces; many of them are hashed beside other work.

    Args:
        size_bytes: How many there will be.
    """

    def __init__(self, size_bytes: int) -> None:
        self._hasher = hashlib.sha256()
        aside = size_bytes >= HASHED_ASIDE_BYTES
        self._thread = ThreadPoolExecutor(1, "blob-hash") if aside else None
        self._coming: deque[Future[None]] = deque()

    def add(self, data: Bytes) -> None:
        """Takes the next piece; waits where too many are left to be hashed."""
        if self._thread is None:
            self._hasher.update(data)
            return
        if len(self._coming) == MAX_UNHASHED:
            self._coming.popleft().result()
        self._coming.append(self._thread.submit(self._hasher.update, data))

    def hexdigest(self) -> str:
        """Waits for what has been added, and returns the hash of all of it."""
        while self._coming:
            self._coming.popleft().result()
        return self._hasher.hexdigest()

    def close(self) -> None:
        """Ends the thread; nothing may be added after that."""
        if self._thread is not None:
            self._thread.shutdown(wait=False, cancel_futures=True)


class EarlySync:
    """Has the disk write a file while more of it comes, so that the last sync has little to do.

    Args:
        handle: The file, open until `end` has returned.
    """

    def __init__(self, handle: int) -> None:
        self._handle = handle
        self._thread: ThreadPoolExecutor | None = None
        self._last: Future[None] | None = None
        self._unsynced_bytes = 0

    def note(self, size_bytes: int) -> None:
        """Tells that so much more has been written.

        Raises:
            OSError: Where an earlier part could not be made durable: the system says so only once.
        """
        self._unsynced_bytes += size_bytes
        if self._unsynced_bytes < SYNC_BYTES or (self._last is not None and not self._last.done()):
            return
        if self._last is not None:
            self._last.result()
        self._unsynced_bytes = 0
        self._thread = self._thread or ThreadPoolExecutor(1, "blob-sync")
        self._last = self._thread.submit(os.fdatasync, self._handle)

    def end(self) -> None:
        """Waits for the disk.

        Raises:
            OSError: As `note` does.
        """
        if self._thread is not None:
            self._thread.shutdown()
        if self._last is not None:
            last, self._last = self._last, None
            last.result()


def _write_all(file: io.FileIO, data: Bytes) -> None:
    """Writes everything: a nearly full disk takes a part first and refuses the rest."""
    left = memoryview(data)
    while left:
        left = left[file.write(left) :]


def _disk_error(error: OSError) -> Exception:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return exhausted("DISK_FULL", "no room on the disk of the store", RETRY_AFTER_S)
    return unavailable(f"the disk of the store failed: {error.strerror}")
