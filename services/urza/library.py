"""The library: blueprints, kernels and reports as rows, each change at once or not at all."""

import logging
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

from esper.common.v1 import kernel_pb2
from esper.services.serving import metrics
from esper.services.serving.checks import effective_page_size
from esper.services.serving.errors import aborted
from esper.services.serving.errors import precondition
from esper.services.store.engine import Store
from esper.services.store.followers import Followers
from esper.services.store.opening import Row
from esper.services.store.paging import PageTokens
from esper.services.store.paging import read_page
from esper.services.store.requests import RequestTable
from esper.services.store.requests import fingerprint
from esper.services.store.seals import seal
from esper.services.store.seals import unseal
from esper.services.urza.blobs import BlobStore
from esper.services.urza.blobs import blob_name
from esper.services.urza.catalog import BLUEPRINT_ORDER
from esper.services.urza.catalog import blueprint_conditions
from esper.services.urza.catalog import blueprint_entries
from esper.services.urza.catalog import kernel_conditions
from esper.services.urza.catalog import kernel_entries
from esper.services.urza.catalog import kernel_order
from esper.services.urza.catalog import within_bounds
from esper.services.urza.changes import TABLES as CHANGE_TABLES
from esper.services.urza.changes import ChangeLog
from esper.services.urza.lineage import TABLE as LINEAGE_TABLE
from esper.services.urza.lineage import Lineage
from esper.services.urza.names import key_of
from esper.services.urza.records import QUARANTINE_TABLE
from esper.services.urza.records import Records
from esper.services.urza.records import list_scope
from esper.services.urza.states import require_blueprint_move
from esper.services.urza.states import require_kernel_move
from esper.urza.v1 import library_pb2 as pb

LOG = logging.getLogger("esper.urza.library")

TABLES = (
    "blueprints",
    "blueprint_index",
    "kernels",
    "kernel_index",
    "reports",
    "requests",
    LINEAGE_TABLE,
    QUARANTINE_TABLE,
    *CHANGE_TABLES,
)
REQUEST_CAPACITY = 100_000
MAX_MEASUREMENTS = 64
FOLLOWED = "library"
"""What a watcher follows."""

_NUMBER_BYTES = 8

Response = TypeVar("Response", bound=Message)


def report_name(key: bytes) -> str:
    """Returns the name of the report whose row has a key."""
    kernel, number = key[:-_NUMBER_BYTES], key[-_NUMBER_BYTES:]
    return f"kernels/{kernel.hex()}/reports/{int.from_bytes(number, 'big')}"


