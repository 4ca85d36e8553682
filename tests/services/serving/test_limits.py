"""Every limit that a server declares, met from outside."""

import os
import subprocess
import time
from collections.abc import Callable
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import grpc
import pytest
from google.protobuf.wrappers_pb2 import BytesValue
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from urza_samples import new_kernel
from urza_samples import refusal

from esper import blueprints
from esper.common.rpc import RpcError
from esper.oona.v1 import event_pb2
from esper.oona.v1 import event_pb2_grpc
from esper.plane import Plane
from esper.plane import connect
from esper.plane.launch import server_command
from esper.plane.launch import server_environment
from esper.plane.v1 import plane_pb2
from esper.plane.v1 import plane_pb2_grpc
from esper.urza.admin import StoreAdmin
from esper.urza.transfer import digest_of
from esper.urza.v1 import blob_pb2
from esper.urza.v1 import blob_pb2_grpc
from esper.urza.v1 import library_pb2
from esper.urza.v1 import library_pb2_grpc

Start = Callable[..., object]

MIB = 1 << 20
CALL_S = 60
REFUSED = grpc.StatusCode.RESOURCE_EXHAUSTED
INVALID = grpc.StatusCode.INVALID_ARGUMENT


def says_when(error: RpcError) -> bool:
    """Returns whether a refusal has a RetryInfo."""
    cause = error.__cause__
    assert isinstance(cause, grpc.Call)
    status = rpc_status.from_call(cause)
    retry = error_details_pb2.RetryInfo()
    return any(
        detail.Unpack(retry) and retry.retry_delay.ToNanoseconds() > 0 for detail in status.details
    )


def client_refusal(call: Callable[[], object]) -> RpcError:
    """Returns the error of a call of a client, with the error of gRPC as its cause."""
    with pytest.raises(RpcError) as caught:
        call()
    return caught.value


# ------------------------------------------------------------ what one message may hold


def test_a_message_has_at_most_4_mib(store_plane: Plane) -> None:
    library = library_pb2_grpc.LibraryServiceStub(store_plane.channel("urza"))
    events = event_pb2_grpc.EventServiceStub(store_plane.channel("oona"))
    request = library_pb2.CreateBlueprintRequest(blueprint=blueprints.get("affine"))
    request.blueprint.description = "x" * (4 * MIB)
    error = refusal(lambda: library.CreateBlueprint(request, timeout=CALL_S))
    assert error.code is REFUSED
    assert str(4 * MIB) in error.message
    event = event_pb2.PublishRequest(topic="large", key="x" * (4 * MIB))
    error = refusal(lambda: list(events.Publish(iter([event]), timeout=CALL_S)))
    assert error.code is REFUSED
    # The connection goes on.
    info = plane_pb2_grpc.PlaneServiceStub(store_plane.channel("urza")).GetPlaneInfo(
        plane_pb2.GetPlaneInfoRequest(), timeout=CALL_S
    )
    assert (info.max_message_bytes, info.max_chunk_bytes) == (4 * MIB, MIB)


@pytest.mark.parametrize("excess", [0, 1])
def test_a_chunk_has_at_most_1_mib(store_plane: Plane, excess: int) -> None:
    blobs = blob_pb2_grpc.BlobServiceStub(store_plane.channel("urza"))
    data = os.urandom(MIB + excess)
    request = blob_pb2.WriteBlobRequest(digest=digest_of(data), data=data)
    if not excess:
        answer = blobs.WriteBlob(iter([request]), timeout=CALL_S)
        assert answer.committed_size == MIB
        return
    error = refusal(lambda: blobs.WriteBlob(iter([request]), timeout=CALL_S))
    assert error.code is INVALID
    (violation,) = error.violations
    assert violation.field == "data"
    assert str(MIB) in violation.description
    assert store_plane.urza.find_missing_blobs([request.digest]) == [request.digest]


def test_an_event_has_at_most_1_mib(store_plane: Plane) -> None:
    error = client_refusal(lambda: store_plane.oona.publish("t", BytesValue(value=bytes(MIB))))
    assert (error.code, error.violations[0].field) == (INVALID, "body")


def test_a_question_about_blobs_names_at_most_1000(store_plane: Plane) -> None:
    blobs = blob_pb2_grpc.BlobServiceStub(store_plane.channel("urza"))
    request = blob_pb2.FindMissingBlobsRequest(digests=[digest_of(b"x")] * 1001)
    error = refusal(lambda: blobs.FindMissingBlobs(request, timeout=CALL_S))
    assert (error.code, error.violations[0].field) == (INVALID, "digests")
    assert "1000" in error.violations[0].description


# ------------------------------------------------------------ what one record may hold


def test_a_graph_has_at_most_1024_nodes(store_plane: Plane) -> None:
    blueprint = blueprints.get("bottleneck")
    nodes = blueprint.graph.nodes
    while len(nodes) <= 1024:
        nodes.add().CopyFrom(nodes[0])
    error = client_refusal(lambda: store_plane.urza.create_blueprint(blueprint))
    assert error.code is INVALID
    assert error.violations[0].field == "blueprint.graph.nodes"
    assert "1024" in error.violations[0].description


def test_a_kernel_has_at_most_2_31_parameters(store_plane: Plane) -> None:
    store_plane.urza.create_blueprint(blueprints.get("bottleneck"))
    kernel = new_kernel("bottleneck")
    narrow, wide = kernel.signature.chunk_width, 2**31 - 1
    kernel.signature.chunk_width = kernel.signature.source_width = wide
    for parameter in kernel.parameters:
        parameter.shape[:] = [wide if size == narrow else size for size in parameter.shape]
        parameter.fan_in = wide if parameter.fan_in == narrow else parameter.fan_in
    error = client_refusal(lambda: store_plane.urza.create_kernel(kernel))
    assert error.code is INVALID
    assert error.violations[0].field == "kernel.parameter_count"
    assert str(2**31 - 1) in error.violations[0].description


