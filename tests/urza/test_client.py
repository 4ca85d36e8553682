"""Urza's client and server together, over a real socket."""

import os
import threading
import time
import uuid
from collections.abc import Callable
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from esper import blueprints
from esper.common.rpc import RpcError
from esper.common.rpc import decode_error
from esper.common.v1 import blueprint_pb2
from esper.common.v1 import digest_pb2
from esper.common.v1 import kernel_pb2
from esper.plane import Plane
from esper.plane import connect
from esper.urza.client import UrzaClient
from esper.urza.client import digest_of
from esper.urza.v1 import blob_pb2
from esper.urza.v1 import blob_pb2_grpc
from esper.urza.v1 import library_pb2 as pb
from esper.urza.v1 import library_pb2_grpc

MIB = 1 << 20
HASH = "0" * 64
PASSED = kernel_pb2.ValidationReport(passed=True, num_cases=3, tolerance=1e-5)


@pytest.fixture
def urza(store_plane: Plane) -> UrzaClient:
    return store_plane.urza


@pytest.fixture
def library(store_plane: Plane) -> library_pb2_grpc.LibraryServiceStub:
    return library_pb2_grpc.LibraryServiceStub(store_plane.channel("urza"))


@pytest.fixture
def blobs(store_plane: Plane) -> blob_pb2_grpc.BlobServiceStub:
    return blob_pb2_grpc.BlobServiceStub(store_plane.channel("urza"))


_width = 100


def new_kernel(name: str = "bottleneck", width: int | None = None) -> kernel_pb2.Kernel:
    """Returns a kernel that no other test has stored, as its width is its own."""
    global _width
    _width += 8
    place = kernel_pb2.KernelSignature(
        slot_kind=kernel_pb2.SLOT_KIND_LINEAR,
        chunk_width=width or _width,
        source_width=width or _width,
        source=blueprint_pb2.SEED_SOURCE_OUTPUT,
        dtype=kernel_pb2.DATA_TYPE_FLOAT32,
        device_class=kernel_pb2.DEVICE_CLASS_CPU,
    )
    return blueprints.lower(blueprints.get(name), place)


@pytest.fixture
def kernel(urza: UrzaClient) -> pb.KernelRecord:
    urza.create_blueprint(blueprints.get("bottleneck"))
    return urza.create_kernel(new_kernel(), tags=["tag"])


def refusal(call: Callable[[], object]) -> RpcError:
    with pytest.raises((RpcError, grpc.RpcError)) as caught:
        call()
    error = caught.value
    return error if isinstance(error, RpcError) else decode_error(error)


# ---------------------------------------------------------------- blobs


@pytest.mark.parametrize("size", [0, 1, 65536, 65537, 5 * MIB + 3])
def test_blobs_make_the_round_trip(urza: UrzaClient, size: int) -> None:
    data = os.urandom(size)
    digest = digest_of(data)
    assert urza.find_missing_blobs([digest]) == ([] if size == 0 else [digest])
    assert urza.write_blob(data) == digest
    assert urza.write_blob(data) == digest
    assert urza.read_blob(digest) == data
    assert urza.find_missing_blobs([digest]) == []


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


# ---------------------------------------------------------------- library


@pytest.mark.parametrize("name", blueprints.names())
def test_every_starting_blueprint_is_stored_under_its_digest(urza: UrzaClient, name: str) -> None:
    blueprint = blueprints.get(name)
    record = urza.create_blueprint(blueprint)
    assert record.name == f"blueprints/{blueprints.blueprint_digest(blueprint)}"
    assert record.blueprint == blueprint
    assert record.state == pb.BLUEPRINT_STATE_PROPOSED
    again = urza.create_blueprint(blueprint)
    assert again == record
    assert urza.get_blueprint(record.name) == record
    assert record.name in [found.name for found in urza.list_blueprints()]


def test_an_unsound_blueprint_is_refused_by_field(urza: UrzaClient) -> None:
    blueprint = blueprints.get("bottleneck")
    blueprint.graph.nodes[0].inputs[0].node = "nowhere"
    error = refusal(lambda: urza.create_blueprint(blueprint))
    assert error.code is grpc.StatusCode.INVALID_ARGUMENT
    assert error.violations[0].field.startswith("blueprint.graph.nodes[0]")
    tagged = blueprints.get("bottleneck")
    tagged.tags.extend(["x"] * 40)
    assert refusal(lambda: urza.create_blueprint(tagged)).violations[0].field == "blueprint.tags"


