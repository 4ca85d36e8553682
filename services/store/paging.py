"""Pages over the rows of a table, in order of key, while others write.

A token holds where the next page begins, whatever has been written since: a row that was there all
the time comes exactly once.
"""

import base64
import binascii
import hashlib
import hmac
import secrets

from esper.services.serving.errors import ServiceError
from esper.services.serving.errors import invalid
from esper.services.store.claim import DirectoryError
from esper.services.store.engine import Store
from esper.services.store.opening import Database
from esper.services.store.opening import Row

MAX_PAGE_BYTES = 3 << 20  # leaves room for the envelope within a message
MAX_TOKEN_CHARS = 1024
_VERSION = b"\x02"
_SEAL_BYTES = 16
_SECRET_BYTES = 32
_SECRET_KEY = b"page_token_secret"


class PageTokens:
    """Gives out the tokens of a store's lists, and takes back none but those.

    A token is sealed for its list with a secret that the store keeps, so one that was changed, or
    that another list or another store gave out, is refused; a restart changes nothing.

    Args:
        store: Keeps the secret, which is made here where it is missing.

    Raises:
        DirectoryError: Where it cannot be made.
    """

    def __init__(self, store: Store) -> None:
        table = store.table("meta")
        with store.reading() as row:
            secret = row.get(_SECRET_KEY, db=table)
        if secret is None:

            def make(row: Row) -> bytes:
                made = row.get(_SECRET_KEY, db=table) or secrets.token_bytes(_SECRET_BYTES)
                row.put(_SECRET_KEY, made, db=table)
                return made

            try:
                secret = store.submit(make).result()
            except ServiceError as error:
                raise DirectoryError(
                    f"cannot make a store in {store.directory}: {error.message}"
                ) from error
        self._secret = secret

    def encode(self, scope: str, position: bytes) -> str:
        """Returns the opaque token of the page that begins at `position`.

        Args:
            scope: The list: whatever must be the same for the token to make sense.
            position: Not empty.
        """
        content = _VERSION + self._seal(scope, position) + position
        return base64.urlsafe_b64encode(content).decode().rstrip("=")

    def decode(self, scope: str, token: str) -> bytes:
        """Returns where the page begins; an empty token is the first page, and its position b"".

        Raises:
            ServiceError: INVALID_ARGUMENT for a token that this list did not give out.
        """
        if not token:
            return b""
        rule = "must be a next_page_token of the same list"
        if len(token) > MAX_TOKEN_CHARS or not token.isascii():
            raise invalid("page_token", token, rule)
        try:
            padded = token + "=" * (-len(token) % 4)
            content = base64.b64decode(padded, altchars=b"-_", validate=True)
        except (binascii.Error, ValueError):
            raise invalid("page_token", token, rule) from None
        head = len(_VERSION) + _SEAL_BYTES
        position = content[head:]
        sealed = _VERSION + self._seal(scope, position)
        # Base64 has several spellings of some bytes; only the one given out is taken.
        if not hmac.compare_digest(content[:head], sealed) or token != self.encode(scope, position):
            raise invalid("page_token", token, rule)
        return position

    def _seal(self, scope: str, position: bytes) -> bytes:
        listed = hashlib.sha256(scope.encode()).digest()
        return hmac.digest(self._secret, listed + position, "sha256")[:_SEAL_BYTES]


def read_page(
    row: Row, table: Database, prefix: bytes, start: bytes, size: int
) -> tuple[list[tuple[bytes, bytes]], bytes | None]:
    """Returns the next rows and the position to go on from, None at the end.

    Args:
        row: The snapshot to read from.
        table: The table's handle.
        prefix: Only keys with this prefix are read.
        start: Position of the page; empty for the first.
        size: The most rows wanted, at least 1; fewer come where they are too much for a message.
    """
    found: list[tuple[bytes, bytes]] = []
    size_bytes = 0
    cursor = row.cursor(db=table)
    going_on = cursor.set_range(max(start, prefix))
    while going_on and cursor.key().startswith(prefix):
        value = cursor.value()
        size_bytes += len(value)
        if found and (len(found) == size or size_bytes > MAX_PAGE_BYTES):
            return found, found[-1][0] + b"\0"
        found.append((cursor.key(), value))
        going_on = cursor.next()
    return found, None
