"""What an operator does with the directory of a store that is not served."""

import os
import secrets
import shutil
import tempfile
from collections.abc import Callable
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

from esper.common.backup import copy_backup
from esper.oona.v1 import event_pb2
from esper.services.serving.context import StartupError
from esper.services.store.claim import DirectoryClaim
from esper.services.store.files import scratch_folder
from esper.services.store.files import sync_folder
from esper.services.store.opening import Schema
from esper.services.store.opening import data_file
from esper.services.store.opening import open_rows
from esper.urza.v1 import store_pb2

Step = TypeVar("Step", store_pb2.CheckStoreResponse, event_pb2.CheckLogResponse)


def compact(directory: Path, schema: Schema) -> dict[str, object]:
    """Rewrites the rows without the pages that deletions have left, and returns the sizes.

    Raises:
        DirectoryError: Where the store cannot be used.
    """
    path = data_file(directory)
    with DirectoryClaim(directory):
        before = path.stat().st_size
        environment, _ = open_rows(directory, schema, before)
        folder = Path(tempfile.mkdtemp(prefix="compact-", dir=scratch_folder(directory)))
        try:
            with environment:
                environment.copy(str(folder), compact=True)
            (folder / path.name).replace(path)
            sync_folder(path.parent)
        finally:
            shutil.rmtree(folder)
        return {"row_file_bytes_before": before, "row_file_bytes": path.stat().st_size}


def restore(
    source: Path, directory: Path, service: str, check: Callable[[Path], Iterator[Step]]
) -> Iterator[Step]:
    """Makes a store of a backup, and yields the findings and the summary of its check.

    The store appears at once and whole, or not at all.

    Args:
        source: The backup.
        directory: Where the store will be.
        service: What was backed up, `urza` or `oona`.
        check: Opens the store in a directory, checks it, and closes it.

    Raises:
        BackupError: Where `source` is no backup of the service.
        StartupError: Where there is a store already, or what was restored is not sound.
    """
    if directory.exists():
        raise StartupError(f"{directory} exists: restore into a directory without a store")
    directory.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    beside = directory.with_name(f"{directory.name}.restoring-{secrets.token_hex(4)}")
    try:
        copy_backup(source, beside, service)
        num_problems = 0
        for step in check(beside):
            num_problems = step.summary.num_problems
            yield step
        if num_problems:
            raise StartupError(f"{source} is not sound: {num_problems} problems; nothing restored")
        for folder, _, _ in os.walk(beside):
            sync_folder(Path(folder))
        beside.rename(directory)
        sync_folder(directory.parent)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
