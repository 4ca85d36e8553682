"""Copies of the rows in a temporary folder, to be read at leisure."""

import shutil
import tempfile
from collections.abc import Generator
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import lmdb.verify

from esper.services.serving.limits import MAX_CHUNK_BYTES
from esper.services.store.engine import Store
from esper.services.store.files import free_bytes


class RowSnapshot:
    """The rows of one moment, without free pages, in a temporary folder until `close`.

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

    def rows(self) -> Generator[bytes, None, None]:
        """Yields the file with the rows in pieces."""
        with (self._folder / "data.mdb").open("rb") as file:
            while piece := file.read(MAX_CHUNK_BYTES):
                yield piece

    def close(self) -> None:
        """Removes the folder."""
        shutil.rmtree(self._folder)


@contextmanager
def copied_rows(store: Store, *, compact: bool) -> Iterator[Path | None]:
    """Gives the folder of a copy of the rows of one moment; None where there is no room for it.

    Args:
        store: What to copy.
        compact: Leave free pages out; else the copy is page by page that of the store.
    """
    if free_bytes(store.directory) < store.row_file_bytes + store.limits.keep_free_bytes:
        yield None
        return
    folder = Path(tempfile.mkdtemp(prefix="copy-", dir=store.scratch))
    try:
        store.copy_rows(folder, compact=compact)
        yield folder
    finally:
        shutil.rmtree(folder)


def structure_problems(folder: Path) -> list[str]:
    """Returns what is wrong with the structure of the file with the rows in a folder."""
    return [str(problem) for problem in lmdb.verify.verify(str(folder))]
