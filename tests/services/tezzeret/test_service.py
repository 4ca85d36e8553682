"""Compilation over a socket, against a server with a real library."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from esper.blueprints.builder import GraphBuilder
from esper.blueprints.digest import blueprint_digest
from esper.blueprints.digest import kernel_digest
from esper.blueprints.library import get
from esper.blueprints.lowering import lower
from esper.common.rpc import RpcError
from esper.common.v1 import blueprint_pb2
from esper.common.v1 import kernel_pb2
from esper.plane import EmbeddedPlane
from esper.plane.channel import make_channel
from esper.plane.launch import server_command
from esper.plane.launch import server_environment
from esper.tezzeret.client import CompileError
from esper.tezzeret.client import TezzeretClient
from esper.tezzeret.v1 import forge_pb2
from esper.tezzeret.v1 import forge_pb2_grpc
from esper.urza.client import UrzaClient
from esper.urza.v1 import library_pb2

CHECKED, LOWERED, VERIFIED, STORED, FAILED = (
    forge_pb2.COMPILE_STAGE_CHECKED,
    forge_pb2.COMPILE_STAGE_LOWERED,
    forge_pb2.COMPILE_STAGE_VERIFIED,
    forge_pb2.COMPILE_STAGE_STORED,
    forge_pb2.COMPILE_STAGE_FAILED,
)


def place(width: int) -> kernel_pb2.KernelSignature:
    """Returns a place; each test takes a width of its own, as they share one library."""
    return kernel_pb2.KernelSignature(
        slot_kind=kernel_pb2.SLOT_KIND_LINEAR,
        chunk_width=width,
        source_width=width,
        source=blueprint_pb2.SEED_SOURCE_OUTPUT,
        dtype=kernel_pb2.DATA_TYPE_FLOAT32,
        device_class=kernel_pb2.DEVICE_CLASS_CPU,
    )


def loud(width: int) -> blueprint_pb2.Blueprint:
    """Returns a sound blueprint that is not zero at birth."""
    graph = GraphBuilder(width=width)
    return blueprint_pb2.Blueprint(
        name="loud", graph=graph.returns(graph.node("linear", graph.input, out=width))
    )


@pytest.fixture(scope="module")
def channel() -> Iterator[grpc.Channel]:
    with EmbeddedPlane(services=("urza", "tezzeret")) as plane:
        channel = make_channel(plane.address)
        yield channel
        channel.close()


@pytest.fixture
def tezzeret(channel: grpc.Channel) -> TezzeretClient:
    return TezzeretClient(channel)


@pytest.fixture
def urza(channel: grpc.Channel) -> UrzaClient:
    return UrzaClient(channel)


def test_compiles_proves_and_stores(tezzeret: TezzeretClient, urza: UrzaClient) -> None:
    blueprint = get("bottleneck", rank=3)
    events = list(tezzeret.compile_events(blueprint, place(9), ["demo", "small"]))
    assert [event.stage for event in events] == [CHECKED, LOWERED, VERIFIED, STORED]
    assert all(event.detail for event in events)
    times = [event.elapsed_ms for event in events]
    assert times == sorted(times) and times[0] > 0
    record = events[-1].kernel
    expected = lower(blueprint, place(9))
    assert record.kernel == expected
    assert record.name == f"kernels/{kernel_digest(expected)}"
    assert record.state == library_pb2.KERNEL_STATE_VALIDATED
    assert list(record.tags) == ["demo", "small"]
    assert record.validation.passed and record.validation == events[2].validation
    assert urza.get_kernel(record.name) == record
    parent = urza.get_blueprint(f"blueprints/{blueprint_digest(blueprint)}")
    assert parent.state == library_pb2.BLUEPRINT_STATE_CHARACTERIZED


def test_a_proved_kernel_comes_back_without_a_second_proof(
    tezzeret: TezzeretClient, urza: UrzaClient
) -> None:
    first = tezzeret.compile(get("glu"), place(10))
    renamed = get("glu")
    renamed.name = "my_glu"
    events = list(tezzeret.compile_events(renamed, place(10)))
    assert [event.stage for event in events] == [CHECKED, LOWERED, STORED]
    assert events[-1].kernel == first
    assert events[-1].validation == first.validation
    deployed = urza.update_kernel_state(first.name, library_pb2.KERNEL_STATE_DEPLOYED)
    assert tezzeret.compile(get("glu"), place(10)) == deployed


def test_a_stored_blueprint_compiles_by_name(tezzeret: TezzeretClient, urza: UrzaClient) -> None:
    stored = urza.create_blueprint(get("norm_mlp", rank=2))
    record = tezzeret.compile(stored.name, place(11))
    assert record.kernel.WhichOneof("lowering") == "graph"
    assert f"blueprints/{record.kernel.blueprint_digest}" == stored.name


def test_a_kernel_that_fails_its_proof_is_kept_as_invalid(
    tezzeret: TezzeretClient, urza: UrzaClient
) -> None:
    blueprint = loud(12)
    for _ in range(2):  # the verdict is as lasting as a good one
        events = list(tezzeret.compile_events(blueprint, place(12)))
        assert events[-1].stage == FAILED
        assert VERIFIED not in [event.stage for event in events]
        assert events[-1].validation.detail == "does not add exactly zero at birth"
    name = f"kernels/{kernel_digest(lower(blueprint, place(12)))}"
    assert urza.get_kernel(name).state == library_pb2.KERNEL_STATE_INVALID
    parent = urza.get_blueprint(f"blueprints/{blueprint_digest(blueprint)}")
    assert parent.state == library_pb2.BLUEPRINT_STATE_FAILED
    with pytest.raises(CompileError, match="does not add exactly zero at birth") as caught:
        tezzeret.compile(blueprint, place(12))
    assert caught.value.validation is not None and not caught.value.validation.passed


def test_a_blueprint_that_cannot_be_compiled_leaves_nothing_behind(
    tezzeret: TezzeretClient, urza: UrzaClient, channel: grpc.Channel
) -> None:
    blueprint = get("widen", rank=13)
    with pytest.raises(CompileError, match="signature.source: .*must be what the graph reads"):
        tezzeret.compile(blueprint, place(13))
    with pytest.raises(RpcError, match="NOT_FOUND"):
        urza.get_blueprint(f"blueprints/{blueprint_digest(blueprint)}")
    blueprint.graph.nodes[1].inputs[0].node = blueprint.graph.nodes[1].id
    with pytest.raises(CompileError, match="inline.graph.nodes: 'relu_1 -> relu_1' must not form"):
        tezzeret.compile(blueprint, place(13))


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (forge_pb2.CompileRequest(signature=place(8)), "blueprint"),
        (forge_pb2.CompileRequest(inline=get("lora")), "signature"),
        (
            forge_pb2.CompileRequest(inline=get("lora"), signature=place(8), tags=["t" * 65]),
            "tags[0]",
        ),
        (forge_pb2.CompileRequest(name="lora", signature=place(8)), "name"),
    ],
)
def test_bad_requests_name_the_field(
    channel: grpc.Channel, request_: forge_pb2.CompileRequest, field: str
) -> None:
    stub = forge_pb2_grpc.ForgeServiceStub(channel)
    with pytest.raises(grpc.RpcError) as caught:
        list(stub.Compile(request_, timeout=30))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT  # type: ignore[attr-defined]
    assert field in caught.value.details()  # type: ignore[attr-defined]


def test_unknown_and_archived_resources_are_refused(
    tezzeret: TezzeretClient, urza: UrzaClient
) -> None:
    with pytest.raises(RpcError, match="NOT_FOUND"):
        tezzeret.compile(f"blueprints/{'0' * 64}", place(14))
    stored = urza.create_blueprint(get("lora", rank=14))
    urza.update_blueprint_state(stored.name, library_pb2.BLUEPRINT_STATE_ARCHIVED)
    with pytest.raises(RpcError, match="FAILED_PRECONDITION: .* is archived"):
        tezzeret.compile(stored.name, place(14))
    record = tezzeret.compile(get("affine"), place(14))
    urza.update_kernel_state(record.name, library_pb2.KERNEL_STATE_DEPRECATED)
    with pytest.raises(RpcError, match="FAILED_PRECONDITION: .* is archived"):
        tezzeret.compile(get("affine"), place(14))


def test_a_cuda_kernel_needs_a_cuda_machine(tezzeret: TezzeretClient) -> None:
    signature = place(15)
    signature.device_class = kernel_pb2.DEVICE_CLASS_CUDA
    with pytest.raises(RpcError, match="FAILED_PRECONDITION: a CUDA kernel can be proved"):
        tezzeret.compile(get("lora"), signature)


def test_many_callers_get_one_kernel(channel: grpc.Channel) -> None:
    stub = forge_pb2_grpc.ForgeServiceStub(channel)
    request = forge_pb2.CompileRequest(inline=get("lora", rank=5), signature=place(16))
    calls = [stub.Compile(request, timeout=60) for _ in range(8)]
    stages = [[response.event.stage for response in call] for call in calls]
    assert sorted(stages, key=len, reverse=True)[0] == [CHECKED, LOWERED, VERIFIED, STORED]
    assert sum(VERIFIED in one for one in stages) == 1
    assert all(one[-1] == STORED for one in stages)


def test_a_failed_blueprint_may_still_fit_elsewhere(
    tezzeret: TezzeretClient, urza: UrzaClient
) -> None:
    blueprint = get("lora", rank=17)
    stored = urza.create_blueprint(blueprint)
    urza.update_blueprint_state(stored.name, library_pb2.BLUEPRINT_STATE_FAILED)
    tezzeret.compile(blueprint, place(17))
    state = urza.get_blueprint(stored.name).state
    assert state == library_pb2.BLUEPRINT_STATE_CHARACTERIZED


def test_pipelines(tezzeret: TezzeretClient) -> None:
    pipelines = tezzeret.list_pipelines()
    assert [way.name for way in pipelines] == [
        "noop",
        "affine",
        "bottleneck",
        "squeeze_excite",
        "depthwise",
        "graph",
    ]
    assert [way.native for way in pipelines] == [True] * 5 + [False]


def test_what_is_not_served_says_so(channel: grpc.Channel) -> None:
    stub = forge_pb2_grpc.ForgeServiceStub(channel)
    calls = (
        lambda: stub.Characterize(forge_pb2.CharacterizeRequest(), timeout=10),
        lambda: stub.CompileBatch(iter([forge_pb2.CompileBatchRequest()]), timeout=10),
    )
    for call in calls:
        with pytest.raises(grpc.RpcError) as caught:
            list(call())
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED  # type: ignore[attr-defined]


def test_a_library_out_of_reach_is_named(tmp_path: Path) -> None:
    with EmbeddedPlane(services=("urza",)) as library:
        gone = library.address
    address = f"unix:{tmp_path}/forge.sock"
    command = server_command(("tezzeret",), address, tmp_path / "data", urza=gone)
    server = subprocess.Popen(command, stdout=subprocess.PIPE, env=server_environment())
    try:
        assert server.stdout is not None and b"ready" in server.stdout.readline()
        with make_channel(address) as channel:
            forge = TezzeretClient(channel)
            assert forge.list_pipelines()
            with pytest.raises(RpcError, match="UNAVAILABLE: the library is out of reach"):
                forge.compile(get("lora"), place(18))
    finally:
        server.terminate()
        assert server.wait(timeout=20) == 0
        assert server.stdout is not None
        server.stdout.close()
