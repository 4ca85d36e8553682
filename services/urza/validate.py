"""What is wrong with a request to Urza; pure functions over the messages."""

import math
from collections.abc import Sequence

from google.protobuf.timestamp_pb2 import Timestamp

from esper.common.v1 import blueprint_pb2
from esper.common.v1 import kernel_pb2
from esper.services.serving.checks import check_enum
from esper.services.serving.checks import check_number
from esper.services.serving.checks import check_page_size
from esper.services.serving.checks import check_tags
from esper.services.serving.checks import check_text
from esper.services.serving.errors import FieldViolation
from esper.services.store.requests import check_request_id
from esper.services.urza.names import check_digest
from esper.services.urza.names import check_hash
from esper.services.urza.names import check_name
from esper.services.urza.names import check_record_name
from esper.services.urza.names import check_run_id
from esper.services.urza.names import check_run_name
from esper.urza.v1 import blob_pb2
from esper.urza.v1 import library_pb2
from esper.urza.v1 import run_pb2

Violations = list[FieldViolation]

MAX_DIGESTS = 1000
MAX_RESOURCE_BYTES = 1 << 20
MAX_NAME_CHARS = 256
MAX_SLOT_CHARS = 512
MAX_REASON_CHARS = 4096
MAX_EVENT_BYTES = 1 << 20
MAX_ETAG_CHARS = 64
MAX_PARENTS = 16
MAX_DEPTH = 16
MIN_PROGRESS_S, MAX_PROGRESS_S = 0.1, 3600.0
MIN_TIME_S = -62135596800  # the years 1 to 9999, as google.protobuf.Timestamp has it
MAX_TIME_S = 253402300799
MAX_INT64 = (1 << 63) - 1


def read_blob(request: blob_pb2.ReadBlobRequest) -> Violations:
    """Checks digest, offset and limit."""
    return [
        *check_digest("digest", request.digest),
        *check_number("read_offset", request.read_offset, low=0),
        *check_number("read_limit", request.read_limit, low=0),
    ]


def begin_write(request: blob_pb2.WriteBlobRequest) -> Violations:
    """Checks the first message of an upload."""
    return [
        *check_digest("digest", request.digest),
        *check_number("write_offset", request.write_offset, low=0),
    ]


def find_missing(request: blob_pb2.FindMissingBlobsRequest) -> Violations:
    """Checks every digest asked about."""
    if len(request.digests) > MAX_DIGESTS:
        return [FieldViolation("digests", len(request.digests), f"must be at most {MAX_DIGESTS}")]
    found: Violations = []
    for index, digest in enumerate(request.digests):
        found += check_digest(f"digests[{index}]", digest)
    return found


def create_blueprint(request: library_pb2.CreateBlueprintRequest) -> Violations:
    """Checks what the checker of blueprints does not: presence, size, tags, parents, request id."""
    found = [*check_request_id(request.request_id), *_parents(request.parents)]
    if not request.HasField("blueprint"):
        return [*found, FieldViolation("blueprint", None, "is required")]
    blueprint = request.blueprint
    return [
        *found,
        *_resource_size("blueprint", blueprint),
        *check_text("blueprint.name", blueprint.name, MAX_NAME_CHARS, required=True),
        *check_tags("blueprint.tags", blueprint.tags),
    ]


def create_kernel(request: library_pb2.CreateKernelRequest) -> Violations:
    """Checks what the checker of kernels does not: all but the kernel's own soundness."""
    found = [
        *check_request_id(request.request_id),
        *check_tags("tags", request.tags),
        *_parents(request.parents),
    ]
    if not request.HasField("kernel"):
        return [*found, FieldViolation("kernel", None, "is required")]
    kernel = request.kernel
    found += [
        *_resource_size("kernel", kernel),
        *check_hash("kernel.blueprint_digest", kernel.blueprint_digest),
        *check_text("kernel.blueprint_name", kernel.blueprint_name, MAX_NAME_CHARS),
    ]
    if kernel.HasField("weights"):
        found += check_digest("kernel.weights", kernel.weights)
    return found


def list_blueprints(request: library_pb2.ListBlueprintsRequest) -> Violations:
    """Checks page size and filter."""
    states = library_pb2.BlueprintState.DESCRIPTOR
    return [
        *check_page_size(request.page_size),
        *check_enum("state", request.state, states, required=False),
        *check_tags("tags", request.tags),
    ]


