"""What every client of the plane shares: timeouts and readable errors."""

import os
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import cast

# gRPC's own fork handlers can hang a DataLoader worker that is forked beside an open channel; a
# worker never uses the channel, so the handlers are not wanted. gRPC reads this when it first
# starts.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

import grpc  # noqa: E402
from google.protobuf.any_pb2 import Any as AnyMessage  # noqa: E402
from google.protobuf.message import Message  # noqa: E402
from google.rpc import error_details_pb2  # noqa: E402
from grpc_status import rpc_status  # noqa: E402

CALL_TIMEOUT_S = 30.0
"""Deadline of an ordinary unary call."""

STREAM_BYTES_PER_S = 1 << 20
"""Slowest blob transfer that is still waited for; sets the deadline of uploads and downloads."""


@dataclass(frozen=True)
class Violation:
    """One field of a request that was refused.

    Attributes:
        field: Path of the field, such as `digest.hash`.
        description: The value found and the rule that it breaks.
    """

    field: str
    description: str


class RpcError(Exception):
    """A call that the plane refused or did not answer, with what its status says.

    Attributes:
        method: Full name of the RPC, such as `/esper.urza.v1.BlobService/WriteBlob`; empty if
            unknown.
        code: gRPC status code.
        reason: Stable word for programs, such as `ILLEGAL_MOVE`; empty where the server sent none.
        violations: The fields refused; empty for other errors.
        metadata: Further facts by name.
    """

    def __init__(
        self,
        code: grpc.StatusCode,
        message: str,
        *,
        method: str = "",
        reason: str = "",
        violations: tuple[Violation, ...] = (),
        metadata: dict[str, str] | None = None,
    ) -> None:
        super().__init__(f"{code.name}: {message}")
        self.method = method
        self.code = code
        self.message = message
        self.reason = reason
        self.violations = violations
        self.metadata = metadata or {}


def decode_error(error: grpc.RpcError) -> RpcError:
    """Returns what `error` says, with the details of its google.rpc.Status where it carries one."""
    call = cast(grpc.Call, error)  # as every error is that a call of the stubs raises
    code = call.code()
    message = call.details() or ""
    reason = ""
    violations: tuple[Violation, ...] = ()
    metadata: dict[str, str] = {}
    status = rpc_status.from_call(call)
    for detail in status.details if status is not None else ():
        info = error_details_pb2.ErrorInfo()
        bad = error_details_pb2.BadRequest()
        if detail.Unpack(info):
            reason = info.reason
            metadata = dict(info.metadata)
        elif detail.Unpack(bad):
            violations = tuple(Violation(v.field, v.description) for v in bad.field_violations)
    return RpcError(code, message, reason=reason, violations=violations, metadata=metadata)


class _ReadableErrors:
    """A class, as a generator would cost a small call a hundredth; it keeps nothing."""

    __slots__ = ()

    def __enter__(self) -> None:
        """Does nothing."""

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, grpc.RpcError):
            raise decode_error(error) from error


_READABLE_ERRORS = _ReadableErrors()


def readable_errors() -> AbstractContextManager[None, None]:
    """Turns a `grpc.RpcError` raised inside into an `RpcError` that names reason and fields.

    Raises:
        RpcError: In place of every `grpc.RpcError`.
    """
    return _READABLE_ERRORS


def packed(message: Message) -> AnyMessage:
    """Returns a message as the body of an event: packed into an Any unless it is one."""
    if isinstance(message, AnyMessage):
        return message
    body = AnyMessage()
    body.Pack(message)
    return body
