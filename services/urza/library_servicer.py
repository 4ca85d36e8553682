"""The gRPC face of the library."""

import asyncio
from collections.abc import AsyncIterator

import grpc

from esper.services.serving.context import CallContext
from esper.services.serving.errors import require
from esper.services.serving.errors import unavailable
from esper.services.store.engine import Store
from esper.services.store.followers import first_of
from esper.services.store.waking import awaitable
from esper.services.urza import validate
from esper.services.urza.answers import Answers
from esper.services.urza.library import FOLLOWED
from esper.services.urza.library import Library
from esper.services.urza.resources import digest_of_blueprint
from esper.services.urza.resources import digest_of_kernel
from esper.urza.v1 import library_pb2 as pb
from esper.urza.v1 import library_pb2_grpc

SERVICE = "esper.urza.v1.LibraryService"
PROGRESS_INTERVAL_S = 10.0

# The methods are documented in proto/esper/urza/v1.
# ruff: noqa: D102, N802


class LibraryServicer(library_pb2_grpc.LibraryServiceServicer):
    """Serves `esper.urza.v1.LibraryService`.

    Args:
        store: Holds the records.
        library: The records.
        stopping: Set when the server drains; watchers are sent away then.
    """

    def __init__(self, store: Store, library: Library, stopping: asyncio.Event) -> None:
        self._library = library
        self._stopping = stopping
        self._blueprints = Answers(
            store,
            pb.GetBlueprintRequest,
            lambda request: pb.GetBlueprintResponse(blueprint=library.get_blueprint(request.name)),
        )
        self._kernels = Answers(
            store,
            pb.GetKernelRequest,
            lambda request: pb.GetKernelResponse(kernel=library.get_kernel(request.name)),
        )

    def add_to(self, server: grpc.aio.Server) -> None:
        """Registers the methods."""
        library_pb2_grpc.add_LibraryServiceServicer_to_server(self, server)
        # In place of the generated ones: these two are served from bytes to bytes.
        blueprints: grpc.RpcMethodHandler[bytes, bytes]
        blueprints = grpc.unary_unary_rpc_method_handler(self.GetBlueprint)
        kernels: grpc.RpcMethodHandler[bytes, bytes]
        kernels = grpc.unary_unary_rpc_method_handler(self.GetKernel)
        server.add_registered_method_handlers(
            SERVICE, {"GetBlueprint": blueprints, "GetKernel": kernels}
        )

    async def CreateBlueprint(
        self, request: pb.CreateBlueprintRequest, context: CallContext
    ) -> pb.CreateBlueprintResponse:
        require(validate.create_blueprint(request))
        digest = await asyncio.to_thread(digest_of_blueprint, request.blueprint)
        return await awaitable(self._library.create_blueprint(request, digest))

    async def GetBlueprint(  # type: ignore[override]  # as registered above
        self, request: bytes, context: CallContext
    ) -> bytes:
        return self._blueprints.answer(request)

    async def ListBlueprints(
        self, request: pb.ListBlueprintsRequest, context: CallContext
    ) -> pb.ListBlueprintsResponse:
        require(validate.list_blueprints(request))
        return await asyncio.to_thread(self._library.list_blueprints, request)

    async def ArchiveBlueprint(
        self, request: pb.ArchiveBlueprintRequest, context: CallContext
    ) -> pb.ArchiveBlueprintResponse:
        require(validate.archive(request, "blueprints"))
        return await awaitable(self._library.archive_blueprint(request))

    async def UpdateBlueprintState(
        self, request: pb.UpdateBlueprintStateRequest, context: CallContext
    ) -> pb.UpdateBlueprintStateResponse:
        require(validate.update_blueprint_state(request))
        return await awaitable(self._library.update_blueprint_state(request))

    async def CreateKernel(
        self, request: pb.CreateKernelRequest, context: CallContext
    ) -> pb.CreateKernelResponse:
        require(validate.create_kernel(request))
        digest = await asyncio.to_thread(digest_of_kernel, request.kernel)
        return await awaitable(self._library.create_kernel(request, digest))

    async def GetKernel(  # type: ignore[override]  # as registered above
        self, request: bytes, context: CallContext
    ) -> bytes:
        return self._kernels.answer(request)

    async def ListKernels(
        self, request: pb.ListKernelsRequest, context: CallContext
    ) -> pb.ListKernelsResponse:
        require(validate.list_kernels(request))
        return await asyncio.to_thread(self._library.list_kernels, request)

    async def ArchiveKernel(
        self, request: pb.ArchiveKernelRequest, context: CallContext
    ) -> pb.ArchiveKernelResponse:
        require(validate.archive(request, "kernels"))
        return await awaitable(self._library.archive_kernel(request))

    async def UpdateKernelState(
        self, request: pb.UpdateKernelStateRequest, context: CallContext
    ) -> pb.UpdateKernelStateResponse:
        require(validate.update_kernel_state(request))
        return await awaitable(self._library.update_kernel_state(request))

    async def RecordMeasurement(
        self, request: pb.RecordMeasurementRequest, context: CallContext
    ) -> pb.RecordMeasurementResponse:
        require(validate.record_measurement(request))
        return await awaitable(self._library.record_measurement(request))

    async def RecordFieldReport(
        self, request: pb.RecordFieldReportRequest, context: CallContext
    ) -> pb.RecordFieldReportResponse:
        require(validate.record_field_report(request))
        return await awaitable(self._library.record_field_report(request))

    async def ListFieldReports(
        self, request: pb.ListFieldReportsRequest, context: CallContext
    ) -> pb.ListFieldReportsResponse:
        require(validate.list_field_reports(request))
        return await asyncio.to_thread(self._library.list_field_reports, request)

    async def GetLineage(
        self, request: pb.GetLineageRequest, context: CallContext
    ) -> pb.GetLineageResponse:
        require(validate.get_lineage(request))
        return await asyncio.to_thread(self._library.lineage, request.name, request.depth or 1)

    async def Watch(
        self, request: pb.WatchRequest, context: CallContext
    ) -> AsyncIterator[pb.WatchResponse]:
        require(validate.watch(request))
        interval_s = request.progress_interval_s or PROGRESS_INTERVAL_S
        with self._library.followers.following(FOLLOWED) as news:
            # Everything up to this revision is behind the watcher.
            revision = request.start_revision - 1
            if not request.start_revision:
                revision = self._library.revision()
            greeted = False
            while not self._stopping.is_set():
                news.clear()
                changes = await asyncio.to_thread(self._library.changes.read, revision + 1)
                if not greeted:  # not before it is known that the revision can be had
                    yield pb.WatchResponse(revision=revision)
                    greeted = True
                for change in changes:
                    yield change
                    revision = change.revision
                if not changes:
                    await first_of(news, self._stopping, timeout_s=interval_s)
                    if not news.is_set() and not self._stopping.is_set():
                        yield pb.WatchResponse(revision=revision)
        raise unavailable("the server is stopping; watch again from the next revision")
