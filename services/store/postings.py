"""A secondary index: lists of records by attribute, each in several orders, and what they share.

For every attribute of a record (a state, a tag, a width) there is a list of the records that have
it, and it is there once for each order that the records can be asked for in. A query walks several
lists of one order at a time: it goes to the first position that none of them lies before, and from
there on until all agree, so that it reads little more than the shortest list, and nothing of the
rest of the store. A condition may be the union of several lists.

A row's key is list, figure and record key; its value is empty. The figure puts the records in
order, and is of the same length throughout an order.
"""

from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Sequence
from dataclasses import dataclass

import lmdb

from esper.services.store.engine import Store
from esper.services.store.opening import Row

MAX_SEEKS = 4096
"""Rows that one search reads at most; it then stops short of the end of its lists."""


@dataclass(frozen=True)
class Place:
    """Where a record stands in one order.

    Attributes:
        order: Names the order; all orders of an index have names of one length.
        figure: What orders the records, as bytes that compare as it does.
    """

    order: bytes
    figure: bytes = b""


def entries(key: bytes, attributes: Iterable[bytes], places: Iterable[Place]) -> set[bytes]:
    """Returns the rows of one record.

    Args:
        key: The record's key; all keys have one length.
        attributes: Names of its lists, none of which may begin with another of the index.
        places: Where it stands in the orders in which it is to be found.
    """
    return {
        place.order + attribute + place.figure + key for attribute in attributes for place in places
    }


class Postings:
    """The lists of one index.

    Args:
        store: Where it lives.
        table: Name of its table, which is this object's alone.
    """

    def __init__(self, store: Store, table: str) -> None:
        self._table = store.table(table)

    def replace(self, row: Row, before: set[bytes], after: set[bytes]) -> None:
        """Puts the rows of a changed record in place of its former ones."""
        for key in before - after:
            row.delete(key, db=self._table)
        for key in after - before:
            row.put(key, b"", db=self._table)

    def has(self, row: Row, entry: bytes) -> bool:
        """Returns whether a row is there."""
        return row.get(entry, db=self._table) is not None

    def num_rows(self, row: Row) -> int:
        """Returns the number of rows of all records."""
        return row.stat(self._table)["entries"]

    def drop(self, row: Row, key: bytes) -> None:
        """Removes all rows of a record that is damaged; reads the whole index."""
        entries = [entry for entry, _ in row.cursor(db=self._table) if entry.endswith(key)]
        for entry in entries:
            row.delete(entry, db=self._table)

    def search(
        self, row: Row, order: bytes, conditions: Sequence[Sequence[bytes]], start: bytes
    ) -> "Search":
        """Returns the records that meet every condition, from `start` on, in an order.

        Args:
            row: The snapshot to read from.
            order: The order's name.
            conditions: At least one; each is met by the records of any of its lists.
            start: Position to begin at: figure and key; empty for the first.
        """
        budget = Budget(MAX_SEEKS)
        unions = [
            _Union([_List(row.cursor(db=self._table), order + name, budget) for name in names])
            for names in conditions
        ]
        return Search(unions, start, budget)


class Search:
    """What one search finds: positions, that is figure and record key, in order.

    Attributes:
        next_start: Where a later search goes on; None once the lists have ended.
        budget: What it may still read.
    """

    def __init__(self, unions: "list[_Union]", start: bytes, budget: "Budget") -> None:
        self._unions = unions
        self.budget = budget
        self.next_start: bytes | None = start

    def __iter__(self) -> Iterator[bytes]:
        while self.next_start is not None and self.budget.left > 0:
            wanted = self.next_start
            agreed = 0
            while agreed < len(self._unions):
                for union in self._unions:
                    found = union.seek(wanted)
                    if found is None:
                        self.next_start = None
                        return
                    agreed = agreed + 1 if found == wanted else 1
                    wanted = found
                    if agreed == len(self._unions):
                        break
                if self.budget.left <= 0 and agreed < len(self._unions):
                    self.next_start = wanted
                    return
            self.next_start = wanted + b"\0"
            yield wanted


class Budget:
    """The number of rows that a search may still read."""

    def __init__(self, left: int) -> None:
        self.left = left


class _List:
    """One list, read forwards."""

    def __init__(self, cursor: "lmdb.Cursor[bytes]", prefix: bytes, budget: Budget) -> None:
        self._cursor = cursor
        self._prefix = prefix
        self._budget = budget
        self.head: bytes | None = b""
        """First position not before the last one sought; None once the list has ended."""

    def seek(self, position: bytes) -> None:
        self._budget.left -= 1
        found = self._cursor.set_range(self._prefix + position)
        key = self._cursor.key() if found else b""
        self.head = key[len(self._prefix) :] if key.startswith(self._prefix) else None


class _Union:
    """Several lists as one."""

    def __init__(self, lists: list[_List]) -> None:
        self._lists = lists

    def seek(self, position: bytes) -> bytes | None:
        """Returns the first position not before `position`; it may never be less than before."""
        for posting in self._lists:
            if not posting.head or posting.head < position:
                posting.seek(position)
        self._lists = [posting for posting in self._lists if posting.head]
        return min((posting.head for posting in self._lists if posting.head), default=None)
