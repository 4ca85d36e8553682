"""The table of methods, in a real server."""

import asyncio
from pathlib import Path

import grpc
import pytest

from esper.services.serving.methods import MethodTable

SERVICE = "esper.test.v1.ManyService"


async def tasks_of_a_server(place: str, num_methods: int) -> int:
    """Serves so many methods, calls the last, and returns how many tasks the server keeps."""

    async def answer(request: bytes, context: object) -> bytes:
        return request * 2

    methods = MethodTable()
    handlers = {
        f"M{number}": grpc.unary_unary_rpc_method_handler(answer) for number in range(num_methods)
    }
    methods.add_registered_method_handlers(SERVICE, handlers)
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((methods,))
    server.add_insecure_port(place)
    before = len(asyncio.all_tasks())
    await server.start()
    async with grpc.aio.insecure_channel(place) as channel:
        call = channel.unary_unary(f"/{SERVICE}/M{num_methods - 1}")
        assert await call(b"ab", timeout=60) == b"abab"
        with pytest.raises(grpc.aio.AioRpcError) as missing:
            await channel.unary_unary(f"/{SERVICE}/M{num_methods}")(b"", timeout=60)
        assert missing.value.code() is grpc.StatusCode.UNIMPLEMENTED
    serving = len(asyncio.all_tasks()) - before
    await server.stop(0)
    return serving


def test_a_server_does_not_wait_for_each_of_its_methods(tmp_path: Path) -> None:
    few = asyncio.run(tasks_of_a_server(f"unix:{tmp_path}/few", 1))
    assert asyncio.run(tasks_of_a_server(f"unix:{tmp_path}/many", 100)) < few + 50


def test_a_later_handler_takes_the_place_of_an_earlier(tmp_path: Path) -> None:
    async def first(request: bytes, context: object) -> bytes:
        return b"first"

    async def second(request: bytes, context: object) -> bytes:
        return b"second"

    async def ask(place: str) -> bytes:
        methods = MethodTable()
        for behaviour in (first, second):
            handler = grpc.unary_unary_rpc_method_handler(behaviour)
            methods.add_registered_method_handlers(SERVICE, {"M": handler})
        server = grpc.aio.server()
        server.add_generic_rpc_handlers((methods,))
        server.add_insecure_port(place)
        await server.start()
        async with grpc.aio.insecure_channel(place) as channel:
            answer: bytes = await channel.unary_unary(f"/{SERVICE}/M")(b"", timeout=60)
        await server.stop(0)
        return answer

    assert asyncio.run(ask(f"unix:{tmp_path}/s")) == b"second"
