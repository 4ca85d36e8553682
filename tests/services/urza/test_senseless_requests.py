"""Requests of random sense to every method of Urza and Oona: answered or refused, never a fault."""

import random
import string
import tempfile
from collections.abc import Callable
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from google.protobuf import descriptor
from google.protobuf import message_factory
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.message import Message

from esper import blueprints
from esper.common.rpc import decode_error
from esper.oona.admin import LogAdmin
from esper.oona.v1 import event_pb2
from esper.plane import connect
from esper.urza.admin import StoreAdmin
from esper.urza.v1 import blob_pb2
from esper.urza.v1 import library_pb2
from esper.urza.v1 import run_pb2
from esper.urza.v1 import store_pb2

ROUNDS = 60
CALL_S = 60
STREAM_S = 0.3
"""Deadline of a call that streams its answer, as it may have no end."""

Field = descriptor.FieldDescriptor
HASH = "0123456789abcdef" * 4
STRINGS = (
    "",
    "a",
    "A b",
    "\0",
    "\u00e9\u4e16\U0001f600",
    "x" * 300,
    HASH,
    HASH.upper(),
    HASH[1:],
    f"blueprints/{HASH}",
    f"kernels/{HASH}",
    f"kernels/{HASH}/reports/0",
    "runs/r",
    "runs/../../etc",
    "kernels/",
    "1-0123456789abcdef",
    "AgAAAA",
)
INTEGERS = (0, 1, -1, 2, 7, 64, 1000, 2**31 - 1, -(2**31), 2**63 - 1, -(2**63), 2**32, 2**53)
FLOATS = (0.0, 1.0, -1.0, 0.5, 1e-300, 1e300, float("inf"), float("-inf"), float("nan"))
SENSIBLE: dict[str, tuple[object, ...]] = {
    "hash": (HASH,),
    "size_bytes": (5, 70_000),
    "name": (f"kernels/{HASH}", f"blueprints/{HASH}", "runs/r"),
    "kernel": (f"kernels/{HASH}",),
    "run": ("runs/r",),
    "run_id": ("r", ""),
    "topic": ("t",),
    "group": ("", "g"),
    "request_id": ("", "once"),
    "etag": ("",),
    "page_token": ("",),
    "page_size": (0, 10),
    "tags": ("tag",),
    "depth": (1, 16),
    "offsets": (0, 1),
    "start_offset": (0,),
    "start_revision": (0, 1),
    "start_sequence": (0,),
    "write_offset": (0,),
    "read_offset": (0, 3),
    "read_limit": (0, 3),
    "max_in_flight": (0, 4),
    "visibility_timeout_s": (0.0, 1.0),
    "progress_interval_s": (0.0, 0.1),
    "type_url": ("type.googleapis.com/x.Y",),
}
SENSE = 0.85
"""Share of the fields named there that get a value from there."""
EXPECTED = {
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.ALREADY_EXISTS,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.ABORTED,
    grpc.StatusCode.OUT_OF_RANGE,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
}
METHODS = [
    method
    for file in (blob_pb2, library_pb2, run_pb2, store_pb2, event_pb2)
    for service in file.DESCRIPTOR.services_by_name.values()
    for method in service.methods
]