def list_kernels(request: library_pb2.ListKernelsRequest) -> Violations:
    """Checks page size, filter and order."""
    wanted = request.filter
    enums = (
        ("slot_kind", wanted.slot_kind, kernel_pb2.SlotKind.DESCRIPTOR),
        ("source", wanted.source, blueprint_pb2.SeedSource.DESCRIPTOR),
        ("dtype", wanted.dtype, kernel_pb2.DataType.DESCRIPTOR),
        ("device_class", wanted.device_class, kernel_pb2.DeviceClass.DESCRIPTOR),
        ("state", wanted.state, library_pb2.KernelState.DESCRIPTOR),
    )
    found = [
        *check_page_size(request.page_size),
        *check_tags("filter.tags", wanted.tags),
        *check_enum("order", request.order, library_pb2.KernelOrder.DESCRIPTOR, required=False),
    ]
    for name, value, enum in enums:
        found += check_enum(f"filter.{name}", value, enum, required=False)
    for name, low in (("chunk_width", 1), ("source_width", 1), ("max_parameter_count", 0)):
        if wanted.HasField(name):
            found += check_number(f"filter.{name}", getattr(wanted, name), low=low)
    if wanted.HasField("max_forward_us"):
        found += check_number("filter.max_forward_us", wanted.max_forward_us, low=0)
    if wanted.blueprint:
        found += check_name("filter.blueprint", wanted.blueprint, "blueprints")
    return found


def update_blueprint_state(request: library_pb2.UpdateBlueprintStateRequest) -> Violations:
    """Checks name, state, etag and request id."""
    return [
        *check_name("name", request.name, "blueprints"),
        *check_enum("state", request.state, library_pb2.BlueprintState.DESCRIPTOR),
        *_etag(request.etag),
        *check_request_id(request.request_id),
    ]


def update_kernel_state(request: library_pb2.UpdateKernelStateRequest) -> Violations:
    """Checks every field, and that a move to VALIDATED brings its evidence."""
    found = [
        *check_name("name", request.name, "kernels"),
        *check_enum("state", request.state, library_pb2.KernelState.DESCRIPTOR),
        *_etag(request.etag),
        *check_request_id(request.request_id),
    ]
    report = request.validation
    if request.state == library_pb2.KERNEL_STATE_VALIDATED and not report.passed:
        rule = "must be a report that passed, for a move to KERNEL_STATE_VALIDATED"
        found.append(FieldViolation("validation.passed", report.passed, rule))
    if request.HasField("validation"):
        found += check_number("validation.num_cases", report.num_cases, low=0)
        found += check_number("validation.tolerance", report.tolerance, low=0)
        found += check_text("validation.detail", report.detail, MAX_REASON_CHARS)
    return found


def archive(
    request: library_pb2.ArchiveBlueprintRequest | library_pb2.ArchiveKernelRequest,
    collection: str,
) -> Violations:
    """Checks name, etag and request id."""
    return [
        *check_name("name", request.name, collection),
        *_etag(request.etag),
        *check_request_id(request.request_id),
    ]


def record_measurement(request: library_pb2.RecordMeasurementRequest) -> Violations:
    """Checks every field of a timing; one without any figure says nothing."""
    found = [
        *check_name("name", request.name, "kernels"),
        *_etag(request.etag),
        *check_request_id(request.request_id),
    ]
    if not request.HasField("measurement"):
        return [*found, FieldViolation("measurement", None, "is required")]
    measurement = request.measurement
    found += [
        *check_text("measurement.machine", measurement.machine, MAX_NAME_CHARS, required=True),
        *check_number("measurement.num_tokens", measurement.num_tokens, low=1),
        *_time("measurement.measure_time", measurement.measure_time),
    ]
    figures = ("forward_us", "backward_us", "peak_memory_bytes")
    present = [name for name in figures if measurement.HasField(name)]
    if not present:
        rule = f"must hold one of {', '.join(figures)}"
        found.append(FieldViolation("measurement", "without a figure", rule))
    for name in present:
        value = getattr(measurement, name)
        found += check_number(f"measurement.{name}", value, low=0)
        if value == 0 and name != "peak_memory_bytes":
            found.append(FieldViolation(f"measurement.{name}", value, "must be above 0"))
    return found


