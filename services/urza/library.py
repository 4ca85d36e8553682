"""The library: blueprints, kernels and reports as rows, each change at once or not at all."""

import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

from esper.common.v1 import kernel_pb2
from esper.services.serving.checks import effective_page_size
from esper.services.serving.errors import aborted
from esper.services.serving.errors import not_found
from esper.services.serving.errors import precondition
from esper.services.store.engine import Store
from esper.services.store.opening import Row
from esper.services.store.paging import decode_token
from esper.services.store.paging import encode_token
from esper.services.store.paging import read_page
from esper.services.store.requests import RequestTable
from esper.services.store.requests import fingerprint
from esper.services.urza.blobs import BlobStore
from esper.services.urza.blobs import blob_name
from esper.services.urza.names import key_of
from esper.services.urza.states import require_blueprint_move
from esper.services.urza.states import require_kernel_move
from esper.urza.v1 import library_pb2 as pb

TABLES = ("blueprints", "kernels", "reports", "counters", "requests")
REQUEST_CAPACITY = 100_000

_REVISION = b"revision"
_NUMBER_BYTES = 8

Record = TypeVar("Record", pb.BlueprintRecord, pb.KernelRecord)
Response = TypeVar("Response", bound=Message)


class Library:
    """The rows of one Urza.

    Reads answer at once. Writes return a future that is done when they are durable; what they find
    wrong is raised by the future. Requests are expected to have been validated.

    Args:
        store: Holds `TABLES`.
        blobs: Where the weights of kernels are.
        now: Gives the time of day in seconds since 1970, for the records alone.
    """

    def __init__(
        self, store: Store, blobs: BlobStore, now: Callable[[], float] = time.time
    ) -> None:
        self._store = store
        self._blobs = blobs
        self._now = now
        self._requests = RequestTable(store, "requests", REQUEST_CAPACITY)

    # ------------------------------------------------------------ blueprints

    def create_blueprint(
        self, request: pb.CreateBlueprintRequest, digest: str
    ) -> "Future[pb.CreateBlueprintResponse]":
        """Stores a blueprint under its digest, or finds it stored."""

        def work(row: Row) -> pb.CreateBlueprintResponse:
            record = self._find(row, "blueprints", bytes.fromhex(digest), pb.BlueprintRecord)
            if record is None:
                record = pb.BlueprintRecord(
                    name=f"blueprints/{digest}",
                    blueprint=request.blueprint,
                    state=pb.BLUEPRINT_STATE_PROPOSED,
                    create_time=self._timestamp(),
                )
                self._save(row, "blueprints", record)
            return pb.CreateBlueprintResponse(blueprint=record)

        return self._once("CreateBlueprint", request, pb.CreateBlueprintResponse, work)

    def get_blueprint(self, name: str) -> pb.BlueprintRecord:
        """Returns a stored blueprint.

        Raises:
            ServiceError: NOT_FOUND.
        """
        with self._store.reading() as row:
            return self._load(row, "blueprints", name, pb.BlueprintRecord)

    def list_blueprints(self, request: pb.ListBlueprintsRequest) -> pb.ListBlueprintsResponse:
        """Returns a page of blueprints in order of name."""

        def keep(value: bytes) -> pb.BlueprintRecord | None:
            record = pb.BlueprintRecord.FromString(value)
            in_state = request.state in (pb.BLUEPRINT_STATE_UNSPECIFIED, record.state)
            tagged = set(request.tags) <= set(record.blueprint.tags)
            return record if in_state and tagged else None

        scope = _scope("blueprints", request)
        after = decode_token(scope, request.page_token)
        size = effective_page_size(request.page_size)
        records, last = read_page(self._store, "blueprints", b"", after, size, keep)
        token = encode_token(scope, last) if last is not None else ""
        return pb.ListBlueprintsResponse(blueprints=records, next_page_token=token)

    def update_blueprint_state(
        self, request: pb.UpdateBlueprintStateRequest
    ) -> "Future[pb.UpdateBlueprintStateResponse]":
        """Moves a blueprint to another state; one that is already there stays as it is."""

        def work(row: Row) -> pb.UpdateBlueprintStateResponse:
            record = self._move_blueprint(row, request.name, request.state, request.etag)
            return pb.UpdateBlueprintStateResponse(blueprint=record)

        return self._once("UpdateBlueprintState", request, pb.UpdateBlueprintStateResponse, work)

    def archive_blueprint(
        self, request: pb.ArchiveBlueprintRequest
    ) -> "Future[pb.ArchiveBlueprintResponse]":
        """Moves a blueprint to ARCHIVED."""

        def work(row: Row) -> pb.ArchiveBlueprintResponse:
            state = pb.BLUEPRINT_STATE_ARCHIVED
            record = self._move_blueprint(row, request.name, state, request.etag)
            return pb.ArchiveBlueprintResponse(blueprint=record)

        return self._once("ArchiveBlueprint", request, pb.ArchiveBlueprintResponse, work)

    def _move_blueprint(
        self, row: Row, name: str, state: pb.BlueprintState, etag: str
    ) -> pb.BlueprintRecord:
        record = self._load(row, "blueprints", name, pb.BlueprintRecord)
        _require_etag(record, etag)
        if record.state != state:
            require_blueprint_move(name, record.state, state)
            record.state = state
            self._save(row, "blueprints", record)
        return record

    # ------------------------------------------------------------ kernels

    def create_kernel(
        self, request: pb.CreateKernelRequest, digest: str
    ) -> "Future[pb.CreateKernelResponse]":
        """Stores a kernel under its digest, or finds it stored.

        The future raises FAILED_PRECONDITION where its blueprint or its weights are not stored.
        """
        kernel = request.kernel
        # Held until the kernel refers to it, so that it is not taken for garbage before.
        self._blobs.leases.hold(kernel.weights.hash)
        has_weights = not kernel.HasField("weights") or self._blobs.contains(kernel.weights)

        def work(row: Row) -> pb.CreateKernelResponse:
            record = self._find(row, "kernels", bytes.fromhex(digest), pb.KernelRecord)
            if record is None:
                parent = f"blueprints/{kernel.blueprint_digest}"
                if (
                    row.get(
                        key_of("name", parent, "blueprints"), db=self._store.table("blueprints")
                    )
                    is None
                ):
                    raise precondition("NO_BLUEPRINT", f"{parent} is not stored", name=parent)
                if not has_weights:
                    blob = blob_name(kernel.weights)
                    raise precondition("NO_WEIGHTS", f"{blob} is not stored", name=blob)
                record = pb.KernelRecord(
                    name=f"kernels/{digest}",
                    kernel=kernel,
                    state=pb.KERNEL_STATE_TESTING,
                    tags=request.tags,
                    create_time=self._timestamp(),
                )
                self._save(row, "kernels", record)
            return pb.CreateKernelResponse(kernel=record)

        future = self._once("CreateKernel", request, pb.CreateKernelResponse, work)
        future.add_done_callback(lambda _: self._blobs.leases.release(kernel.weights.hash))
        return future

    def get_kernel(self, name: str) -> pb.KernelRecord:
        """Returns a stored kernel.

        Raises:
            ServiceError: NOT_FOUND.
        """
        with self._store.reading() as row:
            return self._load(row, "kernels", name, pb.KernelRecord)

    def list_kernels(self, request: pb.ListKernelsRequest) -> pb.ListKernelsResponse:
        """Returns a page of the kernels that match the filter, in order of name."""

        def keep(value: bytes) -> pb.KernelRecord | None:
            record = pb.KernelRecord.FromString(value)
            return record if matches(record, request.filter) else None

        scope = _scope("kernels", request)
        after = decode_token(scope, request.page_token)
        size = effective_page_size(request.page_size)
        records, last = read_page(self._store, "kernels", b"", after, size, keep)
        token = encode_token(scope, last) if last is not None else ""
        return pb.ListKernelsResponse(kernels=records, next_page_token=token)

    def update_kernel_state(
        self, request: pb.UpdateKernelStateRequest
    ) -> "Future[pb.UpdateKernelStateResponse]":
        """Moves a kernel to another state; one that is already there stays as it is."""

        def work(row: Row) -> pb.UpdateKernelStateResponse:
            evidence = request.validation if request.HasField("validation") else None
            record = self._move_kernel(row, request.name, request.state, request.etag, evidence)
            return pb.UpdateKernelStateResponse(kernel=record)

        return self._once("UpdateKernelState", request, pb.UpdateKernelStateResponse, work)

    def archive_kernel(
        self, request: pb.ArchiveKernelRequest
    ) -> "Future[pb.ArchiveKernelResponse]":
        """Moves a kernel to DEPRECATED."""

        def work(row: Row) -> pb.ArchiveKernelResponse:
            state = pb.KERNEL_STATE_DEPRECATED
            record = self._move_kernel(row, request.name, state, request.etag, None)
            return pb.ArchiveKernelResponse(kernel=record)

        return self._once("ArchiveKernel", request, pb.ArchiveKernelResponse, work)

    def _move_kernel(
        self,
        row: Row,
        name: str,
        state: pb.KernelState,
        etag: str,
        evidence: kernel_pb2.ValidationReport | None,
    ) -> pb.KernelRecord:
        record = self._load(row, "kernels", name, pb.KernelRecord)
        _require_etag(record, etag)
        if record.state != state:
            require_kernel_move(name, record.state, state)
            record.state = state
            if evidence is not None:
                record.validation.CopyFrom(evidence)
            self._save(row, "kernels", record)
        return record

    # ------------------------------------------------------------ field reports

    def record_field_report(
        self, request: pb.RecordFieldReportRequest
    ) -> "Future[pb.RecordFieldReportResponse]":
        """Stores a report under the next number of its kernel."""

        def work(row: Row) -> pb.RecordFieldReportResponse:
            name = request.report.kernel
            self._load(row, "kernels", name, pb.KernelRecord)
            key = key_of("report.kernel", name, "kernels")
            number = self._count(row, b"reports" + key)
            report = pb.FieldReport()
            report.CopyFrom(request.report)
            report.name = f"{name}/reports/{number}"
            report.report_time.CopyFrom(self._timestamp())
            place = key + number.to_bytes(_NUMBER_BYTES, "big")
            row.put(place, report.SerializeToString(), db=self._store.table("reports"))
            return pb.RecordFieldReportResponse(report=report)

        return self._once("RecordFieldReport", request, pb.RecordFieldReportResponse, work)

    def list_field_reports(
        self, request: pb.ListFieldReportsRequest
    ) -> pb.ListFieldReportsResponse:
        """Returns a page of the reports on a kernel, oldest first.

        Raises:
            ServiceError: NOT_FOUND where the kernel is not stored.
        """
        self.get_kernel(request.kernel)
        prefix = key_of("kernel", request.kernel, "kernels")
        scope = _scope("reports", request)
        after = decode_token(scope, request.page_token)
        size = effective_page_size(request.page_size)
        reports, last = read_page(
            self._store, "reports", prefix, after, size, pb.FieldReport.FromString
        )
        token = encode_token(scope, last) if last is not None else ""
        return pb.ListFieldReportsResponse(reports=reports, next_page_token=token)

    # ------------------------------------------------------------ rows

    def _find(self, row: Row, table: str, key: bytes, kind: type[Record]) -> Record | None:
        value = row.get(key, db=self._store.table(table))
        return None if value is None else kind.FromString(value)

    def _load(self, row: Row, table: str, name: str, kind: type[Record]) -> Record:
        record = self._find(row, table, key_of("name", name, table), kind)
        if record is None:
            raise not_found(name)
        return record

    def _save(self, row: Row, table: str, record: pb.BlueprintRecord | pb.KernelRecord) -> None:
        """Stores a record under the next revision of the library."""
        record.revision = self._count(row, _REVISION) + 1
        record.etag = f"{record.revision:x}"
        key = key_of("name", record.name, table)
        row.put(key, record.SerializeToString(), db=self._store.table(table))

    def _count(self, row: Row, counter: bytes) -> int:
        """Returns the value of a counter and adds one to it; a new one is 0."""
        table = self._store.table("counters")
        value = int.from_bytes(row.get(counter, db=table) or b"", "big")
        row.put(counter, (value + 1).to_bytes(_NUMBER_BYTES, "big"), db=table)
        return value

    def _timestamp(self) -> Timestamp:
        stamp = Timestamp()
        stamp.FromNanoseconds(int(self._now() * 1e9))
        return stamp

    def _once(
        self,
        method: str,
        request: "_Retriable",
        kind: type[Response],
        work: Callable[[Row], Response],
    ) -> "Future[Response]":
        """Submits `work`, unless the request was answered before: then gives that answer again."""
        asked = fingerprint(method, request)
        request_id = request.request_id

        def run(row: Row) -> Response:
            known = self._requests.recall(row, method, request_id, asked)
            if known is not None:
                return kind.FromString(known)
            response = work(row)
            answer = response.SerializeToString()
            self._requests.remember(row, method, request_id, asked, answer)
            return response

        return self._store.submit(run, request.ByteSize())


