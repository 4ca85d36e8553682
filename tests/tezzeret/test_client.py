"""What the client does where there is no server, or one that says nothing."""

import socket
import time
from pathlib import Path

import grpc
import pytest

from esper.blueprints.library import get
from esper.common.rpc import RpcError
from esper.common.v1 import blueprint_pb2
from esper.common.v1 import kernel_pb2
from esper.plane.channel import make_channel
from esper.tezzeret.client import TezzeretClient

SIGNATURE = kernel_pb2.KernelSignature(
    slot_kind=kernel_pb2.SLOT_KIND_LINEAR,
    chunk_width=8,
    source_width=8,
    source=blueprint_pb2.SEED_SOURCE_OUTPUT,
    dtype=kernel_pb2.DATA_TYPE_FLOAT32,
    device_class=kernel_pb2.DEVICE_CLASS_CPU,
)


def test_no_server(tmp_path: Path) -> None:
    address = f"unix:{tmp_path}/nobody.sock"
    with make_channel(address) as channel, pytest.raises(RpcError) as caught:
        TezzeretClient(channel).compile(get("lora"), SIGNATURE)
    assert caught.value.code is grpc.StatusCode.UNAVAILABLE


def test_a_silent_server_is_given_up_at_the_deadline() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        host, port = server.getsockname()
        with make_channel(f"{host}:{port}") as channel:
            start = time.monotonic()
            with pytest.raises(RpcError) as caught:
                TezzeretClient(channel).compile(get("lora"), SIGNATURE, timeout_s=0.3)
    assert time.monotonic() - start < 10
    assert caught.value.code in (
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.UNAVAILABLE,
    )
