"""The check of a log: every event is read, offsets are counted, and what is derived is compared.

It reads a copy of the rows of one moment; where there is no room for one, the rows themselves,
whose old pages it holds until it is done.
"""

import logging
from collections import Counter
from collections.abc import Generator
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import lmdb
from google.protobuf.message import DecodeError

from esper.common.v1 import check_pb2
from esper.oona.v1 import event_pb2
from esper.services.oona.groups import STATE
from esper.services.oona.topics import QUARANTINE_TABLE
from esper.services.oona.topics import TopicState
from esper.services.oona.topics import event_key
from esper.services.oona.topics import group_prefix
from esper.services.oona.topics import topic_key
from esper.services.serving import metrics
from esper.services.store.copies import copied_rows
from esper.services.store.copies import structure_problems
from esper.services.store.engine import Store
from esper.services.store.opening import Database
from esper.services.store.opening import Row
from esper.services.store.requests import check_requests
from esper.services.store.seals import unseal

LOG = logging.getLogger("esper.oona.check")

_TABLES = ("topics", "events", QUARANTINE_TABLE, "groups", "pending")
_NUMBER_BYTES = 8


class Checker:
    """One check of a log.

    Args:
        store: What is stored.
        quarantine: Whether damaged events are moved aside.
    """

    def __init__(self, store: Store, *, quarantine: bool = False) -> None:
        self._store = store
        self._quarantine = quarantine
        self._damaged: list[tuple[str, bytes, bytes]] = []
        self._summary = event_pb2.CheckLogSummary()

    def __iter__(self) -> Generator[event_pb2.CheckLogResponse, None, None]:
        """Yields what is wrong, and the summary at the end; blocks in between."""
        for finding in self._findings():
            self._summary.num_problems += 1
            yield event_pb2.CheckLogResponse(finding=finding)
        yield event_pb2.CheckLogResponse(summary=self._summary)

    def _findings(self) -> Iterator[check_pb2.Finding]:
        with copied_rows(self._store, compact=False) as folder:
            if folder is None:
                LOG.warning("no room for a copy of the rows: their structure is not checked")
                tables = {name: self._store.table(name) for name in _TABLES}
                with self._store.reading() as row:
                    found = list(self._topics(row, tables))  # the caller is not waited for
                yield from found
            else:
                self._summary.structure_checked = True
                for problem in structure_problems(folder):
                    yield _finding(check_pb2.FINDING_KIND_STRUCTURE, "rows", problem)
                with _copy(folder) as (row, tables):
                    yield from self._topics(row, tables)
        for topic, key, value in self._damaged:
            yield _finding(
                check_pb2.FINDING_KIND_DAMAGED,
                f"topics/{topic}/events/{int.from_bytes(key[-_NUMBER_BYTES:], 'big')}",
                "its bytes are not those that were stored",
                quarantined=self._quarantine and self._put_aside(topic, key, value),
            )
        for problem in check_requests(self._store, "requests"):
            yield _finding(check_pb2.FINDING_KIND_INDEX, "requests", problem)

    def _topics(self, row: Row, tables: dict[str, Database]) -> Iterator[check_pb2.Finding]:
        """Yields what is wrong but for damaged events, which it notes."""
        topics = {
            key.decode(): TopicState.decode(value) for key, value in row.cursor(db=tables["topics"])
        }
        for topic, state in topics.items():
            self._summary.num_topics += 1
            yield from self._events(row, tables, topic, state)
            yield from self._groups(row, tables, topic, state)
        yield from _strays(row, tables, set(topics))

    def _events(
        self, row: Row, tables: dict[str, Database], topic: str, state: TopicState
    ) -> Iterator[check_pb2.Finding]:
        name = f"topics/{topic}"
        prefix = event_key(topic, 0)[:-_NUMBER_BYTES]
        expected, size_bytes, complete = state.first, 0, True
        for key, value in _rows_under(row, tables["events"], prefix):
            offset = int.from_bytes(key[len(prefix) :], "big")
            self._summary.num_events += 1
            size_bytes += len(value)
            if not state.first <= offset < state.following:
                detail = f"it is stored, and the topic keeps {state.first} to {state.following}"
                yield _finding(check_pb2.FINDING_KIND_INDEX, f"{name}/events/{offset}", detail)
                continue
            for finding in self._gap(row, tables, topic, expected, offset):
                complete = False
                yield finding
            expected = offset + 1
            if not _is_sound(key, value, topic, offset):
                self._damaged.append((topic, key, value))
        for finding in self._gap(row, tables, topic, expected, state.following):
            complete = False
            yield finding
        self._summary.event_bytes += size_bytes
        if complete and size_bytes != state.size_bytes:
            detail = f"its events have {size_bytes} bytes and it counts {state.size_bytes}"
            yield _finding(check_pb2.FINDING_KIND_INDEX, name, detail)

    def _gap(
        self, row: Row, tables: dict[str, Database], topic: str, first: int, following: int
    ) -> Iterator[check_pb2.Finding]:
        """Yields a finding unless all the events from `first` on are in quarantine."""
        aside = tables[QUARANTINE_TABLE]
        if any(row.get(event_key(topic, n), db=aside) is None for n in range(first, following)):
            detail = f"events between {first} and {following - 1} are missing"
            yield _finding(check_pb2.FINDING_KIND_DAMAGED, f"topics/{topic}", detail)

    def _groups(
        self, row: Row, tables: dict[str, Database], topic: str, state: TopicState
    ) -> Iterator[check_pb2.Finding]:
        prefix = group_prefix(topic)
        under_way: Counter[bytes] = Counter()
        last: dict[bytes, int] = {}
        for key, _ in _rows_under(row, tables["pending"], prefix):
            group = key[: -1 - _NUMBER_BYTES]
            under_way[group] += 1
            last[group] = int.from_bytes(key[-_NUMBER_BYTES:], "big")
        for key, value in _rows_under(row, tables["groups"], prefix):
            self._summary.num_groups += 1
            name = _group_name(topic, key)
            following, num_pending = STATE.unpack(value)
            if following > state.following:
                detail = f"its next event is {following}, and the topic's {state.following}"
                yield _finding(check_pb2.FINDING_KIND_INDEX, name, detail)
            if last.get(key, -1) >= following:
                detail = f"event {last[key]} is under way, and its next one is {following}"
                yield _finding(check_pb2.FINDING_KIND_INDEX, name, detail)
            if under_way[key] != num_pending:
                detail = f"{under_way[key]} events are under way and it counts {num_pending}"
                yield _finding(check_pb2.FINDING_KIND_INDEX, name, detail)
            del under_way[key]
        for key in under_way:
            detail = "it has events under way and is no group"
            yield _finding(check_pb2.FINDING_KIND_DANGLING, _group_name(topic, key), detail)

    def _put_aside(self, topic: str, key: bytes, value: bytes) -> bool:
        """Puts a damaged event into quarantine; returns False where it has gone since."""
        events, topics = self._store.table("events"), self._store.table("topics")

        def work(row: Row) -> bool:
            if row.get(key, db=events) != value:
                return False
            state = TopicState.decode(row.get(topic_key(topic), db=topics))
            state.size_bytes -= len(value)
            row.delete(key, db=events)
            row.put(key, value, db=self._store.table(QUARANTINE_TABLE))
            row.put(topic_key(topic), state.encode(), db=topics)
            return True

        aside = self._store.submit(work, frees=True).result()
        metrics.QUARANTINED.labels("event").inc(aside)
        return aside


