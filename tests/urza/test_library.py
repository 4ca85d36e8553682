"""Blueprints, kernels and reports by client and server together, over a real socket."""

import os
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from urza_samples import HASH
from urza_samples import PASSED
from urza_samples import new_kernel
from urza_samples import refusal

from esper import blueprints
from esper.common.v1 import kernel_pb2
from esper.urza.client import UrzaClient
from esper.urza.transfer import digest_of
from esper.urza.v1 import library_pb2 as pb
from esper.urza.v1 import library_pb2_grpc


@pytest.mark.parametrize("name", blueprints.names())
def test_every_starting_blueprint_is_stored_under_its_digest(urza: UrzaClient, name: str) -> None:
    blueprint = blueprints.get(name)
    record = urza.create_blueprint(blueprint)
    assert record.name == f"blueprints/{blueprints.blueprint_digest(blueprint)}"
    assert record.blueprint == blueprint
    assert record.state == pb.BLUEPRINT_STATE_PROPOSED
    again = urza.create_blueprint(blueprint)
    assert again == record
    assert urza.get_blueprint(record.name) == record
    assert record.name in [found.name for found in urza.list_blueprints()]


def test_an_unsound_blueprint_is_refused_by_field(urza: UrzaClient) -> None:
    blueprint = blueprints.get("bottleneck")
    blueprint.graph.nodes[0].inputs[0].node = "nowhere"
    error = refusal(lambda: urza.create_blueprint(blueprint))
    assert error.code is grpc.StatusCode.INVALID_ARGUMENT
    assert error.violations[0].field.startswith("blueprint.graph.nodes[0]")
    tagged = blueprints.get("bottleneck")
    tagged.tags.extend(["x"] * 40)
    assert refusal(lambda: urza.create_blueprint(tagged)).violations[0].field == "blueprint.tags"


def test_kernels_make_the_round_trip(urza: UrzaClient, kernel: pb.KernelRecord) -> None:
    assert kernel.name == f"kernels/{blueprints.kernel_digest(kernel.kernel)}"
    assert kernel.state == pb.KERNEL_STATE_TESTING
    assert list(kernel.tags) == ["tag"]
    assert not kernel.HasField("validation")
    assert kernel.create_time.seconds > 0
    assert urza.get_kernel(kernel.name) == kernel
    assert urza.create_kernel(kernel.kernel) == kernel


def test_a_kernel_needs_its_blueprint_and_its_weights(urza: UrzaClient) -> None:
    orphan = new_kernel("glu")
    orphan.blueprint_digest = HASH
    error = refusal(lambda: urza.create_kernel(orphan))
    assert (error.code, error.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "NO_BLUEPRINT")
    assert error.metadata == {"name": f"blueprints/{HASH}"}
    urza.create_blueprint(blueprints.get("glu"))
    heavy = new_kernel("glu")
    weights = os.urandom(100)
    heavy.weights.CopyFrom(digest_of(weights))
    error = refusal(lambda: urza.create_kernel(heavy))
    assert (error.code, error.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "NO_WEIGHTS")
    urza.write_blob(weights)
    assert urza.create_kernel(heavy).kernel == heavy


def change_width(kernel: kernel_pb2.Kernel) -> None:
    kernel.signature.chunk_width = 0


def change_count(kernel: kernel_pb2.Kernel) -> None:
    kernel.parameter_count += 1


def change_digest(kernel: kernel_pb2.Kernel) -> None:
    kernel.blueprint_digest = "x"


def change_dtype(kernel: kernel_pb2.Kernel) -> None:
    kernel.signature.dtype = 99


def change_weights(kernel: kernel_pb2.Kernel) -> None:
    kernel.weights.size_bytes = -1


def change_lowering(kernel: kernel_pb2.Kernel) -> None:
    kernel.ClearField("bottleneck")


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (change_width, "kernel.signature.chunk_width"),
        (change_count, "kernel.parameter_count"),
        (change_digest, "kernel.blueprint_digest"),
        (change_dtype, "kernel.signature.dtype"),
        (change_weights, "kernel.weights.hash"),
        (change_lowering, "kernel.lowering"),
    ],
)
def test_unsound_kernels_are_refused_by_field(
    urza: UrzaClient, change: Callable[[kernel_pb2.Kernel], None], field: str
) -> None:
    kernel = new_kernel()
    change(kernel)
    error = refusal(lambda: urza.create_kernel(kernel))
    assert error.code is grpc.StatusCode.INVALID_ARGUMENT
    assert error.violations[0].field == field


