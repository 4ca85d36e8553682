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
        (pb.KernelFilter(tags=[""]), "filter.tags[0]"),
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
