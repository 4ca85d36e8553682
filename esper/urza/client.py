"""Client of Urza: blobs, blueprints, kernels and field reports; its runs are `UrzaClient.runs`."""

from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Sequence
from typing import TypeAlias

import grpc

from esper.common.following import Following
from esper.common.rpc import CALL_TIMEOUT_S
from esper.common.rpc import RpcError
from esper.common.rpc import readable_errors
from esper.common.v1 import blueprint_pb2
from esper.common.v1 import digest_pb2
from esper.common.v1 import kernel_pb2
from esper.urza import requests
from esper.urza.cache import BlobCache
from esper.urza.framing import download_call
from esper.urza.framing import upload_call
from esper.urza.runs import RunClient
from esper.urza.transfer import ATTEMPTS
from esper.urza.transfer import Download
from esper.urza.transfer import digest_of
from esper.urza.transfer import transfer_timeout_s
from esper.urza.transfer import upload_chunks
from esper.urza.transfer import worth_another_attempt
from esper.urza.v1 import blob_pb2
from esper.urza.v1 import blob_pb2_grpc
from esper.urza.v1 import library_pb2
from esper.urza.v1 import library_pb2_grpc

LibraryWatch: TypeAlias = Following[library_pb2.WatchResponse, library_pb2.WatchResponse]
"""The changes of a library, in order, without end."""


