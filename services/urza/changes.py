"""The library's changes by revision: what `Watch` reads, bounded in number and in bytes."""

from collections.abc import Iterator

from esper.services.serving.errors import out_of_range
from esper.services.store.engine import Store
from esper.services.store.opening import Row
from esper.urza.v1 import library_pb2 as pb

TABLES = ("changes", "counters")
MAX_CHANGES = 100_000
MAX_BYTES = 256 << 20
MAX_BATCH_CHANGES = 256
MAX_BATCH_BYTES = 1 << 20
CHECKED_TOGETHER = 1000
"""Changes that the check looks at in one snapshot."""

_REVISION = b"revision"
_SIZE = b"change_bytes"
_NUMBER_BYTES = 8


class ChangeLog:
    """The latest changes of one library, and the revision that numbers them.

    Args:
        store: Holds `TABLES`.
        max_changes: Number of changes kept.
        max_bytes: Size of the changes kept; the newest is kept whatever its size.
    """

    def __init__(
        self, store: Store, max_changes: int = MAX_CHANGES, max_bytes: int = MAX_BYTES
    ) -> None:
        self._store = store
        self._changes = store.table("changes")
        self._counters = store.table("counters")
        self._max_changes = max_changes
        self._max_bytes = max_bytes

    def revision(self, row: Row) -> int:
        """Returns the revision of the last change; 0 before the first."""
        return self._counter(row, _REVISION)

    def append(self, row: Row, change: pb.WatchResponse) -> None:
        """Stores a change under the next revision, and drops the oldest where there are too many.

        Args:
            row: A write transaction.
            change: Has the revision that is next: `revision` + 1.
        """
        content = change.SerializeToString()
        size_bytes = self._counter(row, _SIZE) + len(content)
        row.put(_key(change.revision), content, db=self._changes)
        kept = row.stat(self._changes)["entries"]
        cursor = row.cursor(db=self._changes)
        while kept > 1 and (kept > self._max_changes or size_bytes > self._max_bytes):
            cursor.first()
            size_bytes -= len(cursor.value())
            cursor.delete()
            kept -= 1
        self._set_counter(row, _REVISION, change.revision)
        self._set_counter(row, _SIZE, size_bytes)

    def read(self, start: int) -> list[pb.WatchResponse]:
        """Returns the next changes from the revision `start` on, a bounded batch; perhaps none.

        Raises:
            ServiceError: OUT_OF_RANGE where `start` is no longer kept, or beyond the next revision.
        """
        with self._store.reading() as row:
            cursor = row.cursor(db=self._changes)
            last = self.revision(row)
            first = int.from_bytes(cursor.key(), "big") if cursor.first() else last + 1
            facts = {"first_revision": str(first), "revision": str(last)}
            if start < first:
                raise out_of_range(
                    "COMPACTED", f"revision {start} is gone; the first kept is {first}", **facts
                )
            if start > last + 1:
                raise out_of_range(
                    "REVISION", f"the library is at revision {last}, so {start} is to come", **facts
                )
            rows: list[bytes] = []
            size_bytes = 0
            going_on = cursor.set_range(_key(start))
            while going_on and len(rows) < MAX_BATCH_CHANGES and size_bytes < MAX_BATCH_BYTES:
                rows.append(cursor.value())
                size_bytes += len(rows[-1])
                going_on = cursor.next()
        return [pb.WatchResponse.FromString(content) for content in rows]

    def check(self) -> Iterator[str]:
        """Yields what is wrong with the numbers of the changes, in sentences."""
        expected = 0
        going_on = True
        while going_on:
            with self._store.reading() as row:
                cursor = row.cursor(db=self._changes)
                if not cursor.first():
                    return
                # The oldest may have been dropped since the last snapshot.
                expected = max(expected, int.from_bytes(cursor.key(), "big"))
                going_on = cursor.set_range(_key(expected))
                for _ in range(CHECKED_TOGETHER):
                    if not going_on:
                        break
                    found = int.from_bytes(cursor.key(), "big")
                    if found != expected:
                        yield f"revisions {expected} to {found - 1} are missing"
                    expected = found + 1
                    going_on = cursor.next()
                last = self.revision(row)
        if expected != last + 1:
            yield f"the last change is {expected - 1}, and the library is at revision {last}"

    def _counter(self, row: Row, name: bytes) -> int:
        return int.from_bytes(row.get(name, db=self._counters) or b"", "big")

    def _set_counter(self, row: Row, name: bytes, value: int) -> None:
        row.put(name, value.to_bytes(_NUMBER_BYTES, "big"), db=self._counters)


def _key(revision: int) -> bytes:
    return revision.to_bytes(_NUMBER_BYTES, "big")
