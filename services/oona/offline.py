"""`python -m esper.services.oona.offline OPERATION DIR`: looks after a log that is not served.

Holds the lock of the store meanwhile. Writes one JSON object a line to stdout: the messages of
`CheckLog`, or what the operation did.
"""

import argparse
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
from esper.oona.v1 import event_pb2
from esper.services.oona.check import Checker
from esper.services.oona.contents import FOLDER
from esper.services.oona.contents import SCHEMA
from esper.services.serving.context import StartupError
from esper.services.serving.errors import ServiceError
from esper.services.store import upkeep
from esper.services.store.copies import RowSnapshot
from esper.services.store.engine import Store
from esper.services.store.opening import data_file

Lines = Iterator[Message | dict[str, object]]


def check(directory: Path, *, quarantine: bool = False) -> Iterator[event_pb2.CheckLogResponse]:
    """Yields the findings and the summary."""
    with contextlib.closing(Store(directory, SCHEMA)) as store:
        yield from Checker(store, quarantine=quarantine)


def backup(directory: Path, folder: Path) -> dict[str, object]:
    """Writes a backup and returns its manifest.

    Raises:
        BackupError: Where `folder` cannot take it.
    """
    writer = BackupWriter(folder, FOLDER)
    with (
        contextlib.closing(Store(directory, SCHEMA)) as store,
        contextlib.closing(RowSnapshot(store)) as taken,
    ):
        writer.put_rows(taken.rows())
    return writer.finish()


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Returns what the command line asks for."""
    parser = argparse.ArgumentParser(prog="esper.services.oona.offline", description=__doc__)
    operations = parser.add_subparsers(dest="operation", required=True)
    for name in ("check", "backup", "restore", "compact"):
        operation = operations.add_parser(name)
        operation.add_argument("data", type=Path, help="data directory of the server")
        if name == "check":
            operation.add_argument("--quarantine", action="store_true")
        elif name != "compact":
            operation.add_argument("backup", type=Path)
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> Lines:
    """Does what was asked for.

    Raises:
        StartupError: Where the store cannot be used.
    """
    directory = options.data.absolute() / FOLDER
    if options.operation == "restore":
        yield from upkeep.restore(options.backup, directory, FOLDER, check)
        return
    if not data_file(directory).exists():
        raise StartupError(f"{options.data} holds no log of Oona")
    if options.operation == "check":
        yield from check(directory, quarantine=options.quarantine)
    elif options.operation == "backup":
        yield backup(directory, options.backup)
    else:
        yield upkeep.compact(directory, SCHEMA)


def main(arguments: Sequence[str]) -> int:
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
    sys.exit(main(sys.argv[1:]))
