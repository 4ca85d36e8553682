"""A bounded folder of blobs that were read before."""

import contextlib
import hashlib
import os
import re
import tempfile
import threading
from pathlib import Path

from esper.common.v1 import digest_pb2

_HASH = re.compile(r"[0-9a-f]{64}")


class BlobCache:
    """Keeps blobs on the local disk, the least recently used going first.

    Blobs never change, so a cached one is never stale. What is read is verified against its
    digest, and dropped where it is damaged. Several threads and processes may share a folder: files
    come by renaming, and one that another process has removed is a miss.

    Args:
        directory: Holds the files; created where missing. Nothing else should live there.
        max_bytes: Bound of their sizes together; at least 1. A larger blob is not kept.

    Attributes:
        hits: Reads answered from the folder.
        misses: Reads that were not.

    Raises:
        ValueError: If `max_bytes` breaks its rule.
        OSError: If the directory cannot be made.
    """

    def __init__(self, directory: Path, max_bytes: int) -> None:
        if max_bytes < 1:
            raise ValueError(f"max_bytes is {max_bytes}, but it must be at least 1 byte")
        self.directory = directory
        self.max_bytes = max_bytes
        self.hits = 0
        self.misses = 0
        self._lock = threading.Lock()
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)

    def get(self, digest: digest_pb2.Digest) -> bytes | None:
        """Returns the bytes of a blob, or None where they are not here."""
        data = self._read(digest)
        with self._lock:
            if data is None:
                self.misses += 1
            else:
                self.hits += 1
        return data

    def put(self, digest: digest_pb2.Digest, data: bytes) -> None:
        """Keeps a blob, and makes room for it.

        Args:
            digest: That of `data`, which the caller has verified.
            data: The blob.

        Raises:
            ValueError: If the digest is not one, as it becomes a file's name.
        """
        path = self._path(digest)
        if not 0 < len(data) <= self.max_bytes:
            return
        # A cache that cannot be written is a slow one, not a reason to fail.
        with contextlib.suppress(OSError), self._lock:
            if path.exists():  # what is damaged goes when it is read
                os.utime(path)
                return
            self._make_room(len(data))
            handle, name = tempfile.mkstemp(dir=self.directory, prefix="coming-")
            try:
                with os.fdopen(handle, "wb") as file:
                    file.write(data)
                os.replace(name, path)
            except OSError:
                os.unlink(name)
                raise

    @property
    def size_bytes(self) -> int:
        """Bytes held now."""
        return sum(size for _, size, _ in self._entries())

    def _read(self, digest: digest_pb2.Digest) -> bytes | None:
        path = self._path(digest)
        try:
            data = path.read_bytes()
        except OSError:
            return None
        if len(data) != digest.size_bytes or hashlib.sha256(data).hexdigest() != digest.hash:
            path.unlink(missing_ok=True)
            return None
        with contextlib.suppress(OSError):
            os.utime(path)  # the time of its last use
        return data

    def _make_room(self, size_bytes: int) -> None:
        entries = self._entries()
        excess = sum(size for _, size, _ in entries) + size_bytes - self.max_bytes
        for _, size, path in sorted(entries):
            if excess <= 0:
                return
            path.unlink(missing_ok=True)
            excess -= size

    def _entries(self) -> list[tuple[int, int, Path]]:
        """Returns time of last use, size and path of every file, those half-written included."""
        found = []
        for path in self.directory.iterdir():
            with contextlib.suppress(FileNotFoundError):
                facts = path.stat()
                found.append((facts.st_mtime_ns, facts.st_size, path))
        return found

    def _path(self, digest: digest_pb2.Digest) -> Path:
        if not _HASH.fullmatch(digest.hash):
            raise ValueError(f"digest.hash is {digest.hash!r}, but it must be 64 hex digits")
        return self.directory / digest.hash
