"""What a call costs as the store grows: each size has a server of its own, all called in turn.

Sizes are 10^3, 10^4 and 10^5 kernels and as many events; `--store-rows 1000000` goes on to 10^6.
Filling takes minutes for each 10^5 rows: with `--store-folder FOLDER` the stores are made there and
found there the next time. A kernel is one record and 24 rows of its index.
"""

import itertools
import random
import tempfile
from collections.abc import Callable
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.urza.conftest import START_TIMEOUT_S
from benchmarks.urza.conftest import Beside
from benchmarks.urza.conftest import start
from benchmarks.urza.conftest import stop
from benchmarks.urza.filling import TOPIC
from benchmarks.urza.filling import fill
from benchmarks.urza.filling import name_of
from benchmarks.urza.filling import tag_of
from benchmarks.urza.load import one_by_one
from esper import blueprints
from esper.common.v1 import blueprint_pb2
from esper.common.v1 import kernel_pb2
from esper.oona.v1 import event_pb2
from esper.oona.v1 import event_pb2_grpc
from esper.plane import Plane
from esper.plane import connect
from esper.plane.launch import server_command
from esper.plane.launch import server_environment
from esper.urza.v1 import library_pb2
from esper.urza.v1 import library_pb2_grpc

PAGE = 20
CHANGES = 100
CALLS = 20
ROUNDS = 15

Call = Callable[[], object]
Operation = Callable[[Plane, int], Call]

_widths = itertools.count(10_000)


@pytest.fixture(scope="session")
def planes(request: pytest.FixtureRequest) -> Iterator[dict[int, Plane]]:
    """A running plane for each size."""
    most = request.config.getoption("--store-rows")
    kept = request.config.getoption("--store-folder")
    sizes = sorted({size for size in (10**3, 10**4, 10**5, 10**6) if size < most} | {most})
    servers = []
    planes: dict[int, Plane] = {}
    with tempfile.TemporaryDirectory(prefix="eb-") as scratch:
        folder = Path(kept or scratch)
        try:
            for size in sizes:
                fill(folder / str(size), size)
                listen = f"unix:{scratch}/{size}.sock"
                command = server_command(("urza", "oona"), listen, folder / str(size))
                server, line = start(command, server_environment())
                servers.append(server)
                planes[size] = connect(line.split(" on ")[1], START_TIMEOUT_S)
                planes[size].urza.create_blueprint(blueprints.get("bottleneck"))
            yield planes
        finally:
            for plane in planes.values():
                plane.close()
            for server in servers:
                stop(server)


def get(plane: Plane, size: int) -> Call:
    chosen = random.Random(0)
    return lambda: plane.urza.get_kernel(name_of(chosen.randrange(size)))


def page(plane: Plane, request: library_pb2.ListKernelsRequest) -> Call:
    stub = library_pb2_grpc.LibraryServiceStub(plane.channel("urza"))

    def call() -> None:
        assert len(stub.ListKernels(request, timeout=60).kernels) == request.page_size

    return call


def filtered_page(plane: Plane, size: int) -> Call:
    wanted = library_pb2.KernelFilter(tags=[tag_of(1)])
    return page(plane, library_pb2.ListKernelsRequest(page_size=10, filter=wanted))


def ordered_page(plane: Plane, size: int) -> Call:
    wanted = library_pb2.KernelFilter(chunk_width=64, state=library_pb2.KERNEL_STATE_VALIDATED)
    order = library_pb2.KERNEL_ORDER_PARAMETER_COUNT
    request = library_pb2.ListKernelsRequest(page_size=PAGE, filter=wanted, order=order)
    return page(plane, request)


def create(plane: Plane, size: int) -> Call:
    fresh = [
        blueprints.lower(
            blueprints.get("bottleneck"),
            kernel_pb2.KernelSignature(
                slot_kind=kernel_pb2.SLOT_KIND_LINEAR,
                chunk_width=width,
                source_width=width,
                source=blueprint_pb2.SEED_SOURCE_OUTPUT,
                dtype=kernel_pb2.DATA_TYPE_FLOAT32,
                device_class=kernel_pb2.DEVICE_CLASS_CPU,
            ),
        )
        for width in itertools.islice(_widths, CALLS * (ROUNDS + 1))
    ]
    return lambda: plane.urza.create_kernel(fresh.pop(), tags=["created"])


def publish(plane: Plane, size: int) -> Call:
    stub = event_pb2_grpc.EventServiceStub(plane.channel("oona"))
    request = event_pb2.PublishRequest(topic=TOPIC)
    request.body.type_url = "type.googleapis.com/bytes"
    request.body.value = bytes(64)
    return lambda: list(stub.Publish(iter([request]), timeout=60))


def watch(plane: Plane, size: int) -> Call:
    stub = library_pb2_grpc.LibraryServiceStub(plane.channel("urza"))
    now = next(iter(stub.Watch(library_pb2.WatchRequest(), timeout=60))).revision
    request = library_pb2.WatchRequest(start_revision=now - CHANGES + 1)

    def call() -> None:
        changes = stub.Watch(request, timeout=60)
        for change in changes:
            if change.revision == now and change.WhichOneof("change") is not None:
                break
        changes.cancel()

    return call


@pytest.mark.parametrize(
    "operation",
    [get, filtered_page, ordered_page, create, publish, watch],
    ids=lambda op: op.__name__,
)
def test_cost_as_the_store_grows(
    beside: Beside, planes: dict[int, Plane], operation: Operation
) -> None:
    calls = {size: operation(plane, size) for size, plane in planes.items()}
    largest = max(planes)

    def load(size: int) -> Callable[[], object]:
        return lambda: one_by_one(calls[size], CALLS)

    beside(
        f"{operation.__name__}, {largest} rows",
        load(largest),
        {f"{size} rows": load(size) for size in sorted(planes) if size != largest},
        rounds=ROUNDS,
    )
