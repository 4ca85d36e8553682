"""Copies of the rows in a temporary folder, to be read at leisure."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import lmdb.verify

from esper.services.store.engine import Store
from esper.services.store.files import free_bytes


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
