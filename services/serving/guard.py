"""What happens around every call: limits, default deadline, errors to statuses, the journal."""

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncIterator
from collections.abc import Awaitable
from collections.abc import Callable
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias
from typing import TypeVar
from typing import cast

import grpc

from esper.services.serving import metrics
from esper.services.serving.context import CallContext
from esper.services.serving.errors import ServiceError
from esper.services.serving.errors import exhausted
from esper.services.serving.journal import Call
from esper.services.serving.journal import CallJournal
from esper.services.serving.limits import ServerLimits
from esper.services.serving.logs import FIELDS
from esper.services.serving.methods import MethodTable

LOG = logging.getLogger("esper.call")
RETRY_AFTER_S = 0.5

Q = TypeVar("Q")
R = TypeVar("R")

# Quoted: gRPC's classes are generic in their type stubs alone.
UnaryBehaviour: TypeAlias = "Callable[[object, CallContext], Awaitable[object]]"
StreamBehaviour: TypeAlias = "Callable[[object, CallContext], AsyncIterator[object]]"


@dataclass(slots=True)
class _Running:
    calls: int = 0


class GuardedServer:
    """Where services register their methods: each gets a guard around it, of all four kinds.

    A `ServiceError` becomes its status with details. Any other exception becomes INTERNAL with an
    incident number; the traceback goes to the log alone. Not an interceptor of gRPC's, which would
    look for the handler anew, and wrap the caller's metadata, with every call.

    Args:
        methods: Gets the methods with their guards.
        limits: What the server takes on.
        journal: Takes down the calls that have ended.
    """

    def __init__(self, methods: MethodTable, limits: ServerLimits, journal: CallJournal) -> None:
        self._methods = methods
        self._limits = limits
        self._running = running = _Running()
        self._journal = journal
        # Not of this object: metrics outlive the loop, and gRPC's server must not.
        metrics.CALLS_RUNNING.set_function(lambda: running.calls)

    def add_generic_rpc_handlers(self, handlers: object) -> None:
        """Does nothing: what generated code adds here it registers by name, too."""

    def add_registered_method_handlers(
        self, service: str, handlers: "Mapping[str, grpc.RpcMethodHandler[Q, R]]"
    ) -> None:
        """Registers methods of a service by name; a later handler takes the place of an earlier."""
        wrapped = {
            name: self._wrap(f"/{service}/{name}", handler) for name, handler in handlers.items()
        }
        self._methods.add_registered_method_handlers(service, wrapped)

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
            call = self._begin(method, context)
            try:
                if self._running.calls > self._limits.max_concurrent_rpcs:
                    raise self._too_many()
                if context.time_remaining() is not None:
                    return await behaviour(request, context)
                async with asyncio.timeout(default_deadline_s):
                    return await behaviour(request, context)
            except BaseException as problem:
                await self._fail(call, context, problem)
                raise
            finally:
                self._end(call)

        return handle

    def _stream(self, method: str, behaviour: "StreamBehaviour") -> "StreamBehaviour":
        async def handle(request: object, context: CallContext) -> AsyncIterator[object]:
            call = self._begin(method, context)
            try:
                if self._running.calls > self._limits.max_concurrent_rpcs:
                    raise self._too_many()
                async for response in behaviour(request, context):
                    yield response
            except BaseException as problem:
                await self._fail(call, context, problem)
                raise
            finally:
                self._end(call)

        return handle

    # Neither a context manager made of a generator nor many small functions: around every call they
    # would cost a small one a twentieth of its time.

    def _begin(self, method: str, context: CallContext) -> Call:
        self._running.calls += 1
        # gRPC crashes when asked for the peer after the call was cancelled.
        return Call(method, context.peer(), time.perf_counter())

    async def _fail(self, call: Call, context: CallContext, problem: BaseException) -> None:
        """Notes what the caller is told of a problem, and tells it unless gRPC does.

        Raises:
            grpc.aio.AbortError: Where it has told.
        """
        told: ServiceError
        if isinstance(problem, asyncio.CancelledError | GeneratorExit):
            call.code = grpc.StatusCode.CANCELLED
            return
        if isinstance(problem, grpc.aio.AbortError):
            call.code = context.code()
            return
        if isinstance(problem, ServiceError):
            told = problem
        elif isinstance(problem, TimeoutError):
            told = self._too_slow()
        elif isinstance(problem, Exception):
            incident = secrets.token_hex(4)
            fields = {"method": call.method, "incident": incident}
            LOG.error("internal error", exc_info=problem, extra={FIELDS: fields})
            told = _internal(incident)
        else:
            return
        call.code, call.reason = told.code, told.reason
        await context.abort_with_status(told.status())

    def _end(self, call: Call) -> None:
        self._running.calls -= 1
        self._journal.end(call)

    def _too_many(self) -> ServiceError:
        return exhausted(
            "TOO_MANY_CALLS",
            f"the server already runs {self._limits.max_concurrent_rpcs} calls",
            RETRY_AFTER_S,
        )

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
