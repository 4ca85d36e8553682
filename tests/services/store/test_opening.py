"""A store is opened whole, with the rows that are wanted, or not at all."""

from collections.abc import Callable
from pathlib import Path

import pytest

from esper.services.store.claim import DirectoryError
from esper.services.store.engine import Store
from esper.services.store.opening import Database
from esper.services.store.opening import Row
from esper.services.store.opening import Schema
from esper.services.store.opening import data_file

NAMES = Schema(("names",), 1)


def put(store: Store, key: bytes, value: bytes) -> None:
    store.submit(lambda row: row.put(key, value, db=store.table("names"))).result(10)


def content(store: Store, table: str) -> dict[bytes, bytes]:
    with store.reading() as row:
        return dict(row.cursor(db=store.table(table)))


def filled(folder: Path, num_rows: int = 300) -> None:
    store = Store(folder, NAMES)

    def work(row: Row) -> None:
        for number in range(num_rows):
            row.put(f"{number:04}".encode(), b"x" * 500, db=store.table("names"))

    store.submit(work).result(10)
    store.close()


@pytest.mark.parametrize("left", [100, 4096, 8192, 20_000, -1])
def test_a_truncated_file_is_refused_and_names_the_remedy(tmp_path: Path, left: int) -> None:
    filled(tmp_path)
    path = data_file(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole[:left])
    with pytest.raises(DirectoryError) as caught:
        Store(tmp_path, NAMES)
    assert str(tmp_path) in str(caught.value)
    path.write_bytes(whole)
    store = Store(tmp_path, NAMES)  # the refusal changed nothing and let go of the directory
    assert len(content(store, "names")) == 300
    store.close()


@pytest.mark.parametrize("how", ["empty", "missing"])
def test_lost_rows_are_not_mistaken_for_a_new_store(tmp_path: Path, how: str) -> None:
    filled(tmp_path, num_rows=1)
    path = data_file(tmp_path)
    if how == "empty":
        path.write_bytes(b"")
    else:
        path.unlink()
    with pytest.raises(DirectoryError, match=f"is {how}; restore it from a backup"):
        Store(tmp_path, NAMES)


def test_rows_that_are_no_rows_are_refused(tmp_path: Path) -> None:
    filled(tmp_path, num_rows=1)
    data_file(tmp_path).write_bytes(b"spark" * 10_000)
    with pytest.raises(DirectoryError, match="cannot open the store"):
        Store(tmp_path, NAMES)


def by_length(row: Row, table: Callable[[str], Database]) -> None:
    for key, _ in row.cursor(db=table("names")):
        row.put(bytes([len(key)]) + key, b"", db=table("lengths"))


def upper(row: Row, table: Callable[[str], Database]) -> None:
    for key, value in list(row.cursor(db=table("names"))):
        row.put(key, value.upper() * 1000, db=table("names"))


def test_old_rows_are_migrated_step_by_step_and_once(tmp_path: Path) -> None:
    old = Store(tmp_path, NAMES)
    for key in (b"urza", b"oona"):
        put(old, key, b"x")
    old.close()
    new = Schema(("names", "lengths"), 3, {1: by_length, 2: upper})
    for _ in range(2):
        store = Store(tmp_path, new)
        assert content(store, "lengths") == {b"\x04oona": b"", b"\x04urza": b""}
        assert content(store, "names") == {b"oona": b"X" * 1000, b"urza": b"X" * 1000}
        store.close()
    with pytest.raises(DirectoryError, match="version 3 and this release reads version 1"):
        Store(tmp_path, NAMES)


def test_a_migration_that_fails_leaves_the_old_rows(tmp_path: Path) -> None:
    filled(tmp_path, num_rows=3)

    def fail(row: Row, table: Callable[[str], Database]) -> None:
        upper(row, table)
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        Store(tmp_path, Schema(("names", "lengths"), 3, {1: by_length, 2: fail}))
    store = Store(tmp_path, NAMES)
    assert set(content(store, "names").values()) == {b"x" * 500}
    store.close()


def test_a_migration_may_outgrow_the_map(tmp_path: Path) -> None:
    filled(tmp_path)
    store = Store(tmp_path, Schema(("names",), 2, {1: upper}), initial_map_bytes=1 << 18)
    assert set(content(store, "names").values()) == {b"X" * 500_000}
    put(store, b"more", b"")
    store.close()


def test_a_release_without_a_way_from_old_rows_says_so(tmp_path: Path) -> None:
    filled(tmp_path, num_rows=1)
    with pytest.raises(DirectoryError, match="version 1 and this release reads version 3"):
        Store(tmp_path, Schema(("names",), 3, {2: upper}))
