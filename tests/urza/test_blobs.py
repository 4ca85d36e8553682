"""Blobs by Urza's client and server together, over a real socket."""

import os
import threading
import time
from collections.abc import Callable
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from urza_samples import HASH
from urza_samples import refusal

from esper.common.v1 import digest_pb2
from esper.plane import Plane
from esper.plane import connect
from esper.urza.client import UrzaClient
from esper.urza.transfer import digest_of
from esper.urza.v1 import blob_pb2
from esper.urza.v1 import blob_pb2_grpc

MIB = 1 << 20


@pytest.mark.parametrize("size", [0, 1, 65536, 65537, 5 * MIB + 3, 20 * MIB + 1])
def test_blobs_make_the_round_trip(urza: UrzaClient, size: int) -> None:
    data = os.urandom(size)
    digest = digest_of(data)
    assert urza.find_missing_blobs([digest]) == ([] if size == 0 else [digest])
    assert urza.write_blob(data) == digest
    assert urza.write_blob(data) == digest
    assert urza.read_blob(digest) == data
    assert urza.find_missing_blobs([digest]) == []


@pytest.mark.parametrize("size", [100, 9 * MIB])
def test_a_digest_that_is_known_is_taken_and_verified(urza: UrzaClient, size: int) -> None:
    data, other = os.urandom(size), os.urandom(size)
    assert urza.write_blob(data, digest_of(data)) == digest_of(data)
    assert urza.read_blob(digest_of(data)) == data
    error = refusal(lambda: urza.write_blob(data, digest_of(other)))
    assert error.code is grpc.StatusCode.INVALID_ARGUMENT
    assert [violation.field for violation in error.violations] == ["digest.hash"]
    assert urza.find_missing_blobs([digest_of(other)]) == [digest_of(other)]


def test_missing_blobs_are_found_among_many(urza: UrzaClient) -> None:
    stored = urza.write_blob(os.urandom(10))
    absent = [digest_of(str(n).encode() * 9) for n in range(1500)]
    assert urza.find_missing_blobs([*absent[:700], stored, *absent[700:]]) == absent


def test_many_writers_of_one_blob_all_succeed(urza: UrzaClient) -> None:
    data = os.urandom(4 * MIB)
    with ThreadPoolExecutor(6) as threads:
        digests = list(threads.map(lambda _: urza.write_blob(data), range(6)))
    assert all(digest == digest_of(data) for digest in digests)
    assert urza.read_blob(digests[0]) == data


class Upload:
    """Sends the first chunks of a blob and then waits until told to go on or break off."""

    def __init__(self, plane: Plane, data: bytes, num_chunks: int) -> None:
        self.digest = digest_of(data)
        self._go_on = threading.Event()
        self._chunks = [data[n * MIB : (n + 1) * MIB] for n in range(num_chunks)]
        stub = blob_pb2_grpc.BlobServiceStub(plane.channel("urza"))
        self.call = stub.WriteBlob.future(self._requests(), timeout=60)

    def _requests(self) -> Iterator[blob_pb2.WriteBlobRequest]:
        for number, chunk in enumerate(self._chunks):
            yield blob_pb2.WriteBlobRequest(
                digest=self.digest if number == 0 else None, write_offset=number * MIB, data=chunk
            )
        self._go_on.wait(60)

    def end(self) -> None:
        self._go_on.set()


def committed(stub: blob_pb2_grpc.BlobServiceStub, digest: digest_pb2.Digest) -> int:
    request = blob_pb2.QueryWriteRequest(digest=digest)
    return stub.QueryWrite(request, timeout=30, wait_for_ready=True).committed_size