def test_kernels_make_the_round_trip(urza: UrzaClient, kernel: pb.KernelRecord) -> None:
    assert kernel.name == f"kernels/{blueprints.kernel_digest(kernel.kernel)}"
    assert kernel.state == pb.KERNEL_STATE_TESTING
    assert list(kernel.tags) == ["tag"]
    assert not kernel.HasField("validation")
    assert kernel.create_time.seconds > 0
    assert urza.get_kernel(kernel.name) == kernel
    assert urza.create_kernel(kernel.kernel) == kernel


def test_a_kernel_needs_its_blueprint_and_its_weights(urza: UrzaClient) -> None:
    orphan = new_kernel("glu")
    orphan.blueprint_digest = HASH
    error = refusal(lambda: urza.create_kernel(orphan))
    assert (error.code, error.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "NO_BLUEPRINT")
    assert error.metadata == {"name": f"blueprints/{HASH}"}
    urza.create_blueprint(blueprints.get("glu"))
    heavy = new_kernel("glu")
    weights = os.urandom(100)
    heavy.weights.CopyFrom(digest_of(weights))
    error = refusal(lambda: urza.create_kernel(heavy))
    assert (error.code, error.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "NO_WEIGHTS")
    urza.write_blob(weights)
    assert urza.create_kernel(heavy).kernel == heavy


def change_width(kernel: kernel_pb2.Kernel) -> None:
    kernel.signature.chunk_width = 0


def change_count(kernel: kernel_pb2.Kernel) -> None:
    kernel.parameter_count += 1


def change_digest(kernel: kernel_pb2.Kernel) -> None:
    kernel.blueprint_digest = "x"


def change_dtype(kernel: kernel_pb2.Kernel) -> None:
    kernel.signature.dtype = 99


def change_weights(kernel: kernel_pb2.Kernel) -> None:
    kernel.weights.size_bytes = -1


def change_lowering(kernel: kernel_pb2.Kernel) -> None:
    kernel.ClearField("bottleneck")


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (change_width, "kernel.signature.chunk_width"),
        (change_count, "kernel.parameter_count"),
        (change_digest, "kernel.blueprint_digest"),
        (change_dtype, "kernel.signature.dtype"),
        (change_weights, "kernel.weights.hash"),
        (change_lowering, "kernel.lowering"),
    ],
)
def test_unsound_kernels_are_refused_by_field(
    urza: UrzaClient, change: Callable[[kernel_pb2.Kernel], None], field: str
) -> None:
    kernel = new_kernel()
    change(kernel)
    error = refusal(lambda: urza.create_kernel(kernel))
    assert error.code is grpc.StatusCode.INVALID_ARGUMENT
    assert error.violations[0].field == field


@pytest.mark.parametrize(
    "name", ["", HASH, f"kernels/{HASH[1:]}", f"kernels/{HASH}0", f"blueprints/{HASH}", "kernels/"]
)
def test_bad_kernel_names_are_refused(urza: UrzaClient, name: str) -> None:
    for call in (
        lambda: urza.get_kernel(name),
        lambda: urza.update_kernel_state(name, pb.KERNEL_STATE_INVALID),
        lambda: list(urza.list_field_reports(name)),
    ):
        error = refusal(call)
        assert error.code is grpc.StatusCode.INVALID_ARGUMENT
        assert error.violations[0].field in ("name", "kernel")


def test_what_is_not_stored_is_not_found(urza: UrzaClient) -> None:
    name = f"kernels/{HASH}"
    for call in (
        lambda: urza.get_kernel(name),
        lambda: urza.update_kernel_state(name, pb.KERNEL_STATE_INVALID),
        lambda: list(urza.list_field_reports(name)),
        lambda: urza.get_blueprint(f"blueprints/{HASH}"),
    ):
        error = refusal(call)
        assert error.code is grpc.StatusCode.NOT_FOUND
        assert error.metadata["name"].endswith(HASH)


