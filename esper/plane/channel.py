"""The one place that makes channels: limits, keepalive, reconnection and retries."""

import json

import grpc

from esper.common.retries import CALL_ATTEMPTS
from esper.common.retries import FIRST_PAUSE_S
from esper.common.retries import MAX_PAUSE_S
from esper.common.retries import PAUSE_FACTOR
from esper.oona.v1 import event_pb2
from esper.plane.address import parse_address
from esper.plane.v1 import plane_pb2
from esper.tamiyo.v1 import controller_pb2
from esper.tezzeret.v1 import forge_pb2
from esper.urza.v1 import blob_pb2
from esper.urza.v1 import library_pb2
from esper.urza.v1 import run_pb2
from esper.urza.v1 import store_pb2

MAX_MESSAGE_BYTES = 4 << 20
KEEPALIVE_MS = 30_000
KEEPALIVE_TIMEOUT_MS = 10_000
RECONNECT_MS = 200
MAX_RECONNECT_MS = 5_000

_FILES = (
    event_pb2,
    plane_pb2,
    controller_pb2,
    forge_pb2,
    blob_pb2,
    library_pb2,
    run_pb2,
    store_pb2,
)
_REPEATABLE = ("Get", "List", "Find", "Query", "Read", "Verify", "Explain", "Acknowledge")
_REQUEST_ID = "request_id"


def idempotent_methods() -> list[tuple[str, str]]:
    """Returns (service, method) of every RPC that may be sent twice.

    Those are the reading ones, acknowledgements, which change nothing the second time, and the
    unary writing ones whose request has a `request_id`. Those that stream their answer are left to
    the caller, who knows how much has come.
    """
    methods = []
    for file in _FILES:
        for service in file.DESCRIPTOR.services_by_name.values():
            for method in service.methods:
                writes_once = (
                    not method.client_streaming and _REQUEST_ID in method.input_type.fields_by_name
                )
                repeatable = method.name.startswith(_REPEATABLE) or writes_once
                if repeatable and not method.server_streaming:
                    methods.append((service.full_name, method.name))
    return methods


def service_config() -> str:
    """Returns the gRPC service config: jittered retries on UNAVAILABLE for idempotent methods."""
    retry = {
        "maxAttempts": CALL_ATTEMPTS,
        "initialBackoff": f"{FIRST_PAUSE_S}s",
        "maxBackoff": f"{MAX_PAUSE_S}s",
        "backoffMultiplier": PAUSE_FACTOR,
        "retryableStatusCodes": ["UNAVAILABLE"],
    }
    names = [{"service": service, "method": method} for service, method in idempotent_methods()]
    return json.dumps({"methodConfig": [{"name": names, "retryPolicy": retry}]})


def _options() -> list[tuple[str, int | str]]:
    return [
        ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
        ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
        ("grpc.keepalive_time_ms", KEEPALIVE_MS),
        ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_MS),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.initial_reconnect_backoff_ms", RECONNECT_MS),
        ("grpc.max_reconnect_backoff_ms", MAX_RECONNECT_MS),
        ("grpc.enable_retries", 1),
        ("grpc.service_config", service_config()),
        # A proxy for the web knows nothing of the plane, least of all of this machine's ports.
        ("grpc.enable_http_proxy", 0),
    ]


def make_channel(address: str) -> grpc.Channel:
    """Returns a channel to `address`; it connects with the first call.

    Args:
        address: `unix:PATH` or `HOST:PORT`.

    Raises:
        ValueError: For another kind of address.
    """
    return grpc.insecure_channel(str(parse_address(address)), options=_options())


def make_async_channel(address: str) -> grpc.aio.Channel:
    """Returns a channel for the asyncio clients, such as `esper.urza.aio.AsyncUrzaClient`.

    Use it as an async context manager, or close it.

    Args:
        address: `unix:PATH` or `HOST:PORT`.

    Raises:
        ValueError: For another kind of address.
    """
    return grpc.aio.insecure_channel(str(parse_address(address)), options=_options())
