"""Client of Urza for asyncio: the calls of `esper.urza.client`, under the same names."""

import asyncio
from collections.abc import AsyncIterator
from collections.abc import Iterable
from collections.abc import Sequence
from typing import TypeAlias

import grpc

from esper.common.following import AsyncFollowing
from esper.common.rpc import CALL_TIMEOUT_S
from esper.common.rpc import RpcError
from esper.common.rpc import readable_errors
from esper.common.v1 import blueprint_pb2
from esper.common.v1 import digest_pb2
from esper.common.v1 import kernel_pb2
from esper.urza import requests
from esper.urza.aio_runs import AsyncRunClient
from esper.urza.cache import BlobCache
from esper.urza.framing import async_download_call
from esper.urza.framing import async_upload_call
from esper.urza.transfer import ATTEMPTS
from esper.urza.transfer import HASHED_ASIDE_BYTES
from esper.urza.transfer import Download
from esper.urza.transfer import digest_of
from esper.urza.transfer import transfer_timeout_s
from esper.urza.transfer import upload_chunks
from esper.urza.transfer import worth_another_attempt
from esper.urza.v1 import blob_pb2
from esper.urza.v1 import blob_pb2_grpc
from esper.urza.v1 import library_pb2
from esper.urza.v1 import library_pb2_grpc

AsyncLibraryWatch: TypeAlias = AsyncFollowing[library_pb2.WatchResponse, library_pb2.WatchResponse]
"""The changes of a library, in order, without end."""


