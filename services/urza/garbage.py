"""Garbage collection: removes what nothing refers to and nobody has used lately."""

import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

from esper.common.v1 import digest_pb2
from esper.services.serving import metrics
from esper.services.store.engine import Store
from esper.services.urza.blobs import TABLE as BLOB_TABLE
from esper.services.urza.blobs import BlobStore
from esper.services.urza.blobs import row_size
from esper.services.urza.names import HASH
from esper.urza.v1 import library_pb2
from esper.urza.v1 import store_pb2

T = TypeVar("T")

GRACE_S = 3600.0
BATCH_BLOBS = 256


def collect(
    store: Store, blobs: BlobStore, grace_s: float = GRACE_S, *, dry_run: bool = False
) -> store_pb2.CollectGarbageResponse:
    """Removes garbage and returns how much that was; blocks, beside whatever else goes on.

    Kernels are never removed, so what a kernel refers to stays for good. A blob that a kernel comes
    to refer to while this runs is leased since this began, and stays.

    Args:
        store: The rows.
        blobs: The blobs.
        grace_s: What was used within so many seconds stays.
        dry_run: Only count.
    """
    before_s = blobs.leases.now() - grace_s
    outcome = store_pb2.CollectGarbageResponse()
    wanted = _referred(store)
    for batch in _batches(_free_blobs(store, blobs, wanted, before_s)):
        removed = batch if dry_run else blobs.remove(batch, before_s)
        outcome.num_blobs += len(removed)
        outcome.blob_bytes += sum(digest.size_bytes for digest in removed)
    for path in orphans(store, blobs):
        if blobs.leases.is_free(path.name, before_s) and (
            dry_run or blobs.remove_file(path.name, before_s)
        ):
            outcome.num_orphans += 1
    for entry in os.scandir(blobs.parked):
        if "." not in entry.name and blobs.leases.is_free(entry.name, before_s):
            outcome.num_uploads += 1
            if not dry_run:
                Path(entry.path).unlink(missing_ok=True)
    if not dry_run:
        metrics.GARBAGE_BYTES.inc(outcome.blob_bytes)
    return outcome


def orphans(store: Store, blobs: BlobStore) -> Iterator[Path]:
    """Yields the files among the blobs that have no row."""
    table = store.table(BLOB_TABLE)
    for folder in sorted(blobs.files.iterdir()):
        names = sorted(entry.name for entry in os.scandir(folder) if HASH.fullmatch(entry.name))
        for batch in _batches(iter(names)):
            with store.reading() as row:
                lacking = [n for n in batch if row.get(bytes.fromhex(n), db=table) is None]
            for name in lacking:
                yield folder / name


def _referred(store: Store) -> set[bytes]:
    """Returns the hashes of the blobs that kernels refer to."""
    wanted = set()
    for _, value in store.scan("kernels"):
        weights = library_pb2.KernelRecord.FromString(value).kernel.weights
        if weights.hash:
            wanted.add(bytes.fromhex(weights.hash))
    return wanted


def _free_blobs(
    store: Store, blobs: BlobStore, wanted: set[bytes], before_s: float
) -> Iterator[digest_pb2.Digest]:
    for key, value in store.scan(BLOB_TABLE):
        if key not in wanted and blobs.leases.is_free(key.hex(), before_s):
            yield digest_pb2.Digest(hash=key.hex(), size_bytes=row_size(value))


def _batches(items: Iterator[T]) -> Iterator[list[T]]:
    while batch := list(itertools.islice(items, BATCH_BLOBS)):
        yield batch
