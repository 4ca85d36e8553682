"""Everything that one Urza stores, opened together."""

from dataclasses import dataclass
from pathlib import Path

from esper.services.store.engine import Store
from esper.services.store.limits import StoreLimits
from esper.services.store.opening import Schema
from esper.services.urza import blobs
from esper.services.urza import library
from esper.services.urza import migrations
from esper.services.urza import runs

SCHEMA = Schema(
    (*blobs.TABLES, *library.TABLES, *runs.TABLES),
    version=3,
    migrations={1: migrations.from_1, 2: migrations.from_2},
)
FOLDER = "urza"
"""Folder of Urza's store in the data directory of a server."""


@dataclass(frozen=True)
class Contents:
    """What one Urza stores. To be opened and closed on one event loop.

    Attributes:
        store: The rows.
        blobs: The blobs.
        library: Blueprints, kernels and reports.
        runs: The runs.
    """

    store: Store
    blobs: blobs.BlobStore
    library: library.Library
    runs: runs.Runs


def open_contents(directory: Path, limits: StoreLimits | None = None) -> Contents:
    """Opens the store in `directory`, created where missing; its `store` is to be closed.

    Raises:
        DirectoryError: Where it cannot be used.
    """
    store = Store(directory, SCHEMA, limits)
    blob_store = blobs.BlobStore(store, directory / "blobs")
    return Contents(store, blob_store, library.Library(store, blob_store), runs.Runs(store))
