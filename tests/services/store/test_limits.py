"""A store at its limits: what does not fit is refused, what was acknowledged stays."""

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from collections.abc import Iterator
from pathlib import Path

import grpc
import lmdb
import pytest

from esper.services.serving.errors import ServiceError
from esper.services.store.engine import Store
from esper.services.store.limits import StoreLimits
from esper.services.store.opening import Row
from esper.services.store.opening import Schema

THINGS = Schema(("things",), 1)
VALUE = os.urandom(4000)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a file system is not allowed here")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def put(store: Store, key: bytes, value: bytes = VALUE) -> Callable[[Row], None]:
    def work(row: Row) -> None:
        row.put(key, value, db=store.table("things"))

    return work


def fill(store: Store, limit: int = 10_000) -> tuple[list[bytes], ServiceError]:
    """Writes until refused; returns what was acknowledged, and the refusal."""
    done: list[bytes] = []
    for number in range(limit):
        key = f"{number:05}".encode()
        try:
            store.submit(put(store, key)).result(10)
        except ServiceError as error:
            return done, error
        done.append(key)
    raise AssertionError("nothing was refused")


def all_there(store: Store, keys: list[bytes]) -> bool:
    with store.reading() as row:
        return all(row.get(key, db=store.table("things")) == VALUE for key in keys)


def delete(store: Store, keys: list[bytes]) -> Callable[[Row], None]:
    def work(row: Row) -> None:
        for key in keys:
            row.delete(key, db=store.table("things"))

    return work


@pytest.mark.parametrize("keep_free", [0, 2 << 20])
def test_a_full_disk_refuses_writes_and_recovers(small_disk: Path, keep_free: int) -> None:
    """Without room kept free the disk's own error comes; with it, the store's."""
    store = Store(small_disk, THINGS, StoreLimits(keep_free_bytes=keep_free))
    acknowledged, refusal = fill(store)
    assert acknowledged
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "DISK_FULL")
    assert refusal.retry_after_s is not None
    assert all_there(store, acknowledged)
    store.close()
    store = Store(small_disk, THINGS, StoreLimits(keep_free_bytes=keep_free))
    assert all_there(store, acknowledged)
    assert fill(store)[1].reason == "DISK_FULL"
    if keep_free:
        # What makes room is done all the same.
        store.submit(delete(store, acknowledged[:500]), frees=True).result(10)
        assert all_there(store, acknowledged[500:])
    store.close()


def test_a_disk_that_has_room_again_is_written_again(small_disk: Path) -> None:
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(4 << 20))
    store = Store(small_disk, THINGS, StoreLimits(keep_free_bytes=1 << 20))
    acknowledged, _ = fill(store)
    ballast.unlink()
    store.submit(put(store, b"more")).result(10)
    assert all_there(store, [*acknowledged, b"more"])
    store.close()


FILLER = """
import resource, sys
from pathlib import Path
from esper.services.serving.errors import ServiceError
from esper.services.store.engine import Store
from esper.services.store.opening import Schema
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
store = Store(Path(sys.argv[1]), Schema(("things",), 1))
number = 0
while True:
    key = f"{number:05}".encode()
    try:
        store.submit(lambda row: row.put(key, b"x" * 500, db=store.table("things"))).result()
    except ServiceError as error:
        print(number, error.code.name, error.reason)
        break
    number += 1
with store.reading() as row:
    print(row.stat(store.table("things"))["entries"])
store.close()
"""


def test_a_file_that_may_not_grow_is_a_full_disk(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-c", FILLER, str(tmp_path)], capture_output=True, text=True, check=True
    )
    number, code, reason, entries = run.stdout.split()
    assert (code, reason) == ("RESOURCE_EXHAUSTED", "DISK_FULL")
    assert number == entries
    store = Store(tmp_path, THINGS)
    with store.reading() as row:
        assert row.stat(store.table("things"))["entries"] == int(number)
    store.submit(put(store, b"more")).result(10)
    store.close()


def test_rows_at_their_limit_refuse_writes_and_take_small_ones_after_deletion(
    tmp_path: Path,
) -> None:
    limits = StoreLimits(max_row_bytes=2 << 20)
    store = Store(tmp_path, THINGS, limits, initial_map_bytes=1 << 20)
    acknowledged, refusal = fill(store)
    assert refusal.reason == "ROWS_FULL"
    assert all_there(store, acknowledged)
    for start in (0, 50):  # the pages that one deletion frees can be had after the next
        keys = acknowledged[start : start + 50]
        store.submit(delete(store, keys), frees=True).result(10)
    store.submit(put(store, b"more")).result(10)
    assert all_there(store, [*acknowledged[100:], b"more"])
    store.close()


def test_a_write_that_cannot_be_does_not_take_its_group_with_it(tmp_path: Path) -> None:
    """A key beyond LMDB's limit and a value beyond the map fail alone, in one group with others."""
    limits = StoreLimits(max_row_bytes=1 << 20)
    store = Store(tmp_path, THINGS, limits, initial_map_bytes=1 << 20)

    def long_key(row: Row) -> None:
        row.put(b"k" * 600, b"", db=store.table("things"))

    blocked = threading.Event()
    store.submit(lambda row: blocked.wait(10))  # so that the others form one group
    before = store.submit(put(store, b"before"))
    bad_key = store.submit(long_key)
    too_large = store.submit(put(store, b"large", bytes(2 << 20)))
    after = store.submit(put(store, b"after"))
    blocked.set()
    before.result(10)
    after.result(10)
    with pytest.raises(ServiceError, match="BAD_VALSIZE"):
        bad_key.result(10)
    with pytest.raises(ServiceError) as caught:
        too_large.result(10)
    assert caught.value.reason == "ROWS_FULL"
    assert all_there(store, [b"before", b"after"])
    store.close()


def test_a_dead_reader_is_cleared_and_holds_no_pages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A foreign reader that is killed within its snapshot must not make the file grow for ever."""
    monkeypatch.setattr("esper.services.store.engine.READER_CHECK_S", 0.0)
    store = Store(tmp_path, THINGS)
    script = (
        f"import lmdb, sys; e = lmdb.open({str(tmp_path / 'rows')!r}, readonly=True); "
        "t = e.begin(); print('reading', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as reader:
        assert reader.stdout is not None
        assert reader.stdout.readline() == "reading\n"
        reader.kill()
        reader.wait()
    environment = store._environment
    assert isinstance(environment, lmdb.Environment)
    pid = str(reader.pid)
    assert pid in environment.readers().split()
    store.submit(put(store, b"a")).result(10)
    store.submit(put(store, b"b")).result(10)
    assert pid not in environment.readers().split()
    store.close()
