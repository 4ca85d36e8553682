"""`python -m esper.services.urza.offline OPERATION DIR`: looks after a store that is not served.

Holds the lock of the store meanwhile. Writes one JSON object a line to stdout: the messages of
`esper.urza.v1.StoreService`, or what the operation did.
"""

import argparse
import asyncio
import contextlib
import json
import os
import sys
from collections.abc import Iterator
from collections.abc import Sequence
from pathlib import Path

from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message

from esper.common.backup import BackupError
from esper.common.backup import BackupWriter
from esper.services.serving.context import StartupError
from esper.services.serving.errors import ServiceError
from esper.services.store import upkeep
from esper.services.store.opening import data_file
from esper.services.urza import garbage
from esper.services.urza.check import Checker
from esper.services.urza.contents import FOLDER
from esper.services.urza.contents import SCHEMA
from esper.services.urza.contents import Contents
from esper.services.urza.contents import open_contents
from esper.services.urza.snapshot import Snapshot
from esper.services.urza.stats import read_stats
from esper.urza.v1 import store_pb2

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
    writer = BackupWriter(folder, FOLDER)
    with contextlib.closing(Snapshot(contents.store)) as taken:
        writer.put_rows(taken.rows())
        for digest in taken.blobs():
            if writer.wants(digest):
                writer.put_blob(digest, contents.blobs.read(digest))
    yield writer.finish()


def check_directory(directory: Path) -> Iterator[store_pb2.CheckStoreResponse]:
    """Yields the findings and the summary of a store that nobody has opened."""
    contents = open_contents(directory)
    try:
        yield from Checker(contents)
    finally:
        contents.store.close()


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
        yield from upkeep.restore(options.backup, directory, FOLDER, check_directory)
        return
    if not data_file(directory).exists():
        raise StartupError(f"{options.data} holds no store of Urza")
    if options.operation == "compact":
        yield upkeep.compact(directory, SCHEMA)
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