_Listing = pb.ListBlueprintsRequest | pb.ListKernelsRequest | pb.ListFieldReportsRequest
_Retriable = (
    pb.CreateBlueprintRequest
    | pb.UpdateBlueprintStateRequest
    | pb.ArchiveBlueprintRequest
    | pb.CreateKernelRequest
    | pb.UpdateKernelStateRequest
    | pb.ArchiveKernelRequest
    | pb.RecordFieldReportRequest
)


def matches(record: pb.KernelRecord, wanted: pb.KernelFilter) -> bool:
    """Returns whether a kernel passes a filter."""
    kernel = record.kernel
    place = kernel.signature
    equal = (
        (wanted.slot_kind, place.slot_kind),
        (wanted.source, place.source),
        (wanted.dtype, place.dtype),
        (wanted.device_class, place.device_class),
        (wanted.state, record.state),
    )
    if any(want not in (0, have) for want, have in equal):
        return False
    if wanted.HasField("chunk_width") and wanted.chunk_width != place.chunk_width:
        return False
    if wanted.HasField("source_width") and wanted.source_width != place.source_width:
        return False
    if wanted.blueprint and wanted.blueprint != f"blueprints/{kernel.blueprint_digest}":
        return False
    if not set(wanted.tags) <= set(record.tags):
        return False
    too_large = kernel.parameter_count > wanted.max_parameter_count
    if wanted.HasField("max_parameter_count") and too_large:
        return False
    if not wanted.HasField("max_forward_us"):
        return True
    return any(
        measured.HasField("forward_us") and measured.forward_us <= wanted.max_forward_us
        for measured in record.measurements
    )


def _require_etag(record: pb.BlueprintRecord | pb.KernelRecord, etag: str) -> None:
    if etag and etag != record.etag:
        raise aborted(
            "ETAG_MISMATCH",
            f"{record.name} has changed: its etag is {record.etag!r}, not {etag!r}",
            etag=record.etag,
        )


def _scope(
    collection: str,
    request: "_Listing",
) -> str:
    """Returns what a page token belongs to: the collection and the filter, not the page's size."""
    question = type(request).FromString(request.SerializeToString())
    question.page_size = 0
    question.page_token = ""
    return f"{collection}:{question.SerializeToString(deterministic=True).hex()}"
