"""`python -m esper.services.urza.offline OPERATION DIR`: looks after a store that is not served.

Holds the lock of the store meanwhile. Writes one JSON object a line to stdout: the messages of
`esper.urza.v1.StoreService`, or what the operation did.
"""

import argparse
import asyncio
import contextlib
import json
import os
import secrets
import shutil
import sys
import tempfile
from collections.abc import Iterator
from collections.abc import Sequence
from pathlib import Path

from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message

from esper.services.serving.context import StartupError
from esper.services.serving.errors import ServiceError
from esper.services.store.claim import DirectoryClaim
from esper.services.store.files import scratch_folder
from esper.services.store.files import sync_folder
from esper.services.store.opening import data_file
from esper.services.store.opening import open_rows
from esper.services.urza import garbage
from esper.services.urza.check import Checker
from esper.services.urza.contents import FOLDER
from esper.services.urza.contents import SCHEMA
from esper.services.urza.contents import Contents
from esper.services.urza.contents import open_contents
from esper.services.urza.snapshot import Snapshot
from esper.services.urza.stats import read_stats
from esper.urza.backup import BackupError
from esper.urza.backup import BackupWriter
from esper.urza.backup import copy_backup

Lines = Iterator[Message | dict[str, object]]


def stats(contents: Contents) -> Lines:
    """Yields the figures of a store."""
    yield read_stats(contents)


def check(contents: Contents, quarantine: bool) -> Lines:
    """Yields the findings and the summary."""
    yield from Checker(contents, quarantine=quarantine)


def collect(contents: Contents, grace_s: float, dry_run: bool) -> Lines:
    """Yields what was removed."""
    yield garbage.collect(contents.store, contents.blobs, grace_s, dry_run=dry_run)


def backup(contents: Contents, folder: Path) -> Lines:
    """Writes a backup and yields its manifest.

    Raises:
        BackupError: Where `folder` cannot take it.
        ServiceError: DATA_LOSS where a blob is damaged.
    """
    writer = BackupWriter(folder)
    with contextlib.closing(Snapshot(contents.store)) as taken:
        writer.put_rows(taken.rows())
        for digest in taken.blobs():
            if writer.wants(digest):
                writer.put_blob(digest, contents.blobs.read(digest))
    yield writer.finish()


def compact(directory: Path) -> Lines:
    """Rewrites the rows without the pages that deletions have left, and yields the sizes.

    Raises:
        DirectoryError: Where the store cannot be used.
    """
    path = data_file(directory)
    with DirectoryClaim(directory):
        before = path.stat().st_size if path.exists() else 0
        environment, _ = open_rows(directory, SCHEMA, before)
        folder = Path(tempfile.mkdtemp(prefix="compact-", dir=scratch_folder(directory)))
        try:
            with environment:
                environment.copy(str(folder), compact=True)
            (folder / path.name).replace(path)
            sync_folder(path.parent)
        finally:
            shutil.rmtree(folder)
        yield {"row_file_bytes_before": before, "row_file_bytes": path.stat().st_size}


def restore(source: Path, directory: Path) -> Lines:
    """Makes a store of a backup, and yields the findings and the summary of its check.

    The store appears at once and whole, or not at all.

    Raises:
        BackupError: Where `source` is no backup.
        StartupError: Where there is a store already, or what was restored is not sound.
    """
    if directory.exists():
        raise StartupError(f"{directory} exists: restore into a directory without a store")
    directory.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    beside = directory.with_name(f"{directory.name}.restoring-{secrets.token_hex(4)}")
    try:
        copy_backup(source, beside)
        contents = open_contents(beside)
        num_problems = 0
        try:
            for step in Checker(contents):
                num_problems = step.summary.num_problems
                yield step
        finally:
            contents.store.close()
        if num_problems:
            raise StartupError(f"{source} is not sound: {num_problems} problems; nothing restored")
        for folder, _, _ in os.walk(beside):
            sync_folder(Path(folder))
        beside.rename(directory)
        sync_folder(directory.parent)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Returns what the command line asks for."""
    parser = argparse.ArgumentParser(prog="esper.services.urza.offline", description=__doc__)
    operations = parser.add_subparsers(dest="operation", required=True)
    for name in ("stats", "check", "gc", "backup", "restore", "compact"):
        operation = operations.add_parser(name)
        operation.add_argument("data", type=Path, help="data directory of the server")
        if name == "check":
            operation.add_argument("--quarantine", action="store_true")
        elif name == "gc":
            operation.add_argument("--grace", type=float, default=0.0, metavar="SECONDS")
            operation.add_argument("--dry-run", action="store_true")
        elif name in ("backup", "restore"):
            operation.add_argument("backup", type=Path)
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> Lines:
    """Does what was asked for.

    Raises:
        StartupError: Where the store cannot be used.
    """
    directory = options.data.absolute() / FOLDER
    if options.operation == "restore":
        yield from restore(options.backup, directory)
        return
    if not data_file(directory).exists():
        raise StartupError(f"{options.data} holds no store of Urza")
    if options.operation == "compact":
        yield from compact(directory)
        return
    contents = open_contents(directory)
    try:
        if options.operation == "stats":
            yield from stats(contents)
        elif options.operation == "check":
            yield from check(contents, options.quarantine)
        elif options.operation == "gc":
            yield from collect(contents, options.grace, options.dry_run)
        else:
            yield from backup(contents, options.backup)
    finally:
        contents.store.close()


async def main(arguments: Sequence[str]) -> int:
    """Returns the exit status: 0 when done, 1 with one line on stderr else."""
    options = parse(arguments)
    os.umask(0o077)
    try:
        for line in run(options):
            if isinstance(line, Message):
                line = MessageToDict(line)
            print(json.dumps(line), flush=True)
    except (StartupError, BackupError, OSError) as error:
        print(f"esper: {error}", file=sys.stderr)
        return 1
    except ServiceError as error:
        print(f"esper: {error.code.name}: {error.message}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(asyncio.run(main(sys.argv[1:])))
