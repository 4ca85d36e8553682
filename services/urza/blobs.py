"""Blobs: immutable bytes under their SHA-256, verified on the way in and on the way out.

Small blobs live in the row itself. Larger ones are files named by their hash, written beside,
synced, renamed into place and only then entered as a row: a blob is either whole and durable, or
not there.

An upload writes to a file of its own, so writers of one blob never meet. When it is interrupted the
file is parked under the hash, where the next writer may take it over and go on; of two parked files
the longer one stays.
"""

import errno
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

from esper.common.v1 import digest_pb2
from esper.services.serving.errors import ServiceError
from esper.services.serving.errors import aborted
from esper.services.serving.errors import data_loss
from esper.services.serving.errors import exhausted
from esper.services.serving.errors import invalid
from esper.services.serving.errors import not_found
from esper.services.serving.errors import out_of_range
from esper.services.serving.limits import MAX_CHUNK_BYTES
from esper.services.store.engine import Store
from esper.services.store.opening import Row
from esper.services.urza.names import EMPTY_HASH
from esper.services.urza.names import HASH

LOG = logging.getLogger("esper.urza.blobs")

TABLE = "blobs"
INLINE_BYTES = 64 << 10
FREE_RESERVE_BYTES = 64 << 20
"""Room on the disk that uploads leave free, for the rows."""

_INLINE = b"\x00"
_FILE = b"\x01"


def blob_name(digest: digest_pb2.Digest) -> str:
    """Returns the name of a blob in messages."""
    return f"blobs/{digest.hash}/{digest.size_bytes}"