class UrzaClient:
    """Stores and finds things in a library; safe to use from several threads.

    Every call raises `esper.common.rpc.RpcError` where the server refuses it or does not answer.
    Calls that fail because the server was away are repeated for a short while, without a second
    effect.

    Args:
        channel: An open channel to a server of Urza.
        cache: Answers `read_blob` for what was read before; None reads from the server always.

    Attributes:
        runs: The client of the server's runs.
    """

    def __init__(self, channel: grpc.Channel, cache: BlobCache | None = None) -> None:
        self.runs = RunClient(channel)
        self._cache = cache
        self._blobs = blob_pb2_grpc.BlobServiceStub(channel)
        self._upload = upload_call(channel)
        self._download = download_call(channel)
        self._library = library_pb2_grpc.LibraryServiceStub(channel)

    # ------------------------------------------------------------ blobs

    def write_blob(self, data: bytes, digest: digest_pb2.Digest | None = None) -> digest_pb2.Digest:
        """Stores some bytes and returns their digest, once they are durable.

        An upload that breaks goes on where it stopped.

        Args:
            data: The bytes.
            digest: Theirs where it is known, which spares a pass over them; the server verifies it.

        Raises:
            RpcError: INVALID_ARGUMENT where `digest` is not that of `data`.
        """
        digest = digest or digest_of(data)
        for attempt in range(ATTEMPTS):
            try:
                with readable_errors():
                    offset = 0 if attempt == 0 else self._committed(digest)
                    self._upload(
                        upload_chunks(digest, data, offset),
                        timeout=transfer_timeout_s(len(data)),
                        wait_for_ready=attempt > 0,
                    )
                return digest
            except RpcError as error:
                if not worth_another_attempt(error, attempt):
                    raise
        raise AssertionError("the last attempt returns or raises")

    def _committed(self, digest: digest_pb2.Digest) -> int:
        answer = self._blobs.QueryWrite(
            blob_pb2.QueryWriteRequest(digest=digest), timeout=CALL_TIMEOUT_S, wait_for_ready=True
        )
        return answer.committed_size

    def read_blob(self, digest: digest_pb2.Digest) -> bytes:
        """Returns the bytes of a blob, from the cache where they are there.

        A download that breaks goes on where it stopped.

        Raises:
            RpcError: NOT_FOUND; DATA_LOSS where what came is not what the digest says.
        """
        if self._cache is None:
            return self._fetch(digest)
        data = self._cache.get(digest)
        if data is None:
            data = self._fetch(digest)
            self._cache.put(digest, data)
        return data

    def _fetch(self, digest: digest_pb2.Digest) -> bytes:
        with Download(digest) as download:
            for attempt in range(ATTEMPTS):
                try:
                    with readable_errors():
                        for chunk in self._download(
                            download.request(),
                            timeout=transfer_timeout_s(digest.size_bytes),
                            wait_for_ready=attempt > 0,
                        ):
                            download.add(chunk)
                    break
                except RpcError as error:
                    if not worth_another_attempt(error, attempt):
                        raise
            return download.verified()

    def find_missing_blobs(self, digests: Sequence[digest_pb2.Digest]) -> list[digest_pb2.Digest]:
        """Returns those of `digests` that the store does not hold, in the same order."""
        missing: list[digest_pb2.Digest] = []
        for request in requests.find_missing(digests):
            with readable_errors():
                missing += self._blobs.FindMissingBlobs(request, timeout=CALL_TIMEOUT_S).missing
        return missing

    # ------------------------------------------------------------ blueprints

    def create_blueprint(
        self, blueprint: blueprint_pb2.Blueprint, parents: Iterable[str] = ()
    ) -> library_pb2.BlueprintRecord:
        """Stores a blueprint, or finds an equal one stored, and returns its record.

        Args:
            blueprint: The architecture.
            parents: Names of the blueprints and kernels that it was made from.

        Raises:
            RpcError: FAILED_PRECONDITION where a parent is not stored.
        """
        request = requests.create_blueprint(blueprint, parents)
        with readable_errors():
            return self._library.CreateBlueprint(request, timeout=CALL_TIMEOUT_S).blueprint

    def get_blueprint(self, name: str) -> library_pb2.BlueprintRecord:
        """Returns the record of `blueprints/{digest}`."""
        request = library_pb2.GetBlueprintRequest(name=name)
        with readable_errors():
            return self._library.GetBlueprint(request, timeout=CALL_TIMEOUT_S).blueprint

    def list_blueprints(
        self,
        state: library_pb2.BlueprintState = library_pb2.BLUEPRINT_STATE_UNSPECIFIED,
        tags: Iterable[str] = (),
    ) -> Iterator[library_pb2.BlueprintRecord]:
        """Yields the blueprints in a state (default any) that carry all of `tags`, by name."""
        request = requests.list_blueprints(state, tags)
        while True:
            with readable_errors():
                page = self._library.ListBlueprints(request, timeout=CALL_TIMEOUT_S)
            yield from page.blueprints
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    def update_blueprint_state(
        self, name: str, state: library_pb2.BlueprintState, etag: str = ""
    ) -> library_pb2.BlueprintRecord:
        """Moves a blueprint to another state; with `etag`, only if it has not changed since."""
        request = requests.update_blueprint_state(name, state, etag)
        with readable_errors():
            return self._library.UpdateBlueprintState(request, timeout=CALL_TIMEOUT_S).blueprint

    # ------------------------------------------------------------ kernels

    def create_kernel(
        self, kernel: kernel_pb2.Kernel, tags: Iterable[str] = (), parents: Iterable[str] = ()
    ) -> library_pb2.KernelRecord:
        """Stores a kernel, or finds an equal one stored, and returns its record.

        Args:
            kernel: The kernel; its blueprint is its first parent.
            tags: Free words for searching.
            parents: Names of further blueprints and kernels that it was made from.

        Raises:
            RpcError: FAILED_PRECONDITION where its blueprint, another parent or its weights are not
                stored.
        """
        request = requests.create_kernel(kernel, tags, parents)
        with readable_errors():
            return self._library.CreateKernel(request, timeout=CALL_TIMEOUT_S).kernel

    def get_kernel(self, name: str) -> library_pb2.KernelRecord:
        """Returns the record of `kernels/{digest}`."""
        request = library_pb2.GetKernelRequest(name=name)
        with readable_errors():
            return self._library.GetKernel(request, timeout=CALL_TIMEOUT_S).kernel

    def list_kernels(
        self,
        filter: library_pb2.KernelFilter | None = None,
        order: library_pb2.KernelOrder = library_pb2.KERNEL_ORDER_NAME,
    ) -> Iterator[library_pb2.KernelRecord]:
        """Yields the kernels that pass `filter` (default all) in an order (default by name).

        Orders by a measured figure leave out the kernels that have not been measured.
        """
        request = requests.list_kernels(filter, order)
        while True:
            with readable_errors():
                page = self._library.ListKernels(request, timeout=CALL_TIMEOUT_S)
            yield from page.kernels
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    def update_kernel_state(
        self,
        name: str,
        state: library_pb2.KernelState,
        validation: kernel_pb2.ValidationReport | None = None,
        etag: str = "",
    ) -> library_pb2.KernelRecord:
        """Moves a kernel to another state; to VALIDATED only with a report that passed."""
        request = requests.update_kernel_state(name, state, validation, etag)
        with readable_errors():
            return self._library.UpdateKernelState(request, timeout=CALL_TIMEOUT_S).kernel

    def record_measurement(
        self, name: str, measurement: kernel_pb2.Measurement, etag: str = ""
    ) -> library_pb2.KernelRecord:
        """Adds a timing to a kernel's record; with `etag`, only if it has not changed since."""
        request = requests.record_measurement(name, measurement, etag)
        with readable_errors():
            return self._library.RecordMeasurement(request, timeout=CALL_TIMEOUT_S).kernel

    # ------------------------------------------------------------ field reports

    def record_field_report(
        self, report: library_pb2.FieldReport, request_id: str = ""
    ) -> library_pb2.FieldReport:
        """Stores what a kernel did in a run and returns the report with name and time.

        Args:
            report: The report.
            request_id: Makes it harmless to send the report again; empty takes a new one.
        """
        request = requests.record_field_report(report, request_id)
        with readable_errors():
            return self._library.RecordFieldReport(request, timeout=CALL_TIMEOUT_S).report

    def list_field_reports(self, kernel: str) -> Iterator[library_pb2.FieldReport]:
        """Yields the reports on `kernels/{digest}`, oldest first."""
        request = requests.list_field_reports(kernel)
        while True:
            with readable_errors():
                page = self._library.ListFieldReports(request, timeout=CALL_TIMEOUT_S)
            yield from page.reports
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    # ------------------------------------------------------------ relations and changes

    def lineage(self, name: str, depth: int = 1) -> library_pb2.GetLineageResponse:
        """Returns what a blueprint or kernel was made from and what was made from it.

        Args:
            name: `blueprints/{digest}` or `kernels/{digest}`.
            depth: Generations wanted in each direction, 1 to 16.
        """
        request = library_pb2.GetLineageRequest(name=name, depth=depth)
        with readable_errors():
            return self._library.GetLineage(request, timeout=CALL_TIMEOUT_S)

    def watch(self, start_revision: int = 0, progress_interval_s: float = 10.0) -> LibraryWatch:
        """Returns the library's changes from a revision on, then those that follow.

        Each response has the revision up to which the watcher has seen everything: to resume, watch
        from the last one plus 1. A response without a change is a progress mark.

        Args:
            start_revision: First revision wanted; 0 means changes after this call returns.
            progress_interval_s: How often a quiet watch is told its position, 0.1 to 3600.
        """
        call = self._library.Watch(requests.watch(start_revision, progress_interval_s))
        if start_revision == 0:
            call.initial_metadata()  # comes once the server has noted the position
        return LibraryWatch(call, lambda response: response)
