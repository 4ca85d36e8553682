"""A bare gRPC server: the least that any service of this kind can cost.

Started as a process of its own by the benchmarks, on the address that it is given:

    python echo.py unix:/tmp/echo.sock

``/bare/Unary`` answers with the bytes it got, ``/bare/Upload`` takes a stream and answers with its
length, ``/bare/UploadMessages`` does so with messages that generated code parses, and
``/bare/Download`` streams as many bytes as its request says, in chunks of 1 MiB. Nothing is
stored, hashed or checked.
"""

import asyncio
import sys
from collections.abc import AsyncIterator

import grpc

from esper.urza.v1 import blob_pb2

CHUNK = bytes(1 << 20)
MAX_MESSAGE_BYTES = 4 << 20


def _same(message: bytes) -> bytes:
    return message


async def _unary(request: bytes, context: object) -> bytes:
    return request


async def _upload(requests: AsyncIterator[bytes], context: object) -> bytes:
    size_bytes = 0
    async for request in requests:
        size_bytes += len(request)
    return str(size_bytes).encode()


async def _upload_messages(
    requests: AsyncIterator[blob_pb2.WriteBlobRequest], context: object
) -> bytes:
    size_bytes = 0
    async for request in requests:
        size_bytes += len(request.data)
    return str(size_bytes).encode()


async def _download(request: bytes, context: object) -> AsyncIterator[bytes]:
    left = int(request)
    while left:
        yield CHUNK[:left]
        left -= min(left, len(CHUNK))


async def serve(address: str) -> None:
    """Serves until the process is ended; prints one line when ready."""
    server = grpc.aio.server(options=[("grpc.max_receive_message_length", MAX_MESSAGE_BYTES)])
    handlers = {
        "Unary": grpc.unary_unary_rpc_method_handler(_unary, _same, _same),
        "Upload": grpc.stream_unary_rpc_method_handler(_upload, _same, _same),
        "UploadMessages": grpc.stream_unary_rpc_method_handler(
            _upload_messages, blob_pb2.WriteBlobRequest.FromString, _same
        ),
        "Download": grpc.unary_stream_rpc_method_handler(_download, _same, _same),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bare", handlers),))
    port = server.add_insecure_port(address)
    await server.start()
    print(f"ready on {address if address.startswith('unix:') else f'127.0.0.1:{port}'}", flush=True)
    await server.wait_for_termination()


if __name__ == "__main__":
    asyncio.run(serve(sys.argv[1]))
