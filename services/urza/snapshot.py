"""A snapshot of the rows in a temporary folder, with the blobs that it needs besides."""

from collections.abc import Iterator

import lmdb

from esper.common.v1 import digest_pb2
from esper.services.store.copies import RowSnapshot
from esper.services.urza.blobs import TABLE as BLOB_TABLE
from esper.services.urza.blobs import is_file_row
from esper.services.urza.blobs import row_size


class Snapshot(RowSnapshot):
    """The rows of Urza at one moment."""

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
