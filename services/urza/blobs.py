"""Blobs: immutable bytes under their SHA-256, verified on the way in and on the way out.

Small blobs live in the row itself. Larger ones are files named by their hash, written beside,
synced, renamed into place and only then entered as a row: a blob is either whole and durable, or
not there. It is taken out the other way round, the row first: a file without a row is no blob, and
is left to garbage collection.

An upload writes to a file of its own, so writers of one blob never meet. When it is interrupted the
file is parked under the hash, where the next writer may take it over and go on; of two parked files
the longer one stays.

A blob that turns out to be damaged is put into quarantine: its bytes are moved aside, reads are
DATA_LOSS, and it can be uploaded again.
"""

import hashlib
import logging
import os
import secrets
import threading
from collections.abc import Iterator
from collections.abc import Sequence
from concurrent.futures import Future
from functools import lru_cache
from pathlib import Path
from typing import TypeAlias

from esper.common.v1 import digest_pb2
from esper.services.serving import metrics
from esper.services.serving.errors import ServiceError
from esper.services.serving.errors import aborted
from esper.services.serving.errors import data_loss
from esper.services.serving.errors import not_found
from esper.services.serving.errors import out_of_range
from esper.services.serving.limits import MAX_CHUNK_BYTES
from esper.services.store.engine import Store
from esper.services.store.files import sync_folder
from esper.services.store.opening import Row
from esper.services.urza.leases import Leases
from esper.services.urza.names import EMPTY_HASH
from esper.services.urza.names import HASH
from esper.services.urza.room import Room
from esper.services.urza.uploads import Upload
from esper.services.urza.writing import Buffers

LOG = logging.getLogger("esper.urza.blobs")

TABLE = "blobs"
QUARANTINE_TABLE = "blob_quarantine"
TABLES = (TABLE, QUARANTINE_TABLE)

_INLINE = b"\x00"
_FILE = b"\x01"

Signature: TypeAlias = tuple[int, int, int]
"""Tells the versions of a file apart: inode, time of change, size."""


def blob_name(digest: digest_pb2.Digest) -> str:
    """Returns the name of a blob in messages."""
    return f"blobs/{digest.hash}/{digest.size_bytes}"


def row_size(row: bytes) -> int:
    """Returns the size of the blob that a row stands for."""
    return len(row) - 1 if row.startswith(_INLINE) else int.from_bytes(row[1:], "big")


def is_file_row(row: bytes) -> bool:
    """Returns whether the bytes of the blob of a row are in a file."""
    return row.startswith(_FILE)