@pytest.mark.parametrize(
    "name", ["", HASH, f"kernels/{HASH[1:]}", f"kernels/{HASH}0", f"blueprints/{HASH}", "kernels/"]
)
def test_bad_kernel_names_are_refused(urza: UrzaClient, name: str) -> None:
    for call in (
        lambda: urza.get_kernel(name),
        lambda: urza.update_kernel_state(name, pb.KERNEL_STATE_INVALID),
        lambda: list(urza.list_field_reports(name)),
    ):
        error = refusal(call)
        assert error.code is grpc.StatusCode.INVALID_ARGUMENT
        assert error.violations[0].field in ("name", "kernel")


def test_what_is_not_stored_is_not_found(urza: UrzaClient) -> None:
    name = f"kernels/{HASH}"
    for call in (
        lambda: urza.get_kernel(name),
        lambda: urza.update_kernel_state(name, pb.KERNEL_STATE_INVALID),
        lambda: list(urza.list_field_reports(name)),
        lambda: urza.get_blueprint(f"blueprints/{HASH}"),
    ):
        error = refusal(call)
        assert error.code is grpc.StatusCode.NOT_FOUND
        assert error.metadata["name"].endswith(HASH)


def test_a_kernel_moves_along_its_states_and_not_otherwise(
    urza: UrzaClient, kernel: pb.KernelRecord
) -> None:
    error = refusal(lambda: urza.update_kernel_state(kernel.name, pb.KERNEL_STATE_DEPLOYED))
    assert (error.code, error.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "ILLEGAL_MOVE")
    assert error.metadata == {
        "before": "KERNEL_STATE_TESTING",
        "after": "KERNEL_STATE_DEPLOYED",
    }
    for evidence in (None, kernel_pb2.ValidationReport(num_cases=1)):
        error = refusal(
            lambda evidence=evidence: urza.update_kernel_state(
                kernel.name, pb.KERNEL_STATE_VALIDATED, evidence
            )
        )
        assert error.violations[0].field == "validation.passed"
    assert urza.get_kernel(kernel.name) == kernel
    validated = urza.update_kernel_state(kernel.name, pb.KERNEL_STATE_VALIDATED, PASSED)
    assert validated.validation == PASSED
    assert validated.revision > kernel.revision
    assert validated.etag != kernel.etag
    deployed = urza.update_kernel_state(kernel.name, pb.KERNEL_STATE_DEPLOYED)
    assert deployed.validation == PASSED
    assert urza.update_kernel_state(kernel.name, pb.KERNEL_STATE_DEPLOYED) == deployed
    assert refusal(lambda: urza.update_kernel_state(kernel.name, 77)).violations[0].field == "state"


def test_archived_things_stay_readable(
    urza: UrzaClient, library: library_pb2_grpc.LibraryServiceStub, kernel: pb.KernelRecord
) -> None:
    request = pb.ArchiveKernelRequest(name=kernel.name)
    assert refusal(lambda: library.ArchiveKernel(request)).reason == "ILLEGAL_MOVE"
    urza.update_kernel_state(kernel.name, pb.KERNEL_STATE_VALIDATED, PASSED)
    assert library.ArchiveKernel(request).kernel.state == pb.KERNEL_STATE_DEPRECATED
    assert urza.get_kernel(kernel.name).state == pb.KERNEL_STATE_DEPRECATED
    own = blueprints.get("bottleneck", rank=3)
    name = urza.create_blueprint(own).name
    archived = library.ArchiveBlueprint(pb.ArchiveBlueprintRequest(name=name)).blueprint
    assert archived.state == pb.BLUEPRINT_STATE_ARCHIVED
    error = refusal(lambda: urza.update_blueprint_state(name, pb.BLUEPRINT_STATE_COMPILING))
    assert error.reason == "ILLEGAL_MOVE"