def test_a_kernel_moves_along_its_states_and_not_otherwise(
    urza: UrzaClient, kernel: pb.KernelRecord
) -> None:
    error = refusal(lambda: urza.update_kernel_state(kernel.name, pb.KERNEL_STATE_DEPLOYED))
    assert (error.code, error.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "ILLEGAL_MOVE")
    assert error.metadata == {
        "before": "KERNEL_STATE_TESTING",
        "after": "KERNEL_STATE_DEPLOYED",
    }
    for evidence in (None, kernel_pb2.ValidationReport(num_cases=1)):
        error = refusal(
            lambda evidence=evidence: urza.update_kernel_state(
                kernel.name, pb.KERNEL_STATE_VALIDATED, evidence
            )
        )
        assert error.violations[0].field == "validation.passed"
    assert urza.get_kernel(kernel.name) == kernel
    validated = urza.update_kernel_state(kernel.name, pb.KERNEL_STATE_VALIDATED, PASSED)
    assert validated.validation == PASSED
    assert validated.revision > kernel.revision
    assert validated.etag != kernel.etag
    deployed = urza.update_kernel_state(kernel.name, pb.KERNEL_STATE_DEPLOYED)
    assert deployed.validation == PASSED
    assert urza.update_kernel_state(kernel.name, pb.KERNEL_STATE_DEPLOYED) == deployed
    assert refusal(lambda: urza.update_kernel_state(kernel.name, 77)).violations[0].field == "state"


def test_archived_things_stay_readable(
    urza: UrzaClient, library: library_pb2_grpc.LibraryServiceStub, kernel: pb.KernelRecord
) -> None:
    request = pb.ArchiveKernelRequest(name=kernel.name)
    assert refusal(lambda: library.ArchiveKernel(request)).reason == "ILLEGAL_MOVE"
    urza.update_kernel_state(kernel.name, pb.KERNEL_STATE_VALIDATED, PASSED)
    assert library.ArchiveKernel(request).kernel.state == pb.KERNEL_STATE_DEPRECATED
    assert urza.get_kernel(kernel.name).state == pb.KERNEL_STATE_DEPRECATED
    own = blueprints.get("bottleneck", rank=3)
    name = urza.create_blueprint(own).name
    archived = library.ArchiveBlueprint(pb.ArchiveBlueprintRequest(name=name)).blueprint
    assert archived.state == pb.BLUEPRINT_STATE_ARCHIVED
    error = refusal(lambda: urza.update_blueprint_state(name, pb.BLUEPRINT_STATE_COMPILING))
    assert error.reason == "ILLEGAL_MOVE"


def test_a_changed_record_is_not_overwritten_by_an_old_etag(
    urza: UrzaClient, kernel: pb.KernelRecord
) -> None:
    validated = urza.update_kernel_state(
        kernel.name, pb.KERNEL_STATE_VALIDATED, PASSED, etag=kernel.etag
    )
    error = refusal(
        lambda: urza.update_kernel_state(kernel.name, pb.KERNEL_STATE_DEPLOYED, etag=kernel.etag)
    )
    assert (error.code, error.reason) == (grpc.StatusCode.ABORTED, "ETAG_MISMATCH")
    assert error.metadata == {"etag": validated.etag}
    assert urza.get_kernel(kernel.name) == validated


def test_a_retry_has_no_second_effect(
    library: library_pb2_grpc.LibraryServiceStub, kernel: pb.KernelRecord, urza: UrzaClient
) -> None:
    report = pb.FieldReport(kernel=kernel.name, run="r", verdict=pb.FIELD_VERDICT_CULLED)
    request = pb.RecordFieldReportRequest(report=report, request_id=str(uuid.uuid4()))
    with ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(lambda _: library.RecordFieldReport(request), range(16)))
    assert all(answer == answers[0] for answer in answers)
    assert [found.name for found in urza.list_field_reports(kernel.name)] == [
        f"{kernel.name}/reports/0"
    ]
    changed = pb.RecordFieldReportRequest(report=report, request_id=request.request_id)
    changed.report.run = "another"
    error = refusal(lambda: library.RecordFieldReport(changed))
    assert error.violations[0].field == "request_id"
    move = pb.UpdateKernelStateRequest(
        name=kernel.name, state=pb.KERNEL_STATE_VALIDATED, validation=PASSED, request_id="move-1"
    )
    first = library.UpdateKernelState(move)
    urza.update_kernel_state(kernel.name, pb.KERNEL_STATE_DEPLOYED)
    assert library.UpdateKernelState(move) == first