def wait_for(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline_s, "waited in vain"
        time.sleep(0.02)


def test_a_broken_off_upload_goes_on_where_it_stopped(
    store_plane: Plane, blobs: blob_pb2_grpc.BlobServiceStub
) -> None:
    data = os.urandom(6 * MIB)
    upload = Upload(store_plane, data, 3)
    partial = store_plane.info.data_dir + "/urza/blobs/partial"

    def three_came() -> bool:
        sizes = [entry.stat().st_size for entry in os.scandir(partial)]
        return 3 * MIB in sizes

    wait_for(three_came)
    assert store_plane.urza.find_missing_blobs([upload.digest]) == [upload.digest]
    upload.call.cancel()
    upload.end()
    wait_for(lambda: committed(blobs, upload.digest) == 3 * MIB)
    wrong = [blob_pb2.WriteBlobRequest(digest=upload.digest, write_offset=MIB, data=data[:1])]
    error = refusal(lambda: blobs.WriteBlob(iter(wrong), timeout=30))
    assert (error.code, error.reason) == (grpc.StatusCode.ABORTED, "OFFSET_MISMATCH")
    assert error.metadata == {"committed_size": str(3 * MIB)}
    rest = [
        blob_pb2.WriteBlobRequest(
            digest=upload.digest, write_offset=start, data=data[start : start + MIB]
        )
        for start in range(3 * MIB, 6 * MIB, MIB)
    ]
    answer = blobs.WriteBlob(iter(rest), timeout=30)
    assert answer.committed_size == 6 * MIB
    assert store_plane.urza.read_blob(upload.digest) == data


def test_an_upload_outlives_the_death_of_the_server(start_server: Callable[..., object]) -> None:
    server = start_server("urza")
    data = os.urandom(6 * MIB)
    with connect(server.address, timeout_s=20) as plane:
        upload = Upload(plane, data, 4)
        partial = server.data / "urza" / "blobs" / "partial"
        wait_for(lambda: any(path.stat().st_size == 4 * MIB for path in partial.iterdir()))
        server.stop(9)
        upload.end()
        start_server("urza")
        stub = blob_pb2_grpc.BlobServiceStub(plane.channel("urza"))
        assert committed(stub, upload.digest) == 4 * MIB
        assert plane.urza.find_missing_blobs([upload.digest]) == [upload.digest]
        assert plane.urza.write_blob(data) == upload.digest
        assert plane.urza.read_blob(upload.digest) == data


def test_the_client_goes_on_by_itself_after_a_restart(start_server: Callable[..., object]) -> None:
    server = start_server("urza")
    data = os.urandom(48 * MIB)
    partial = server.data / "urza" / "blobs" / "partial"
    with connect(server.address, timeout_s=20) as plane, ThreadPoolExecutor(1) as threads:
        writing = threads.submit(plane.urza.write_blob, data)
        wait_for(lambda: any(path.stat().st_size >= 2 * MIB for path in partial.iterdir()))
        server.stop(9)
        start_server("urza")
        digest = writing.result(60)
        assert plane.urza.read_blob(digest) == data


def test_a_piece_may_be_left_for_later(
    store_plane: Plane, blobs: blob_pb2_grpc.BlobServiceStub
) -> None:
    data = os.urandom(2 * MIB)
    digest = digest_of(data)
    first = [blob_pb2.WriteBlobRequest(digest=digest, data=data[:MIB])]
    assert blobs.WriteBlob(iter(first), timeout=30).committed_size == MIB
    second = [blob_pb2.WriteBlobRequest(digest=digest, write_offset=MIB, data=data[MIB:])]
    assert blobs.WriteBlob(iter(second), timeout=30).committed_size == 2 * MIB
    assert store_plane.urza.read_blob(digest) == data


@pytest.mark.parametrize(
    ("hash_", "size", "field"),
    [
        ("", 1, "digest.hash"),
        (HASH[:-1], 1, "digest.hash"),
        (HASH + "0", 1, "digest.hash"),
        ("G" + HASH[1:], 1, "digest.hash"),
        ("A" + HASH[1:], 1, "digest.hash"),
        (HASH[:-1] + "\n", 1, "digest.hash"),
        ("../" + HASH[3:], 1, "digest.hash"),
        ("\N{FULLWIDTH DIGIT ONE}" + HASH[1:], 1, "digest.hash"),
        (HASH, -1, "digest.size_bytes"),
        (HASH, (16 << 30) + 1, "digest.size_bytes"),
        (HASH, 0, "digest.size_bytes"),
        (digest_of(b"").hash, 1, "digest.size_bytes"),
    ],
)
def test_bad_digests_are_refused_everywhere(
    blobs: blob_pb2_grpc.BlobServiceStub, hash_: str, size: int, field: str
) -> None:
    digest = digest_pb2.Digest(hash=hash_, size_bytes=size)
    write = blob_pb2.WriteBlobRequest(digest=digest)
    calls: list[tuple[str, Callable[[], object]]] = [
        ("", lambda: blobs.QueryWrite(blob_pb2.QueryWriteRequest(digest=digest))),
        ("", lambda: list(blobs.ReadBlob(blob_pb2.ReadBlobRequest(digest=digest)))),
        ("", lambda: blobs.WriteBlob(iter([write]))),
        (
            "s[0]",
            lambda: blobs.FindMissingBlobs(blob_pb2.FindMissingBlobsRequest(digests=[digest])),
        ),
    ]
    for suffix, call in calls:
        error = refusal(call)
        assert error.code is grpc.StatusCode.INVALID_ARGUMENT
        assert [violation.field for violation in error.violations] == [
            field.replace("digest", f"digest{suffix}", 1)
        ]


def test_bad_offsets_and_empty_uploads_are_refused(
    urza: UrzaClient, blobs: blob_pb2_grpc.BlobServiceStub
) -> None:
    digest = urza.write_blob(os.urandom(7))
    for offset, limit, fields in ((-1, 0, ["read_offset"]), (0, -1, ["read_limit"])):
        request = blob_pb2.ReadBlobRequest(digest=digest, read_offset=offset, read_limit=limit)
        error = refusal(lambda request=request: list(blobs.ReadBlob(request)))
        assert [violation.field for violation in error.violations] == fields
    request = blob_pb2.ReadBlobRequest(digest=digest, read_offset=8)
    assert refusal(lambda: list(blobs.ReadBlob(request))).code is grpc.StatusCode.OUT_OF_RANGE
    error = refusal(lambda: blobs.WriteBlob(iter([])))
    assert [violation.field for violation in error.violations] == ["digest"]
    many = blob_pb2.FindMissingBlobsRequest(digests=[digest] * 1001)
    assert refusal(lambda: blobs.FindMissingBlobs(many)).violations[0].field == "digests"


def test_a_blob_that_is_damaged_at_rest_is_data_loss(store_plane: Plane) -> None:
    data = os.urandom(3 * MIB)
    digest = store_plane.urza.write_blob(data)
    path = f"{store_plane.info.data_dir}/urza/blobs/files/{digest.hash[:2]}/{digest.hash}"
    with open(path, "r+b") as file:
        file.seek(2 * MIB)
        file.write(bytes([data[2 * MIB] ^ 255]))
    error = refusal(lambda: store_plane.urza.read_blob(digest))
    assert (error.code, error.reason) == (grpc.StatusCode.DATA_LOSS, "CORRUPT_AT_REST")
    assert store_plane.urza.write_blob(data) == digest
    assert store_plane.urza.read_blob(digest) == data