class Fuzz:
    """Draws messages, some of them near to sense.

    Args:
        seed: Of all that is drawn.
    """

    def __init__(self, seed: str) -> None:
        self._draw = random.Random(seed)

    def message(self, kind: descriptor.Descriptor, depth: int = 0) -> Message:
        """Returns a message of a kind; a real blueprint now and then."""
        made = message_factory.GetMessageClass(kind)()
        if kind.full_name == "esper.common.v1.Blueprint" and self._draw.random() < 0.5:
            made.CopyFrom(blueprints.get(self._draw.choice(blueprints.names())))
            return made
        if isinstance(made, AnyMessage):
            made.type_url = self._draw.choice(("", "x", *["type.googleapis.com/x.Y"] * 5))
            made.value = self._bytes()
            return made
        for field in kind.fields:
            if self._draw.random() < (0.25 if depth else 0.15):
                continue
            if field.is_repeated:
                self._fill(made, field, depth)
            elif field.message_type is not None:
                if depth < 5:
                    getattr(made, field.name).CopyFrom(self.message(field.message_type, depth + 1))
            else:
                setattr(made, field.name, self._value(field))
        return made

    def _fill(self, made: Message, field: Field, depth: int) -> None:
        count = self._draw.choice((0, 1, 1, 2, 5))
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            entry = field.message_type
            for _ in range(count):
                value = entry.fields_by_name["value"]
                key = self._value(entry.fields_by_name["key"])
                if value.message_type is not None:
                    if depth < 5:
                        held = self.message(value.message_type, depth + 1)
                        getattr(made, field.name)[key].CopyFrom(held)
                else:
                    getattr(made, field.name)[key] = self._value(value)
            return
        for _ in range(count):
            if field.message_type is None:
                getattr(made, field.name).append(self._value(field))
            elif depth < 5:
                getattr(made, field.name).append(self.message(field.message_type, depth + 1))

    def _value(self, field: Field) -> object:
        if field.name in SENSIBLE and self._draw.random() < SENSE:
            return self._draw.choice(SENSIBLE[field.name])
        if field.type == Field.TYPE_STRING:
            letters = "".join(self._draw.choices(string.printable, k=self._draw.randrange(8)))
            return self._draw.choice((*STRINGS, letters))
        if field.type == Field.TYPE_BYTES:
            return self._bytes()
        if field.type == Field.TYPE_BOOL:
            return self._draw.random() < 0.5
        if field.type in (Field.TYPE_DOUBLE, Field.TYPE_FLOAT):
            return self._draw.choice(FLOATS)
        if field.type == Field.TYPE_ENUM:
            return self._draw.choice((*(v.number for v in field.enum_type.values), 99))
        low, high = {
            Field.CPPTYPE_INT32: (-(2**31), 2**31 - 1),
            Field.CPPTYPE_INT64: (-(2**63), 2**63 - 1),
            Field.CPPTYPE_UINT32: (0, 2**32 - 1),
            Field.CPPTYPE_UINT64: (0, 2**64 - 1),
        }[field.cpp_type]
        return self._draw.choice([number for number in INTEGERS if low <= number <= high])

    def _bytes(self) -> bytes:
        return self._draw.randbytes(self._draw.choice((0, 1, 32, 70_000)))


def call(
    channel: grpc.Channel, method: descriptor.MethodDescriptor, requests: list[Message]
) -> Iterator[Message]:
    """Makes a call of any kind and yields its answers."""
    path = f"/{method.containing_service.full_name}/{method.name}"
    coders = (
        lambda request: request.SerializeToString(),
        message_factory.GetMessageClass(method.output_type).FromString,
    )
    asked = iter(requests) if method.client_streaming else requests[0]
    if method.server_streaming:
        streams = channel.stream_stream if method.client_streaming else channel.unary_stream
        yield from streams(path, *coders)(asked, timeout=STREAM_S)
    else:
        one: Callable[..., object]
        one = channel.stream_unary if method.client_streaming else channel.unary_unary
        yield one(path, *coders)(asked, timeout=CALL_S)


@pytest.fixture(scope="module")
def channel(serve_in_thread: Callable[..., object]) -> Iterator[grpc.Channel]:
    """A server that no other test has to live with; it must be sound in the end."""
    with tempfile.TemporaryDirectory(prefix="et-", dir="/tmp") as folder:
        server = serve_in_thread(Path(folder), ("urza", "oona"))
        with connect(server.address, timeout_s=CALL_S) as plane:
            yield plane.channel("urza")
            checks = (StoreAdmin(plane.channel("urza")), LogAdmin(plane.channel("oona")))
            assert [step.summary.num_problems for c in checks for step in c.check()] == [0, 0]
        server.stop()


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_senseless_requests_are_refused_and_harm_nothing(
    channel: grpc.Channel, method: descriptor.MethodDescriptor
) -> None:
    fuzz = Fuzz(method.full_name)
    rounds = ROUNDS // 6 if method.server_streaming else ROUNDS
    for _ in range(rounds):
        requests = [fuzz.message(method.input_type) for _ in range(3)]
        try:
            for _ in call(channel, method, requests):
                pass
        except grpc.RpcError as raised:
            error = decode_error(raised)
            if method.server_streaming and error.code is grpc.StatusCode.DEADLINE_EXCEEDED:
                continue
            assert error.code in EXPECTED, f"{error}\n{requests}"
            assert error.reason, f"{error}\n{requests}"
            if error.code is grpc.StatusCode.INVALID_ARGUMENT:
                assert error.violations, f"{error}\n{requests}"
                assert all(v.field and v.description for v in error.violations), error.violations
