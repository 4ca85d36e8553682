"""The guard around handlers of all four kinds, over a real socket."""

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator
from collections.abc import Callable
from collections.abc import Iterator

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from esper.common.rpc import decode_error
from esper.oona.v1 import event_pb2
from esper.services.serving.errors import FieldViolation
from esper.services.serving.errors import ServiceError
from esper.services.serving.errors import aborted
from esper.services.serving.errors import data_loss
from esper.services.serving.errors import exhausted
from esper.services.serving.errors import invalid
from esper.services.serving.errors import not_found
from esper.services.serving.errors import out_of_range
from esper.services.serving.errors import precondition
from esper.services.serving.errors import refused
from esper.services.serving.errors import require
from esper.services.serving.errors import unavailable
from esper.services.serving.errors import unimplemented
from esper.services.serving.guard import GuardedServer
from esper.services.serving.journal import CallJournal
from esper.services.serving.limits import ServerLimits
from esper.services.serving.logs import FIELDS
from esper.services.serving.methods import MethodTable

SERVICE = "esper.test.v1.KindService"
LIMITS = ServerLimits(max_concurrent_rpcs=3, default_deadline_s=0.3)
ERRORS: dict[str, Callable[[], Exception]] = {
    "invalid": lambda: invalid("digest.hash", "xyz", "must be a SHA-256"),
    "not_found": lambda: not_found("kernels/1"),
    "precondition": lambda: precondition("ILLEGAL_MOVE", "no", before="A", after="B"),
    "aborted": lambda: aborted("ETAG_MISMATCH", "changed", etag="7"),
    "out_of_range": lambda: out_of_range("OFFSET", "beyond"),
    "data_loss": lambda: data_loss("damaged"),
    "exhausted": lambda: exhausted("DISK_FULL", "no room", retry_after_s=2.5),
    "unavailable": lambda: unavailable("stopping"),
    "unimplemented": lambda: unimplemented("S/M"),
    "bug": lambda: ZeroDivisionError("the secret of the house"),
}


async def unary_unary(request: event_pb2.Topic, context: object) -> event_pb2.Topic:
    if request.name == "slow":
        await asyncio.sleep(1.0)
        return request
    raise ERRORS[request.name]()


async def stream_unary(
    requests: AsyncIterator[event_pb2.Topic], context: object
) -> event_pb2.Topic:
    async for request in requests:
        raise ERRORS[request.name]()
    return event_pb2.Topic()


async def unary_stream(request: event_pb2.Topic, context: object) -> AsyncIterator[event_pb2.Topic]:
    if request.name == "slow":
        for _ in range(2):
            await asyncio.sleep(0.4)
            yield request
        return
    yield request
    raise ERRORS[request.name]()


async def stream_stream(
    requests: AsyncIterator[event_pb2.Topic], context: object
) -> AsyncIterator[event_pb2.Topic]:
    async for request in requests:
        if request.name == "hold":
            yield request
            continue
        raise ERRORS[request.name]()


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    place = f"unix:{tmp_path_factory.mktemp('k')}/s"
    coders = {
        "request_deserializer": event_pb2.Topic.FromString,
        "response_serializer": event_pb2.Topic.SerializeToString,
    }
    handlers = {
        "UnaryUnary": grpc.unary_unary_rpc_method_handler(unary_unary, **coders),
        "StreamUnary": grpc.stream_unary_rpc_method_handler(stream_unary, **coders),
        "UnaryStream": grpc.unary_stream_rpc_method_handler(unary_stream, **coders),
        "StreamStream": grpc.stream_stream_rpc_method_handler(stream_stream, **coders),
    }
    ready = threading.Event()
    control: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = []

    async def run() -> None:
        server = grpc.aio.server()
        methods = MethodTable()
        server.add_generic_rpc_handlers((methods,))
        guarded = GuardedServer(methods, LIMITS, CallJournal())
        guarded.add_registered_method_handlers(SERVICE, handlers)
        server.add_insecure_port(place)
        await server.start()
        stop = asyncio.Event()
        control.append((asyncio.get_running_loop(), stop))
        ready.set()
        await stop.wait()
        await server.stop(0)

    thread = threading.Thread(target=lambda: asyncio.run(run()))
    thread.start()
    assert ready.wait(10)
    yield place
    loop, stop = control[0]
    loop.call_soon_threadsafe(stop.set)
    thread.join()


class Kinds:
    """Calls each of the four kinds with one request."""

    def __init__(self, channel: grpc.Channel) -> None:
        coders = {
            "request_serializer": event_pb2.Topic.SerializeToString,
            "response_deserializer": event_pb2.Topic.FromString,
        }
        path = f"/{SERVICE}"
        self.unary_unary = channel.unary_unary(f"{path}/UnaryUnary", **coders)
        self.stream_unary = channel.stream_unary(f"{path}/StreamUnary", **coders)
        self.unary_stream = channel.unary_stream(f"{path}/UnaryStream", **coders)
        self.stream_stream = channel.stream_stream(f"{path}/StreamStream", **coders)

    def call(self, kind: str, name: str) -> None:
        request = event_pb2.Topic(name=name)
        if kind == "unary_unary":
            self.unary_unary(request, timeout=60)
        elif kind == "stream_unary":
            self.stream_unary(iter([request]), timeout=60)
        elif kind == "unary_stream":
            list(self.unary_stream(request, timeout=60))
        else:
            list(self.stream_stream(iter([request]), timeout=60))


