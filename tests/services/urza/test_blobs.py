import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from esper.common.v1 import digest_pb2
from esper.services.serving.errors import ServiceError
from esper.services.serving.limits import MAX_CHUNK_BYTES
from esper.services.store.engine import Store
from esper.services.store.opening import Schema
from esper.services.urza.blobs import TABLES
from esper.services.urza.blobs import BlobStore
from esper.services.urza.uploads import INLINE_BYTES

LARGE = 3 * MAX_CHUNK_BYTES + 17


def digest_of(data: bytes) -> digest_pb2.Digest:
    return digest_pb2.Digest(hash=hashlib.sha256(data).hexdigest(), size_bytes=len(data))


class Opened:
    """A blob store that can be closed and opened again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.reopen()

    def reopen(self) -> None:
        self.store = Store(self.folder, Schema(TABLES, 1))
        self.blobs = BlobStore(self.store, self.folder / "blobs")

    def write(self, data: bytes, offset: int = 0) -> digest_pb2.Digest:
        digest = digest_of(data)
        upload = self.blobs.begin(digest, offset)
        assert upload is not None
        while True:
            upload.write(offset, data[offset : offset + MAX_CHUNK_BYTES])
            offset = upload.size_bytes
            if upload.complete:
                break
        upload.finish().result(10)
        return digest

    def read(self, digest: digest_pb2.Digest, offset: int = 0, limit: int = 0) -> bytes:
        return b"".join(self.blobs.read(digest, offset, limit))

    def file_of(self, digest: digest_pb2.Digest) -> Path:
        return self.folder / "blobs" / "files" / digest.hash[:2] / digest.hash


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Opened]:
    opened = Opened(tmp_path)
    yield opened
    opened.store.close()


@pytest.mark.parametrize("size", [1, INLINE_BYTES, INLINE_BYTES + 1, MAX_CHUNK_BYTES, LARGE])
def test_blobs_come_back_after_a_restart(opened: Opened, size: int) -> None:
    data = os.urandom(size)
    digest = opened.write(data)
    assert opened.blobs.committed(digest) == (size, True)
    opened.store.close()
    opened.reopen()
    assert opened.read(digest) == data
    assert opened.blobs.begin(digest, 0) is None
    assert not list((opened.folder / "blobs" / "partial").iterdir())
    assert opened.file_of(digest).exists() is (size > INLINE_BYTES)


def test_the_empty_blob_is_always_there(opened: Opened) -> None:
    digest = digest_of(b"")
    assert opened.blobs.begin(digest, 0) is None
    assert opened.read(digest) == b""
    assert opened.blobs.missing([digest]) == []


@pytest.mark.parametrize("size", [1000, LARGE])
@pytest.mark.parametrize(
    ("offset", "limit"), [(0, 0), (0, 1), (10, 0), (10, 20), (999, 5000), (1000, 0), (1000, 7)]
)
def test_parts_are_read(opened: Opened, size: int, offset: int, limit: int) -> None:
    data = os.urandom(size)
    digest = opened.write(data)
    end = size if limit == 0 else offset + limit
    assert opened.read(digest, offset, limit) == data[offset:end]


def test_reading_beyond_the_end_or_nothing_is_refused(opened: Opened) -> None:
    digest = opened.write(b"spark")
    with pytest.raises(ServiceError) as caught:
        opened.blobs.read(digest, 6)
    assert caught.value.code.name == "OUT_OF_RANGE"
    other = digest_pb2.Digest(hash=digest.hash, size_bytes=6)
    for missing in (digest_of(b"other"), other):
        with pytest.raises(ServiceError) as caught:
            opened.blobs.read(missing)
        assert caught.value.code.name == "NOT_FOUND"
    assert opened.blobs.missing([digest, other]) == [other]


def test_an_interrupted_upload_goes_on_across_a_restart(opened: Opened) -> None:
    data = os.urandom(LARGE)
    digest = digest_of(data)
    upload = opened.blobs.begin(digest, 0)
    assert upload is not None
    upload.write(0, data[:MAX_CHUNK_BYTES])
    assert not opened.blobs.contains(digest)
    assert upload.interrupt() == MAX_CHUNK_BYTES
    opened.store.close()
    opened.reopen()
    assert opened.blobs.committed(digest) == (MAX_CHUNK_BYTES, False)
    opened.write(data, MAX_CHUNK_BYTES)
    assert opened.read(digest) == data


def test_an_upload_that_a_dead_server_left_goes_on(opened: Opened) -> None:
    data = os.urandom(LARGE)
    digest = digest_of(data)
    for length in (MAX_CHUNK_BYTES, 10):  # of two the longer is kept
        upload = opened.blobs.begin(digest, 0)
        assert upload is not None
        upload.write(0, data[:length])
        assert upload._file is not None
        upload._file.settle()
    opened.store.close()
    opened.reopen()
    assert opened.blobs.committed(digest) == (MAX_CHUNK_BYTES, False)
    assert len(list((opened.folder / "blobs" / "partial").iterdir())) == 1


def test_a_wrong_offset_is_told_the_right_one(opened: Opened) -> None:
    digest = digest_of(os.urandom(LARGE))
    with pytest.raises(ServiceError) as caught:
        opened.blobs.begin(digest, 5)
    assert caught.value.code.name == "ABORTED"
    assert caught.value.metadata["committed_size"] == "0"


def test_concurrent_writers_of_one_blob_both_succeed(opened: Opened) -> None:
    data = os.urandom(LARGE)
    digest = digest_of(data)
    uploads = [opened.blobs.begin(digest, 0) for _ in range(2)]
    for start in range(0, LARGE, MAX_CHUNK_BYTES):
        for upload in uploads:
            assert upload is not None
            upload.write(start, data[start : start + MAX_CHUNK_BYTES])
    for upload in uploads:
        assert upload is not None
        upload.finish().result(10)
    assert opened.read(digest) == data


@pytest.mark.parametrize("size", [1000, LARGE])
def test_data_that_is_not_the_digests_is_dropped(opened: Opened, size: int) -> None:
    digest = digest_of(os.urandom(size))
    upload = opened.blobs.begin(digest, 0)
    assert upload is not None
    for start in range(0, size, MAX_CHUNK_BYTES):
        upload.write(start, bytes(min(MAX_CHUNK_BYTES, size - start)))
    with pytest.raises(ServiceError) as caught:
        upload.finish()
    assert caught.value.violations[0].field == "digest.hash"
    assert opened.blobs.committed(digest) == (0, False)


def test_gaps_overlaps_and_excess_are_refused(opened: Opened) -> None:
    data = os.urandom(LARGE)
    upload = opened.blobs.begin(digest_of(data), 0)
    assert upload is not None
    upload.write(0, data[:1000])
    for offset in (0, 999, 1001):
        with pytest.raises(ServiceError, match="must be 1000"):
            upload.write(offset, b"x")
    with pytest.raises(ServiceError, match="at most 1048576 bytes"):
        upload.write(1000, bytes(MAX_CHUNK_BYTES + 1))
    for start in range(1000, LARGE, MAX_CHUNK_BYTES):
        upload.write(start, data[start : start + MAX_CHUNK_BYTES])
    with pytest.raises(ServiceError, match="beyond the size"):
        upload.write(LARGE, b"x")
    upload.finish().result(10)
    assert opened.read(digest_of(data)) == data


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_damage_at_rest_is_found_and_healed_by_a_new_upload(
    opened: Opened, damage: str, whole: bool
) -> None:
    data = os.urandom(LARGE)
    digest = opened.write(data)
    path = opened.file_of(digest)
    if damage == "flip":
        path.write_bytes(data[:2000] + bytes([data[2000] ^ 1]) + data[2001:])
    elif damage == "truncate":
        path.write_bytes(data[:-1])
    else:
        path.unlink()
    with pytest.raises(ServiceError) as caught:
        opened.read(digest, *(() if whole else (5, 6)))
    assert caught.value.code.name == "DATA_LOSS"
    assert opened.blobs.missing([digest]) == [digest]
    assert opened.write(data) == digest
    assert opened.read(digest) == data
    assert opened.read(digest, 5, 6) == data[5:11]


def test_damage_in_a_row_is_found(opened: Opened) -> None:
    digest = opened.write(b"spark")
    key = bytes.fromhex(digest.hash)
    table = opened.store.table("blobs")
    opened.store.submit(lambda row: row.put(key, b"\x00sparc", db=table)).result(10)
    with pytest.raises(ServiceError) as caught:
        opened.read(digest)
    assert caught.value.code.name == "DATA_LOSS"
    opened.write(b"spark")
    assert opened.read(digest) == b"spark"
