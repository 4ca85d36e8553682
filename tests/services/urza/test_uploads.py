"""What goes on beside an upload: hashing, and making it durable."""

import contextlib
import hashlib
import os
from pathlib import Path

import pytest

from esper.common.v1 import digest_pb2
from esper.services.serving.limits import MAX_CHUNK_BYTES
from esper.services.store.engine import Store
from esper.services.store.opening import Schema
from esper.services.urza.blobs import TABLES
from esper.services.urza.blobs import BlobStore
from esper.services.urza.uploads import HASHED_ASIDE_BYTES
from esper.services.urza.uploads import SYNC_BYTES
from esper.services.urza.uploads import EarlySync
from esper.services.urza.uploads import HashingAside


def test_an_early_sync_that_fails_fails_the_upload() -> None:
    """The system tells of a failure only once: it must not be lost because nobody waited."""
    reading, writing = os.pipe()  # cannot be synced
    try:
        early = EarlySync(writing)
        early.note(SYNC_BYTES)
        with pytest.raises(OSError):
            early.end()
        again = EarlySync(writing)
        with pytest.raises(OSError):
            for _ in range(1_000_000):
                again.note(SYNC_BYTES)
        with pytest.raises(OSError):
            again.end()
    finally:
        os.close(reading)
        os.close(writing)


@pytest.mark.parametrize("size_bytes", [0, 1, HASHED_ASIDE_BYTES - 1, HASHED_ASIDE_BYTES + 12_345])
def test_the_hash_is_that_of_the_whole(size_bytes: int) -> None:
    data = os.urandom(size_bytes)
    hashing = HashingAside(size_bytes)
    try:
        for start in range(0, size_bytes, 100_000):
            hashing.add(data[start : start + 100_000])
        assert hashing.hexdigest() == hashlib.sha256(data).hexdigest()
    finally:
        hashing.close()


def test_chunks_that_come_after_the_end_of_their_call_change_nothing(tmp_path: Path) -> None:
    """A call is cancelled while a thread writes: what was held then is what stays."""
    data = os.urandom(HASHED_ASIDE_BYTES)
    digest = digest_pb2.Digest(hash=hashlib.sha256(data).hexdigest(), size_bytes=len(data))
    with contextlib.closing(Store(tmp_path, Schema(TABLES, 1))) as store:
        blobs = BlobStore(store, tmp_path / "blobs")
        upload = blobs.begin(digest, 0)
        assert upload is not None
        upload.write(0, data[:1000])
        assert upload.interrupt() == 1000
        upload.write(1000, data[1000:2000])
        assert blobs.committed(digest) == (1000, False)
        upload = blobs.begin(digest, 1000)
        assert upload is not None
        for start in range(1000, len(data), MAX_CHUNK_BYTES):
            upload.write(start, data[start : start + MAX_CHUNK_BYTES])
        upload.finish().result(60)
        assert b"".join(blobs.read(digest)) == data