class AsyncUrzaClient:
    """`esper.urza.client.UrzaClient` for one event loop; see there for what each call does.

    Args:
        channel: An open channel to a server of Urza.
        cache: Answers `read_blob` for what was read before; None reads from the server always.

    Attributes:
        runs: The client of the server's runs.
    """

    def __init__(self, channel: grpc.aio.Channel, cache: BlobCache | None = None) -> None:
        self.runs = AsyncRunClient(channel)
        self._cache = cache
        # The stubs' own types speak of channels without asyncio only.
        self._blobs: blob_pb2_grpc.BlobServiceAsyncStub = blob_pb2_grpc.BlobServiceStub(channel)
        self._library: library_pb2_grpc.LibraryServiceAsyncStub = (
            library_pb2_grpc.LibraryServiceStub(channel)
        )
        self._upload = async_upload_call(channel)
        self._download = async_download_call(channel)

    async def write_blob(
        self, data: bytes, digest: digest_pb2.Digest | None = None
    ) -> digest_pb2.Digest:
        """Stores some bytes, whose digest may be known, and returns it once they are durable."""
        if digest is None and len(data) < HASHED_ASIDE_BYTES:
            digest = digest_of(data)
        elif digest is None:
            digest = await asyncio.to_thread(digest_of, data)
        for attempt in range(ATTEMPTS):
            try:
                with readable_errors():
                    offset = 0 if attempt == 0 else await self._committed(digest)
                    await self._upload(
                        upload_chunks(digest, data, offset),
                        timeout=transfer_timeout_s(len(data)),
                        wait_for_ready=attempt > 0,
                    )
                return digest
            except RpcError as error:
                if not worth_another_attempt(error, attempt):
                    raise
        raise AssertionError("the last attempt returns or raises")

    async def _committed(self, digest: digest_pb2.Digest) -> int:
        request = blob_pb2.QueryWriteRequest(digest=digest)
        answer = await self._blobs.QueryWrite(request, timeout=CALL_TIMEOUT_S, wait_for_ready=True)
        return answer.committed_size

    async def read_blob(self, digest: digest_pb2.Digest) -> bytes:
        """Returns the bytes of a blob, from the cache where they are there.

        A download that breaks goes on where it stopped.

        Raises:
            RpcError: NOT_FOUND; DATA_LOSS where what came is not what the digest says.
        """
        if self._cache is not None and (known := self._cache.get(digest)) is not None:
            return known
        with Download(digest) as download:
            for attempt in range(ATTEMPTS):
                try:
                    with readable_errors():
                        async for chunk in self._download(
                            download.request(),
                            timeout=transfer_timeout_s(digest.size_bytes),
                            wait_for_ready=attempt > 0,
                        ):
                            download.add(chunk)
                    break
                except RpcError as error:
                    if not worth_another_attempt(error, attempt):
                        raise
            data = download.verified()
        if self._cache is not None:
            self._cache.put(digest, data)
        return data

    async def find_missing_blobs(
        self, digests: Sequence[digest_pb2.Digest]
    ) -> list[digest_pb2.Digest]:
        """Returns those of `digests` that the store does not hold, in the same order."""
        missing: list[digest_pb2.Digest] = []
        for request in requests.find_missing(digests):
            with readable_errors():
                answer = await self._blobs.FindMissingBlobs(request, timeout=CALL_TIMEOUT_S)
            missing += answer.missing
        return missing

    async def create_blueprint(
        self, blueprint: blueprint_pb2.Blueprint, parents: Iterable[str] = ()
    ) -> library_pb2.BlueprintRecord:
        """Stores a blueprint, or finds an equal one stored, and returns its record."""
        request = requests.create_blueprint(blueprint, parents)
        with readable_errors():
            return (await self._library.CreateBlueprint(request, timeout=CALL_TIMEOUT_S)).blueprint

    async def get_blueprint(self, name: str) -> library_pb2.BlueprintRecord:
        """Returns the record of `blueprints/{digest}`."""
        request = library_pb2.GetBlueprintRequest(name=name)
        with readable_errors():
            return (await self._library.GetBlueprint(request, timeout=CALL_TIMEOUT_S)).blueprint

    async def list_blueprints(
        self,
        state: library_pb2.BlueprintState = library_pb2.BLUEPRINT_STATE_UNSPECIFIED,
        tags: Iterable[str] = (),
    ) -> AsyncIterator[library_pb2.BlueprintRecord]:
        """Yields the blueprints in a state (default any) that carry all of `tags`, by name."""
        request = requests.list_blueprints(state, tags)
        while True:
            with readable_errors():
                page = await self._library.ListBlueprints(request, timeout=CALL_TIMEOUT_S)
            for record in page.blueprints:
                yield record
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    async def update_blueprint_state(
        self, name: str, state: library_pb2.BlueprintState, etag: str = ""
    ) -> library_pb2.BlueprintRecord:
        """Moves a blueprint to another state; with `etag`, only if it has not changed since."""
        request = requests.update_blueprint_state(name, state, etag)
        with readable_errors():
            answer = await self._library.UpdateBlueprintState(request, timeout=CALL_TIMEOUT_S)
        return answer.blueprint

    async def create_kernel(
        self, kernel: kernel_pb2.Kernel, tags: Iterable[str] = (), parents: Iterable[str] = ()
    ) -> library_pb2.KernelRecord:
        """Stores a kernel, or finds an equal one stored, and returns its record."""
        request = requests.create_kernel(kernel, tags, parents)
        with readable_errors():
            return (await self._library.CreateKernel(request, timeout=CALL_TIMEOUT_S)).kernel

    async def get_kernel(self, name: str) -> library_pb2.KernelRecord:
        """Returns the record of `kernels/{digest}`."""
        request = library_pb2.GetKernelRequest(name=name)
        with readable_errors():
            return (await self._library.GetKernel(request, timeout=CALL_TIMEOUT_S)).kernel

    async def list_kernels(
        self,
        filter: library_pb2.KernelFilter | None = None,
        order: library_pb2.KernelOrder = library_pb2.KERNEL_ORDER_NAME,
    ) -> AsyncIterator[library_pb2.KernelRecord]:
        """Yields the kernels that pass `filter` (default all) in an order (default by name)."""
        request = requests.list_kernels(filter, order)
        while True:
            with readable_errors():
                page = await self._library.ListKernels(request, timeout=CALL_TIMEOUT_S)
            for record in page.kernels:
                yield record
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    async def update_kernel_state(
        self,
        name: str,
        state: library_pb2.KernelState,
        validation: kernel_pb2.ValidationReport | None = None,
        etag: str = "",
    ) -> library_pb2.KernelRecord:
        """Moves a kernel to another state; to VALIDATED only with a report that passed."""
        request = requests.update_kernel_state(name, state, validation, etag)
        with readable_errors():
            return (await self._library.UpdateKernelState(request, timeout=CALL_TIMEOUT_S)).kernel

    async def record_measurement(
        self, name: str, measurement: kernel_pb2.Measurement, etag: str = ""
    ) -> library_pb2.KernelRecord:
        """Adds a timing to a kernel's record; with `etag`, only if it has not changed since."""
        request = requests.record_measurement(name, measurement, etag)
        with readable_errors():
            return (await self._library.RecordMeasurement(request, timeout=CALL_TIMEOUT_S)).kernel

    async def record_field_report(
        self, report: library_pb2.FieldReport, request_id: str = ""
    ) -> library_pb2.FieldReport:
        """Stores what a kernel did in a run and returns the report with name and time."""
        request = requests.record_field_report(report, request_id)
        with readable_errors():
            return (await self._library.RecordFieldReport(request, timeout=CALL_TIMEOUT_S)).report

    async def list_field_reports(self, kernel: str) -> AsyncIterator[library_pb2.FieldReport]:
        """Yields the reports on `kernels/{digest}`, oldest first."""
        request = requests.list_field_reports(kernel)
        while True:
            with readable_errors():
                page = await self._library.ListFieldReports(request, timeout=CALL_TIMEOUT_S)
            for report in page.reports:
                yield report
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    async def lineage(self, name: str, depth: int = 1) -> library_pb2.GetLineageResponse:
        """Returns what a blueprint or kernel was made from and what was made from it."""
        request = library_pb2.GetLineageRequest(name=name, depth=depth)
        with readable_errors():
            return await self._library.GetLineage(request, timeout=CALL_TIMEOUT_S)

    async def watch(
        self, start_revision: int = 0, progress_interval_s: float = 10.0
    ) -> AsyncLibraryWatch:
        """Returns the library's changes from a revision on, then those that follow."""
        call = self._library.Watch(requests.watch(start_revision, progress_interval_s))
        if start_revision == 0:
            await call.initial_metadata()  # comes once the server has noted the position
        return AsyncLibraryWatch(call, lambda response: response)
