"""Connects to a running plane."""

from collections.abc import Mapping
from functools import cached_property
from typing import Self

import grpc
from grpc_health.v1 import health_pb2

from esper import __version__
from esper.common.rpc import CALL_TIMEOUT_S
from esper.common.rpc import decode_error
from esper.oona.client import OonaClient
from esper.plane.channel import make_channel
from esper.plane.contract import contract_digest
from esper.plane.errors import PlaneError
from esper.plane.v1 import plane_pb2
from esper.plane.v1 import plane_pb2_grpc
from esper.tamiyo.client import TamiyoClient
from esper.tezzeret.client import TezzeretClient
from esper.urza.cache import BlobCache
from esper.urza.client import UrzaClient

SERVICES = ("urza", "tezzeret", "tamiyo", "oona")
SHOWN_DIGEST_CHARS = 12


class Plane:
    """An open connection to the servers of one plane; safe to use from several threads.

    Made by `connect`. The channels reconnect by themselves after a server was restarted.
    """

    def __init__(
        self,
        addresses: Mapping[str, str],
        channels: Mapping[str, grpc.Channel],
        infos: Mapping[str, plane_pb2.GetPlaneInfoResponse],
        cache: BlobCache | None = None,
    ) -> None:
        self.addresses = dict(addresses)
        """Address of each service's server."""
        self.infos = dict(infos)
        """What each server said of itself, by address."""
        self._channels = dict(channels)
        self._cache = cache

    @property
    def info(self) -> plane_pb2.GetPlaneInfoResponse:
        """What the first server said of itself when it was connected to."""
        return next(iter(self.infos.values()))

    def channel(self, service: str) -> grpc.Channel:
        """Returns the channel to the server of a service, such as `urza`.

        Raises:
            PlaneError: Where the plane does not serve it.
        """
        address = self.addresses.get(service)
        prefix = f"esper.{service}."
        if address is None or not any(
            name.startswith(prefix) for name in self.infos[address].services
        ):
            where = ", ".join(self.infos)
            raise PlaneError(f"the plane on {where} does not serve {service}")
        return self._channels[address]

    @cached_property
    def urza(self) -> UrzaClient:
        """The library and the blobs."""
        return UrzaClient(self.channel("urza"), self._cache)

    @cached_property
    def oona(self) -> OonaClient:
        """The event log."""
        return OonaClient(self.channel("oona"))

    @cached_property
    def tezzeret(self) -> TezzeretClient:
        """The compilation forge."""
        return TezzeretClient(self.channel("tezzeret"))

    @cached_property
    def tamiyo(self) -> TamiyoClient:
        """The controller."""
        return TamiyoClient(self.channel("tamiyo"))

    def health(self, timeout_s: float = CALL_TIMEOUT_S) -> dict[str, str]:
        """Returns the health of every Esper service by full name, such as `SERVING`.

        Args:
            timeout_s: Deadline of each check, in seconds.
        """
        found = {}
        for address, info in self.infos.items():
            check = self._channels[address].unary_unary(
                "/grpc.health.v1.Health/Check",
                request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
                response_deserializer=health_pb2.HealthCheckResponse.FromString,
            )
            for name in info.services:
                request = health_pb2.HealthCheckRequest(service=name)
                try:
                    status = check(request, timeout=timeout_s).status
                    found[name] = health_pb2.HealthCheckResponse.ServingStatus.Name(status)
                except grpc.RpcError as error:
                    found[name] = decode_error(error).code.name
        return found

    def close(self) -> None:
        """Closes the channels; streams under way end with CANCELLED."""
        for channel in self._channels.values():
            channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def connect(
    address: str | Mapping[str, str], timeout_s: float = 5.0, cache: BlobCache | None = None
) -> Plane:
    """Connects to a plane and makes sure that it speaks this client's protocol.

    Args:
        address: `unix:PATH` or `HOST:PORT` of a server with all services, or the address of each
            service by name (`urza`, `tezzeret`, `tamiyo`, `oona`; at least one).
        timeout_s: How long to wait for each server to answer, in seconds.
        cache: Where blobs that were read are kept for the next time; None keeps none.

    Raises:
        ValueError: For an address or a service name that makes no sense.
        PlaneError: Where nothing answers, or something that speaks another protocol.
    """
    addresses = _addresses(address)
    channels: dict[str, grpc.Channel] = {}
    infos: dict[str, plane_pb2.GetPlaneInfoResponse] = {}
    try:
        for place in addresses.values():
            if place not in channels:
                channels[place] = make_channel(place)
                infos[place] = _introduce(channels[place], place, timeout_s)
    except BaseException:
        for channel in channels.values():
            channel.close()
        raise
    return Plane(addresses, channels, infos, cache)


def _addresses(address: str | Mapping[str, str]) -> dict[str, str]:
    if isinstance(address, str):
        return dict.fromkeys(SERVICES, address)
    if not address:
        raise ValueError("address is an empty mapping: it must name at least one service")
    for name in address:
        if name not in SERVICES:
            raise ValueError(f"address has the service {name!r}, which must be one of {SERVICES}")
    return dict(address)


def _introduce(
    channel: grpc.Channel, address: str, timeout_s: float
) -> plane_pb2.GetPlaneInfoResponse:
    stub = plane_pb2_grpc.PlaneServiceStub(channel)
    try:
        info = stub.GetPlaneInfo(
            plane_pb2.GetPlaneInfoRequest(), timeout=timeout_s, wait_for_ready=True
        )
    except grpc.RpcError as error:
        reason = decode_error(error)
        if reason.code is grpc.StatusCode.DEADLINE_EXCEEDED:
            raise PlaneError(f"no plane answers on {address} within {timeout_s:g} s") from error
        raise PlaneError(f"{address} does not answer as a plane: {reason}") from error
    if info.contract != contract_digest():
        raise PlaneError(
            f"the plane on {address} runs esper {info.version} (contract "
            f"{info.contract[:SHOWN_DIGEST_CHARS]}) and this is esper {__version__} (contract "
            f"{contract_digest()[:SHOWN_DIGEST_CHARS]}): use the same release on both sides"
        )
    return info
