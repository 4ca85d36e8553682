"""PlaneService: which server this is."""

import time
from pathlib import Path

import grpc

from esper import __version__
from esper.plane.contract import contract_digest
from esper.plane.v1 import plane_pb2
from esper.plane.v1 import plane_pb2_grpc
from esper.services.serving.limits import MAX_CHUNK_BYTES
from esper.services.serving.limits import MAX_MESSAGE_BYTES

FULL_NAME = plane_pb2.DESCRIPTOR.services_by_name["PlaneService"].full_name


class PlaneServicer(plane_pb2_grpc.PlaneServiceServicer):
    """Answers clients that have just connected.

    Args:
        services: Full names of the services served.
        data_dir: Directory of the stores.
    """

    def __init__(self, services: tuple[str, ...], data_dir: Path) -> None:
        self._services = services
        self._data_dir = data_dir
        self._started_s = time.monotonic()

    async def GetPlaneInfo(  # noqa: N802, D102
        self, request: plane_pb2.GetPlaneInfoRequest, context: grpc.ServicerContext
    ) -> plane_pb2.GetPlaneInfoResponse:
        return plane_pb2.GetPlaneInfoResponse(
            version=__version__,
            contract=contract_digest(),
            services=self._services,
            uptime_s=time.monotonic() - self._started_s,
            max_message_bytes=MAX_MESSAGE_BYTES,
            max_chunk_bytes=MAX_CHUNK_BYTES,
            data_dir=str(self._data_dir),
        )
