"""The requests that both clients of Urza make."""

import uuid
from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Sequence

from google.protobuf.message import Message

from esper.common.rpc import packed
from esper.common.v1 import blueprint_pb2
from esper.common.v1 import digest_pb2
from esper.common.v1 import kernel_pb2
from esper.urza.v1 import blob_pb2
from esper.urza.v1 import library_pb2
from esper.urza.v1 import run_pb2

PAGE_SIZE = 200
MAX_DIGESTS = 1000


def new_id() -> str:
    """Returns a request id that nobody else has."""
    return str(uuid.uuid4())


def find_missing(
    digests: Sequence[digest_pb2.Digest],
) -> Iterator[blob_pb2.FindMissingBlobsRequest]:
    """Yields requests for all of `digests`, as many in each as one may have."""
    for start in range(0, len(digests), MAX_DIGESTS):
        yield blob_pb2.FindMissingBlobsRequest(digests=digests[start : start + MAX_DIGESTS])


def create_blueprint(
    blueprint: blueprint_pb2.Blueprint, parents: Iterable[str]
) -> library_pb2.CreateBlueprintRequest:
    """Asks to store a blueprint."""
    return library_pb2.CreateBlueprintRequest(
        blueprint=blueprint, parents=parents, request_id=new_id()
    )


def list_blueprints(
    state: library_pb2.BlueprintState, tags: Iterable[str]
) -> library_pb2.ListBlueprintsRequest:
    """Asks for the first page of blueprints."""
    return library_pb2.ListBlueprintsRequest(page_size=PAGE_SIZE, state=state, tags=tags)


def update_blueprint_state(
    name: str, state: library_pb2.BlueprintState, etag: str
) -> library_pb2.UpdateBlueprintStateRequest:
    """Asks to move a blueprint to another state."""
    return library_pb2.UpdateBlueprintStateRequest(
        name=name, state=state, etag=etag, request_id=new_id()
    )


def create_kernel(
    kernel: kernel_pb2.Kernel, tags: Iterable[str], parents: Iterable[str]
) -> library_pb2.CreateKernelRequest:
    """Asks to store a kernel."""
    return library_pb2.CreateKernelRequest(
        kernel=kernel, tags=tags, parents=parents, request_id=new_id()
    )


def list_kernels(
    filter: library_pb2.KernelFilter | None, order: library_pb2.KernelOrder
) -> library_pb2.ListKernelsRequest:
    """Asks for the first page of kernels."""
    return library_pb2.ListKernelsRequest(page_size=PAGE_SIZE, filter=filter, order=order)


def update_kernel_state(
    name: str,
    state: library_pb2.KernelState,
    validation: kernel_pb2.ValidationReport | None,
    etag: str,
) -> library_pb2.UpdateKernelStateRequest:
    """Asks to move a kernel to another state."""
    return library_pb2.UpdateKernelStateRequest(
        name=name, state=state, validation=validation, etag=etag, request_id=new_id()
    )


def record_measurement(
    name: str, measurement: kernel_pb2.Measurement, etag: str
) -> library_pb2.RecordMeasurementRequest:
    """Asks to add a timing to a kernel."""
    return library_pb2.RecordMeasurementRequest(
        name=name, measurement=measurement, etag=etag, request_id=new_id()
    )


def record_field_report(
    report: library_pb2.FieldReport, request_id: str
) -> library_pb2.RecordFieldReportRequest:
    """Asks to store a report; an empty id takes a new one."""
    return library_pb2.RecordFieldReportRequest(report=report, request_id=request_id or new_id())


def list_field_reports(kernel: str) -> library_pb2.ListFieldReportsRequest:
    """Asks for the first page of reports."""
    return library_pb2.ListFieldReportsRequest(kernel=kernel, page_size=PAGE_SIZE)


def watch(start_revision: int, progress_interval_s: float) -> library_pb2.WatchRequest:
    """Asks for the changes of the library."""
    return library_pb2.WatchRequest(
        start_revision=start_revision, progress_interval_s=progress_interval_s
    )


def create_run(run_id: str, task: str) -> run_pb2.CreateRunRequest:
    """Asks to open a run."""
    return run_pb2.CreateRunRequest(run_id=run_id, task=task, request_id=new_id())


def append_run_events(
    name: str, messages: Iterable[Message], expected_sequence: int
) -> list[run_pb2.AppendRunEventsRequest]:
    """Returns a request for each event that happens now.

    Raises:
        ValueError: Where there is no message.
    """
    events = []
    for number, message in enumerate(messages):
        event = run_pb2.AppendRunEventsRequest(
            run="" if number else name,
            expected_sequence=expected_sequence + number,
            body=packed(message),
        )
        event.event_time.GetCurrentTime()
        events.append(event)
    if not events:
        raise ValueError("messages: [] must hold at least one message")
    return events
