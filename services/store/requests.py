"""Makes retries harmless: remembers what a request id was answered with."""

import hashlib
from collections.abc import Iterator

from google.protobuf.message import Message

from esper.services.serving.errors import FieldViolation
from esper.services.serving.errors import invalid
from esper.services.store.engine import Store
from esper.services.store.opening import Row

MAX_REQUEST_ID_CHARS = 64
CHECKED_TOGETHER = 1000
"""Rows that the check looks at in one snapshot."""
_COUNTER_BYTES = 8
_DIGEST_BYTES = 32
_ORDER_PREFIX = b"o"
_ANSWER_PREFIX = b"a"


def check_request_id(request_id: str) -> list[FieldViolation]:
    """Returns what is wrong with a request id; an empty one is none."""
    legal = request_id.isascii() and request_id.isprintable() and " " not in request_id
    if len(request_id) <= MAX_REQUEST_ID_CHARS and legal:
        return []
    rule = f"must be at most {MAX_REQUEST_ID_CHARS} printable ASCII characters without spaces"
    return [FieldViolation("request_id", request_id, rule)]


def fingerprint(scope: str, request: Message) -> bytes:
    """Returns 32 bytes that tell whether two requests ask for the same thing.

    Args:
        scope: Name of the method.
        request: The request; its request_id may stay in.
    """
    content = request.SerializeToString(deterministic=True)
    return hashlib.sha256(scope.encode() + b"\0" + content).digest()


class RequestTable:
    """Answers by request id, the latest `capacity` of them.

    Bounded by number, not by time, so that a clock that jumps forgets nothing.

    Args:
        store: Where it lives.
        table: Name of its table in the store.
        capacity: Number of answers kept.
    """

    def __init__(self, store: Store, table: str, capacity: int) -> None:
        self._table = store.table(table)
        self._capacity = capacity

    def recall(self, row: Row, scope: str, request_id: str, asked: bytes) -> bytes | None:
        """Returns the answer given to this request before; None if it is new.

        Raises:
            ServiceError: INVALID_ARGUMENT where the id belongs to a different request.
        """
        if not request_id:
            return None
        found = row.get(self._key(scope, request_id), db=self._table)
        if found is None:
            return None
        if found[:_DIGEST_BYTES] != asked:
            raise invalid("request_id", request_id, "has been used for a different request")
        return found[_DIGEST_BYTES:]

    def remember(self, row: Row, scope: str, request_id: str, asked: bytes, answer: bytes) -> None:
        """Keeps an answer, in the transaction that did the work; forgets the oldest if need be."""
        if not request_id:
            return
        key = self._key(scope, request_id)
        row.put(key, asked + answer, db=self._table)
        cursor = row.cursor(db=self._table)
        newest = 0
        if cursor.last() and cursor.key().startswith(_ORDER_PREFIX):
            newest = int.from_bytes(cursor.key()[1:], "big") + 1
        row.put(_ORDER_PREFIX + newest.to_bytes(_COUNTER_BYTES, "big"), key, db=self._table)
        # Each answer has two rows: itself and its place in the order.
        while row.stat(self._table)["entries"] > 2 * self._capacity:
            cursor = row.cursor(db=self._table)
            cursor.set_range(_ORDER_PREFIX)
            place, oldest = cursor.item()
            row.delete(place, db=self._table)
            row.delete(oldest, db=self._table)

    @staticmethod
    def _key(scope: str, request_id: str) -> bytes:
        return _ANSWER_PREFIX + hashlib.sha256(f"{scope}\0{request_id}".encode()).digest()


def check_requests(store: Store, table: str) -> Iterator[str]:
    """Yields what is wrong with a table of requests, in sentences."""
    handle = store.table(table)
    position = _ORDER_PREFIX
    while position:
        lacking: list[bytes] = []
        with store.reading() as row:
            cursor = row.cursor(db=handle)
            going_on = cursor.set_range(position)
            for _ in range(CHECKED_TOGETHER):
                if not going_on:
                    break
                if row.get(cursor.value(), db=handle) is None:
                    lacking.append(cursor.key())
                going_on = cursor.next()
            position = cursor.key() if going_on else b""
        for place in lacking:
            yield f"place {int.from_bytes(place[1:], 'big')} of the order has no answer"
    with store.reading() as row:
        num_rows = row.stat(handle)["entries"]
        cursor = row.cursor(db=handle)
        has_order = cursor.set_range(_ORDER_PREFIX)
        first = int.from_bytes(cursor.key()[1:], "big") if has_order else 0
        has_order = has_order and cursor.last()
        last = int.from_bytes(cursor.key()[1:], "big") if has_order else -1
    if num_rows != 2 * (last - first + 1):
        yield f"{num_rows} rows are not two for each of the places {first} to {last}"
