"""The library, over a real socket and with restarts, against a model of dictionaries and lists."""

import itertools
import shutil
import tempfile
import uuid
from collections.abc import Callable
from pathlib import Path

import grpc
from hypothesis import HealthCheck
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine
from hypothesis.stateful import initialize
from hypothesis.stateful import invariant
from hypothesis.stateful import precondition
from hypothesis.stateful import rule
from hypothesis.stateful import run_state_machine_as_test
from urza_samples import PASSED
from urza_samples import new_kernel
from urza_samples import refusal

from esper import blueprints
from esper.common.v1 import blueprint_pb2
from esper.common.v1 import kernel_pb2
from esper.plane import Plane
from esper.plane import connect
from esper.services.urza.states import KERNEL_MOVES
from esper.urza.v1 import library_pb2 as pb
from esper.urza.v1 import library_pb2_grpc

MAX_RESTARTS = 2  # of one history: they take longest
INDEX = st.integers(0, 1000)
TAGS = st.lists(st.sampled_from("ab"), unique=True)
WIDTHS = st.sampled_from([8, 16, 24])
FIELDS = {
    "slot_kind": st.sampled_from(kernel_pb2.SlotKind.values()[:3]),
    "dtype": st.sampled_from(kernel_pb2.DataType.values()[:3]),
    "device_class": st.just(kernel_pb2.DEVICE_CLASS_CPU),
    "source": st.sampled_from(blueprint_pb2.SeedSource.values()),
    "chunk_width": WIDTHS,
    "source_width": WIDTHS,
    "state": st.sampled_from(pb.KernelState.values()),
    "tags": TAGS,
    "max_parameter_count": st.integers(0, 300),
    "max_forward_us": st.sampled_from([0.0, 0.7, 1.0, 2.5, 4.0, 1e9]),
}
FILTERS = st.lists(st.sampled_from(sorted(FIELDS)), max_size=2, unique=True).flatmap(
    lambda names: st.fixed_dictionaries({name: FIELDS[name] for name in names})
)
QUESTIONS = st.lists(
    st.tuples(FILTERS, st.sampled_from(pb.KernelOrder.values()), st.integers(1, 9)),
    min_size=6,
    max_size=6,
)


def figure(record: pb.KernelRecord, order: int) -> float | None:
    """What the kernels are ordered by, smallest first; None leaves a kernel out."""
    if order == pb.KERNEL_ORDER_PARAMETER_COUNT:
        return record.kernel.parameter_count
    if order == pb.KERNEL_ORDER_FLOPS_PER_TOKEN:
        return record.kernel.flops_per_token
    if order == pb.KERNEL_ORDER_FORWARD_US:
        return forward_us(record)
    if order == pb.KERNEL_ORDER_MEAN_GAIN:
        return -record.mean_gain if record.HasField("mean_gain") else None
    return 0


def forward_us(record: pb.KernelRecord) -> float | None:
    times = [m.forward_us for m in record.measurements if m.HasField("forward_us")]
    return times[-1] if times else None


def fits(record: pb.KernelRecord, wanted: dict[str, object]) -> bool:
    """Whether a kernel passes a filter, field by field as the contract says."""
    place = record.kernel.signature
    time_us = forward_us(record)
    for name, value in wanted.items():
        if name == "state":
            good = value in (0, record.state)
        elif name == "tags":
            good = set(value) <= set(record.tags)  # type: ignore[call-overload]
        elif name == "max_parameter_count":
            good = record.kernel.parameter_count <= value  # type: ignore[operator]
        elif name == "max_forward_us":
            good = time_us is not None and time_us <= value  # type: ignore[operator]
        elif name in ("chunk_width", "source_width"):
            good = getattr(place, name) == value
        else:
            good = value in (0, getattr(place, name))
        if not good:
            return False
    return True


