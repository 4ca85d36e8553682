"""Files that are filled with bytes that come in pieces, past the page cache where that is possible.

A copy into the page cache costs the processor as much as hashing the same bytes does, and several
times as much where the pages are fresh to the machine; the disk fetches aligned memory by itself
meanwhile. So pieces go to the disk directly as long as each begins and ends with a block. What does
not, a short end above all, goes through the page cache.
"""

import errno
import fcntl
import mmap
import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from esper.services.serving.limits import MAX_CHUNK_BYTES
from esper.urza.framing import Bytes

SYNC_BYTES = 8 << 20
"""How much is written through the page cache before the disk is set to work on it."""
BLOCK_BYTES = 4096
"""What addresses and sizes of direct writes are multiples of."""
MAX_UNWRITTEN = 4
"""Pieces of one file that wait to be written."""
KEPT_BUFFERS = 16


class Buffers:
    """Recycles aligned memory of `MAX_CHUNK_BYTES`: fresh pages would cost more than their use."""

    def __init__(self) -> None:
        self._free: deque[mmap.mmap] = deque(maxlen=KEPT_BUFFERS)

    def take(self) -> mmap.mmap:
        """Returns a buffer with any content."""
        try:
            return self._free.pop()  # the one used last is the one in the processor's caches
        except IndexError:
            return mmap.mmap(-1, MAX_CHUNK_BYTES)

    def give_back(self, buffer: mmap.mmap) -> None:
        """Takes back a buffer that is no longer used."""
        self._free.append(buffer)


class FileWriting:
    """One file that is appended to. Every one ends with `close`; not to be used by two threads.

    Whatever fails, the file holds a first part of what was added.

    Args:
        path: Of the file, created where missing.
        buffers: Memory for direct writes.
        aside: Whether pieces are written by a thread of its own, behind whoever adds them.

    Raises:
        OSError: Where it cannot be opened.
    """

    def __init__(self, path: Path, buffers: Buffers, *, aside: bool) -> None:
        self._buffers = buffers
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        try:
            self._handle = os.open(path, flags | os.O_DIRECT, 0o600)
            self._direct = True
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            self._handle = os.open(path, flags, 0o600)
            self._direct = False
        self._added_bytes = os.fstat(self._handle).st_size
        self._early = EarlySync(self._handle)
        self._thread = ThreadPoolExecutor(1, "blob-write") if aside else None
        self._coming: deque[Future[None]] = deque()
        self._failure: OSError | None = None

    def add(self, data: Bytes) -> None:
        """Takes the next piece, of at most `MAX_CHUNK_BYTES`, which must not change any more.

        Waits where too many are left to be written.

        Raises:
            OSError: Where this piece or an earlier one could not be written.
        """
        whole_blocks = 0
        if self._direct and self._added_bytes % BLOCK_BYTES == 0:
            whole_blocks = len(data) - len(data) % BLOCK_BYTES
        self._added_bytes += len(data)
        if whole_blocks:
            self._do(self._write_blocks, data[:whole_blocks])
        if whole_blocks < len(data):
            self._do(self._write_all, memoryview(data)[whole_blocks:])

    def settle(self) -> None:
        """Waits until everything is written.

        Raises:
            OSError: Where it could not be.
        """
        while self._coming:
            self._coming.popleft().result()
        if self._failure is not None:
            raise self._failure

    def sync(self) -> int:
        """Makes durable what could be written, and returns the size of the file.

        Raises:
            OSError: Where a sync fails, or an earlier one has failed.
        """
        while self._coming:
            self._coming.popleft().exception()
        self._early.end()
        os.fsync(self._handle)
        return os.fstat(self._handle).st_size

    def close(self) -> None:
        """Closes the file, and ends the threads."""
        if self._thread is not None:
            self._thread.shutdown()
        self._early.abandon()
        os.close(self._handle)

    def _do(self, write: Callable[[Bytes], None], data: Bytes) -> None:
        if self._thread is None:
            write(data)
            return
        if len(self._coming) == MAX_UNWRITTEN:
            self._coming.popleft().result()
        self._coming.append(self._thread.submit(write, data))

    def _write_blocks(self, data: Bytes) -> None:
        buffer = self._buffers.take()
        try:
            buffer[: len(data)] = data
            self._write_all(memoryview(buffer)[: len(data)], direct=True)
        finally:
            self._buffers.give_back(buffer)

    def _write_all(self, data: Bytes, *, direct: bool = False) -> None:
        """Writes everything: a nearly full disk takes a part first and refuses the rest."""
        if self._failure is not None:  # a gap would be left
            raise self._failure
        left = memoryview(data)
        try:
            while left:
                if self._direct and (not direct or len(left) % BLOCK_BYTES):
                    self._go_through_the_cache()
                try:
                    written = os.write(self._handle, left)
                except OSError as error:
                    if not self._direct or error.errno != errno.EINVAL:
                        raise
                    self._go_through_the_cache()  # of a disk with other blocks
                    continue
                left = left[written:]
                if not self._direct:
                    self._early.note(written)
        except OSError as error:
            self._failure = error
            raise

    def _go_through_the_cache(self) -> None:
        flags = fcntl.fcntl(self._handle, fcntl.F_GETFL)
        fcntl.fcntl(self._handle, fcntl.F_SETFL, flags & ~os.O_DIRECT)
        self._direct = False


class EarlySync:
    """Has the disk write a file while more of it comes, so that the last sync has little to do.

    Args:
        handle: The file, open until `end` or `abandon` has returned.
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
        self.abandon()
        if self._last is not None:
            last, self._last = self._last, None
            last.result()

    def abandon(self) -> None:
        """Ends the thread; what became of the parts is not told."""
        if self._thread is not None:
            self._thread.shutdown()
