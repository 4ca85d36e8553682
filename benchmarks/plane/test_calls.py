"""Urza over a Unix socket, against a bare gRPC echo of the same bytes in the same run."""

from collections.abc import Iterator
from concurrent import futures
from pathlib import Path

import grpc
import pytest

from esper import blueprints
from esper.plane import EmbeddedPlane
from esper.plane import Plane
from esper.plane import connect
from esper.urza.v1 import library_pb2


def _identity(message: bytes) -> bytes:
    return message


class _Echo(grpc.GenericRpcHandler):
    """Answers every call with the bytes it was built with."""

    def __init__(self, answer: bytes) -> None:
        self._answer = answer

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        return grpc.unary_unary_rpc_method_handler(
            lambda request, context: self._answer, _identity, _identity
        )


@pytest.fixture(scope="module")
def plane() -> Iterator[Plane]:
    """A running library."""
    with EmbeddedPlane(services=("urza",)) as embedded, connect(embedded.address) as connected:
        yield connected


def test_a_small_read(side_by_side, plane: Plane, tmp_path: Path) -> None:
    stored = plane.urza.create_blueprint(blueprints.get("bottleneck"))
    answer = library_pb2.GetBlueprintResponse(blueprint=stored).SerializeToString()
    request = library_pb2.GetBlueprintRequest(name=stored.name).SerializeToString()
    server = grpc.server(futures.ThreadPoolExecutor(2), handlers=[_Echo(answer)])
    address = f"unix:{tmp_path / 'echo.sock'}"
    server.add_insecure_port(address)
    server.start()
    try:
        with grpc.insecure_channel(address) as channel:
            echo = channel.unary_unary("/echo", _identity, _identity)
            side_by_side(
                "read a blueprint",
                lambda: plane.urza.get_blueprint(stored.name),
                {"echo": lambda: echo(request)},
            )
    finally:
        server.stop(None)