class BlobStore:
    """The blobs of one Urza. Its methods block, and may be called from any thread.

    Args:
        store: Holds the rows; its table `blobs` is this object's alone.
        directory: Holds the files; created where missing.
    """

    def __init__(self, store: Store, directory: Path) -> None:
        self._store = store
        self._table = store.table(TABLE)
        self._files = directory / "files"
        self._partial = directory / "partial"
        for folder in (self._files, self._partial):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for path in sorted(self._partial.iterdir()):
            if HASH.match(path.name) and "." in path.name:  # an upload that a dead server left
                self._park(path, path.name.partition(".")[0])

    def contains(self, digest: digest_pb2.Digest) -> bool:
        """Returns whether the whole blob is stored."""
        return self._row(digest) is not None

    def missing(self, digests: Sequence[digest_pb2.Digest]) -> list[digest_pb2.Digest]:
        """Returns those of `digests` that are not stored, in the same order."""
        return [digest for digest in digests if not self.contains(digest)]

    def committed(self, digest: digest_pb2.Digest) -> tuple[int, bool]:
        """Returns the number of bytes held, and whether they are the whole blob."""
        if self.contains(digest):
            return digest.size_bytes, True
        return self._parked_bytes(digest), False

    def begin(self, digest: digest_pb2.Digest, offset: int) -> "Upload | None":
        """Starts an upload, or goes on with one; None where the blob is already there.

        Args:
            digest: What will have been uploaded.
            offset: 0 to start afresh, else the `committed` size of an interrupted upload.

        Raises:
            ServiceError: ABORTED where `offset` is neither; RESOURCE_EXHAUSTED where the disk is
                full.
        """
        if self.contains(digest):
            return None
        statistics = os.statvfs(self._partial)
        free_bytes = statistics.f_bavail * statistics.f_frsize - FREE_RESERVE_BYTES
        if digest.size_bytes - offset > free_bytes:
            raise exhausted(
                "DISK_FULL", f"{blob_name(digest)} needs more than the {free_bytes} bytes free"
            )
        path = self._partial / f"{digest.hash}.{secrets.token_hex(8)}"
        if offset:
            held = self._parked_bytes(digest)
            try:
                if held != offset:
                    raise FileNotFoundError
                (self._partial / digest.hash).rename(path)
            except FileNotFoundError:
                raise aborted(
                    "OFFSET_MISMATCH",
                    f"{blob_name(digest)}: write_offset is {offset} but {held} bytes are held",
                    committed_size=str(held),
                ) from None
        return Upload(self, digest, path)

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
                after which the blob counts as missing and can be uploaded again.
        """
        row = self._row(digest)
        if row is None:
            raise not_found(blob_name(digest))
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
            raise self._damaged(digest)
        if offset < end:
            yield content[offset:end]

    def _read_file(self, digest: digest_pb2.Digest, offset: int, end: int) -> Iterator[bytes]:
        path = self._path(digest.hash)
        try:
            file = path.open("rb")
        except FileNotFoundError:
            raise self._damaged(digest) from None
        with file:
            whole = offset == 0 and end == digest.size_bytes
            facts = os.fstat(file.fileno())
            signature = (facts.st_ino, facts.st_mtime_ns, facts.st_size)
            if facts.st_size != digest.size_bytes or (
                not whole and _file_hash(path, signature) != digest.hash
            ):
                raise self._damaged(digest)
            file.seek(offset)
            hasher = hashlib.sha256()
            while offset < end:
                chunk = file.read(min(MAX_CHUNK_BYTES, end - offset))
                if not chunk:
                    raise self._damaged(digest)
                offset += len(chunk)
                if whole:
                    hasher.update(chunk)
                    if offset == end and hasher.hexdigest() != digest.hash:
                        raise self._damaged(digest)
                yield chunk

    def _row(self, digest: digest_pb2.Digest) -> bytes | None:
        """Returns the row of the blob; None where there is none of that hash and size."""
        if digest.hash == EMPTY_HASH:
            return _INLINE
        with self._store.reading() as snapshot:
            row = snapshot.get(bytes.fromhex(digest.hash), db=self._table)
        if row is None:
            return None
        size_bytes = len(row) - 1 if row.startswith(_INLINE) else int.from_bytes(row[1:], "big")
        return row if size_bytes == digest.size_bytes else None

    def _path(self, name: str) -> Path:
        return self._files / name[:2] / name

    def _parked_bytes(self, digest: digest_pb2.Digest) -> int:
        try:
            size_bytes = (self._partial / digest.hash).stat().st_size
        except FileNotFoundError:
            return 0
        return size_bytes if size_bytes <= digest.size_bytes else 0

    def _park(self, path: Path, name: str) -> None:
        """Keeps an interrupted upload for the next writer, unless more is already there."""
        parked = self._partial / name
        if parked.exists() and parked.stat().st_size >= path.stat().st_size:
            path.unlink()
        else:
            path.replace(parked)

    def _enter(self, digest: digest_pb2.Digest, row: bytes) -> "Future[None]":
        key = bytes.fromhex(digest.hash)

        def work(transaction: Row) -> None:
            transaction.put(key, row, db=self._table)

        return self._store.submit(work, len(row))

    def _damaged(self, digest: digest_pb2.Digest) -> ServiceError:
        """Takes a damaged blob out of the store, so that it can be written again."""
        LOG.error("%s is damaged at rest and has been taken out", blob_name(digest))
        key = bytes.fromhex(digest.hash)

        def work(transaction: Row) -> None:
            transaction.delete(key, db=self._table)

        self._store.submit(work).result()
        path = self._path(digest.hash)
        if path.exists():
            path.rename(self._partial / f"damaged-{digest.hash}-{secrets.token_hex(4)}")
        return data_loss(
            f"{blob_name(digest)} is damaged at rest: upload it again", name=blob_name(digest)
        )


class Upload:
    """One upload under way. Every one ends with `finish` or `interrupt`.

    Args:
        blobs: Where it will be stored.
        digest: What it must turn out to be.
        path: The file that it writes, with what was uploaded before.
    """

    def __init__(self, blobs: BlobStore, digest: digest_pb2.Digest, path: Path) -> None:
        self._blobs = blobs
        self._digest = digest
        self._path = path
        # A cancelled call is tidied up while its last chunk may still be on the way in.
        self._lock = threading.Lock()
        self._hasher = hashlib.sha256()
        self._content = bytearray()
        self.size_bytes = 0
        """Number of bytes held so far."""
        self._file = None if digest.size_bytes <= INLINE_BYTES else path.open("a+b")
        if self._file is not None:
            self._file.seek(0)
            while chunk := self._file.read(MAX_CHUNK_BYTES):
                self._hasher.update(chunk)
                self.size_bytes += len(chunk)

    @property
    def complete(self) -> bool:
        """Whether as many bytes are held as the digest says."""
        return self.size_bytes == self._digest.size_bytes

    def write(self, offset: int, data: bytes) -> None:
        """Appends a chunk.

        Raises:
            ServiceError: INVALID_ARGUMENT for a gap, an overlap, or bytes beyond the size;
                RESOURCE_EXHAUSTED where the disk is full.
        """
        with self._lock:
            if offset != self.size_bytes:
                raise invalid("write_offset", offset, f"must be {self.size_bytes}, the bytes held")
            if len(data) > MAX_CHUNK_BYTES:
                raise invalid(
                    "data", f"{len(data)} bytes", f"must be at most {MAX_CHUNK_BYTES} bytes"
                )
            if self.size_bytes + len(data) > self._digest.size_bytes:
                rule = f"must not go beyond the size of the blob, {self._digest.size_bytes} bytes"
                raise invalid("data", f"{len(data)} bytes at {offset}", rule)
            if self._file is None:
                self._content += data
            else:
                try:
                    self._file.write(data)
                except OSError as error:
                    raise _disk_error(error) from error
            self._hasher.update(data)
            self.size_bytes += len(data)

    def finish(self) -> "Future[None]":
        """Verifies the bytes and stores them; the future is done once they are durable.

        Raises:
            ServiceError: INVALID_ARGUMENT where the bytes are not what the digest says; they are
                dropped then.
        """
        with self._lock:
            assert self.complete
            found = self._hasher.hexdigest()
            if found != self._digest.hash:
                self.drop()
                raise invalid("digest.hash", self._digest.hash, f"is not that of the data, {found}")
            if self._file is None:
                return self._blobs._enter(self._digest, _INLINE + bytes(self._content))
            target = self._blobs._path(self._digest.hash)
            try:
                self._file.flush()
                os.fsync(self._file.fileno())
                self._file.close()
                if not target.parent.exists():
                    target.parent.mkdir(mode=0o700, exist_ok=True)
                    _sync_folder(target.parent.parent)
                self._path.replace(target)
                _sync_folder(target.parent)
            except OSError as error:
                raise _disk_error(error) from error
            size = self._digest.size_bytes.to_bytes(8, "big")
            return self._blobs._enter(self._digest, _FILE + size)

    def interrupt(self) -> int:
        """Keeps what has come so far for a later writer, and returns how much that is in bytes."""
        with self._lock:
            if self._file is None or self._file.closed:
                return 0
            if self.size_bytes == 0:
                self.drop()
                return 0
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self._blobs._park(self._path, self._digest.hash)
            return self.size_bytes

    def drop(self) -> None:
        """Forgets what has come."""
        if self._file is not None:
            self._file.close()
            self._path.unlink(missing_ok=True)


@lru_cache(maxsize=4096)
def _file_hash(path: Path, signature: tuple[int, int, int]) -> str:
    """Returns the SHA-256 of a file; `signature` tells its versions apart."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _disk_error(error: OSError) -> Exception:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return exhausted("DISK_FULL", "no room on the disk of the store")
    return error