# ------------------------------------------------------------ what one server takes


@pytest.fixture
def limited(start_server: Start) -> Iterator[Callable[..., Plane]]:
    """Starts a server with limits, and connects."""
    with ExitStack() as stack:

        def start(**limits: int) -> Plane:
            server = start_server(limits=limits)
            return stack.enter_context(connect(server.address, timeout_s=CALL_S))

        yield start


def test_max_calls(limited: Callable[..., Plane]) -> None:
    plane = limited(max_calls=5)
    events = event_pb2_grpc.EventServiceStub(plane.channel("oona"))
    request = event_pb2.SubscribeRequest(topic="t")
    streams = [events.Subscribe(request) for _ in range(5)]
    for stream in streams:
        stream.initial_metadata()  # comes once the stream is one of the calls under way
    error = client_refusal(plane.oona.list_topics)
    assert (error.code, error.reason) == (REFUSED, "TOO_MANY_CALLS")
    assert says_when(error)
    error = refusal(lambda: next(events.Subscribe(request)))
    assert (error.code, error.reason) == (REFUSED, "TOO_MANY_CALLS")
    streams[0].cancel()
    # Noticed soon, and then there is room for one.
    deadline_s = time.monotonic() + CALL_S
    while True:
        try:
            assert plane.oona.list_topics() == []
            break
        except RpcError as again:
            assert again.reason == "TOO_MANY_CALLS"
            assert time.monotonic() < deadline_s
            time.sleep(0.01)
    for stream in streams:
        stream.cancel()


def test_max_blob_bytes(limited: Callable[..., Plane]) -> None:
    plane = limited(max_blob_bytes=MIB)
    kept = plane.urza.write_blob(os.urandom(MIB // 2))
    error = client_refusal(lambda: plane.urza.write_blob(os.urandom(MIB // 2 + 1)))
    assert (error.code, error.reason) == (REFUSED, "QUOTA")
    assert says_when(error)
    # What an upload has been promised counts, before its bytes have come.
    data = os.urandom(MIB // 2)
    digest = digest_of(data)
    blobs = blob_pb2_grpc.BlobServiceStub(plane.channel("urza"))
    partial = Path(plane.info.data_dir) / "urza" / "blobs" / "partial"
    refusals: list[RpcError] = []

    def requests() -> Iterator[blob_pb2.WriteBlobRequest]:
        yield blob_pb2.WriteBlobRequest(digest=digest, data=data[:1000])
        deadline_s = time.monotonic() + CALL_S
        while not any(partial.glob(f"{digest.hash}.*")) and time.monotonic() < deadline_s:
            time.sleep(0.01)
        refusals.append(client_refusal(lambda: plane.urza.write_blob(b"x")))
        yield blob_pb2.WriteBlobRequest(write_offset=1000, data=data[1000:])

    assert blobs.WriteBlob(requests(), timeout=2 * CALL_S).committed_size == len(data)
    assert [error.reason for error in refusals] == ["QUOTA"]
    assert plane.urza.find_missing_blobs([kept, digest]) == []
    # The library is not the quota's business.
    plane.urza.create_blueprint(blueprints.get("affine"))


def test_max_row_bytes(limited: Callable[..., Plane]) -> None:
    plane = limited(max_row_bytes=2 * MIB)
    written = []
    with pytest.raises(RpcError) as caught:
        for _ in range(200):
            written.append(plane.urza.write_blob(os.urandom(60_000)))
    error = caught.value
    assert (error.code, error.reason) == (REFUSED, "ROWS_FULL")
    assert says_when(error)
    assert written
    assert plane.urza.find_missing_blobs(written) == []
    assert len(plane.urza.read_blob(written[0])) == 60_000
    # Each store has a limit of its own.
    plane.oona.publish("t", BytesValue(value=b"x"))


def test_keep_free_bytes(start_server: Start) -> None:
    server = start_server()
    with connect(server.address, timeout_s=CALL_S) as plane:
        kept = plane.urza.write_blob(b"kept")
        plane.oona.publish("t", BytesValue(value=b"kept"))
    server.stop()
    # It starts where the disk is short, and serves what needs no room.
    server = start_server(limits={"keep_free_bytes": 1 << 60})
    with connect(server.address, timeout_s=CALL_S) as plane:
        for write in (
            lambda: plane.urza.write_blob(b"x"),
            lambda: plane.urza.create_blueprint(blueprints.get("affine")),
            lambda: plane.urza.runs.create_run("r"),
            lambda: plane.oona.publish("t", BytesValue(value=b"x")),
        ):
            error = client_refusal(write)
            assert (error.code, error.reason) == (REFUSED, "DISK_FULL")
            assert says_when(error)
        assert plane.urza.read_blob(kept) == b"kept"
        assert plane.oona.list_topics()[0].next_offset == 1
        # What makes room is done.
        assert StoreAdmin(plane.channel("urza")).collect_garbage(0).num_blobs == 1


def test_a_new_store_on_a_short_disk_is_refused_in_one_sentence(short_dir: Path) -> None:
    data = short_dir / "data"
    run = subprocess.run(
        server_command(("urza",), f"unix:{short_dir}/s", data, limits={"keep_free_bytes": 1 << 60}),
        capture_output=True,
        text=True,
        env=server_environment(),
        timeout=CALL_S,
        check=False,
    )
    assert (run.returncode, run.stdout) == (1, "")
    said = run.stderr.splitlines()[-1]
    assert said.startswith(f"esper: cannot make a store in {data}/urza: the disk of the store has")
    assert "Traceback" not in run.stderr
