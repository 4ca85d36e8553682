"""Lists of the library: filters, orders and pages, over a real socket."""

import uuid

import grpc
import pytest
from urza_samples import PASSED
from urza_samples import new_kernel
from urza_samples import refusal

from esper import blueprints
from esper.common.v1 import blueprint_pb2
from esper.common.v1 import kernel_pb2
from esper.urza.client import UrzaClient
from esper.urza.v1 import library_pb2 as pb
from esper.urza.v1 import library_pb2_grpc


def test_filters_choose_among_kernels(urza: UrzaClient) -> None:
    tag = str(uuid.uuid4())
    for name in ("bottleneck", "affine"):
        urza.create_blueprint(blueprints.get(name))
    wide = urza.create_kernel(new_kernel(width=4096), tags=[tag, "wide"])
    narrow = urza.create_kernel(new_kernel(width=32), tags=[tag])
    affine = urza.create_kernel(new_kernel("affine", width=32), tags=[tag])

    def chosen(**wanted: object) -> set[str]:
        return {r.name for r in urza.list_kernels(pb.KernelFilter(tags=[tag], **wanted))}

    everything = {wide.name, narrow.name, affine.name}
    assert chosen() == everything
    assert chosen(chunk_width=32) == {narrow.name, affine.name}
    assert chosen(source_width=4096) == {wide.name}
    assert chosen(max_parameter_count=64) == {affine.name}
    assert chosen(max_parameter_count=0) == set()
    assert chosen(max_forward_us=1e9) == set()  # none has been measured
    assert chosen(blueprint=f"blueprints/{affine.kernel.blueprint_digest}") == {affine.name}
    assert chosen(slot_kind=kernel_pb2.SLOT_KIND_CONV) == set()
    assert chosen(dtype=kernel_pb2.DATA_TYPE_FLOAT32) == everything
    assert chosen(source=blueprint_pb2.SEED_SOURCE_INPUT) == set()
    assert chosen(device_class=kernel_pb2.DEVICE_CLASS_CPU) == everything
    assert chosen(state=pb.KERNEL_STATE_VALIDATED) == set()
    urza.update_kernel_state(narrow.name, pb.KERNEL_STATE_VALIDATED, PASSED)
    assert chosen(state=pb.KERNEL_STATE_VALIDATED) == {narrow.name}
    both = pb.KernelFilter(tags=[tag, "wide"])
    assert [record.name for record in urza.list_kernels(both)] == [wide.name]


@pytest.mark.parametrize(
    ("wanted", "field"),
    [
        (pb.KernelFilter(slot_kind=99), "filter.slot_kind"),
        (pb.KernelFilter(state=99), "filter.state"),
        (pb.KernelFilter(chunk_width=0), "filter.chunk_width"),
        (pb.KernelFilter(max_parameter_count=-1), "filter.max_parameter_count"),
        (pb.KernelFilter(max_forward_us=float("nan")), "filter.max_forward_us"),
        (pb.KernelFilter(blueprint="bottleneck"), "filter.blueprint"),
        (pb.KernelFilter(max_forward_us=-1), "filter.max_forward_us"),
        (pb.KernelFilter(source_width=-1), "filter.source_width"),
        (pb.KernelFilter(dtype=99), "filter.dtype"),
        (pb.KernelFilter(device_class=-1), "filter.device_class"),
        (pb.KernelFilter(source=99), "filter.source"),
        (pb.KernelFilter(tags=[""]), "filter.tags[0]"),
        (pb.KernelFilter(tags=["x" * 65]), "filter.tags[0]"),
        (pb.KernelFilter(tags=["x"] * 33), "filter.tags"),
    ],
)
def test_senseless_filters_are_refused(
    urza: UrzaClient, wanted: pb.KernelFilter, field: str
) -> None:
    error = refusal(lambda: list(urza.list_kernels(wanted)))
    assert error.code is grpc.StatusCode.INVALID_ARGUMENT
    assert [violation.field for violation in error.violations] == [field]


