"""Pages over the rows of a table, in order of key, while others write.

A token holds the last key seen, so a page begins after it whatever has been written since: a row
that was there all the time comes exactly once.
"""

import base64
import binascii
import hashlib
from collections.abc import Callable
from typing import TypeVar

from google.protobuf.message import Message

from esper.services.serving.errors import invalid
from esper.services.store.engine import Store

T = TypeVar("T", bound=Message)

SCAN_ROWS = 512
MAX_PAGE_BYTES = 3 << 20  # leaves room for the envelope within a message
MAX_TOKEN_CHARS = 1024
_SCOPE_BYTES = 8
_VERSION = b"\x01"


def _scope_digest(scope: str) -> bytes:
    return hashlib.sha256(scope.encode()).digest()[:_SCOPE_BYTES]


def encode_token(scope: str, key: bytes) -> str:
    """Returns the opaque token of the page that begins after `key`."""
    content = _VERSION + _scope_digest(scope) + key
    return base64.urlsafe_b64encode(content).decode().rstrip("=")


def decode_token(scope: str, token: str) -> bytes:
    """Returns the key after which the page begins; an empty token is the first page.

    Raises:
        ServiceError: INVALID_ARGUMENT for a token that this list did not give out.
    """
    if not token:
        return b""
    rule = "must be a next_page_token of the same request"
    if len(token) > MAX_TOKEN_CHARS or not token.isascii():
        raise invalid("page_token", token, rule)
    try:
        content = base64.b64decode(token + "=" * (-len(token) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        raise invalid("page_token", token, rule) from None
    head = _VERSION + _scope_digest(scope)
    if not content.startswith(head) or len(content) == len(head):
        raise invalid("page_token", token, rule)
    return content[len(head) :]


def read_page(
    store: Store,
    table: str,
    prefix: bytes,
    after: bytes,
    size: int,
    keep: Callable[[bytes], T | None],
) -> tuple[list[T], bytes | None]:
    """Returns the next records and the key to go on after, None at the end.

    Args:
        store: Where to read.
        table: Name of the table.
        prefix: Only keys with this prefix are read.
        after: Key before the first one wanted; empty for the start.
        size: The most records wanted, at least 1.
        keep: Gives the record of a row's value, or None to leave it out.
    """
    found: list[T] = []
    size_bytes = 0
    last_kept = b""
    position = max(after, prefix)
    handle = store.table(table)
    while True:
        rows: list[tuple[bytes, bytes]] = []
        with store.reading() as snapshot:  # short: a scan that finds little may be long
            cursor = snapshot.cursor(db=handle)
            going_on = cursor.set_range(position)
            while going_on and len(rows) < SCAN_ROWS:
                rows.append(cursor.item())
                going_on = cursor.next()
        for key, value in rows:
            if not key.startswith(prefix):
                return found, None
            position = key
            if key <= after:
                continue
            record = keep(value)
            if record is None:
                continue
            size_bytes += len(value)
            if found and (len(found) == size or size_bytes > MAX_PAGE_BYTES):
                return found, last_kept
            found.append(record)
            last_kept = key
        if not going_on:
            return found, None
        after = max(after, position)
