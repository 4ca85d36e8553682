"""Opens the environment of a store: whole files only, and rows of the schema that is wanted."""

import logging
from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import field
from pathlib import Path
from typing import TypeAlias

import lmdb

from esper.services.store.claim import DirectoryError
from esper.services.store.files import sync_file
from esper.services.store.files import sync_folder

LOG = logging.getLogger("esper.store")

# Quoted: generic in the type stubs alone.
Row: TypeAlias = "lmdb.Transaction[bytes]"
Database: TypeAlias = "lmdb._Database"
Migration: TypeAlias = Callable[[Row, Callable[[str], Database]], None]
"""Makes rows of one version those of the next; gets the transaction and the tables by name."""

SCHEMA_KEY = b"schema_version"
META_TABLE = "meta"
ROWS_FOLDER = "rows"
MARKER = "store"
"""Name of a file that stands in every directory whose rows have once been durable."""
MAX_READERS = 512


@dataclass(frozen=True)
class Schema:
    """What the rows of a store look like.

    Attributes:
        tables: Names of the tables, created where missing.
        version: Version of the row formats.
        migrations: By version, how to get from its rows to those of the next version. Directories
            of these versions are brought up to date when they are opened, others are refused.
    """

    tables: Sequence[str]
    version: int
    migrations: Mapping[int, Migration] = field(default_factory=dict)


def data_file(directory: Path) -> Path:
    """Returns the file that holds the rows of the store in `directory`."""
    return directory / ROWS_FOLDER / "data.mdb"


def open_rows(
    directory: Path, schema: Schema, map_bytes: int
) -> tuple["lmdb.Environment", dict[str, Database]]:
    """Opens or creates the rows of a claimed directory, and returns them with their tables.

    Args:
        directory: Where the store is.
        schema: What the rows must look like.
        map_bytes: Size of the memory map; at least that of the file is taken.

    Raises:
        DirectoryError: Where the rows are damaged or gone, or of a schema without a way to this
            one.
    """
    path = data_file(directory)
    marker = directory / MARKER
    held_bytes = path.stat().st_size if path.exists() else 0
    if marker.exists() and held_bytes == 0:
        raise DirectoryError(
            f"{directory} has lost its rows: {path} is {'empty' if path.exists() else 'missing'}; "
            "restore it from a backup"
        )
    try:
        environment = lmdb.open(
            str(path.parent),
            map_size=max(map_bytes, held_bytes),
            max_dbs=len(schema.tables) + 1,
            max_readers=MAX_READERS,
            mode=0o600,
        )
    except lmdb.Error as error:
        raise DirectoryError(f"cannot open the store in {directory}: {error}") from error
    try:
        _require_whole(environment, path)
        environment.reader_check()
        tables = {name: environment.open_db(name.encode()) for name in (*schema.tables, META_TABLE)}
        while not _migrate(environment, tables, schema, directory):
            environment.set_mapsize(2 * environment.info()["map_size"])
        if not marker.exists():
            for folder in (path.parent, directory, directory.parent):
                sync_folder(folder)
            marker.write_text("A store of Esper: its rows are in rows/.\n")
            sync_file(marker)
            sync_folder(directory)
    except lmdb.Error as error:
        environment.close()
        raise DirectoryError(f"cannot open the store in {directory}: {error}") from error
    except BaseException:
        environment.close()
        raise
    return environment, tables


def _require_whole(environment: "lmdb.Environment", path: Path) -> None:
    """Raises DirectoryError for a truncated file: reading what it lacks would end the process."""
    wanted = (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]
    found = path.stat().st_size
    if found < wanted:
        raise DirectoryError(
            f"{path} is truncated: it has {found} bytes of {wanted}; restore it from a backup"
        )


def _migrate(
    environment: "lmdb.Environment", tables: dict[str, Database], schema: Schema, directory: Path
) -> bool:
    """Brings the rows to the version wanted, all at once; returns False where the map is full."""
    meta = tables[META_TABLE]
    try:
        with environment.begin(write=True) as row:
            found = row.get(SCHEMA_KEY, db=meta)
            version = schema.version if found is None else int(found)
            while version < schema.version and version in schema.migrations:
                LOG.info("migrating %s from schema version %d", directory, version)
                schema.migrations[version](row, tables.__getitem__)
                version += 1
            if version != schema.version:
                raise DirectoryError(
                    f"{directory} was written with schema version {version} and this release "
                    f"reads version {schema.version}"
                )
            written = str(version).encode()
            if found != written:  # a store on a full disk must open, to be read
                row.put(SCHEMA_KEY, written, db=meta)
    except lmdb.MapFullError:
        return False
    return True
