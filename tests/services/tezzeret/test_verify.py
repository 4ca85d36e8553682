"""The verification passes what is right and catches what is wrong."""

from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st

from esper.blueprints.builder import GraphBuilder
from esper.blueprints.builder import Plain
from esper.blueprints.checker import Layout
from esper.blueprints.library import get
from esper.blueprints.library import names
from esper.blueprints.lowering import Lowered
from esper.blueprints.lowering import lower_with_mapping
from esper.common.v1 import blueprint_pb2
from esper.common.v1 import kernel_pb2
from esper.services.tezzeret.verify import verify

DTYPES = (
    kernel_pb2.DATA_TYPE_FLOAT32,
    kernel_pb2.DATA_TYPE_FLOAT64,
    kernel_pb2.DATA_TYPE_BFLOAT16,
    kernel_pb2.DATA_TYPE_FLOAT16,
)


def lowered(
    blueprint: blueprint_pb2.Blueprint,
    *,
    width: int = 12,
    source_width: int = 7,
    dtype: kernel_pb2.DataType = kernel_pb2.DATA_TYPE_FLOAT32,
    conv: bool = False,
) -> Lowered:
    source = blueprint.graph.inputs[0].source
    return lower_with_mapping(
        blueprint,
        kernel_pb2.KernelSignature(
            slot_kind=kernel_pb2.SLOT_KIND_CONV if conv else kernel_pb2.SLOT_KIND_LINEAR,
            chunk_width=width,
            source_width=width if source == blueprint_pb2.SEED_SOURCE_OUTPUT else source_width,
            source=source,
            dtype=dtype,
            device_class=kernel_pb2.DEVICE_CLASS_CPU,
        ),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", names())
def test_starting_blueprints_pass_in_every_type(name: str, dtype: kernel_pb2.DataType) -> None:
    for conv in (True,) if name in ("squeeze_excite", "depthwise") else (False, True):
        report = verify(lowered(get(name), dtype=dtype, conv=conv))
        assert report.passed, report.detail
        assert report.num_cases == 3
        assert 0.0 <= report.forward_error <= report.tolerance
        assert 0.0 <= report.gradient_error <= report.tolerance
        assert report.torch_version and report.esper_version
        if dtype == kernel_pb2.DATA_TYPE_FLOAT64:
            assert report.tolerance < 1e-11


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    name=st.sampled_from(["squeeze_excite", "depthwise"]),
    positions=st.integers(1, 2),
    size=st.integers(1, 20),
    width=st.integers(1, 20),
)
def test_spatial_families_equal_the_reference_for_any_shape(
    name: str, positions: int, size: int, width: int
) -> None:
    own = {"rank": size} if name == "squeeze_excite" else {"kernel": 2 * (size % 3) + 1}
    report = verify(lowered(get(name, positions=positions, **own), width=width, conv=True))
    assert report.passed, report.detail
    assert "compiled core" in report.detail


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    name=st.sampled_from(["lora", "bottleneck", "glu"]),
    source=st.sampled_from(["output", "input"]),
    rank=st.integers(1, 70),
    width=st.integers(1, 70),
    source_width=st.integers(1, 70),
    activation=st.sampled_from(["identity", "relu", "gelu", "silu", "tanh"]),
)
def test_native_families_equal_the_reference_for_any_shape(
    name: str, source: str, rank: int, width: int, source_width: int, activation: str
) -> None:
    chosen: dict[str, int | float | str] = {"rank": rank, "source": source}
    if name != "lora":
        chosen["activation"] = activation
    report = verify(lowered(get(name, **chosen), width=width, source_width=source_width))
    assert report.passed, report.detail


def _other_activation(kernel: kernel_pb2.Kernel) -> None:
    kernel.bottleneck.activation = kernel_pb2.ACTIVATION_SILU


@pytest.mark.parametrize(
    ("name", "corrupt"),
    [("bottleneck", _other_activation), ("glu", _other_activation)],
)
def test_a_kernel_that_is_not_its_blueprint_is_caught(
    name: str, corrupt: Callable[[kernel_pb2.Kernel], None]
) -> None:
    made = lowered(get(name) if name == "bottleneck" else get(name, activation="gelu"))
    assert verify(made).passed
    corrupt(made.kernel)
    report = verify(made)
    assert not report.passed
    assert "differs from the reference by" in report.detail
    assert report.forward_error > report.tolerance


def test_parameters_that_go_to_the_wrong_branch_are_caught() -> None:
    made = lowered(get("glu"))
    # A and G have equal shapes, so nothing but the comparison can tell them apart.
    swapped = {"A": "G", "G": "A", "B": "B"}
    names = {key: swapped[name] for key, name in made.computation.names.items()}
    wrong = replace(made, computation=replace(made.computation, names=names))
    report = verify(wrong)
    assert not report.passed
    assert report.forward_error > report.tolerance


def test_a_graph_kernel_that_is_not_its_blueprint_is_caught() -> None:
    made = lowered(get("norm_mlp"))
    made.kernel.graph.graph.nodes[2].op = blueprint_pb2.OP_SILU
    report = verify(made)
    assert not report.passed
    assert report.gradient_error > report.tolerance


def blueprint_of(graph: GraphBuilder, value: blueprint_pb2.ValueRef) -> blueprint_pb2.Blueprint:
    return blueprint_pb2.Blueprint(name="trial", graph=graph.returns(value))


@pytest.mark.parametrize(
    ("op", "attributes"), [("linear", {"out": "D"}), ("tanh", {}), ("scale", {"factor": 1e-3})]
)
def test_what_is_not_zero_at_birth_is_refused(op: str, attributes: dict[str, Plain]) -> None:
    graph = GraphBuilder()
    report = verify(lowered(blueprint_of(graph, graph.node(op, graph.input, **attributes))))
    assert not report.passed
    assert report.detail == "does not add exactly zero at birth"


def test_every_layout_is_compared_in_its_own_shapes() -> None:
    for layout in (Layout.SEQUENCE, Layout.PLANE_1D, Layout.PLANE_2D):
        graph = GraphBuilder(layout=layout)
        planes = layout is not Layout.SEQUENCE
        if planes:
            op = "conv1d" if layout is Layout.PLANE_1D else "conv2d"
            value = graph.node(op, graph.input, out="D", kernel=3, init="zeros")
        else:
            value = graph.node("attention", graph.input, heads=3, init="zeros")
        report = verify(lowered(blueprint_of(graph, value), conv=planes))
        assert report.passed, report.detail


@pytest.mark.parametrize("rank", [4121, 4282])
def test_a_rectifier_at_its_kink_is_no_fault(rank: int) -> None:
    # At these ranks a preactivation of the first draw rounds to the other side of 0 in float32.
    report = verify(lowered(get("widen", rank=rank), width=1, source_width=512))
    assert report.passed, report.detail


def test_non_finite_results_fail() -> None:
    graph = GraphBuilder()
    nothing = graph.node("sub", graph.input, graph.input)
    broken = graph.node("div", nothing, nothing)
    report = verify(lowered(blueprint_of(graph, graph.node("scale", broken, factor=0.0))))
    assert not report.passed
