"""One collection of the library: its records, the index over them, and the log of their changes."""

import logging
from collections.abc import Callable
from collections.abc import Iterator
from typing import Generic
from typing import TypeVar

from google.protobuf.message import DecodeError

from esper.services.serving import metrics
from esper.services.serving.checks import effective_page_size
from esper.services.serving.errors import ServiceError
from esper.services.serving.errors import data_loss
from esper.services.serving.errors import not_found
from esper.services.store.engine import Store
from esper.services.store.opening import Row
from esper.services.store.paging import MAX_PAGE_BYTES
from esper.services.store.paging import PageTokens
from esper.services.store.postings import Postings
from esper.services.urza.catalog import Conditions
from esper.services.urza.changes import ChangeLog
from esper.services.urza.etags import etag_of
from esper.services.urza.names import key_of
from esper.urza.v1 import library_pb2 as pb

Record = TypeVar("Record", pb.BlueprintRecord, pb.KernelRecord)
Listing = pb.ListBlueprintsRequest | pb.ListKernelsRequest | pb.ListFieldReportsRequest

LOG = logging.getLogger("esper.urza.library")

QUARANTINE_TABLE = "row_quarantine"
"""Damaged records by name."""

_KEY_BYTES = 32


class Records(Generic[Record]):
    """The records of one kind, by digest.

    Args:
        store: Holds the tables `collection` and `index`.
        collection: Name of the table and first part of the records' names.
        index: Name of the table of the index.
        kind: Class of the records.
        entries: Gives the rows of a record in the index.
        change: Gives what a watcher is told of a changed record.
        changes: Numbers the changes.
        tokens: Seals the tokens of pages.
    """

    def __init__(
        self,
        store: Store,
        collection: str,
        index: str,
        kind: type[Record],
        entries: Callable[[Record], set[bytes]],
        change: Callable[[Record], pb.WatchResponse],
        changes: ChangeLog,
        tokens: PageTokens,
    ) -> None:
        self._store = store
        self._collection = collection
        self._table = store.table(collection)
        self._quarantined = store.table(QUARANTINE_TABLE)
        self._index = Postings(store, index)
        self._kind: type[Record] = kind
        self._entries: Callable[[Record], set[bytes]] = entries
        self._change: Callable[[Record], pb.WatchResponse] = change
        self._changes = changes
        self._tokens = tokens

    def find(self, row: Row, name: str) -> Record | None:
        """Returns a record, None where it is not stored.

        Raises:
            ServiceError: DATA_LOSS where it cannot be read.
        """
        value = row.get(key_of("name", name, self._collection), db=self._table)
        if value is None:
            return None
        try:
            return self._kind.FromString(value)
        except DecodeError as error:
            raise _lost(name) from error

    def load(self, row: Row, name: str) -> Record:
        """Returns a record.

        Raises:
            ServiceError: NOT_FOUND; DATA_LOSS where it was damaged.
        """
        record = self.find(row, name)
        if record is None:
            if row.get(name.encode(), db=self._quarantined) is not None:
                raise _lost(name)
            raise not_found(name)
        return record

    def save(self, row: Row, record: Record) -> None:
        """Stores a new or changed record under the next revision of the library."""
        before = self.find(row, record.name)
        record.revision = self._changes.revision(row) + 1
        record.etag = etag_of(record)
        key = key_of("name", record.name, self._collection)
        row.put(key, record.SerializeToString(), db=self._table)
        known = set() if before is None else self._entries(before)
        self._index.replace(row, known, self._entries(record))
        self._changes.append(row, self._change(record))
        row.delete(record.name.encode(), db=self._quarantined)

    def put_aside(self, key: bytes, value: bytes) -> bool:
        """Puts a damaged row into quarantine; returns False where it has been replaced since.

        Reading the record is DATA_LOSS from then on, and it can be stored anew.
        """
        name = f"{self._collection}/{key.hex()}"

        def work(row: Row) -> bool:
            if row.get(key, db=self._table) != value:
                return False
            row.delete(key, db=self._table)
            self._index.drop(row, key)
            row.put(name.encode(), value, db=self._quarantined)
            return True

        aside = self._store.submit(work, frees=True).result()
        metrics.QUARANTINED.labels("record").inc(aside)
        return aside

    def check_index(self) -> Iterator[str]:
        """Yields what is wrong with the index, in sentences."""
        num_expected = 0
        with self._store.reading() as row:
            for _, value in row.cursor(db=self._table):
                try:
                    record = self._kind.FromString(value)
                except DecodeError:
                    continue
                expected = self._entries(record)
                num_expected += len(expected)
                lacking = sum(not self._index.has(row, entry) for entry in expected)
                if lacking:
                    yield f"{record.name} lacks {lacking} of its {len(expected)} rows"
            num_found = self._index.num_rows(row)
        if num_found > num_expected:
            yield f"{num_found - num_expected} rows belong to no record"

    def page(
        self,
        request: Listing,
        order: bytes,
        conditions: Conditions,
        keep: Callable[[Record], bool] = lambda record: True,
    ) -> tuple[list[Record], str]:
        """Returns a page of records and the token of the next, empty at the end.

        Args:
            request: Asks for the page.
            order: Name of the order in the index.
            conditions: The lists of the index that a record must be on.
            keep: Whether a record that is on them is wanted.
        """
        scope = list_scope(request)
        start = self._tokens.decode(scope, request.page_token)
        size = effective_page_size(request.page_size)
        found: list[Record] = []
        size_bytes = 0
        with self._store.reading() as row:
            search = self._index.search(row, order, conditions, start)
            for position in search:
                value = row.get(position[-_KEY_BYTES:], db=self._table)
                try:
                    record = self._kind.FromString(value or b"")
                except DecodeError:
                    LOG.exception("a row of %s cannot be read", self._collection)
                    continue
                if not keep(record):
                    continue
                size_bytes += len(value or b"")
                if found and (len(found) == size or size_bytes > MAX_PAGE_BYTES):
                    return found, self._tokens.encode(scope, position)
                found.append(record)
        if search.next_start is None:
            return found, ""
        return found, self._tokens.encode(scope, search.next_start)


def _lost(name: str) -> ServiceError:
    return data_loss(f"{name} was damaged at rest: store it again", name=name)


def list_scope(request: Listing) -> str:
    """Returns what a page token belongs to: the whole request but the page's size."""
    question = type(request).FromString(request.SerializeToString())
    question.page_size = 0
    question.page_token = ""
    content = question.SerializeToString(deterministic=True)
    return f"{question.DESCRIPTOR.full_name}:{content.hex()}"
