"""Rows that carry a checksum of their own: what a disk has changed is found when it is read."""

import hashlib

from esper.services.store.opening import Database
from esper.services.store.opening import Row

SEAL_BYTES = 8


def seal(key: bytes, content: bytes) -> bytes:
    """Returns a row's value: the content behind a checksum of it and of its place."""
    return _seal(key, content) + content


def unseal(key: bytes, value: bytes | None) -> bytes | None:
    """Returns the content of a row; None where it is damaged, or where there is no row."""
    if value is None:
        return None
    content = value[SEAL_BYTES:]
    return content if value[:SEAL_BYTES] == _seal(key, content) else None


def seal_rows(row: Row, table: Database) -> None:
    """Seals every row of a table, for a migration."""
    cursor = row.cursor(db=table)
    going_on = cursor.first()
    while going_on:
        key, content = cursor.item()
        cursor.put(key, seal(key, content))
        going_on = cursor.next()


def _seal(key: bytes, content: bytes) -> bytes:
    hasher = hashlib.sha256(len(key).to_bytes(4, "big") + key)
    hasher.update(content)
    return hasher.digest()[:SEAL_BYTES]
