"""What happens around every call: limits, default deadline, errors to statuses, one log line."""

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncIterator
from collections.abc import Awaitable
from collections.abc import Callable
from contextlib import asynccontextmanager
from typing import TypeAlias
from typing import TypeVar
from typing import cast

import grpc

from esper.services.serving import metrics
from esper.services.serving.context import CallContext
from esper.services.serving.errors import ServiceError
from esper.services.serving.errors import exhausted
from esper.services.serving.limits import ServerLimits
from esper.services.serving.logs import FIELDS

LOG = logging.getLogger("esper.call")
OWN_PREFIX = "/esper."
RETRY_AFTER_S = 0.5

Q = TypeVar("Q")
R = TypeVar("R")

# Quoted: gRPC's classes are generic in their type stubs alone.
Handler: TypeAlias = "grpc.RpcMethodHandler[Q, R]"
UnaryBehaviour: TypeAlias = "Callable[[object, CallContext], Awaitable[object]]"
StreamBehaviour: TypeAlias = "Callable[[object, CallContext], AsyncIterator[object]]"


class CallInterceptor(grpc.aio.ServerInterceptor):
    """Wraps the handlers of Esper's own services, all four kinds of them.

    A `ServiceError` becomes its status with details. Any other exception becomes INTERNAL with an
    incident number; the traceback goes to the log alone.

    Args:
        limits: What the server takes on.
    """

    def __init__(self, limits: ServerLimits) -> None:
        self._limits = limits
        self._running = 0
        self._wrapped: dict[str, object] = {}  # a wrapper for every call would cost a tenth of it

    async def intercept_service(  # noqa: D102
        self,
        continuation: "Callable[[grpc.HandlerCallDetails], Awaitable[Handler[Q, R] | None]]",
        handler_call_details: grpc.HandlerCallDetails,
    ) -> "Handler[Q, R] | None":
        method = handler_call_details.method
        if (known := self._wrapped.get(method)) is not None:
            return cast("Handler[Q, R]", known)
        handler = await continuation(handler_call_details)
        # Health checks and reflection have no errors of ours and would fill the log.
        if handler is None or not method.startswith(OWN_PREFIX):
            return handler
        wrapped = self._wrap(method, handler)
        self._wrapped[method] = wrapped
        return wrapped

    def _wrap(
        self, method: str, handler: "grpc.RpcMethodHandler[Q, R]"
    ) -> "grpc.RpcMethodHandler[Q, R]":
        # The casts: the type stubs know handlers of synchronous servers only.
        wrap: Callable[..., grpc.RpcMethodHandler[Q, R]]
        behaviour: object
        if handler.unary_unary is not None:
            deadline_s = self._limits.default_deadline_s
            wrap = grpc.unary_unary_rpc_method_handler
            behaviour = self._unary(method, cast(UnaryBehaviour, handler.unary_unary), deadline_s)
        elif handler.stream_unary is not None:
            wrap = grpc.stream_unary_rpc_method_handler
            behaviour = self._unary(method, cast(UnaryBehaviour, handler.stream_unary), None)
        elif handler.unary_stream is not None:
            wrap = grpc.unary_stream_rpc_method_handler
            behaviour = self._stream(method, cast(StreamBehaviour, handler.unary_stream))
        else:
            wrap = grpc.stream_stream_rpc_method_handler
            behaviour = self._stream(method, cast(StreamBehaviour, handler.stream_stream))
        return wrap(behaviour, handler.request_deserializer, handler.response_serializer)

    def _unary(
        self, method: str, behaviour: "UnaryBehaviour", default_deadline_s: float | None
    ) -> "UnaryBehaviour":
        async def handle(request: object, context: CallContext) -> object:
            async with self._call(method, context):
                if context.time_remaining() is not None:
                    return await behaviour(request, context)
                async with asyncio.timeout(default_deadline_s):
                    return await behaviour(request, context)

        return handle

    def _stream(self, method: str, behaviour: "StreamBehaviour") -> "StreamBehaviour":
        async def handle(request: object, context: CallContext) -> AsyncIterator[object]:
            async with self._call(method, context):
                responses = behaviour(request, context)
                async for response in responses:
                    yield response

        return handle

    @asynccontextmanager
    async def _call(self, method: str, context: CallContext) -> AsyncIterator[None]:
        started_s = time.perf_counter()
        peer = context.peer()  # gRPC crashes when asked after the call was cancelled
        code = grpc.StatusCode.OK
        reason = ""
        self._running += 1
        metrics.CALLS_RUNNING.inc()
        try:
            if self._running > self._limits.max_concurrent_rpcs:
                raise exhausted(
                    "TOO_MANY_CALLS",
                    f"the server already runs {self._limits.max_concurrent_rpcs} calls",
                    RETRY_AFTER_S,
                )
            yield
        except ServiceError as error:
            code, reason = error.code, error.reason
            await context.abort_with_status(error.status())
        except TimeoutError:
            code, reason = grpc.StatusCode.DEADLINE_EXCEEDED, "DEFAULT_DEADLINE"
            await context.abort_with_status(self._too_slow().status())
        except (asyncio.CancelledError, GeneratorExit):
            code = grpc.StatusCode.CANCELLED
            raise
        except grpc.aio.AbortError:
            code = context.code()
            raise
        except Exception as error:
            incident = secrets.token_hex(4)
            code, reason = grpc.StatusCode.INTERNAL, "INTERNAL"
            LOG.exception(
                "internal error", extra={FIELDS: {"method": method, "incident": incident}}
            )
            await context.abort_with_status(_internal(incident).status())
            raise AssertionError("abort_with_status raises") from error
        finally:
            self._running -= 1
            metrics.CALLS_RUNNING.dec()
            elapsed_s = time.perf_counter() - started_s
            # The answer goes out first: writing the line takes a tenth of a small call.
            asyncio.get_running_loop().call_soon(_record, method, peer, code, reason, elapsed_s)

    def _too_slow(self) -> ServiceError:
        return ServiceError(
            grpc.StatusCode.DEADLINE_EXCEEDED,
            "DEFAULT_DEADLINE",
            f"the call set no deadline and took longer than {self._limits.default_deadline_s:g} s",
        )


def _internal(incident: str) -> ServiceError:
    return ServiceError(
        grpc.StatusCode.INTERNAL,
        "INTERNAL",
        f"internal error; the server's log has it as incident {incident}",
        metadata={"incident": incident},
    )


def _record(method: str, peer: str, code: grpc.StatusCode, reason: str, elapsed_s: float) -> None:
    """Counts a call that has ended, and logs it."""
    metrics.CALLS.labels(method, code.name).inc()
    metrics.CALL_SECONDS.labels(method).observe(elapsed_s)
    fields: dict[str, object] = {
        "method": method,
        "code": code.name,
        "duration_ms": round(elapsed_s * 1e3, 3),
        "peer": peer,
    }
    if reason:
        fields["reason"] = reason
    LOG.info("call", extra={FIELDS: fields})