def test_filters_choose_among_kernels(urza: UrzaClient) -> None:
    tag = str(uuid.uuid4())
    for name in ("bottleneck", "affine"):
        urza.create_blueprint(blueprints.get(name))
    wide = urza.create_kernel(new_kernel(width=4096), tags=[tag, "wide"])
    narrow = urza.create_kernel(new_kernel(width=32), tags=[tag])
    affine = urza.create_kernel(new_kernel("affine", width=32), tags=[tag])

    def chosen(**wanted: object) -> set[str]:
        return {r.name for r in urza.list_kernels(pb.KernelFilter(tags=[tag], **wanted))}

    everything = {wide.name, narrow.name, affine.name}
    assert chosen() == everything
    assert chosen(chunk_width=32) == {narrow.name, affine.name}
    assert chosen(source_width=4096) == {wide.name}
    assert chosen(max_parameter_count=64) == {affine.name}
    assert chosen(max_parameter_count=0) == set()
    assert chosen(max_forward_us=1e9) == set()  # none has been measured
    assert chosen(blueprint=f"blueprints/{affine.kernel.blueprint_digest}") == {affine.name}
    assert chosen(slot_kind=kernel_pb2.SLOT_KIND_CONV) == set()
    assert chosen(dtype=kernel_pb2.DATA_TYPE_FLOAT32) == everything
    assert chosen(source=blueprint_pb2.SEED_SOURCE_INPUT) == set()
    assert chosen(device_class=kernel_pb2.DEVICE_CLASS_CPU) == everything
    assert chosen(state=pb.KERNEL_STATE_VALIDATED) == set()
    urza.update_kernel_state(narrow.name, pb.KERNEL_STATE_VALIDATED, PASSED)
    assert chosen(state=pb.KERNEL_STATE_VALIDATED) == {narrow.name}
    both = pb.KernelFilter(tags=[tag, "wide"])
    assert [record.name for record in urza.list_kernels(both)] == [wide.name]


@pytest.mark.parametrize(
    ("wanted", "field"),
    [
        (pb.KernelFilter(slot_kind=99), "filter.slot_kind"),
        (pb.KernelFilter(state=99), "filter.state"),
        (pb.KernelFilter(chunk_width=0), "filter.chunk_width"),
        (pb.KernelFilter(max_parameter_count=-1), "filter.max_parameter_count"),
        (pb.KernelFilter(max_forward_us=float("nan")), "filter.max_forward_us"),
        (pb.KernelFilter(blueprint="bottleneck"), "filter.blueprint"),
        (pb.KernelFilter(tags=[""]), "filter.tags[0]"),
    ],
)
def test_senseless_filters_are_refused(
    urza: UrzaClient, wanted: pb.KernelFilter, field: str
) -> None:
    error = refusal(lambda: list(urza.list_kernels(wanted)))
    assert error.code is grpc.StatusCode.INVALID_ARGUMENT
    assert [violation.field for violation in error.violations] == [field]


def test_pages_are_complete_while_others_write(
    urza: UrzaClient, library: library_pb2_grpc.LibraryServiceStub
) -> None:
    urza.create_blueprint(blueprints.get("affine"))
    tag = str(uuid.uuid4())
    names = sorted(urza.create_kernel(new_kernel("affine"), tags=[tag]).name for _ in range(12))
    request = pb.ListKernelsRequest(page_size=5, filter=pb.KernelFilter(tags=[tag]))
    seen: list[str] = []
    later: set[str] = set()
    while True:
        page = library.ListKernels(request, timeout=30)
        assert len(page.kernels) <= 5
        seen += [record.name for record in page.kernels]
        if not page.next_page_token:
            break
        request.page_token = page.next_page_token
        later.add(urza.create_kernel(new_kernel("affine"), tags=[tag]).name)
        urza.update_kernel_state(names[0], pb.KERNEL_STATE_VALIDATED, PASSED)
    assert [name for name in seen if name in names] == names
    assert set(seen) - set(names) <= later


