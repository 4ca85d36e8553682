import subprocess
import sys
import threading
import time
from collections.abc import Callable
from collections.abc import Iterator
from concurrent.futures import CancelledError
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from prometheus_client import REGISTRY

from esper.services.store.claim import DirectoryClaim
from esper.services.store.claim import DirectoryError
from esper.services.store.engine import Store
from esper.services.store.engine import StoreClosedError
from esper.services.store.opening import Row
from esper.services.store.opening import Schema


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    opened = Store(tmp_path / "s", Schema(("things",), 1))
    yield opened
    opened.close()


def put(store: Store, key: bytes, value: bytes) -> Callable[[Row], bytes]:
    def work(row: Row) -> bytes:
        row.put(key, value, db=store.table("things"))
        return key

    return work


def get(store: Store, key: bytes) -> bytes | None:
    with store.reading() as row:
        return row.get(key, db=store.table("things"))


def test_what_is_acknowledged_can_be_read_and_outlives_the_store(tmp_path: Path) -> None:
    store = Store(tmp_path, Schema(("things",), 1))
    assert store.submit(put(store, b"a", b"1")).result(10) == b"a"
    assert get(store, b"a") == b"1"
    store.close()
    again = Store(tmp_path, Schema(("things",), 1))
    assert get(again, b"a") == b"1"
    again.close()


def test_one_failure_in_a_group_undoes_only_itself(store: Store) -> None:
    blocked = threading.Event()

    def wait(row: Row) -> None:
        blocked.wait(10)

    def fail(row: Row) -> None:
        row.put(b"half", b"done", db=store.table("things"))
        raise KeyError("no")

    first = store.submit(wait)  # holds the writer up, so that the others form one group
    before = store.submit(put(store, b"before", b"1"))
    failing = store.submit(fail)
    after = store.submit(put(store, b"after", b"2"))
    blocked.set()
    first.result(10)
    assert before.result(10) == b"before"
    assert after.result(10) == b"after"
    with pytest.raises(KeyError):
        failing.result(10)
    assert get(store, b"half") is None
    assert (get(store, b"before"), get(store, b"after")) == (b"1", b"2")


def test_later_writes_of_a_group_see_earlier_ones(store: Store) -> None:
    def add(row: Row) -> int:
        value = int(row.get(b"n", db=store.table("things")) or b"0") + 1
        row.put(b"n", str(value).encode(), db=store.table("things"))
        return value

    futures = [store.submit(add) for _ in range(500)]
    assert [future.result(20) for future in futures] == list(range(1, 501))


def test_a_full_map_grows_and_no_write_is_lost(tmp_path: Path) -> None:
    store = Store(tmp_path, Schema(("things",), 1), initial_map_bytes=256 << 10)
    stop = threading.Event()

    def read() -> int:
        count = 0
        while not stop.is_set():
            with store.reading() as row:
                count += row.stat(store.table("things"))["entries"] >= 0
            time.sleep(0.0005)  # a spinning reader would keep the interpreter to itself
        return count

    with ThreadPoolExecutor(10) as threads:
        readers = [threads.submit(read) for _ in range(2)]

        def write(number: int) -> bytes:
            key = f"{number:04}".encode()
            return store.submit(put(store, key, key * 4096)).result(30)

        assert len(list(threads.map(write, range(600)))) == 600
        stop.set()
        assert all(reader.result(10) > 0 for reader in readers)
    for number in range(600):
        key = f"{number:04}".encode()
        assert get(store, key) == key * 4096
    grown = REGISTRY.get_sample_value("esper_store_growths_total", {"store": tmp_path.name})
    assert grown is not None and grown >= 3
    store.close()
    schema = Schema(("things",), 1)
    again = Store(tmp_path, schema, initial_map_bytes=256 << 10)  # smaller than the file
    assert get(again, b"0599") == b"0599" * 4096
    again.close()


def test_writes_are_grouped(store: Store) -> None:
    """64 writers must not pay for 64 syncs: their commits take far fewer transactions."""

    def transaction(row: Row) -> int:
        row.put(b"x", str(time.perf_counter()).encode(), db=store.table("things"))
        return row.id()

    blocked = threading.Event()
    store.submit(lambda row: blocked.wait(10))
    futures = [store.submit(transaction) for _ in range(64)]
    blocked.set()
    assert len({future.result(10) for future in futures}) == 1


def test_a_cancelled_write_is_not_done(store: Store) -> None:
    blocked = threading.Event()
    store.submit(lambda row: blocked.wait(10))
    doomed = store.submit(put(store, b"doomed", b""))
    assert doomed.cancel()
    blocked.set()
    store.submit(lambda row: None).result(10)
    assert get(store, b"doomed") is None
    with pytest.raises(CancelledError):
        doomed.result()


def test_closing_finishes_what_was_submitted(tmp_path: Path) -> None:
    store = Store(tmp_path, Schema(("things",), 1))
    futures = [store.submit(put(store, str(n).encode(), b"")) for n in range(100)]
    store.close()
    assert all(future.done() and future.exception() is None for future in futures)
    with pytest.raises(StoreClosedError):
        store.submit(lambda row: None)
    store.close()


def test_another_schema_version_is_refused(tmp_path: Path) -> None:
    Store(tmp_path, Schema(("things",), 1)).close()
    with pytest.raises(DirectoryError, match="schema version 1 and this release reads version 2"):
        Store(tmp_path, Schema(("things",), 2))
    Store(tmp_path, Schema(("things",), 1)).close()  # the refusal let go of the directory


def test_a_directory_has_one_holder_and_no_stale_lock(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; "
        "from esper.services.store.claim import DirectoryClaim; "
        f"claim = DirectoryClaim(Path({str(tmp_path)!r})); print('held', flush=True); "
        "sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(DirectoryError, match=rf"another server \(process {holder.pid}\)"):
            DirectoryClaim(tmp_path)
        holder.kill()
        holder.wait()
    with DirectoryClaim(tmp_path):
        assert (tmp_path / "lock").exists()


WRITER = """
import sys
from pathlib import Path
from esper.services.store.engine import Store
from esper.services.store.opening import Schema
store = Store(Path(sys.argv[1]), Schema(("things",), 1))
number = 0
while True:
    key = str(number).encode()
    store.submit(lambda row: row.put(key, b"x" * 500, db=store.table("things"))).result()
    print(number, flush=True)
    number += 1
"""


def test_nothing_acknowledged_is_lost_to_kill(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as writer:
        assert writer.stdout is not None
        for line in writer.stdout:
            if int(line) == 300:
                break
        writer.kill()
        acknowledged = [300, *map(int, writer.stdout.read().split())][-1]
    store = Store(tmp_path, Schema(("things",), 1))
    assert all(get(store, str(n).encode()) == b"x" * 500 for n in range(acknowledged + 1))
    store.close()