class Library:
    """The rows of one Urza. To be made on an event loop, whose threads may read.

    Reads answer at once. Writes return a future that is done when they are durable; what they find
    wrong is raised by the future. Requests are expected to have been validated.

    Args:
        store: Holds `TABLES`.
        blobs: Where the weights of kernels are.
        now: Gives the time of day in seconds since 1970, for the records alone.

    Attributes:
        changes: What has changed, by revision.
        followers: Wakes those that follow `FOLLOWED`.
        blueprints: The records of blueprints.
        kernels: The records of kernels.
    """

    def __init__(
        self, store: Store, blobs: BlobStore, now: Callable[[], float] = time.time
    ) -> None:
        self.changes = ChangeLog(store)
        self.followers = Followers()
        self._store = store
        self._blobs = blobs
        self._now = now
        self._requests = RequestTable(store, "requests", REQUEST_CAPACITY)
        self._tokens = PageTokens(store)
        self._lineage = Lineage(store)
        self.blueprints = Records(
            store,
            "blueprints",
            "blueprint_index",
            pb.BlueprintRecord,
            blueprint_entries,
            lambda record: pb.WatchResponse(revision=record.revision, blueprint=record),
            self.changes,
            self._tokens,
        )
        self.kernels = Records(
            store,
            "kernels",
            "kernel_index",
            pb.KernelRecord,
            kernel_entries,
            lambda record: pb.WatchResponse(revision=record.revision, kernel=record),
            self.changes,
            self._tokens,
        )

    # ------------------------------------------------------------ blueprints

    def create_blueprint(
        self, request: pb.CreateBlueprintRequest, digest: str
    ) -> "Future[pb.CreateBlueprintResponse]":
        """Stores a blueprint under its digest, or finds it stored.

        The future raises FAILED_PRECONDITION where a parent is not stored.
        """
        name = f"blueprints/{digest}"

        def work(row: Row) -> pb.CreateBlueprintResponse:
            record = self.blueprints.find(row, name)
            if record is None:
                record = pb.BlueprintRecord(
                    name=name,
                    blueprint=request.blueprint,
                    state=pb.BLUEPRINT_STATE_PROPOSED,
                    create_time=self._timestamp(),
                    parents=dict.fromkeys(request.parents),
                )
                self._lineage.add(row, name, list(record.parents))
                self.blueprints.save(row, record)
            return pb.CreateBlueprintResponse(blueprint=record)

        return self._once("CreateBlueprint", request, pb.CreateBlueprintResponse, work)

    def get_blueprint(self, name: str) -> pb.BlueprintRecord:
        """Returns a stored blueprint.

        Raises:
            ServiceError: NOT_FOUND.
        """
        with self._store.reading() as row:
            return self.blueprints.load(row, name)

    def list_blueprints(self, request: pb.ListBlueprintsRequest) -> pb.ListBlueprintsResponse:
        """Returns a page of blueprints in order of name."""
        conditions = blueprint_conditions(request)
        records, token = self.blueprints.page(request, BLUEPRINT_ORDER, conditions)
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
        record = self.blueprints.load(row, name)
        _require_etag(record, etag)
        if record.state != state:
            require_blueprint_move(name, record.state, state)
            record.state = state
            self.blueprints.save(row, record)
        return record

    # ------------------------------------------------------------ kernels

    def create_kernel(
        self, request: pb.CreateKernelRequest, digest: str
    ) -> "Future[pb.CreateKernelResponse]":
        """Stores a kernel under its digest, or finds it stored.

        The future raises FAILED_PRECONDITION where its blueprint, another parent or its weights are
        not stored.
        """
        name = f"kernels/{digest}"
        kernel = request.kernel
        # Held until the kernel refers to it, so that it is not taken for garbage before.
        self._blobs.leases.hold(kernel.weights.hash)
        has_weights = not kernel.HasField("weights") or self._blobs.contains(kernel.weights)

        def work(row: Row) -> pb.CreateKernelResponse:
            record = self.kernels.find(row, name)
            if record is None:
                blueprint = f"blueprints/{kernel.blueprint_digest}"
                if self.blueprints.find(row, blueprint) is None:
                    raise precondition("NO_BLUEPRINT", f"{blueprint} is not stored", name=blueprint)
                if not has_weights:
                    blob = blob_name(kernel.weights)
                    raise precondition("NO_WEIGHTS", f"{blob} is not stored", name=blob)
                record = pb.KernelRecord(
                    name=name,
                    kernel=kernel,
                    state=pb.KERNEL_STATE_TESTING,
                    tags=request.tags,
                    create_time=self._timestamp(),
                    parents=dict.fromkeys([blueprint, *request.parents]),
                )
                self._lineage.add(row, name, list(record.parents))
                self.kernels.save(row, record)
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
            return self.kernels.load(row, name)

    def list_kernels(self, request: pb.ListKernelsRequest) -> pb.ListKernelsResponse:
        """Returns a page of the kernels that pass the filter, in the order asked for."""
        wanted = request.filter
        records, token = self.kernels.page(
            request,
            kernel_order(request.order),
            kernel_conditions(wanted),
            lambda record: within_bounds(record, wanted),
        )
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
        record = self.kernels.load(row, name)
        _require_etag(record, etag)
        if record.state != state:
            require_kernel_move(name, record.state, state)
            record.state = state
            if evidence is not None:
                record.validation.CopyFrom(evidence)
            self.kernels.save(row, record)
        return record

    def record_measurement(
        self, request: pb.RecordMeasurementRequest
    ) -> "Future[pb.RecordMeasurementResponse]":
        """Adds a timing to a kernel; the oldest goes where there are `MAX_MEASUREMENTS`."""

        def work(row: Row) -> pb.RecordMeasurementResponse:
            record = self.kernels.load(row, request.name)
            _require_etag(record, request.etag)
            measurement = record.measurements.add()
            measurement.CopyFrom(request.measurement)
            if not measurement.HasField("measure_time"):
                measurement.measure_time.CopyFrom(self._timestamp())
            del record.measurements[:-MAX_MEASUREMENTS]
            self.kernels.save(row, record)
            return pb.RecordMeasurementResponse(kernel=record)

        return self._once("RecordMeasurement", request, pb.RecordMeasurementResponse, work)

    # ------------------------------------------------------------ field reports

    def record_field_report(
        self, request: pb.RecordFieldReportRequest
    ) -> "Future[pb.RecordFieldReportResponse]":
        """Stores a report under the next number of its kernel, and adds its gain to the mean."""

        def work(row: Row) -> pb.RecordFieldReportResponse:
            name = request.report.kernel
            kernel = self.kernels.load(row, name)
            report = pb.FieldReport()
            report.CopyFrom(request.report)
            if report.HasField("gain"):
                kernel.num_gains += 1
                share = 1 / kernel.num_gains
                # Weighted, not summed up: no sum of finite gains may become infinite.
                kernel.mean_gain = kernel.mean_gain * (1 - share) + report.gain * share
                self.kernels.save(row, kernel)
            key = key_of("report.kernel", name, "kernels")
            number = self._next_report(row, key)
            report.name = f"{name}/reports/{number}"
            report.report_time.CopyFrom(self._timestamp())
            place = key + number.to_bytes(_NUMBER_BYTES, "big")
            sealed = seal(place, report.SerializeToString())
            row.put(place, sealed, db=self._store.table("reports"))
            revision = self.changes.revision(row) + 1
            self.changes.append(row, pb.WatchResponse(revision=revision, report=report))
            return pb.RecordFieldReportResponse(report=report)

        return self._once("RecordFieldReport", request, pb.RecordFieldReportResponse, work)

    def list_field_reports(
        self, request: pb.ListFieldReportsRequest
    ) -> pb.ListFieldReportsResponse:
        """Returns a page of the reports on a kernel, oldest first; damaged ones are left out.

        Raises:
            ServiceError: NOT_FOUND where the kernel is not stored.
        """
        prefix = key_of("kernel", request.kernel, "kernels")
        scope = list_scope(request)
        start = self._tokens.decode(scope, request.page_token)
        size = effective_page_size(request.page_size)
        with self._store.reading() as row:
            self.kernels.load(row, request.kernel)
            rows, following = read_page(row, self._store.table("reports"), prefix, start, size)
        token = "" if following is None else self._tokens.encode(scope, following)
        contents = [unseal(key, value) for key, value in rows]
        if None in contents:
            LOG.error("%s has damaged reports", request.kernel)
        reports = [pb.FieldReport.FromString(held) for held in contents if held is not None]
        return pb.ListFieldReportsResponse(reports=reports, next_page_token=token)

    def put_report_aside(self, key: bytes, value: bytes) -> bool:
        """Puts a damaged report into quarantine; returns False where it has changed since.

        An empty row stays in its place, so that its number is given to no other.
        """

        def work(row: Row) -> bool:
            table = self._store.table("reports")
            if row.get(key, db=table) != value:
                return False
            row.put(key, b"", db=table)
            row.put(report_name(key).encode(), value, db=self._store.table(QUARANTINE_TABLE))
            return True

        aside = self._store.submit(work, frees=True).result()
        metrics.QUARANTINED.labels("report").inc(aside)
        return aside

    # ------------------------------------------------------------ relations and revisions

    def lineage(self, name: str, depth: int) -> pb.GetLineageResponse:
        """Returns what a blueprint or kernel was made from and what was made from it.

        Raises:
            ServiceError: NOT_FOUND.
        """
        with self._store.reading() as row:
            if name.startswith("blueprints/"):
                self.blueprints.load(row, name)
            else:
                self.kernels.load(row, name)
            return self._lineage.around(row, name, depth)

    def revision(self) -> int:
        """Returns the revision of the last change; 0 before the first."""
        with self._store.reading() as row:
            return self.changes.revision(row)

    # ------------------------------------------------------------ rows

    def _next_report(self, row: Row, kernel: bytes) -> int:
        """Returns the number that the next report on a kernel gets."""
        cursor = row.cursor(db=self._store.table("reports"))
        beyond = kernel + b"\xff" * _NUMBER_BYTES
        going_on = cursor.prev() if cursor.set_range(beyond) else cursor.last()
        if not going_on or not cursor.key().startswith(kernel):
            return 0
        return int.from_bytes(cursor.key()[len(kernel) :], "big") + 1

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

        future = self._store.submit(run, request.ByteSize())
        future.add_done_callback(lambda _: self.followers.wake(FOLLOWED))
        return future


_Retriable = (
    pb.CreateBlueprintRequest
    | pb.UpdateBlueprintStateRequest
    | pb.ArchiveBlueprintRequest
    | pb.CreateKernelRequest
    | pb.UpdateKernelStateRequest
    | pb.ArchiveKernelRequest
    | pb.RecordMeasurementRequest
    | pb.RecordFieldReportRequest
)


def _require_etag(record: pb.BlueprintRecord | pb.KernelRecord, etag: str) -> None:
    if etag and etag != record.etag:
        raise aborted(
            "ETAG_MISMATCH",
            f"{record.name} has changed: its etag is {record.etag!r}, not {etag!r}",
            etag=record.etag,
        )