def test_a_changed_record_is_not_overwritten_by_an_old_etag(
    urza: UrzaClient, kernel: pb.KernelRecord
) -> None:
    validated = urza.update_kernel_state(
        kernel.name, pb.KERNEL_STATE_VALIDATED, PASSED, etag=kernel.etag
    )
    error = refusal(
        lambda: urza.update_kernel_state(kernel.name, pb.KERNEL_STATE_DEPLOYED, etag=kernel.etag)
    )
    assert (error.code, error.reason) == (grpc.StatusCode.ABORTED, "ETAG_MISMATCH")
    assert error.metadata == {"etag": validated.etag}
    assert urza.get_kernel(kernel.name) == validated


@pytest.mark.parametrize("etag", ["x", "0", "ffffffffffffffff", "\N{BULLET}", " "])
def test_etags_of_nothing_are_refused_everywhere(
    library: library_pb2_grpc.LibraryServiceStub, kernel: pb.KernelRecord, etag: str
) -> None:
    blueprint = kernel.parents[0]
    timing = kernel_pb2.Measurement(machine="m", num_tokens=1, forward_us=1.0)
    calls: list[Callable[[], object]] = [
        lambda: library.UpdateKernelState(
            pb.UpdateKernelStateRequest(name=kernel.name, state=pb.KERNEL_STATE_INVALID, etag=etag)
        ),
        lambda: library.ArchiveKernel(pb.ArchiveKernelRequest(name=kernel.name, etag=etag)),
        lambda: library.RecordMeasurement(
            pb.RecordMeasurementRequest(name=kernel.name, measurement=timing, etag=etag)
        ),
        lambda: library.UpdateBlueprintState(
            pb.UpdateBlueprintStateRequest(
                name=blueprint, state=pb.BLUEPRINT_STATE_FAILED, etag=etag
            )
        ),
        lambda: library.ArchiveBlueprint(pb.ArchiveBlueprintRequest(name=blueprint, etag=etag)),
    ]
    for call in calls:
        error = refusal(call)
        assert (error.code, error.reason) == (grpc.StatusCode.ABORTED, "ETAG_MISMATCH")
        assert error.metadata["etag"] not in ("", etag)
    too_long = pb.ArchiveKernelRequest(name=kernel.name, etag="x" * 65)
    error = refusal(lambda: library.ArchiveKernel(too_long))
    assert [violation.field for violation in error.violations] == ["etag"]
    assert library.GetKernel(pb.GetKernelRequest(name=kernel.name)).kernel == kernel


@pytest.mark.parametrize("request_id", ["x" * 65, "a b", "\n", "\N{BULLET}"])
def test_bad_request_ids_are_refused_everywhere(
    library: library_pb2_grpc.LibraryServiceStub, kernel: pb.KernelRecord, request_id: str
) -> None:
    requests: dict[str, object] = {
        "CreateBlueprint": pb.CreateBlueprintRequest(blueprint=blueprints.get("glu")),
        "UpdateBlueprintState": pb.UpdateBlueprintStateRequest(
            name=kernel.parents[0], state=pb.BLUEPRINT_STATE_FAILED
        ),
        "ArchiveBlueprint": pb.ArchiveBlueprintRequest(name=kernel.parents[0]),
        "CreateKernel": pb.CreateKernelRequest(kernel=kernel.kernel),
        "UpdateKernelState": pb.UpdateKernelStateRequest(
            name=kernel.name, state=pb.KERNEL_STATE_INVALID
        ),
        "ArchiveKernel": pb.ArchiveKernelRequest(name=kernel.name),
        "RecordMeasurement": pb.RecordMeasurementRequest(
            name=kernel.name,
            measurement=kernel_pb2.Measurement(machine="m", num_tokens=1, forward_us=1.0),
        ),
        "RecordFieldReport": pb.RecordFieldReportRequest(
            report=pb.FieldReport(kernel=kernel.name, run="r", verdict=pb.FIELD_VERDICT_CULLED)
        ),
    }
    service = pb.DESCRIPTOR.services_by_name["LibraryService"]
    assert set(requests) == {
        method.name
        for method in service.methods
        if "request_id" in method.input_type.fields_by_name
    }
    for method, request in requests.items():
        request.request_id = request_id  # type: ignore[attr-defined]
        error = refusal(lambda m=method, r=request: getattr(library, m)(r))
        assert error.code is grpc.StatusCode.INVALID_ARGUMENT
        assert [violation.field for violation in error.violations] == ["request_id"]


