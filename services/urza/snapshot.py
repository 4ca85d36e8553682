"""A snapshot of the rows in a temporary folder, with the blobs that it needs besides."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import lmdb

from esper.common.v1 import digest_pb2
from esper.services.serving.limits import MAX_CHUNK_BYTES
from esper.services.store.engine import Store
from esper.services.urza.blobs import TABLE as BLOB_TABLE
from esper.services.urza.blobs import is_file_row
from esper.services.urza.blobs import row_size


class Snapshot:
    """The rows at one moment, in a temporary folder until `close`.

    Args:
        store: What to copy.
    """

    def __init__(self, store: Store) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="snapshot-", dir=store.scratch))
        try:
            store.copy_rows(self._folder, compact=True)
        except BaseException:
            self.close()
            raise

    def rows(self) -> Iterator[bytes]:
        """Yields the file with the rows in pieces."""
        with (self._folder / "data.mdb").open("rb") as file:
            while piece := file.read(MAX_CHUNK_BYTES):
                yield piece

    def blobs(self) -> Iterator[digest_pb2.Digest]:
        """Yields the blobs that are files."""
        with (
            lmdb.open(
                str(self._folder), readonly=True, lock=False, max_dbs=1, create=False
            ) as environment,
            environment.begin(db=environment.open_db(BLOB_TABLE.encode(), create=False)) as row,
        ):
            for key, value in row.cursor():
                if is_file_row(value):
                    yield digest_pb2.Digest(hash=key.hex(), size_bytes=row_size(value))

    def close(self) -> None:
        """Removes the folder."""
        shutil.rmtree(self._folder)
