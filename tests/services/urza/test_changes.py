"""The log of changes: bounded, and clear about what is gone."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from esper.services.serving.errors import ServiceError
from esper.services.store.engine import Store
from esper.services.store.opening import Schema
from esper.services.urza.changes import MAX_BATCH_BYTES
from esper.services.urza.changes import MAX_BATCH_CHANGES
from esper.services.urza.changes import TABLES
from esper.services.urza.changes import ChangeLog
from esper.urza.v1 import library_pb2 as pb


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    opened = Store(tmp_path, Schema(TABLES, version=1))
    yield opened
    opened.close()


def append(store: Store, log: ChangeLog, number: int, size_bytes: int = 0) -> None:
    def change(revision: int) -> pb.WatchResponse:
        report = pb.FieldReport(reason="x" * size_bytes)
        return pb.WatchResponse(revision=revision, report=report)

    for _ in range(number):
        store.submit(lambda row: log.append(row, change(log.revision(row) + 1)))
    store.submit(lambda row: None).result(30)


def revisions(log: ChangeLog, start: int) -> list[int]:
    return [change.revision for change in log.read(start)]


def refused(log: ChangeLog, start: int) -> ServiceError:
    with pytest.raises(ServiceError) as caught:
        log.read(start)
    return caught.value


def test_the_oldest_changes_go_and_are_refused(store: Store) -> None:
    log = ChangeLog(store, max_changes=5)
    append(store, log, 12)
    assert revisions(log, 8) == [8, 9, 10, 11, 12]
    assert revisions(log, 11) == [11, 12]
    assert revisions(log, 13) == []
    error = refused(log, 7)
    assert (error.code.name, error.reason) == ("OUT_OF_RANGE", "COMPACTED")
    assert error.metadata == {"first_revision": "8", "revision": "12"}
    error = refused(log, 14)
    assert (error.code.name, error.reason) == ("OUT_OF_RANGE", "REVISION")


def test_changes_are_bounded_in_bytes_and_the_newest_stays(store: Store) -> None:
    log = ChangeLog(store, max_bytes=10_000)
    append(store, log, 10, 3000)
    assert revisions(log, 8) == [8, 9, 10]
    assert refused(log, 7).reason == "COMPACTED"
    append(store, log, 1, 50_000)
    assert revisions(log, 11) == [11]
    assert refused(log, 10).reason == "COMPACTED"
    append(store, log, 3, 100)  # the large one has gone, so all of these fit
    assert revisions(log, 12) == [12, 13, 14]


def test_an_empty_log_can_be_followed_from_its_start(store: Store) -> None:
    log = ChangeLog(store)
    assert revisions(log, 1) == []
    assert refused(log, 0).reason == "COMPACTED"
    assert refused(log, 2).reason == "REVISION"


def test_a_read_is_bounded(store: Store) -> None:
    log = ChangeLog(store)
    append(store, log, MAX_BATCH_CHANGES + 10)
    assert len(log.read(1)) == MAX_BATCH_CHANGES
    append(store, log, 4, MAX_BATCH_BYTES // 2)
    assert len(log.read(MAX_BATCH_CHANGES + 11)) == 2


def test_revisions_go_on_after_a_restart(tmp_path: Path) -> None:
    for expected in ([1, 2], [1, 2, 3, 4]):
        store = Store(tmp_path, Schema(TABLES, version=1))
        log = ChangeLog(store)
        append(store, log, 2)
        assert revisions(log, 1) == expected
        store.close()
