"""Publishing through a connection that breaks after the event was stored."""

import asyncio
import uuid
from collections.abc import Callable
from collections.abc import Iterator
from concurrent import futures

import grpc
import pytest
from google.protobuf.wrappers_pb2 import Int64Value

from esper.common.retries import CALL_ATTEMPTS
from esper.common.rpc import RpcError
from esper.oona.aio import AsyncOonaClient
from esper.oona.client import OonaClient
from esper.oona.v1 import event_pb2
from esper.oona.v1 import event_pb2_grpc
from esper.plane import Plane
from esper.plane.channel import make_async_channel
from esper.plane.channel import make_channel

Publish = Callable[[str, list[int]], list[int]]


class Breaking(event_pb2_grpc.EventServiceServicer):
    """Hands events on to a server; of the first calls the acknowledgements are lost."""

    def __init__(self, channel: grpc.Channel) -> None:
        self.stub = event_pb2_grpc.EventServiceStub(channel)
        self.num_calls = 0
        self.num_broken = 0
        self.code = grpc.StatusCode.UNAVAILABLE

    def Publish(  # noqa: N802
        self, requests: Iterator[event_pb2.PublishRequest], context: grpc.ServicerContext
    ) -> Iterator[event_pb2.PublishResponse]:
        self.num_calls += 1
        answers = list(self.stub.Publish(iter(list(requests)), timeout=60))
        if self.num_calls <= self.num_broken:
            yield answers[0]
            context.abort(self.code, "the connection broke")
        yield from answers


@pytest.fixture
def breaking(store_plane: Plane, short_dir) -> Iterator[tuple[Breaking, str]]:
    address = f"unix:{short_dir}/breaking.sock"
    servicer = Breaking(store_plane.channel("oona"))
    server = grpc.server(futures.ThreadPoolExecutor(2))
    event_pb2_grpc.add_EventServiceServicer_to_server(servicer, server)
    server.add_insecure_port(address)
    server.start()
    yield servicer, address
    server.stop(None).wait()


@pytest.fixture(params=["threads", "asyncio"])
def publish(request: pytest.FixtureRequest, breaking: tuple[Breaking, str]) -> Publish:
    """Publishes through `breaking`, with either client."""

    def with_threads(topic: str, numbers: list[int]) -> list[int]:
        messages = [Int64Value(value=number) for number in numbers]
        with make_channel(breaking[1]) as channel:
            oona = OonaClient(channel)
            if len(messages) == 1:
                return [oona.publish(topic, messages[0], timeout_s=60)]
            return oona.publish_many(topic, messages, timeout_s=60)

    async def in_a_loop(topic: str, numbers: list[int]) -> list[int]:
        messages = [Int64Value(value=number) for number in numbers]
        async with make_async_channel(breaking[1]) as channel:
            oona = AsyncOonaClient(channel)
            if len(messages) == 1:
                return [await oona.publish(topic, messages[0], timeout_s=60)]
            return await oona.publish_many(topic, messages, timeout_s=60)

    if request.param == "threads":
        return with_threads
    return lambda topic, numbers: asyncio.run(in_a_loop(topic, numbers))


def stored(plane: Plane, topic: str) -> int:
    return {found.name: found.next_offset for found in plane.oona.list_topics()}[topic]


@pytest.mark.parametrize("numbers", [[7], [1, 2, 3]])
def test_what_was_stored_is_not_stored_again(
    store_plane: Plane, breaking: tuple[Breaking, str], publish: Publish, numbers: list[int]
) -> None:
    breaking[0].num_broken = 2
    topic = f"t.{uuid.uuid4()}"
    assert publish(topic, numbers) == list(range(len(numbers)))
    assert breaking[0].num_calls == 3
    assert stored(store_plane, topic) == len(numbers)


def test_it_is_given_up_after_some_attempts(
    store_plane: Plane, breaking: tuple[Breaking, str], publish: Publish
) -> None:
    breaking[0].num_broken = 100
    topic = f"t.{uuid.uuid4()}"
    with pytest.raises(RpcError) as caught:
        publish(topic, [1])
    assert caught.value.code is grpc.StatusCode.UNAVAILABLE
    assert breaking[0].num_calls == CALL_ATTEMPTS
    assert stored(store_plane, topic) == 1


def test_a_refusal_is_not_repeated(breaking: tuple[Breaking, str], publish: Publish) -> None:
    breaking[0].num_broken = 1
    breaking[0].code = grpc.StatusCode.RESOURCE_EXHAUSTED
    with pytest.raises(RpcError):
        publish(f"t.{uuid.uuid4()}", [1])
    assert breaking[0].num_calls == 1