def test_pages_are_complete_while_others_write(
    urza: UrzaClient, library: library_pb2_grpc.LibraryServiceStub
) -> None:
    urza.create_blueprint(blueprints.get("affine"))
    tag = str(uuid.uuid4())
    names = sorted(urza.create_kernel(new_kernel("affine"), tags=[tag]).name for _ in range(12))
    request = pb.ListKernelsRequest(page_size=5, filter=pb.KernelFilter(tags=[tag]))
    seen: list[str] = []
    later: set[str] = set()
    while True:
        page = library.ListKernels(request, timeout=30)
        assert len(page.kernels) <= 5
        seen += [record.name for record in page.kernels]
        if not page.next_page_token:
            break
        request.page_token = page.next_page_token
        later.add(urza.create_kernel(new_kernel("affine"), tags=[tag]).name)
        urza.update_kernel_state(names[0], pb.KERNEL_STATE_VALIDATED, PASSED)
    assert [name for name in seen if name in names] == names
    assert set(seen) - set(names) <= later


@pytest.mark.parametrize("token", ["x", "a" * 2000, "AQAA", "%%%%"])
def test_bad_pages_are_refused(library: library_pb2_grpc.LibraryServiceStub, token: str) -> None:
    for call in (
        lambda: library.ListKernels(pb.ListKernelsRequest(page_token=token)),
        lambda: library.ListBlueprints(pb.ListBlueprintsRequest(page_token=token)),
    ):
        error = refusal(call)
        assert [violation.field for violation in error.violations] == ["page_token"]
    error = refusal(lambda: library.ListKernels(pb.ListKernelsRequest(page_size=-1)))
    assert [violation.field for violation in error.violations] == ["page_size"]


def test_a_token_belongs_to_its_filter(
    library: library_pb2_grpc.LibraryServiceStub, urza: UrzaClient
) -> None:
    urza.create_blueprint(blueprints.get("affine"))
    for _ in range(3):
        urza.create_kernel(new_kernel("affine"), tags=["paged"])
    wanted = pb.KernelFilter(tags=["paged"])
    token = library.ListKernels(pb.ListKernelsRequest(page_size=1, filter=wanted)).next_page_token
    assert token
    other_size = pb.ListKernelsRequest(page_size=2, filter=wanted, page_token=token)
    assert len(library.ListKernels(other_size).kernels) == 2
    other = pb.ListKernelsRequest(page_size=1, page_token=token)
    assert refusal(lambda: library.ListKernels(other)).violations[0].field == "page_token"


def measured(forward_us: float | None, backward_us: float | None = 1.0) -> kernel_pb2.Measurement:
    return kernel_pb2.Measurement(
        machine="m", num_tokens=64, forward_us=forward_us, backward_us=backward_us
    )


def test_bounds_are_exact(urza: UrzaClient) -> None:
    tag = str(uuid.uuid4())
    urza.create_blueprint(blueprints.get("affine"))
    records = [urza.create_kernel(new_kernel("affine", 9000 + 7 * n), [tag]) for n in range(6)]
    times = [0.25, 0.3, 1.0, 1.5, 2.0, 1e7]
    for record, time_us in zip(records, times, strict=True):
        urza.record_measurement(record.name, measured(time_us))
    for bound, allowed in (
        ("max_parameter_count", [record.kernel.parameter_count for record in records]),
        ("max_forward_us", times),
    ):
        for limit in allowed:
            for offset in (-0.01, 0, 0.01) if bound == "max_forward_us" else (-1, 0, 1):
                wanted = pb.KernelFilter(tags=[tag], **{bound: limit + offset})
                found = {record.name for record in urza.list_kernels(wanted)}
                assert found == {
                    record.name
                    for record, value in zip(records, allowed, strict=True)
                    if value <= limit + offset
                }


def test_the_newest_forward_time_counts(urza: UrzaClient, kernel: pb.KernelRecord) -> None:
    def found(limit: float) -> list[str]:
        wanted = pb.KernelFilter(chunk_width=place.chunk_width, max_forward_us=limit)
        return [record.name for record in urza.list_kernels(wanted)]

    place = kernel.kernel.signature
    urza.record_measurement(kernel.name, measured(5.0))
    urza.record_measurement(kernel.name, measured(50.0))
    record = urza.record_measurement(kernel.name, measured(None))
    assert [m.forward_us for m in record.measurements if m.HasField("forward_us")] == [5.0, 50.0]
    assert all(m.measure_time.seconds > 0 for m in record.measurements)
    assert found(49.0) == []
    assert found(50.0) == [kernel.name]


