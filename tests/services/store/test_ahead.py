"""Rows are in memory soon after a store was opened, as far as there is room for them."""

import contextlib
import errno
import os
import time
from pathlib import Path

import pytest
from prometheus_client import REGISTRY

from esper.services.store.ahead import LEAST_BYTES
from esper.services.store.ahead import PAGE_BYTES
from esper.services.store.ahead import STEP_BYTES
from esper.services.store.ahead import ReadAhead
from esper.services.store.ahead import available_bytes
from esper.services.store.engine import Store
from esper.services.store.opening import Row
from esper.services.store.opening import Schema
from esper.services.store.opening import data_file

DEADLINE_S = 120.0


def drop_from_memory(path: Path) -> None:
    """Takes a file out of the page cache, where it is on a disk."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(handle)


def pages_in_memory(path: Path) -> float:
    """Returns the share of a file's pages that a read need not wait for."""
    there = 0
    starts = range(0, path.stat().st_size, PAGE_BYTES)
    with path.open("rb", buffering=0) as file:
        for start in starts:
            try:
                there += os.preadv(file.fileno(), [bytearray(1)], start, os.RWF_NOWAIT)
            except BlockingIOError:
                continue
            except OSError as error:
                if error.errno == errno.EOPNOTSUPP:
                    pytest.skip("the filesystem does not tell")
                raise
    return there / len(starts)


def read_ahead(name: str) -> float | None:
    return REGISTRY.get_sample_value("esper_store_read_ahead_bytes", {"store": name})


def wait_for(name: str, num_bytes: int) -> None:
    deadline_s = time.monotonic() + DEADLINE_S
    while read_ahead(name) != num_bytes:
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


def test_the_rows_of_a_cold_store_come_without_being_asked_for(tmp_path: Path) -> None:
    directory = tmp_path / "cold"
    schema = Schema(("names",), 1)
    with contextlib.closing(Store(directory, schema)) as store:

        def work(row: Row) -> None:
            for number in range(2 * LEAST_BYTES // 4000):
                row.put(f"{number:06}".encode(), os.urandom(4000), db=store.table("names"))

        store.submit(work).result(DEADLINE_S)
    path = data_file(directory)
    size_bytes = path.stat().st_size
    assert size_bytes > 2 * LEAST_BYTES
    drop_from_memory(path)
    with contextlib.closing(Store(directory, schema)):
        wait_for("cold", size_bytes)
        assert pages_in_memory(path) > 0.9


def test_no_more_is_read_than_there_is_room_for(tmp_path: Path) -> None:
    path = tmp_path / "rows"
    path.write_bytes(bytes(2 * LEAST_BYTES + 5))
    for most_bytes in (0, STEP_BYTES + 1, LEAST_BYTES):
        with contextlib.closing(ReadAhead(path, "bounded", most_bytes)):
            wait_for("bounded", most_bytes)
    assert available_bytes() > 0


def test_closing_does_not_wait_for_all_of_it(tmp_path: Path) -> None:
    path = tmp_path / "rows"
    with path.open("wb") as file:
        file.truncate(1 << 40)  # a hole: would take minutes
    ReadAhead(path, "endless", 1 << 40).close()
    assert (read_ahead("endless") or 0) < 1 << 40