class LibraryMachine(RuleBasedStateMachine):
    serve: Callable[..., object]

    @initialize()
    def begin(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="et-", dir="/tmp"))
        self.blueprints: dict[str, pb.BlueprintRecord] = {}
        self.kernels: dict[str, pb.KernelRecord] = {}
        self.former: list[str] = []  # etags that are no longer any record's
        self.reports: dict[str, list[pb.FieldReport]] = {}
        self.history: list[pb.WatchResponse] = []
        self.restarts = 0
        self.sent: list[tuple[str, object, object]] = []
        self.start()
        self.make_blueprint(1, [])

    def start(self) -> None:
        self.server = type(self).serve(self.folder, ("urza",))
        self.plane: Plane = connect(self.server.address, timeout_s=30)
        self.urza = self.plane.urza
        self.stub = library_pb2_grpc.LibraryServiceStub(self.plane.channel("urza"))

    def stop(self) -> None:
        self.plane.close()
        self.server.stop()

    def teardown(self) -> None:
        if hasattr(self, "plane"):
            self.stop()
            shutil.rmtree(self.folder)

    def ask(self, method: str, request: object) -> object:
        """Makes a call that may be repeated later."""
        answer = getattr(self.stub, method)(request, timeout=30)
        self.sent.append((method, request, answer))
        return answer

    def pick(self, records: dict[str, object], index: int) -> str:
        return list(records)[index % len(records)]

    def note(self, record: pb.KernelRecord) -> None:
        """Takes a kernel's change into the model."""
        before = self.kernels.get(record.name)
        if before is not None:
            self.former.append(before.etag)
        self.kernels[record.name] = record
        self.history.append(pb.WatchResponse(revision=record.revision, kernel=record))

    @rule(rank=st.integers(1, 6), parents=st.lists(INDEX, max_size=3))
    def make_blueprint(self, rank: int, parents: list[int]) -> None:
        names = [self.pick(self.blueprints, index) for index in parents if self.blueprints]
        request = pb.CreateBlueprintRequest(
            blueprint=blueprints.get("bottleneck", rank=rank),
            parents=names,
            request_id=str(uuid.uuid4()),
        )
        record = self.ask("CreateBlueprint", request).blueprint
        if record.name in self.blueprints:
            assert record == self.blueprints[record.name]
            return
        assert list(record.parents) == list(dict.fromkeys(names))
        self.blueprints[record.name] = record
        self.history.append(pb.WatchResponse(revision=record.revision, blueprint=record))

    @rule(index=INDEX, width=WIDTHS, tags=TAGS)
    def make_kernel(self, index: int, width: int, tags: list[str]) -> None:
        blueprint = self.blueprints[self.pick(self.blueprints, index)]
        kernel = blueprints.lower(blueprint.blueprint, new_kernel(width=width).signature)
        request = pb.CreateKernelRequest(kernel=kernel, tags=tags, request_id=str(uuid.uuid4()))
        record = self.ask("CreateKernel", request).kernel
        if record.name in self.kernels:
            assert record == self.kernels[record.name]
            return
        assert (list(record.parents), list(record.tags)) == ([blueprint.name], tags)
        self.reports[record.name] = []
        self.note(record)

    @precondition(lambda self: self.kernels)
    @rule(index=INDEX, state=st.sampled_from(pb.KernelState.values()[1:]), etag=INDEX)
    def move(self, index: int, state: int, etag: int) -> None:
        record = self.kernels[self.pick(self.kernels, index)]
        etags = ["", record.etag, *self.former[-1:]]
        request = pb.UpdateKernelStateRequest(
            name=record.name,
            state=state,
            validation=PASSED,
            etag=etags[etag % len(etags)],
            request_id=str(uuid.uuid4()),
        )
        if request.etag not in ("", record.etag):
            error = refusal(lambda: self.stub.UpdateKernelState(request))
            assert (error.code, error.reason) == (grpc.StatusCode.ABORTED, "ETAG_MISMATCH")
        elif state == record.state:
            assert self.ask("UpdateKernelState", request).kernel == record
        elif state not in KERNEL_MOVES[record.state]:
            error = refusal(lambda: self.stub.UpdateKernelState(request))
            assert error.code is grpc.StatusCode.FAILED_PRECONDITION
        else:
            changed = self.ask("UpdateKernelState", request).kernel
            assert (changed.state, changed.validation) == (state, PASSED)
            self.note(changed)

    @precondition(lambda self: self.kernels)
    @rule(index=INDEX, time_us=st.none() | st.sampled_from([0.5, 1.0, 2.0, 3.75]))
    def measure(self, index: int, time_us: float | None) -> None:
        record = self.kernels[self.pick(self.kernels, index)]
        timing = kernel_pb2.Measurement(
            machine="m", num_tokens=1, forward_us=time_us, backward_us=1.0
        )
        request = pb.RecordMeasurementRequest(
            name=record.name, measurement=timing, etag=record.etag, request_id=str(uuid.uuid4())
        )
        changed = self.ask("RecordMeasurement", request).kernel
        assert len(changed.measurements) == len(record.measurements) + 1
        self.note(changed)

    @precondition(lambda self: self.kernels)
    @rule(index=INDEX, gain=st.none() | st.sampled_from([-1.0, 0.0, 0.25, 3.0]))
    def report(self, index: int, gain: float | None) -> None:
        name = self.pick(self.kernels, index)
        said = pb.FieldReport(kernel=name, run="r", verdict=pb.FIELD_VERDICT_CULLED, gain=gain)
        request = pb.RecordFieldReportRequest(report=said, request_id=str(uuid.uuid4()))
        stored = self.ask("RecordFieldReport", request).report
        assert stored.name == f"{name}/reports/{len(self.reports[name])}"
        self.reports[name].append(stored)
        if gain is not None:
            gains = [report.gain for report in self.reports[name] if report.HasField("gain")]
            record = self.urza.get_kernel(name)
            assert record.num_gains == len(gains)
            assert abs(record.mean_gain - sum(gains) / len(gains)) < 1e-9
            self.note(record)
        revision = self.history[-1].revision + 1 if self.history else 1
        self.history.append(pb.WatchResponse(revision=revision, report=stored))

    @precondition(lambda self: self.sent)
    @rule(index=INDEX)
    def repeat(self, index: int) -> None:
        """A request that comes again is answered as it was, and does nothing."""
        method, request, answer = self.sent[index % len(self.sent)]
        assert getattr(self.stub, method)(request, timeout=30) == answer

    @rule(questions=QUESTIONS)
    def list_kernels(self, questions: list[tuple[dict[str, object], int, int]]) -> None:
        for wanted, order, size in questions:
            self.list_in_pages(wanted, order, size)
        for state in pb.KernelState.values():
            self.list_in_pages({"state": state}, pb.KERNEL_ORDER_NAME, 500)

    def list_in_pages(self, wanted: dict[str, object], order: int, size: int) -> None:
        request = pb.ListKernelsRequest(
            page_size=size, filter=pb.KernelFilter(**wanted), order=order
        )
        found: list[pb.KernelRecord] = []
        while True:
            page = self.stub.ListKernels(request, timeout=30)
            assert len(page.kernels) <= size
            found += page.kernels
            if not page.next_page_token:
                break
            request.page_token = page.next_page_token
        expected = [
            record
            for record in self.kernels.values()
            if fits(record, wanted) and figure(record, order) is not None
        ]
        expected.sort(key=lambda record: (figure(record, order), record.name))
        assert found == expected

    @rule(width=WIDTHS, index=INDEX, order=st.sampled_from(pb.KernelOrder.values()[:4]))
    def list_while_others_write(self, width: int, index: int, order: int) -> None:
        there = set(self.kernels)
        request = pb.ListKernelsRequest(page_size=2, order=order)
        found: list[str] = []
        for turn in itertools.count():
            page = self.stub.ListKernels(request, timeout=30)
            found += [record.name for record in page.kernels]
            if not page.next_page_token:
                break
            request.page_token = page.next_page_token
            self.make_kernel(index + turn, width, [])
        assert len(set(found)) == len(found)
        assert there <= set(found) <= set(self.kernels)

    @rule(state=st.sampled_from(pb.BlueprintState.values()[:3]))
    def list_blueprints(self, state: int) -> None:
        expected = sorted(
            name for name, record in self.blueprints.items() if state in (0, record.state)
        )
        assert [record.name for record in self.urza.list_blueprints(state)] == expected

    @rule(index=INDEX, depth=st.integers(1, 4))
    def lineage(self, index: int, depth: int) -> None:
        records = {**self.blueprints, **self.kernels}
        edges = {(parent, name) for name, record in records.items() for parent in record.parents}
        name = self.pick(records, index)
        found = self.urza.lineage(name, depth)
        for near, far, told in ((1, 0, found.ancestors), (0, 1, found.descendants)):
            expected: dict[tuple[str, str], int] = {}
            generation = {name}
            for number in range(1, depth + 1):
                here = [edge for edge in edges if edge[near] in generation]
                generation = {edge[far] for edge in here}
                for edge in here:
                    expected.setdefault(edge, number)
            assert {(e.parent, e.child): e.generation for e in told} == expected
            assert len(told) == len(expected)

    @rule(start=INDEX)
    def watch(self, start: int) -> None:
        first = start % (len(self.history) + 1)
        with self.urza.watch(first + 1) as watch:
            assert next(watch).revision == first
            assert list(itertools.islice(watch, len(self.history) - first)) == self.history[first:]

    @precondition(lambda self: self.restarts < MAX_RESTARTS)
    @rule()
    def restart(self) -> None:
        self.restarts += 1
        self.stop()
        self.start()

    @invariant()
    def everything_is_there(self) -> None:
        if not hasattr(self, "urza"):
            return
        for name, record in list(self.kernels.items())[-2:]:
            assert self.urza.get_kernel(name) == record
            assert list(self.urza.list_field_reports(name)) == self.reports[name]


def test_the_library_is_what_a_simple_model_is(serve_in_thread: Callable[..., object]) -> None:
    class Machine(LibraryMachine):
        serve = staticmethod(serve_in_thread)

    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=16,
            stateful_step_count=30,
            deadline=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        ),
    )