@pytest.mark.parametrize("token", ["x", "a" * 2000, "AQAA", "%%%%"])
def test_bad_pages_are_refused(library: library_pb2_grpc.LibraryServiceStub, token: str) -> None:
    for call in (
        lambda: library.ListKernels(pb.ListKernelsRequest(page_token=token)),
        lambda: library.ListBlueprints(pb.ListBlueprintsRequest(page_token=token)),
    ):
        error = refusal(call)
        assert [violation.field for violation in error.violations] == ["page_token"]
    error = refusal(lambda: library.ListKernels(pb.ListKernelsRequest(page_size=-1)))
    assert [violation.field for violation in error.violations] == ["page_size"]


def test_a_token_belongs_to_its_filter(
    library: library_pb2_grpc.LibraryServiceStub, urza: UrzaClient
) -> None:
    urza.create_blueprint(blueprints.get("affine"))
    for _ in range(3):
        urza.create_kernel(new_kernel("affine"), tags=["paged"])
    wanted = pb.KernelFilter(tags=["paged"])
    token = library.ListKernels(pb.ListKernelsRequest(page_size=1, filter=wanted)).next_page_token
    assert token
    other_size = pb.ListKernelsRequest(page_size=2, filter=wanted, page_token=token)
    assert len(library.ListKernels(other_size).kernels) == 2
    other = pb.ListKernelsRequest(page_size=1, page_token=token)
    assert refusal(lambda: library.ListKernels(other)).violations[0].field == "page_token"


def test_reports_are_kept_in_order(urza: UrzaClient, kernel: pb.KernelRecord) -> None:
    stored = [
        urza.record_field_report(
            pb.FieldReport(
                name="ignored",
                kernel=kernel.name,
                run=f"run-{number}",
                slot="fc1",
                seed=1,
                verdict=pb.FIELD_VERDICT_FOSSILIZED,
                gain=0.5,
                gain_low=0.25,
                gain_high=0.75,
                p_value=0.001,
                num_samples=900,
            )
        )
        for number in range(3)
    ]
    assert list(urza.list_field_reports(kernel.name)) == stored
    assert [report.name for report in stored] == [
        f"{kernel.name}/reports/{number}" for number in range(3)
    ]
    assert all(report.report_time.seconds > 0 for report in stored)


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"kernel": "x"}, "report.kernel"),
        ({"run": ""}, "report.run"),
        ({"verdict": 0}, "report.verdict"),
        ({"verdict": 42}, "report.verdict"),
        ({"seed": -1}, "report.seed"),
        ({"gain": float("inf")}, "report.gain"),
        ({"p_value": 1.5}, "report.p_value"),
        ({"num_samples": -2}, "report.num_samples"),
        ({"gain_low": 2.0, "gain_high": 1.0}, "report.gain_low"),
        ({"reason": "x" * 5000}, "report.reason"),
    ],
)
def test_senseless_reports_are_refused(
    urza: UrzaClient, kernel: pb.KernelRecord, fields: dict[str, object], field: str
) -> None:
    good: dict[str, object] = {
        "kernel": kernel.name,
        "run": "r",
        "verdict": pb.FIELD_VERDICT_CULLED,
    }
    report = pb.FieldReport(**{**good, **fields})
    error = refusal(lambda: urza.record_field_report(report))
    assert [violation.field for violation in error.violations] == [field]
    assert list(urza.list_field_reports(kernel.name)) == []


def test_what_is_declared_but_not_served_says_so(
    library: library_pb2_grpc.LibraryServiceStub,
) -> None:
    calls: dict[str, Callable[[], object]] = {
        "LibraryService/GetLineage": lambda: library.GetLineage(pb.GetLineageRequest()),
        "LibraryService/Watch": lambda: list(library.Watch(pb.WatchRequest())),
    }
    for name, call in calls.items():
        error = refusal(call)
        assert error.code is grpc.StatusCode.UNIMPLEMENTED
        assert error.metadata == {"method": f"esper.urza.v1.{name}"}