@contextmanager
def _copy(folder: Path) -> Iterator[tuple[Row, dict[str, Database]]]:
    """Gives a transaction on the rows in a folder, and their tables."""
    with lmdb.open(
        str(folder), readonly=True, lock=False, max_dbs=len(_TABLES), create=False
    ) as environment:
        tables = {name: environment.open_db(name.encode(), create=False) for name in _TABLES}
        with environment.begin() as row:
            yield row, tables


def _is_sound(key: bytes, value: bytes, topic: str, offset: int) -> bool:
    content = unseal(key, value)
    if content is None:
        return False
    try:
        event = event_pb2.Event.FromString(content)
    except DecodeError:
        return False
    return (event.topic, event.offset) == (topic, offset)


def _strays(row: Row, tables: dict[str, Database], topics: set[str]) -> Iterator[check_pb2.Finding]:
    """Yields the topics that have rows and are none."""
    for table in ("events", QUARANTINE_TABLE, "groups", "pending"):
        cursor = row.cursor(db=tables[table])
        going_on = cursor.first()
        while going_on:
            topic = cursor.key().partition(b"\0")[0]
            name = topic.decode("utf-8", "replace")
            if name not in topics:
                detail = f"it has rows among the {table} and is no topic"
                yield _finding(check_pb2.FINDING_KIND_DANGLING, f"topics/{name}", detail)
            going_on = cursor.set_range(topic + b"\1")


def _group_name(topic: str, key: bytes) -> str:
    group = key[len(group_prefix(topic)) :].decode("utf-8", "replace")
    return f"topics/{topic}/groups/{group}"


def _rows_under(row: Row, table: Database, prefix: bytes) -> Iterator[tuple[bytes, bytes]]:
    cursor = row.cursor(db=table)
    going_on = cursor.set_range(prefix)
    while going_on and cursor.key().startswith(prefix):
        yield cursor.item()
        going_on = cursor.next()


def _finding(
    kind: check_pb2.FindingKind, name: str, detail: str, *, quarantined: bool = False
) -> check_pb2.Finding:
    return check_pb2.Finding(kind=kind, name=name, detail=detail, quarantined=quarantined)