class BlobStore:
    """The blobs of one Urza. Its methods block, and may be called from any thread.

    Args:
        store: Holds the rows; its tables `TABLES` are this object's alone.
        directory: Holds the files; created where missing.
    """

    def __init__(self, store: Store, directory: Path) -> None:
        self._store = store
        self._table = store.table(TABLE)
        self._quarantined = store.table(QUARANTINE_TABLE)
        self.files = directory / "files"
        """Folder of the blobs that are files, in folders by the first two characters."""
        self.parked = directory / "partial"
        """Folder of uploads, under way or interrupted."""
        self._damaged = directory / "quarantine"
        for folder in (self.files, self.parked, self._damaged):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        # Held while a file is put in place or taken away.
        self._placing = threading.Lock()
        self._buffers = Buffers()
        self.leases = Leases()
        self.room = Room(self.parked, store.limits, self._all_parked_bytes)
        with store.reading() as snapshot:
            sizes = [row_size(row) for _, row in snapshot.cursor(db=self._table)]
        self.room.count(len(sizes), sum(sizes))
        for path in sorted(self.parked.iterdir()):
            if HASH.match(path.name) and "." in path.name:  # an upload that a dead server left
                self.park(path, path.name.partition(".")[0])

    # ------------------------------------------------------------ asking

    def contains(self, digest: digest_pb2.Digest) -> bool:
        """Returns whether the whole blob is stored; it is leased then."""
        return self.leases.use(digest.hash) and self._row(digest) is not None

    def missing(self, digests: Sequence[digest_pb2.Digest]) -> list[digest_pb2.Digest]:
        """Returns those of `digests` that are not stored, in the same order."""
        return [digest for digest in digests if not self.contains(digest)]

    def committed(self, digest: digest_pb2.Digest) -> tuple[int, bool]:
        """Returns the number of bytes held, and whether they are the whole blob."""
        if self.contains(digest):
            return digest.size_bytes, True
        return self._parked_bytes(digest), False

    # ------------------------------------------------------------ writing

    def begin(self, digest: digest_pb2.Digest, offset: int) -> Upload | None:
        """Starts an upload, or goes on with one; None where the blob is already there.

        Args:
            digest: What will have been uploaded.
            offset: 0 to start afresh, else the `committed` size of an interrupted upload.

        Raises:
            ServiceError: ABORTED where `offset` is neither; RESOURCE_EXHAUSTED where there is no
                room for it.
        """
        self.leases.hold(digest.hash)
        try:
            if self.contains(digest):
                self.leases.release(digest.hash)
                return None
            self.room.promise(blob_name(digest), digest.size_bytes)
        except BaseException:
            self.leases.release(digest.hash)
            raise
        try:
            path = self.parked / f"{digest.hash}.{secrets.token_hex(8)}"
            if offset:
                self._take_over(digest, offset, path)
            return Upload(self, digest, path, self._buffers)
        except BaseException:
            self.end_upload(digest)
            raise

    def end_upload(self, digest: digest_pb2.Digest) -> None:
        """Gives back what an upload was promised; called once for each, by itself."""
        self.room.give_back(digest.size_bytes)
        self.leases.release(digest.hash)

    def park(self, path: Path, name: str) -> None:
        """Keeps an interrupted upload for the next writer, unless more is already there."""
        parked = self.parked / name
        if parked.exists() and parked.stat().st_size >= path.stat().st_size:
            path.unlink()
        else:
            path.replace(parked)

    def enter_content(self, digest: digest_pb2.Digest, content: bytes) -> "Future[None]":
        """Stores a verified small blob; the future is done once it is durable."""
        return self._enter(digest, _INLINE + content)

    def enter_file(self, digest: digest_pb2.Digest, path: Path) -> "Future[None]":
        """Stores a verified and synced file; the future is done once it is durable.

        Raises:
            OSError: Where the file cannot be put in its place.
        """
        target = self.path_of(digest.hash)
        with self._placing:
            if not target.parent.exists():
                target.parent.mkdir(mode=0o700, exist_ok=True)
                sync_folder(self.files)
            path.replace(target)
        sync_folder(target.parent)
        return self._enter(digest, _FILE + digest.size_bytes.to_bytes(8, "big"))

    # ------------------------------------------------------------ reading

    def read(self, digest: digest_pb2.Digest, offset: int = 0, limit: int = 0) -> Iterator[bytes]:
        """Yields a blob or a part of it in chunks of at most `MAX_CHUNK_BYTES`.

        A whole file is verified while it is read, so the error may come after its chunks; a part is
        only read from a file that was verified before.

        Args:
            digest: Which blob.
            offset: First byte wanted.
            limit: The most bytes wanted; 0 means all.

        Raises:
            ServiceError: NOT_FOUND; OUT_OF_RANGE; DATA_LOSS where the stored bytes are damaged,
                until the blob is uploaded again.
        """
        row = self._row(digest)
        if row is None:
            raise self._absent(digest)
        self.leases.use(digest.hash)
        if offset > digest.size_bytes:
            raise out_of_range(
                "OFFSET", f"read_offset {offset} is beyond the end of {blob_name(digest)}"
            )
        end = digest.size_bytes if limit == 0 else min(digest.size_bytes, offset + limit)
        if row.startswith(_INLINE):
            return self._read_inline(digest, row[1:], offset, end)
        return self._read_file(digest, offset, end)

    def _read_inline(
        self, digest: digest_pb2.Digest, content: bytes, offset: int, end: int
    ) -> Iterator[bytes]:
        if hashlib.sha256(content).hexdigest() != digest.hash:
            raise self._quarantine(digest, content)
        if offset < end:
            yield content[offset:end]

    def _read_file(self, digest: digest_pb2.Digest, offset: int, end: int) -> Iterator[bytes]:
        path = self.path_of(digest.hash)
        try:
            file = path.open("rb", buffering=0)
        except FileNotFoundError:
            if self._row(digest) is None:  # removed since the row was read
                raise self._absent(digest) from None
            raise self._quarantine(digest, None) from None
        with file:
            whole = offset == 0 and end == digest.size_bytes
            signature = _signature(os.fstat(file.fileno()))
            if signature[2] != digest.size_bytes or (
                not whole and _file_hash(path, signature) != digest.hash
            ):
                raise self._quarantine(digest, signature)
            # What was uploaded past the page cache comes from the disk for the first reader.
            os.posix_fadvise(file.fileno(), offset, end - offset, os.POSIX_FADV_SEQUENTIAL)
            file.seek(offset)
            hasher = hashlib.sha256()
            chunk = b""
            while offset < end:
                chunk = file.read(min(MAX_CHUNK_BYTES, end - offset))
                if not chunk:
                    raise self._quarantine(digest, signature)
                offset += len(chunk)
                if whole:
                    hasher.update(chunk)
                    if offset == end and hasher.hexdigest() != digest.hash:
                        raise self._quarantine(digest, signature)
                if offset == end:
                    break
                yield chunk
        if chunk:
            yield chunk  # the last: the file is closed by now, though nobody may ask for more

    def is_sound(self, digest: digest_pb2.Digest) -> bool:
        """Returns whether a stored blob has the bytes that its digest says.

        Raises:
            ServiceError: NOT_FOUND where it is not stored, or no longer.
        """
        row = self._row(digest)
        if row is None:
            raise not_found(blob_name(digest))
        if row.startswith(_INLINE):
            return hashlib.sha256(row[1:]).hexdigest() == digest.hash
        try:
            with self.path_of(digest.hash).open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest() == digest.hash
        except FileNotFoundError:
            if self._row(digest) is None:
                raise not_found(blob_name(digest)) from None
            return False

    # ------------------------------------------------------------ taking out

    def remove(
        self, digests: Sequence[digest_pb2.Digest], before_s: float
    ) -> list[digest_pb2.Digest]:
        """Removes the blobs of `digests` that are still free, and returns these.

        Args:
            digests: Blobs that nothing refers to.
            before_s: What was used since, by the clock of `leases`, stays.
        """
        condemned = [d for d in digests if self.leases.condemn(d.hash, before_s)]

        def work(row: Row) -> list[digest_pb2.Digest]:
            gone = []
            for digest in condemned:
                # A writer may have come meanwhile: it does not know that the blob was there.
                if self.leases.is_free(digest.hash, before_s):
                    row.delete(bytes.fromhex(digest.hash), db=self._table)
                    gone.append(digest)
            return gone

        gone: list[digest_pb2.Digest] = []
        try:
            gone = self._store.submit(work, frees=True).result()
            for digest in gone:
                self.remove_file(digest.hash, before_s)
        finally:
            for digest in condemned:
                self.leases.forget(digest.hash, removed=digest in gone)
        self.room.count(-len(gone), -sum(digest.size_bytes for digest in gone))
        return gone

    def remove_file(self, name: str, before_s: float) -> bool:
        """Removes a file that is no blob, unless an upload of the same content is under way."""
        with self._placing:
            digest_row = self._raw_row(name)
            if digest_row is not None or not self.leases.is_free(name, before_s):
                return False
            self.path_of(name).unlink(missing_ok=True)
            return True

    def put_aside(self, digest: digest_pb2.Digest) -> None:
        """Puts a blob that is not sound into quarantine."""
        row = self._row(digest)
        if row is not None and row.startswith(_INLINE):
            self._quarantine(digest, row[1:])
        elif row is not None:
            try:
                signature = _signature(self.path_of(digest.hash).stat())
            except FileNotFoundError:
                self._quarantine(digest, None)
            else:
                self._quarantine(digest, signature)

    def _quarantine(
        self, digest: digest_pb2.Digest, found: Signature | bytes | None
    ) -> ServiceError:
        """Takes a damaged blob out, unless it has been replaced since, and returns DATA_LOSS.

        Args:
            digest: The blob.
            found: The damaged bytes of a row, or the version of a file; None for a missing file.
        """
        key = bytes.fromhex(digest.hash)
        path = self.path_of(digest.hash)
        aside = self._damaged / f"{digest.hash}.{secrets.token_hex(4)}"

        def version() -> Signature | None:
            try:
                return _signature(path.stat())
            except FileNotFoundError:
                return None

        def work(row: Row) -> bool:
            stored = row.get(key, db=self._table)
            if stored is None:
                return False
            if isinstance(found, bytes):
                if stored != _INLINE + found:
                    return False
            elif version() != found:
                return False
            row.delete(key, db=self._table)
            size = digest.size_bytes.to_bytes(8, "big")
            row.put(key, size + aside.name.encode(), db=self._quarantined)
            return True

        if self._store.submit(work, frees=True).result():
            LOG.error("%s is damaged at rest: put into quarantine as %s", blob_name(digest), aside)
            metrics.QUARANTINED.labels("blob").inc()
            self.room.count(-1, -digest.size_bytes)
            if isinstance(found, bytes):
                aside.write_bytes(found)
            else:
                with self._placing:
                    if found is not None and version() == found:
                        path.replace(aside)
        return _lost(digest)

    # ------------------------------------------------------------ rows and files

    def path_of(self, name: str) -> Path:
        """Returns where the file of a hash stands."""
        return self.files / name[:2] / name

    def _row(self, digest: digest_pb2.Digest) -> bytes | None:
        """Returns the row of the blob; None where there is none of that hash and size."""
        if digest.hash == EMPTY_HASH:
            return _INLINE
        row = self._raw_row(digest.hash)
        return row if row is not None and row_size(row) == digest.size_bytes else None

    def _raw_row(self, name: str) -> bytes | None:
        with self._store.reading() as snapshot:
            return snapshot.get(bytes.fromhex(name), db=self._table)

    def _absent(self, digest: digest_pb2.Digest) -> ServiceError:
        with self._store.reading() as snapshot:
            row = snapshot.get(bytes.fromhex(digest.hash), db=self._quarantined)
        if row is not None and int.from_bytes(row[:8], "big") == digest.size_bytes:
            return _lost(digest)
        return not_found(blob_name(digest))

    def _enter(self, digest: digest_pb2.Digest, row: bytes) -> "Future[None]":
        key = bytes.fromhex(digest.hash)
        is_new = False

        def work(transaction: Row) -> None:
            nonlocal is_new
            is_new = transaction.get(key, db=self._table) is None
            transaction.put(key, row, db=self._table)
            transaction.delete(key, db=self._quarantined)

        def count(done: "Future[None]") -> None:
            if not done.cancelled() and done.exception() is None and is_new:
                self.room.count(1, digest.size_bytes)

        future = self._store.submit(work, len(row))
        future.add_done_callback(count)
        return future

    def _take_over(self, digest: digest_pb2.Digest, offset: int, path: Path) -> None:
        """Moves what an interrupted upload left to `path`, if it is as long as is expected."""
        held = self._parked_bytes(digest)
        try:
            if held != offset:
                raise FileNotFoundError
            (self.parked / digest.hash).rename(path)
        except FileNotFoundError:
            raise aborted(
                "OFFSET_MISMATCH",
                f"{blob_name(digest)}: write_offset is {offset} but {held} bytes are held",
                committed_size=str(held),
            ) from None

    def _parked_bytes(self, digest: digest_pb2.Digest) -> int:
        try:
            size_bytes = (self.parked / digest.hash).stat().st_size
        except FileNotFoundError:
            return 0
        return size_bytes if size_bytes <= digest.size_bytes else 0

    def _all_parked_bytes(self) -> int:
        return sum(
            entry.stat().st_size for entry in os.scandir(self.parked) if "." not in entry.name
        )


def _signature(facts: os.stat_result) -> Signature:
    return facts.st_ino, facts.st_mtime_ns, facts.st_size


def _lost(digest: digest_pb2.Digest) -> ServiceError:
    name = blob_name(digest)
    return data_loss(f"{name} was damaged at rest: upload it again", name=name)


@lru_cache(maxsize=4096)
def _file_hash(path: Path, signature: Signature) -> str:
    """Returns the SHA-256 of a file; `signature` tells its versions apart."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