def test_orders_begin_with_the_best(urza: UrzaClient) -> None:
    tag = str(uuid.uuid4())
    for name in ("affine", "bottleneck", "noop"):
        urza.create_blueprint(blueprints.get(name))
    cheap = urza.create_kernel(new_kernel("noop"), [tag]).name
    middle = urza.create_kernel(new_kernel("affine"), [tag]).name
    dear = urza.create_kernel(new_kernel("bottleneck"), [tag]).name
    for name, time_us in ((dear, 1.5), (cheap, 0.75), (middle, 1e3)):
        urza.record_measurement(name, measured(time_us))
    for name, gain in ((dear, 0.5), (dear, 1.5), (cheap, -2.0)):
        urza.record_field_report(
            pb.FieldReport(kernel=name, run="r", verdict=pb.FIELD_VERDICT_CULLED, gain=gain)
        )

    def listed(order: pb.KernelOrder) -> list[str]:
        return [r.name for r in urza.list_kernels(pb.KernelFilter(tags=[tag]), order)]

    assert listed(pb.KERNEL_ORDER_NAME) == sorted([cheap, middle, dear])
    assert listed(pb.KERNEL_ORDER_UNSPECIFIED) == sorted([cheap, middle, dear])
    assert listed(pb.KERNEL_ORDER_PARAMETER_COUNT) == [cheap, middle, dear]
    assert listed(pb.KERNEL_ORDER_FLOPS_PER_TOKEN) == [*sorted([cheap, middle]), dear]
    assert listed(pb.KERNEL_ORDER_FORWARD_US) == [cheap, dear, middle]
    assert listed(pb.KERNEL_ORDER_MEAN_GAIN) == [dear, cheap]  # the others have none


def test_a_token_belongs_to_its_order(
    urza: UrzaClient, library: library_pb2_grpc.LibraryServiceStub
) -> None:
    urza.create_blueprint(blueprints.get("affine"))
    for _ in range(2):
        urza.create_kernel(new_kernel("affine"))
    request = pb.ListKernelsRequest(page_size=1, order=pb.KERNEL_ORDER_PARAMETER_COUNT)
    request.page_token = library.ListKernels(request).next_page_token
    library.ListKernels(request)
    request.order = pb.KERNEL_ORDER_FLOPS_PER_TOKEN
    error = refusal(lambda: library.ListKernels(request))
    assert [violation.field for violation in error.violations] == ["page_token"]


def test_only_the_newest_measurements_are_kept(urza: UrzaClient, kernel: pb.KernelRecord) -> None:
    for number in range(1, 70):
        record = urza.record_measurement(kernel.name, measured(float(number)))
    assert [m.forward_us for m in record.measurements] == list(range(6, 70))


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"machine": ""}, "measurement.machine"),
        ({"machine": "x" * 300}, "measurement.machine"),
        ({"num_tokens": 0}, "measurement.num_tokens"),
        ({"forward_us": 0.0}, "measurement.forward_us"),
        ({"forward_us": -1.0}, "measurement.forward_us"),
        ({"forward_us": float("nan")}, "measurement.forward_us"),
        ({"backward_us": float("inf")}, "measurement.backward_us"),
        ({"peak_memory_bytes": -1}, "measurement.peak_memory_bytes"),
        ({"forward_us": None}, "measurement"),
        ({"measure_time": {"nanos": -1}}, "measurement.measure_time.nanos"),
        ({"measure_time": {"seconds": 1 << 60}}, "measurement.measure_time.seconds"),
    ],
)
def test_senseless_measurements_are_refused(
    urza: UrzaClient, kernel: pb.KernelRecord, fields: dict[str, object], field: str
) -> None:
    good: dict[str, object] = {"machine": "m", "num_tokens": 1, "forward_us": 1.0}
    timing = kernel_pb2.Measurement(**{**good, **fields})
    error = refusal(lambda: urza.record_measurement(kernel.name, timing))
    assert error.code is grpc.StatusCode.INVALID_ARGUMENT
    assert [violation.field for violation in error.violations] == [field]
    assert urza.get_kernel(kernel.name) == kernel
