"""Tezzeret's gRPC face: a thin adapter over the forge."""

import asyncio
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeAlias

import grpc
import torch
from google.protobuf.message import Message

from esper.blueprints.lowering import PIPELINES
from esper.common.rpc import RpcError
from esper.common.v1 import blueprint_pb2
from esper.plane import Plane
from esper.plane import PlaneError
from esper.plane import connect
from esper.services.serving.checks import check_tags
from esper.services.serving.context import ServiceContext
from esper.services.serving.errors import FieldViolation
from esper.services.serving.errors import ServiceError
from esper.services.serving.errors import require
from esper.services.serving.errors import unavailable
from esper.services.serving.errors import unimplemented
from esper.services.tezzeret.forge import Emit
from esper.services.tezzeret.forge import Forge
from esper.tezzeret.v1 import forge_pb2
from esper.tezzeret.v1 import forge_pb2_grpc

# Quoted: gRPC's classes are generic in their type stubs alone.
Context: TypeAlias = "grpc.aio.ServicerContext[Message, Message]"

# The methods are documented in proto/esper/tezzeret/v1.
# ruff: noqa: D102, N802


def check_request(request: forge_pb2.CompileRequest) -> list[FieldViolation]:
    """Returns what is wrong with a request, the blueprint itself not looked at."""
    found = []
    if request.WhichOneof("blueprint") is None:
        found.append(FieldViolation("blueprint", None, "must be a name or inline"))
    if not request.HasField("signature"):
        found.append(FieldViolation("signature", None, "is required"))
    return found + check_tags("tags", request.tags)


class Worker:
    """Compiles one blueprint after the other in a thread of its own, with one core.

    Training runs on the same machine, so the compiler must not take all of it.

    Args:
        urza: Address of the library; connected to with the first compilation.
    """

    def __init__(self, urza: str | None) -> None:
        assert urza is not None, "the shell fills in its own address"
        self._urza = urza
        self._plane: Plane | None = None
        self._thread = ThreadPoolExecutor(
            1, "tezzeret", initializer=torch.set_num_threads, initargs=(1,)
        )

    def submit(self, request: forge_pb2.CompileRequest, emit: Emit) -> "asyncio.Future[None]":
        """Queues a compilation; its events go to `emit` in the worker's thread."""
        return asyncio.get_running_loop().run_in_executor(
            self._thread, self._compile, request, emit
        )

    def _compile(self, request: forge_pb2.CompileRequest, emit: Emit) -> None:
        blueprint: blueprint_pb2.Blueprint | str = request.inline
        if request.WhichOneof("blueprint") == "name":
            blueprint = request.name
        try:
            if self._plane is None:
                self._plane = connect(self._urza)
            forge = Forge(self._plane.urza)
            forge.compile(blueprint, request.signature, request.tags, emit)
        except PlaneError as error:
            raise unavailable(f"the library is out of reach: {error}") from error
        except RpcError as error:
            raise ServiceError(
                error.code,
                error.reason or "LIBRARY_FAILED",
                f"the library answered: {error.message}",
                metadata=error.metadata,
            ) from error

    def close(self) -> None:
        """Waits for the compilation under way and lets go of the library."""
        self._thread.shutdown(wait=True, cancel_futures=True)
        if self._plane is not None:
            self._plane.close()


class ForgeServicer(forge_pb2_grpc.ForgeServiceServicer):
    """Serves `esper.tezzeret.v1.ForgeService`."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker

    async def Compile(
        self, request: forge_pb2.CompileRequest, context: Context
    ) -> AsyncIterator[forge_pb2.CompileResponse]:
        require(check_request(request))
        start = time.perf_counter()
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[forge_pb2.CompileEvent | None] = asyncio.Queue()

        def emit(event: forge_pb2.CompileEvent) -> None:
            event.elapsed_ms = (time.perf_counter() - start) * 1e3
            loop.call_soon_threadsafe(events.put_nowait, event)

        work = self._worker.submit(request, emit)
        work.add_done_callback(lambda _: events.put_nowait(None))
        try:
            while (event := await events.get()) is not None:
                yield forge_pb2.CompileResponse(event=event)
            await work
        finally:
            work.cancel()  # drops the work of a caller that left while it was queued

    def CompileBatch(
        self,
        request_iterator: AsyncIterator[forge_pb2.CompileBatchRequest],
        context: Context,
    ) -> AsyncIterator[forge_pb2.CompileBatchResponse]:
        raise unimplemented("esper.tezzeret.v1.ForgeService/CompileBatch")

    def Characterize(
        self, request: forge_pb2.CharacterizeRequest, context: Context
    ) -> AsyncIterator[forge_pb2.CharacterizeResponse]:
        raise unimplemented("esper.tezzeret.v1.ForgeService/Characterize")

    async def ListPipelines(
        self, request: forge_pb2.ListPipelinesRequest, context: Context
    ) -> forge_pb2.ListPipelinesResponse:
        return forge_pb2.ListPipelinesResponse(
            pipelines=[
                forge_pb2.Pipeline(name=way.name, description=way.description, native=way.native)
                for way in PIPELINES
            ]
        )


class TezzeretService:
    """Tezzeret as a service of the shell."""

    full_names = ("esper.tezzeret.v1.ForgeService",)

    def __init__(self, context: ServiceContext) -> None:
        self._worker = Worker(context.urza)

    def add_to(self, server: grpc.aio.Server) -> None:
        """Registers the servicer."""
        forge_pb2_grpc.add_ForgeServiceServicer_to_server(ForgeServicer(self._worker), server)

    async def close(self) -> None:
        """Waits for the compilation under way."""
        await asyncio.to_thread(self._worker.close)


def create(context: ServiceContext) -> TezzeretService:
    """Returns the service."""
    return TezzeretService(context)