def record_field_report(request: library_pb2.RecordFieldReportRequest) -> Violations:
    """Checks every field of a report."""
    report = request.report
    found = [
        *check_request_id(request.request_id),
        *check_name("report.kernel", report.kernel, "kernels"),
        *check_text("report.run", report.run, MAX_NAME_CHARS, required=True),
        *check_text("report.slot", report.slot, MAX_SLOT_CHARS),
        *check_text("report.reason", report.reason, MAX_REASON_CHARS),
        *check_number("report.seed", report.seed, low=0),
        *check_enum("report.verdict", report.verdict, library_pb2.FieldVerdict.DESCRIPTOR),
    ]
    bounds = {"p_value": (0.0, 1.0), "num_samples": (0.0, MAX_INT64)}
    for name in ("gain", "gain_low", "gain_high", "p_value", "num_samples"):
        if report.HasField(name):
            low, high = bounds.get(name, (-math.inf, math.inf))
            found += check_number(f"report.{name}", getattr(report, name), low, high)
    has_interval = report.HasField("gain_low") and report.HasField("gain_high")
    if has_interval and report.gain_low > report.gain_high:
        rule = f"must be at most gain_high, {report.gain_high}"
        found.append(FieldViolation("report.gain_low", report.gain_low, rule))
    return found


def list_field_reports(request: library_pb2.ListFieldReportsRequest) -> Violations:
    """Checks kernel and page size."""
    return [
        *check_name("kernel", request.kernel, "kernels"),
        *check_page_size(request.page_size),
    ]


def get_lineage(request: library_pb2.GetLineageRequest) -> Violations:
    """Checks name and depth."""
    return [
        *check_record_name("name", request.name),
        *check_number("depth", request.depth, 0, MAX_DEPTH),
    ]


def watch(request: library_pb2.WatchRequest) -> Violations:
    """Checks revision and interval."""
    found = check_number("start_revision", request.start_revision, low=0)
    if request.progress_interval_s != 0:
        interval_s = request.progress_interval_s
        found += check_number("progress_interval_s", interval_s, MIN_PROGRESS_S, MAX_PROGRESS_S)
    return found


def create_run(request: run_pb2.CreateRunRequest) -> Violations:
    """Checks id, task and request id."""
    return [
        *(check_run_id("run_id", request.run_id) if request.run_id else []),
        *check_text("task", request.task, MAX_NAME_CHARS),
        *check_request_id(request.request_id),
    ]


def list_runs(request: run_pb2.ListRunsRequest) -> Violations:
    """Checks page size."""
    return check_page_size(request.page_size)


def watch_run(request: run_pb2.WatchRunRequest) -> Violations:
    """Checks name and sequence number."""
    return [
        *check_run_name("name", request.name),
        *check_number("start_sequence", request.start_sequence, low=0),
    ]


def append_run_event(request: run_pb2.AppendRunEventsRequest, run: str) -> Violations:
    """Checks one event of a stream to `run`, the run that its first message named."""
    found = check_run_name("run", run)
    if request.run not in ("", run):
        found.append(FieldViolation("run", request.run, f"must be empty or {run} again"))
    found += check_number("expected_sequence", request.expected_sequence, low=0)
    found += _time("event_time", request.event_time)
    if not request.body.type_url:
        found.append(FieldViolation("body", None, "is required"))
    elif request.body.ByteSize() > MAX_EVENT_BYTES:
        size = f"{request.body.ByteSize()} bytes"
        found.append(FieldViolation("body", size, f"must have at most {MAX_EVENT_BYTES} bytes"))
    return found


def _etag(etag: str) -> Violations:
    return check_text("etag", etag, MAX_ETAG_CHARS)


def _parents(parents: Sequence[str]) -> Violations:
    if len(parents) > MAX_PARENTS:
        return [FieldViolation("parents", len(parents), f"are too many: at most {MAX_PARENTS}")]
    found: Violations = []
    for index, parent in enumerate(parents):
        found += check_record_name(f"parents[{index}]", parent)
    return found


def _time(field: str, stamp: Timestamp) -> Violations:
    found = check_number(f"{field}.nanos", stamp.nanos, 0, 999_999_999)
    if not MIN_TIME_S <= stamp.seconds <= MAX_TIME_S:
        rule = "must lie within the years 1 to 9999"
        found.append(FieldViolation(f"{field}.seconds", stamp.seconds, rule))
    return found


def _resource_size(field: str, value: blueprint_pb2.Blueprint | kernel_pb2.Kernel) -> Violations:
    size_bytes = value.ByteSize()
    if size_bytes <= MAX_RESOURCE_BYTES:
        return []
    return [FieldViolation(field, f"{size_bytes} bytes", f"must be at most {MAX_RESOURCE_BYTES}")]
