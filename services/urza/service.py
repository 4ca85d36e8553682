"""Urza as a service of the shell."""

import asyncio

import grpc

from esper.services.serving.context import ServiceContext
from esper.services.urza.blob_servicer import BlobServicer
from esper.services.urza.contents import FOLDER
from esper.services.urza.contents import open_contents
from esper.services.urza.library_servicer import LibraryServicer
from esper.services.urza.run_servicer import RunServicer
from esper.services.urza.store_servicer import StoreServicer
from esper.urza.v1 import run_pb2_grpc
from esper.urza.v1 import store_pb2_grpc


class UrzaService:
    """Urza as a service of the shell; its store is `urza` in the data directory.

    Raises:
        StartupError: Where the directory cannot be used.
    """

    full_names = (
        "esper.urza.v1.BlobService",
        "esper.urza.v1.LibraryService",
        "esper.urza.v1.RunService",
        "esper.urza.v1.StoreService",
    )

    def __init__(self, context: ServiceContext) -> None:
        self._contents = open_contents(context.data_dir / FOLDER, context.limits)
        held = self._contents
        self._blob_servicer = BlobServicer(held.blobs)
        self._library_servicer = LibraryServicer(held.store, held.library, context.stopping)
        self._run_servicer = RunServicer(held.runs, context.stopping)
        self._store_servicer = StoreServicer(held, context.stopping)

    def add_to(self, server: grpc.aio.Server) -> None:
        """Registers the servicers."""
        self._blob_servicer.add_to(server)
        self._library_servicer.add_to(server)
        run_pb2_grpc.add_RunServiceServicer_to_server(self._run_servicer, server)
        store_pb2_grpc.add_StoreServiceServicer_to_server(self._store_servicer, server)

    async def close(self) -> None:
        """Closes the store after its last write."""
        await self._store_servicer.close()
        await asyncio.to_thread(self._blob_servicer.close)
        await asyncio.to_thread(self._contents.store.close)


def create(context: ServiceContext) -> UrzaService:
    """Returns the service."""
    return UrzaService(context)
