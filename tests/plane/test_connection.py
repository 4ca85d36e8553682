import json
from collections.abc import Callable
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path

import grpc
import pytest

from esper import __version__
from esper.plane import Plane
from esper.plane import PlaneError
from esper.plane import connect
from esper.plane import contract_digest
from esper.plane.channel import idempotent_methods
from esper.plane.channel import service_config
from esper.plane.v1 import plane_pb2
from esper.plane.v1 import plane_pb2_grpc


class Foreign(plane_pb2_grpc.PlaneServiceServicer):
    def __init__(self, info: plane_pb2.GetPlaneInfoResponse) -> None:
        self._info = info

    def GetPlaneInfo(  # noqa: N802
        self, request: plane_pb2.GetPlaneInfoRequest, context: grpc.ServicerContext
    ) -> plane_pb2.GetPlaneInfoResponse:
        return self._info


@pytest.fixture
def foreign_server(
    short_dir: Path,
) -> Iterator[Callable[[plane_pb2.GetPlaneInfoResponse | None], str]]:
    servers = []

    def start(info: plane_pb2.GetPlaneInfoResponse | None) -> str:
        server = grpc.server(futures.ThreadPoolExecutor(1))
        if info is not None:
            plane_pb2_grpc.add_PlaneServiceServicer_to_server(Foreign(info), server)
        address = f"unix:{short_dir}/foreign.sock"
        server.add_insecure_port(address)
        server.start()
        servers.append(server)
        return address

    yield start
    for server in servers:
        server.stop(None).wait()


def test_a_plane_introduces_itself(store_plane: Plane) -> None:
    info = store_plane.info
    assert info.version == __version__
    assert info.contract == contract_digest()
    assert info.max_message_bytes == 4 << 20
    assert info.max_chunk_bytes == 1 << 20
    assert list(info.services) == [
        "esper.plane.v1.PlaneService",
        "esper.urza.v1.BlobService",
        "esper.urza.v1.LibraryService",
        "esper.urza.v1.RunService",
        "esper.urza.v1.StoreService",
        "esper.oona.v1.EventService",
    ]
    assert store_plane.health() == dict.fromkeys(info.services, "SERVING")


def test_another_contract_is_refused_with_both_versions(
    foreign_server: Callable[[plane_pb2.GetPlaneInfoResponse | None], str],
) -> None:
    address = foreign_server(plane_pb2.GetPlaneInfoResponse(version="9.9.9", contract="ab" * 32))
    with pytest.raises(PlaneError) as caught:
        connect(address)
    message = str(caught.value)
    assert "9.9.9" in message
    assert "abababababab" in message
    assert __version__ in message
    assert contract_digest()[:12] in message


def test_a_server_of_something_else_is_refused(
    foreign_server: Callable[[plane_pb2.GetPlaneInfoResponse | None], str],
) -> None:
    with pytest.raises(PlaneError, match="does not answer as a plane: UNIMPLEMENTED"):
        connect(foreign_server(None))


def test_nobody_there_is_said_within_the_time_given(short_dir: Path) -> None:
    with pytest.raises(PlaneError, match=r"no plane answers on unix:.*within 0\.3 s"):
        connect(f"unix:{short_dir}/nobody.sock", timeout_s=0.3)


def test_services_that_are_not_served_are_named(store_plane: Plane) -> None:
    with pytest.raises(PlaneError, match="does not serve tezzeret"):
        _ = store_plane.tezzeret


@pytest.mark.parametrize("address", [{}, {"jace": "localhost:1"}, "localhost"])
def test_senseless_addresses_are_refused(address: str | dict[str, str]) -> None:
    with pytest.raises(ValueError, match="address"):
        connect(address)


def test_services_on_several_servers_make_one_plane(
    start_server: Callable[..., object], short_dir: Path
) -> None:
    addresses = {
        "urza": start_server("urza", listen="127.0.0.1:0").address,
        "oona": start_server("oona", listen=f"unix:{short_dir}/oona.sock").address,
    }
    with connect(addresses, timeout_s=20) as plane:
        digest = plane.urza.write_blob(b"spark")
        assert plane.urza.read_blob(digest) == b"spark"
        assert plane.oona.publish("system.events.epoch", digest) == 0
        assert plane.health()["esper.oona.v1.EventService"] == "SERVING"
        with pytest.raises(PlaneError, match="does not serve tamiyo"):
            plane.channel("tamiyo")


def test_an_open_connection_outlives_a_restart(start_server: Callable[..., object]) -> None:
    first = start_server("urza")
    with connect(first.address, timeout_s=20) as plane:
        digest = plane.urza.write_blob(b"kept")
        assert first.stop() == 0
        start_server("urza")
        assert plane.urza.read_blob(digest) == b"kept"


def test_only_what_may_be_sent_twice_is_retried() -> None:
    retried = set(idempotent_methods())
    for method in ("GetKernel", "ListKernels", "CreateKernel", "UpdateKernelState"):
        assert ("esper.urza.v1.LibraryService", method) in retried
    assert ("esper.oona.v1.EventService", "Acknowledge") in retried
    for method in (
        # Its client goes on where it broke off; gRPC's own retries can leave such a call hanging.
        ("esper.urza.v1.BlobService", "ReadBlob"),
        ("esper.urza.v1.BlobService", "WriteBlob"),
        ("esper.oona.v1.EventService", "Publish"),
        ("esper.oona.v1.EventService", "Subscribe"),
        ("esper.tamiyo.v1.ControllerService", "Advise"),
    ):
        assert method not in retried
    config = json.loads(service_config())["methodConfig"]
    named = {(entry["service"], entry["method"]) for entry in config[0]["name"]}
    assert named == retried
    assert config[0]["retryPolicy"]["retryableStatusCodes"] == ["UNAVAILABLE"]