@pytest.fixture
def kinds(address: str) -> Iterator[Kinds]:
    with grpc.insecure_channel(address) as channel:
        yield Kinds(channel)


ALL_KINDS = ["unary_unary", "stream_unary", "unary_stream", "stream_stream"]


@pytest.mark.parametrize("kind", ALL_KINDS)
@pytest.mark.parametrize("name", [name for name in ERRORS if name != "bug"])
def test_errors_carry_their_details_in_every_kind_of_call(
    kinds: Kinds, kind: str, name: str
) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        kinds.call(kind, name)
    wanted = ERRORS[name]()
    assert isinstance(wanted, ServiceError)
    error = decode_error(caught.value)
    assert (error.code, error.message, error.reason, error.metadata) == (
        wanted.code,
        wanted.message,
        wanted.reason,
        wanted.metadata,
    )
    assert [v.field for v in error.violations] == [v.field for v in wanted.violations]


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_bugs_are_logged_and_not_told(
    kinds: Kinds, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO), pytest.raises(grpc.RpcError) as caught:
        kinds.call(kind, "bug")
    error = decode_error(caught.value)
    assert (error.code, error.reason) == (grpc.StatusCode.INTERNAL, "INTERNAL")
    assert "secret" not in str(caught.value)
    assert "ZeroDivisionError" not in str(caught.value)
    logged = [record for record in caplog.records if record.exc_info]
    assert len(logged) == 1
    assert "the secret of the house" in caplog.text
    assert getattr(logged[0], FIELDS)["incident"] == error.metadata["incident"]


def test_retry_info_says_when(kinds: Kinds) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        kinds.call("unary_unary", "exhausted")
    details = rpc_status.from_call(caught.value).details
    retry = error_details_pb2.RetryInfo()
    assert any(detail.Unpack(retry) for detail in details)
    assert retry.retry_delay.ToMilliseconds() == 2500
    info = error_details_pb2.ErrorInfo()
    assert details[0].Unpack(info)
    assert info.domain == "esper"


def test_every_violation_is_named() -> None:
    violations = [FieldViolation("a", 1, "must be 2"), FieldViolation("b.c", "x" * 500, "is long")]
    error = refused(violations)
    assert "a: 1 must be 2" in error.message
    assert len(error.message) < 250
    with pytest.raises(ServiceError):
        require(violations)
    require([])


def test_a_unary_call_without_a_deadline_gets_one(kinds: Kinds) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        kinds.unary_unary(event_pb2.Topic(name="slow"))
    error = decode_error(caught.value)
    assert (error.code, error.reason) == (grpc.StatusCode.DEADLINE_EXCEEDED, "DEFAULT_DEADLINE")


def test_the_callers_own_deadline_counts(kinds: Kinds) -> None:
    answer = kinds.unary_unary(event_pb2.Topic(name="slow"), timeout=60)
    assert answer.name == "slow"


def test_streams_have_no_default_deadline(kinds: Kinds) -> None:
    assert len(list(kinds.unary_stream(event_pb2.Topic(name="slow")))) == 2


def test_more_calls_than_allowed_are_turned_away(kinds: Kinds) -> None:
    release = threading.Event()

    def held() -> Iterator[event_pb2.Topic]:
        yield event_pb2.Topic(name="hold")
        release.wait(10)

    calls = [kinds.stream_stream(held(), timeout=60) for _ in range(LIMITS.max_concurrent_rpcs)]
    for call in calls:
        next(call)
    with pytest.raises(grpc.RpcError) as caught:
        kinds.call("unary_unary", "not_found")
    error = decode_error(caught.value)
    assert (error.code, error.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "TOO_MANY_CALLS")
    release.set()
    for call in calls:
        assert list(call) == []
    with pytest.raises(grpc.RpcError) as caught:  # there is room again
        kinds.call("unary_unary", "not_found")
    assert decode_error(caught.value).code is grpc.StatusCode.NOT_FOUND


def test_one_line_a_call_says_how_it_went(kinds: Kinds, caplog: pytest.LogCaptureFixture) -> None:
    def lines() -> list[dict[str, object]]:
        """The lines of this call: those of an earlier test's calls may still be on their way."""
        fields = [getattr(record, FIELDS) for record in caplog.records]
        return [line for line in fields if line["code"] == "ABORTED"]

    with caplog.at_level(logging.INFO, "esper.call"):
        with pytest.raises(grpc.RpcError):
            kinds.call("stream_stream", "aborted")
        deadline_s = time.monotonic() + 60
        while not lines() and time.monotonic() < deadline_s:
            time.sleep(0.01)  # the client has its answer before the server writes the line
    fields = lines()
    assert len(fields) == 1
    assert fields[0]["method"] == f"/{SERVICE}/StreamStream"
    assert fields[0]["reason"] == "ETAG_MISMATCH"
    assert fields[0]["duration_ms"] >= 0
