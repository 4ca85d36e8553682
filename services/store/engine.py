"""Durable rows: one LMDB environment, one writer thread, many short readers.

Every write is a function of a transaction. The writer thread takes all that wait, runs each in a
child transaction (so that one that fails undoes only itself) and commits them together with one
sync; their futures are resolved after that. An acknowledged write is therefore on disk, and the
price of the sync is shared by all writers that came while the one before was under way.
"""

import errno
import logging
import os
import queue
import threading
import time
from collections.abc import Callable
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import lmdb
from prometheus_client import Histogram

from esper.services.serving import metrics
from esper.services.serving.errors import ServiceError
from esper.services.serving.errors import exhausted
from esper.services.serving.errors import unavailable
from esper.services.store.ahead import ReadAhead
from esper.services.store.claim import DirectoryClaim
from esper.services.store.files import free_bytes
from esper.services.store.files import scratch_folder
from esper.services.store.gate import Gate
from esper.services.store.limits import RETRY_AFTER_S
from esper.services.store.limits import SOFT_SHARE
from esper.services.store.limits import StoreLimits
from esper.services.store.opening import Database
from esper.services.store.opening import Row
from esper.services.store.opening import Schema
from esper.services.store.opening import data_file
from esper.services.store.opening import open_rows
from esper.services.store.waking import gathered

LOG = logging.getLogger("esper.store")

T = TypeVar("T")

MAX_BATCH_JOBS = 256
MAX_BATCH_BYTES = 32 << 20
INITIAL_MAP_BYTES = 4 << 30  # address space only: the file grows by what is written
LONG_READ_S = 5.0
READER_CHECK_S = 60.0
PROBE_BYTES = 1 << 20
SCAN_ROWS = 512
SCAN_BYTES = 8 << 20
FREEING_BYTES = 16 << 20
"""Room beyond the limit for writes that make room: a deletion writes the pages on its way."""


class StoreClosedError(RuntimeError):
    """A write came after the store was closed."""


@dataclass
class _Job:
    work: Callable[[Row], object]
    size_bytes: int
    future: "Future[object]"
    frees: bool


class _Reading:
    """One read. A class, as a generator for every read would cost a small call a hundredth."""

    __slots__ = ("_directory", "_environment", "_gate", "_row", "_seconds", "_started_s")

    def __init__(
        self, environment: lmdb.Environment, gate: Gate, seconds: Histogram, directory: Path
    ) -> None:
        self._environment = environment
        self._gate = gate
        self._seconds = seconds
        self._directory = directory

    def __enter__(self) -> Row:
        self._gate.enter()
        try:
            self._started_s = time.monotonic()
            self._row = self._environment.begin()
        except BaseException:
            self._gate.leave()
            raise
        return self._row

    def __exit__(self, *_: object) -> None:
        self._row.abort()
        self._gate.leave()
        held_s = time.monotonic() - self._started_s
        self._seconds.observe(held_s)
        if held_s > LONG_READ_S:
            LOG.warning("a read of %s held its snapshot for %.1f s", self._directory, held_s)