@pytest.mark.parametrize(
    ("parents", "field"),
    [
        (["x"], "parents[0]"),
        ([f"blueprints/{HASH}", f"runs/{HASH}"], "parents[1]"),
        ([f"kernels/{HASH}0"], "parents[0]"),
        ([f"kernels/{HASH}"] * 17, "parents"),
    ],
)
def test_senseless_parents_are_refused(
    urza: UrzaClient, kernel: pb.KernelRecord, parents: list[str], field: str
) -> None:
    for call in (
        lambda: urza.create_blueprint(blueprints.get("bottleneck", rank=77), parents),
        lambda: urza.create_kernel(kernel.kernel, parents=parents),
    ):
        error = refusal(call)
        assert error.code is grpc.StatusCode.INVALID_ARGUMENT
        assert [violation.field for violation in error.violations] == [field]


def test_a_retry_has_no_second_effect(
    library: library_pb2_grpc.LibraryServiceStub, kernel: pb.KernelRecord, urza: UrzaClient
) -> None:
    report = pb.FieldReport(kernel=kernel.name, run="r", verdict=pb.FIELD_VERDICT_CULLED)
    request = pb.RecordFieldReportRequest(report=report, request_id=str(uuid.uuid4()))
    with ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(lambda _: library.RecordFieldReport(request), range(16)))
    assert all(answer == answers[0] for answer in answers)
    assert [found.name for found in urza.list_field_reports(kernel.name)] == [
        f"{kernel.name}/reports/0"
    ]
    changed = pb.RecordFieldReportRequest(report=report, request_id=request.request_id)
    changed.report.run = "another"
    error = refusal(lambda: library.RecordFieldReport(changed))
    assert error.violations[0].field == "request_id"
    move = pb.UpdateKernelStateRequest(
        name=kernel.name, state=pb.KERNEL_STATE_VALIDATED, validation=PASSED, request_id="move-1"
    )
    first = library.UpdateKernelState(move)
    urza.update_kernel_state(kernel.name, pb.KERNEL_STATE_DEPLOYED)
    assert library.UpdateKernelState(move) == first


def test_reports_are_kept_in_order(urza: UrzaClient, kernel: pb.KernelRecord) -> None:
    stored = [
        urza.record_field_report(
            pb.FieldReport(
                name="ignored",
                kernel=kernel.name,
                run=f"run-{number}",
                slot="fc1",
                seed=1,
                verdict=pb.FIELD_VERDICT_FOSSILIZED,
                gain=0.5,
                gain_low=0.25,
                gain_high=0.75,
                p_value=0.001,
                num_samples=900,
            )
        )
        for number in range(3)
    ]
    assert list(urza.list_field_reports(kernel.name)) == stored
    assert [report.name for report in stored] == [
        f"{kernel.name}/reports/{number}" for number in range(3)
    ]
    assert all(report.report_time.seconds > 0 for report in stored)


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"kernel": "x"}, "report.kernel"),
        ({"run": ""}, "report.run"),
        ({"verdict": 0}, "report.verdict"),
        ({"verdict": 42}, "report.verdict"),
        ({"seed": -1}, "report.seed"),
        ({"gain": float("inf")}, "report.gain"),
        ({"p_value": 1.5}, "report.p_value"),
        ({"num_samples": -2}, "report.num_samples"),
        ({"gain_low": 2.0, "gain_high": 1.0}, "report.gain_low"),
        ({"reason": "x" * 5000}, "report.reason"),
    ],
)
def test_senseless_reports_are_refused(
    urza: UrzaClient, kernel: pb.KernelRecord, fields: dict[str, object], field: str
) -> None:
    good: dict[str, object] = {
        "kernel": kernel.name,
        "run": "r",
        "verdict": pb.FIELD_VERDICT_CULLED,
    }
    report = pb.FieldReport(**{**good, **fields})
    error = refusal(lambda: urza.record_field_report(report))
    assert [violation.field for violation in error.violations] == [field]
    assert list(urza.list_field_reports(kernel.name)) == []
