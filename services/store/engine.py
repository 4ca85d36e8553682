"""Durable rows: one LMDB environment, one writer thread, many short readers.

Every write is a function of a transaction. The writer thread takes all that wait, runs each in a
child transaction (so that one that fails undoes only itself) and commits them together with one
sync; their futures are resolved after that. An acknowledged write is therefore on disk, and the
price of the sync is shared by all writers that came while the one before was under way.
"""

import errno
import logging
import queue
import threading
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias
from typing import TypeVar

import lmdb

from esper.services.serving.errors import exhausted
from esper.services.store.claim import DirectoryClaim
from esper.services.store.claim import DirectoryError

LOG = logging.getLogger("esper.store")

T = TypeVar("T")
# Quoted: generic in the type stubs alone.
Row: TypeAlias = "lmdb.Transaction[bytes]"

SCHEMA_KEY = b"schema_version"
MAX_BATCH_JOBS = 256
MAX_BATCH_BYTES = 32 << 20
INITIAL_MAP_BYTES = 4 << 30  # address space only: the file grows by what is written
MAX_READERS = 512


class StoreClosedError(RuntimeError):
    """A write came after the store was closed."""


@dataclass
class _Job:
    work: Callable[[Row], object]
    size_bytes: int
    future: "Future[object]"


class _Gate:
    """Lets readers in and out, and shuts them out while the map is being resized."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._readers = 0
        self._shut = False

    @contextmanager
    def reading(self) -> Iterator[None]:
        with self._condition:
            while self._shut:
                self._condition.wait()
            self._readers += 1
        try:
            yield
        finally:
            with self._condition:
                self._readers -= 1
                if self._readers == 0:
                    self._condition.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        with self._condition:
            self._shut = True
            while self._readers:
                self._condition.wait()
        try:
            yield
        finally:
            with self._condition:
                self._shut = False
                self._condition.notify_all()


class Store:
    """One LMDB environment in one directory.

    Args:
        directory: Claimed for this process alone.
        tables: Names of the tables, created where missing.
        schema_version: Version of the row formats. A directory of another version is refused.
        initial_map_bytes: Size of the memory map; doubled whenever it is full.

    Raises:
        DirectoryError: Where the directory cannot be used, or was written by another schema
            version.
    """

    def __init__(
        self,
        directory: Path,
        tables: Sequence[str],
        schema_version: int,
        initial_map_bytes: int = INITIAL_MAP_BYTES,
    ) -> None:
        self.directory = directory
        self._claim = DirectoryClaim(directory)
        try:
            self._environment = lmdb.open(
                str(directory / "rows"),
                map_size=max(initial_map_bytes, _file_bytes(directory / "rows" / "data.mdb")),
                max_dbs=len(tables) + 1,
                max_readers=MAX_READERS,
                subdir=True,
                metasync=True,
                sync=True,
                mode=0o600,
            )
            self._environment.reader_check()
            self._tables = {
                name: self._environment.open_db(name.encode()) for name in (*tables, "meta")
            }
            self._check_schema(schema_version)
        except lmdb.Error as error:
            self._claim.release()
            raise DirectoryError(f"cannot open the store in {directory}: {error}") from error
        except DirectoryError:
            self._environment.close()
            self._claim.release()
            raise
        self._gate = _Gate()
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._closed = threading.Lock()
        self._open = True
        self._writer = threading.Thread(
            target=self._run, name=f"store-{directory.name}", daemon=True
        )
        self._writer.start()

    def _check_schema(self, version: int) -> None:
        wanted = str(version).encode()
        with self._environment.begin(write=True) as row:
            found = row.get(SCHEMA_KEY, db=self._tables["meta"])
            if found is None:
                row.put(SCHEMA_KEY, wanted, db=self._tables["meta"])
            elif found != wanted:
                raise DirectoryError(
                    f"{self.directory} was written with schema version {found.decode()} and this "
                    f"release reads version {version}"
                )

    def table(self, name: str) -> "lmdb._Database":
        """Returns the handle of a table."""
        return self._tables[name]

    @contextmanager
    def reading(self) -> Iterator[Row]:
        """Gives a snapshot to read from, to be left soon: it holds old pages and blocks growth."""
        with self._gate.reading(), self._environment.begin() as row:
            yield row

    def submit(self, work: Callable[[Row], T], size_bytes: int = 0) -> "Future[T]":
        """Has `work` done in a write transaction and resolves the future once that is durable.

        Args:
            work: Run by the writer thread, and again after the map has grown: it must have no
                effect beyond its transaction. What it raises fails its own future and undoes its
                own writes.
            size_bytes: About how much it writes; bounds the size of a group.

        Raises:
            StoreClosedError: After `close`.
        """
        future: Future[T] = Future()
        with self._closed:
            if not self._open:
                raise StoreClosedError(f"the store in {self.directory} is closed")
            self._jobs.put(_Job(work, size_bytes, future))  # type: ignore[arg-type]
        return future

    def close(self) -> None:
        """Finishes what was submitted, then releases the directory."""
        with self._closed:
            if not self._open:
                return
            self._open = False
            self._jobs.put(None)
        self._writer.join()
        with self._gate.alone():
            self._environment.close()
        self._claim.release()

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
                self._write(batch)

    def _write(self, batch: list[_Job]) -> None:
        while True:
            try:
                outcomes = self._commit(batch)
            except lmdb.MapFullError:
                self._grow()
                continue
            except lmdb.Error as error:
                failure = _translate(error)
                LOG.error("a group of %d writes failed: %s", len(batch), error)
                for job in batch:
                    job.future.set_exception(failure)
                return
            for job, (result, problem) in zip(batch, outcomes, strict=True):
                if problem is None:
                    job.future.set_result(result)
                else:
                    job.future.set_exception(problem)
            return

    def _commit(self, batch: list[_Job]) -> list[tuple[object, Exception | None]]:
        outcomes: list[tuple[object, Exception | None]] = []
        with self._environment.begin(write=True) as group:
            for job in batch:
                try:
                    with self._environment.begin(write=True, parent=group) as row:
                        outcomes.append((job.work(row), None))
                except lmdb.Error:
                    raise
                except Exception as problem:  # belongs to the submitter, who gets it
                    outcomes.append((None, problem))
        return outcomes

    def _grow(self) -> None:
        with self._gate.alone():
            size_bytes = 2 * self._environment.info()["map_size"]
            self._environment.set_mapsize(size_bytes)
        LOG.info("the map of %s grew to %d bytes", self.directory, size_bytes)


def _file_bytes(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _translate(error: lmdb.Error) -> Exception:
    if isinstance(error, lmdb.DiskError) or getattr(error, "code", 0) == errno.ENOSPC:
        return exhausted("DISK_FULL", f"no room on the disk of the store: {error}")
    return RuntimeError(f"the store failed: {error}")