class Store:
    """One LMDB environment in one directory.

    Args:
        directory: Claimed for this process alone.
        schema: Tables and version of the rows.
        limits: How much it may take.
        initial_map_bytes: Size of the memory map, as far as the limits allow; doubled whenever it
            is full.

    Raises:
        DirectoryError: Where the directory cannot be used, is damaged, or was written by another
            schema version.
    """

    def __init__(
        self,
        directory: Path,
        schema: Schema,
        limits: StoreLimits | None = None,
        initial_map_bytes: int = INITIAL_MAP_BYTES,
    ) -> None:
        self.directory = directory
        self.limits = limits or StoreLimits()
        self._claim = DirectoryClaim(directory)
        try:
            map_bytes = min(initial_map_bytes, self.limits.max_row_bytes)
            self._environment, self._tables = open_rows(directory, schema, map_bytes)
            self.scratch = scratch_folder(directory)
            """Folder for temporary files, emptied when the store is opened."""
        except BaseException:
            self._claim.release()
            raise
        self.num_commits = 0
        """Groups of writes committed since it was opened; counted before they are acknowledged."""
        self._gate = Gate()
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._closed = threading.Lock()
        self._open = True
        self._failure: ServiceError | None = None
        self._readers_checked_s = time.monotonic()
        self._name = directory.name
        self._committed = metrics.WRITES.labels(self._name, "committed")
        self._refused = metrics.WRITES.labels(self._name, "refused")
        self._reads = metrics.READ_SECONDS.labels(self._name)
        self._commits = metrics.COMMIT_SECONDS.labels(self._name)
        self._copies = metrics.COPY_SECONDS.labels(self._name)
        self._growths = metrics.GROWTHS.labels(self._name)
        self._queued = metrics.QUEUE_LENGTH.labels(self._name)
        self._file_bytes = metrics.ROW_FILE_BYTES.labels(self._name)
        self._ahead = ReadAhead(data_file(directory), self._name)
        self._writer = threading.Thread(
            target=self._run, name=f"store-{directory.name}", daemon=True
        )
        self._writer.start()

    def table(self, name: str) -> Database:
        """Returns the handle of a table."""
        return self._tables[name]

    def reading(self) -> "_Reading":
        """Gives a snapshot to read from, to be left soon: it holds old pages and blocks growth.

        A context manager. Not to be nested, and not to be held while waiting for a caller.
        """
        return _Reading(self._environment, self._gate, self._reads, self.directory)

    def submit(
        self, work: Callable[[Row], T], size_bytes: int = 0, *, frees: bool = False
    ) -> "Future[T]":
        """Has `work` done in a write transaction and resolves the future once that is durable.

        Args:
            work: Run by the writer thread, and again after the map has grown: it must have no
                effect beyond its transaction. What it raises fails its own future and undoes its
                own writes.
            size_bytes: About how much it writes; bounds the size of a group.
            frees: Whether it makes room, and is therefore done on a disk that is short of it.

        Raises:
            StoreClosedError: After `close`.
        """
        future: Future[T] = Future()
        with self._closed:
            if not self._open:
                raise StoreClosedError(f"the store in {self.directory} is closed")
            self._jobs.put(_Job(work, size_bytes, future, frees))  # type: ignore[arg-type]
        return future

    @property
    def num_queued(self) -> int:
        """Number of writes that wait for their commit."""
        return self._jobs.qsize()

    @property
    def row_file_bytes(self) -> int:
        """Size of the file with the rows."""
        return data_file(self.directory).stat().st_size

    def table_sizes(self) -> dict[str, int]:
        """Returns the number of rows of every table."""
        with self.reading() as row:
            return {name: row.stat(db)["entries"] for name, db in sorted(self._tables.items())}

    def scan(self, table: str, prefix: bytes = b"") -> Iterator[tuple[bytes, bytes]]:
        """Yields the rows of a table in order of key, from one short snapshot after the other.

        A row that is there all the time comes once; one that comes or goes meanwhile may come.
        """
        position = prefix
        rows: list[tuple[bytes, bytes]] = []
        while True:
            size_bytes = 0
            with self.reading() as row:
                cursor = row.cursor(db=self._tables[table])
                going_on = cursor.set_range(position)
                while going_on and len(rows) < SCAN_ROWS and size_bytes < SCAN_BYTES:
                    rows.append(cursor.item())
                    size_bytes += len(rows[-1][1])
                    going_on = cursor.next()
            for key, value in rows:
                if not key.startswith(prefix):
                    return
                yield key, value
            if not going_on:
                return
            position = rows[-1][0] + b"\0"
            rows.clear()

    def copy_rows(self, folder: Path, *, compact: bool) -> None:
        """Writes a snapshot of the rows into an empty folder, as an environment of its own.

        Args:
            folder: Where to.
            compact: Leave free pages out; else the copy is page by page that of the store.
        """
        self._gate.enter()
        try:
            with self._copies.time():
                self._environment.copy(str(folder), compact=compact)
        finally:
            self._gate.leave()

    def close(self) -> None:
        """Finishes what was submitted, then releases the directory."""
        with self._closed:
            if not self._open:
                return
            self._open = False
            self._jobs.put(None)
        self._writer.join()
        self._ahead.close()
        with self._gate.alone():
            self._environment.close()
        self._claim.release()

    # ------------------------------------------------------------ the writer thread

    def _run(self) -> None:
        going_on = True
        while going_on:
            batch: list[_Job] = []
            size_bytes = 0
            job = self._jobs.get()
            while True:
                if job is None:
                    going_on = False
                    break
                if job.future.set_running_or_notify_cancel():
                    batch.append(job)
                    size_bytes += job.size_bytes
                if len(batch) >= MAX_BATCH_JOBS or size_bytes >= MAX_BATCH_BYTES:
                    break
                try:
                    job = self._jobs.get_nowait()
                except queue.Empty:
                    break
            if batch:
                self._serve(batch)

    def _serve(self, batch: list[_Job]) -> None:
        """Does what the state of the disk allows, and refuses the rest."""
        refusal = self._failure or self._shortage()
        if refusal is not None:
            allowed = [job for job in batch if job.frees and self._failure is None]
            for job in batch:
                if job not in allowed:
                    self._refused.inc()
                    job.future.set_exception(refusal)
            batch = allowed
        if batch:
            self._write(batch)
        self._queued.set(self.num_queued)
        self._file_bytes.set(self.row_file_bytes)
        if time.monotonic() - self._readers_checked_s > READER_CHECK_S:
            self._clear_readers()

    def _shortage(self) -> ServiceError | None:
        free = free_bytes(self.directory)
        if free >= self.limits.keep_free_bytes:
            return None
        return exhausted(
            "DISK_FULL",
            f"the disk of the store has {free} bytes free and {self.limits.keep_free_bytes} are "
            "kept free: nothing more is written",
            RETRY_AFTER_S,
        )

    def _write(self, batch: list[_Job]) -> None:
        try:
            outcomes = self._commit(batch)
        except lmdb.Error as error:
            if isinstance(error, lmdb.MapFullError) and self._grow(batch):
                self._write(batch)
            elif len(batch) > 1:  # whoever is at fault, the others shall not suffer
                for job in batch:
                    self._write([job])
            else:
                self._refused.inc()
                batch[0].future.set_exception(self._refusal(error))
            return
        self.num_commits += 1
        num_refused = sum(problem is not None for _, problem in outcomes)
        self._committed.inc(len(batch) - num_refused)
        self._refused.inc(num_refused)
        with gathered():
            for job, (result, problem) in zip(batch, outcomes, strict=True):
                if problem is None:
                    job.future.set_result(result)
                else:
                    job.future.set_exception(problem)

    def _commit(self, batch: list[_Job]) -> list[tuple[object, Exception | None]]:
        outcomes: list[tuple[object, Exception | None]] = []
        timing = self._commits.time()
        with timing, self._environment.begin(write=True) as group:
            for job in batch:
                try:
                    with self._environment.begin(write=True, parent=group) as row:
                        outcomes.append((job.work(row), None))
                except lmdb.Error:
                    raise
                except Exception as problem:  # belongs to the submitter, who gets it
                    outcomes.append((None, problem))
        return outcomes

    def _grow(self, batch: list[_Job]) -> bool:
        """Doubles the map; returns False where it is as large as it may be."""
        size_bytes = self._environment.info()["map_size"]
        limit = self.limits.max_row_bytes
        if all(job.frees for job in batch):
            limit += FREEING_BYTES
        wanted = min(2 * size_bytes, limit)
        if wanted <= size_bytes:
            return False
        self._clear_readers()
        with self._gate.alone():
            self._environment.set_mapsize(wanted)
        self._growths.inc()
        LOG.info("the map of %s grew to %d bytes", self.directory, wanted)
        if wanted >= SOFT_SHARE * self.limits.max_row_bytes:
            LOG.warning("the rows of %s near their limit of %d bytes", self.directory, wanted)
        return True

    def _clear_readers(self) -> None:
        """Frees the slots of readers that died: a copying tool, say, that was killed."""
        self._readers_checked_s = time.monotonic()
        if dead := self._environment.reader_check():
            LOG.warning("cleared %d dead readers of %s", dead, self.directory)

    def _refusal(self, error: lmdb.Error) -> ServiceError:
        """Returns what a failed write is told; a disk that fails ends all writing."""
        LOG.error("a write to %s failed: %s", self.directory, error)
        if isinstance(error, lmdb.MapFullError):
            return exhausted(
                "ROWS_FULL",
                f"the rows of the store have reached their limit, {self.limits.max_row_bytes} "
                "bytes",
                RETRY_AFTER_S,
            )
        if _code(error) in _NO_ROOM or (_code(error) == errno.EIO and self._is_full()):
            return exhausted(
                "DISK_FULL", f"no room on the disk of the store: {error}", RETRY_AFTER_S
            )
        failure = unavailable(f"the store failed: {error}")
        if isinstance(error, _FATAL) or _code(error) == errno.EIO:
            # What the disk holds of a write that failed so is unknown, and a later sync may
            # wrongly succeed: nothing more is acknowledged.
            self._failure = failure
            LOG.critical("%s takes no more writes until it is opened again", self.directory)
        return failure

    def _is_full(self) -> bool:
        """Returns whether the file with the rows cannot grow.

        LMDB reports a write that was cut short as an input/output error, whatever the reason.
        """
        with data_file(self.directory).open("r+b") as file:
            try:
                os.posix_fallocate(file.fileno(), os.fstat(file.fileno()).st_size, PROBE_BYTES)
            except OSError as error:
                return error.errno in _NO_ROOM
        return False


_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FATAL = (lmdb.PanicError, lmdb.CorruptedError, lmdb.PageNotFoundError)


def _code(error: lmdb.Error) -> int:
    """Returns the number of an error: of the system where it is positive, else of LMDB."""
    code: int = getattr(error, "code", 0)
    return code
