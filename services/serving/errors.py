"""Errors that a service tells its caller, and their form on the wire (google.rpc.Status)."""

from collections.abc import Iterable
from collections.abc import Mapping
from dataclasses import dataclass

import grpc
from google.protobuf import any_pb2
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc import error_details_pb2
from google.rpc import status_pb2
from grpc_status import rpc_status

DOMAIN = "esper"
MAX_VALUE_CHARS = 120


@dataclass(frozen=True)
class FieldViolation:
    """One field that breaks one rule.

    Attributes:
        field: Path of the field, such as `digest.hash`.
        value: The value found; cut to `MAX_VALUE_CHARS` characters in messages.
        rule: What the value must be.
    """

    field: str
    value: object
    rule: str

    def description(self) -> str:
        """Returns value and rule as one phrase."""
        text = repr(self.value)
        if len(text) > MAX_VALUE_CHARS:
            text = f"{text[:MAX_VALUE_CHARS]}..."
        return f"{text} {self.rule}"


class ServiceError(Exception):
    """An answer other than the one asked for; the shell turns it into a status.

    Attributes:
        code: gRPC status code.
        reason: Stable UPPER_SNAKE word for programs.
        message: One sentence for people.
        violations: The fields refused.
        metadata: Further facts by name.
        retry_after_s: When a retry may succeed, in seconds; None where a retry is no use.
    """

    def __init__(
        self,
        code: grpc.StatusCode,
        reason: str,
        message: str,
        violations: Iterable[FieldViolation] = (),
        metadata: Mapping[str, str] | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.reason = reason
        self.message = message
        self.violations = tuple(violations)
        self.metadata = dict(metadata or {})
        self.retry_after_s = retry_after_s

    def status(self) -> grpc.Status:
        """Returns the status with ErrorInfo, and BadRequest and RetryInfo where they apply."""
        details: list[Message] = [
            error_details_pb2.ErrorInfo(reason=self.reason, domain=DOMAIN, metadata=self.metadata)
        ]
        if self.violations:
            bad = error_details_pb2.BadRequest()
            for violation in self.violations:
                bad.field_violations.add(field=violation.field, description=violation.description())
            details.append(bad)
        if self.retry_after_s is not None:
            delay = Duration()
            delay.FromNanoseconds(round(self.retry_after_s * 1e9))
            details.append(error_details_pb2.RetryInfo(retry_delay=delay))
        status = status_pb2.Status(code=self.code.value[0], message=self.message)
        for detail in details:
            packed = any_pb2.Any()
            packed.Pack(detail)
            status.details.append(packed)
        return rpc_status.to_status(status)


def refused(violations: Iterable[FieldViolation]) -> ServiceError:
    """Returns INVALID_ARGUMENT that names every field of `violations` (at least one)."""
    found = tuple(violations)
    message = "; ".join(f"{v.field}: {v.description()}" for v in found)
    return ServiceError(grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD", message, found)


def require(violations: Iterable[FieldViolation]) -> None:
    """Raises INVALID_ARGUMENT where there is any violation."""
    found = tuple(violations)
    if found:
        raise refused(found)


def invalid(field: str, value: object, rule: str) -> ServiceError:
    """Returns INVALID_ARGUMENT for one field; `rule` reads on after the value: `must be ...`."""
    return refused([FieldViolation(field, value, rule)])


def not_found(name: str) -> ServiceError:
    """Returns NOT_FOUND for a resource name."""
    return ServiceError(
        grpc.StatusCode.NOT_FOUND, "NOT_FOUND", f"{name} does not exist", metadata={"name": name}
    )


def precondition(reason: str, message: str, **metadata: str) -> ServiceError:
    """Returns FAILED_PRECONDITION: the request is well formed but the store's state forbids it."""
    return ServiceError(grpc.StatusCode.FAILED_PRECONDITION, reason, message, metadata=metadata)


def aborted(reason: str, message: str, **metadata: str) -> ServiceError:
    """Returns ABORTED: another writer came first; read again and retry."""
    return ServiceError(grpc.StatusCode.ABORTED, reason, message, metadata=metadata)


def out_of_range(reason: str, message: str, **metadata: str) -> ServiceError:
    """Returns OUT_OF_RANGE: a position that does not exist, or no longer."""
    return ServiceError(grpc.StatusCode.OUT_OF_RANGE, reason, message, metadata=metadata)


def data_loss(message: str, **metadata: str) -> ServiceError:
    """Returns DATA_LOSS: stored bytes are not what was stored."""
    return ServiceError(grpc.StatusCode.DATA_LOSS, "CORRUPT_AT_REST", message, metadata=metadata)


def exhausted(reason: str, message: str, retry_after_s: float | None = None) -> ServiceError:
    """Returns RESOURCE_EXHAUSTED: a limit was reached."""
    return ServiceError(
        grpc.StatusCode.RESOURCE_EXHAUSTED, reason, message, retry_after_s=retry_after_s
    )


def unavailable(message: str, retry_after_s: float = 1.0) -> ServiceError:
    """Returns UNAVAILABLE: try again, perhaps elsewhere."""
    return ServiceError(
        grpc.StatusCode.UNAVAILABLE, "UNAVAILABLE", message, retry_after_s=retry_after_s
    )


def unimplemented(method: str) -> ServiceError:
    """Returns UNIMPLEMENTED for an RPC that is declared but not served by this release."""
    return ServiceError(
        grpc.StatusCode.UNIMPLEMENTED,
        "NOT_SERVED",
        f"{method} is declared but not served by this release",
        metadata={"method": method},
    )
