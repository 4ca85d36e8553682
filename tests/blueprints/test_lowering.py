"""Which graph becomes which kernel, and which places are refused."""

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper.blueprints.builder import GraphBuilder
from esper.blueprints.builder import Plain
from esper.blueprints.checker import Layout
from esper.blueprints.digest import blueprint_digest
from esper.blueprints.errors import BlueprintError
from esper.blueprints.kernels import check_kernel
from esper.blueprints.library import get
from esper.blueprints.lowering import PIPELINES
from esper.blueprints.lowering import lower
from esper.common.v1 import blueprint_pb2
from esper.common.v1 import kernel_pb2

OUTPUT = blueprint_pb2.SEED_SOURCE_OUTPUT
INPUT = blueprint_pb2.SEED_SOURCE_INPUT


def place(
    width: int = 8,
    source_width: int = 8,
    source: blueprint_pb2.SeedSource = OUTPUT,
    kind: kernel_pb2.SlotKind = kernel_pb2.SLOT_KIND_LINEAR,
) -> kernel_pb2.KernelSignature:
    return kernel_pb2.KernelSignature(
        slot_kind=kind,
        chunk_width=width,
        source_width=source_width,
        source=source,
        dtype=kernel_pb2.DATA_TYPE_FLOAT32,
        device_class=kernel_pb2.DEVICE_CLASS_CPU,
    )


def lowering_of(kernel: kernel_pb2.Kernel) -> object:
    field = kernel.WhichOneof("lowering")
    return getattr(kernel, str(field))


@pytest.mark.parametrize(
    ("name", "hyperparameters", "expected", "parameters"),
    [
        ("noop", {}, kernel_pb2.NoopLowering(), []),
        ("affine", {}, kernel_pb2.AffineLowering(bias=True), ["w", "b"]),
        (
            "lora",
            {"rank": 4},
            kernel_pb2.BottleneckLowering(activation=kernel_pb2.ACTIVATION_IDENTITY, rank=4),
            ["A", "B"],
        ),
        (
            "bottleneck",
            {"rank": 4, "activation": "tanh"},
            kernel_pb2.BottleneckLowering(
                activation=kernel_pb2.ACTIVATION_TANH, rank=4, bias_in=True, bias_out=True
            ),
            ["A", "a", "B", "b"],
        ),
        (
            "bottleneck",
            {"rank": 4, "activation": "identity"},
            kernel_pb2.BottleneckLowering(
                activation=kernel_pb2.ACTIVATION_IDENTITY, rank=4, bias_in=True, bias_out=True
            ),
            ["A", "a", "B", "b"],
        ),
        (
            "glu",
            {"rank": 4},
            kernel_pb2.BottleneckLowering(
                activation=kernel_pb2.ACTIVATION_SILU, rank=4, gated=True
            ),
            ["A", "G", "B"],
        ),
        (
            "squeeze_excite",
            {"rank": 4, "activation": "silu"},
            kernel_pb2.SqueezeExciteLowering(
                activation=kernel_pb2.ACTIVATION_SILU,
                rank=4,
                bias_in=True,
                bias_out=True,
                position_axes=2,
            ),
            ["A", "a", "B", "b"],
        ),
        (
            "squeeze_excite",
            {"activation": "identity", "positions": 1},
            kernel_pb2.SqueezeExciteLowering(
                activation=kernel_pb2.ACTIVATION_IDENTITY,
                rank=8,
                bias_in=True,
                bias_out=True,
                position_axes=1,
            ),
            ["A", "a", "B", "b"],
        ),
        (
            "depthwise",
            {"kernel": 5, "positions": 1},
            kernel_pb2.DepthwiseLowering(
                activation=kernel_pb2.ACTIVATION_RELU,
                window=5,
                bias_in=True,
                bias_out=True,
                position_axes=1,
            ),
            ["A", "a", "B", "b"],
        ),
    ],
)
def test_starting_blueprints_run_natively(
    name: str,
    hyperparameters: dict[str, int | float | str],
    expected: object,
    parameters: list[str],
) -> None:
    blueprint = get(name, **hyperparameters)
    planes = name in ("squeeze_excite", "depthwise")
    kind = kernel_pb2.SLOT_KIND_CONV if planes else kernel_pb2.SLOT_KIND_LINEAR
    kernel = lower(blueprint, place(kind=kind))
    assert lowering_of(kernel) == expected
    assert [spec.name for spec in kernel.parameters] == parameters
    assert kernel.blueprint_digest == blueprint_digest(blueprint)
    assert kernel.blueprint_name == name
    assert kernel.signature == place(kind=kind)
    check_kernel(kernel)


def test_gated_biases_go_to_their_branches() -> None:
    graph = GraphBuilder(INPUT)
    value = graph.node("linear", graph.input, out=3, bias=True, gain=2.0)
    bent = graph.node("linear", graph.input, out=3, bias=False)
    joined = graph.node("gate", value, bent, activation="relu")
    out = graph.node("linear", joined, out="D")
    blueprint = blueprint_pb2.Blueprint(name="gated", graph=graph.returns(out))
    kernel = lower(blueprint, place(8, 5, INPUT))
    assert kernel.bottleneck == kernel_pb2.BottleneckLowering(
        activation=kernel_pb2.ACTIVATION_RELU, rank=3, gated=True, bias_gate=True, bias_out=True
    )
    shapes = {spec.name: (list(spec.shape), spec.gain, spec.fan_in) for spec in kernel.parameters}
    assert shapes == {
        "A": ([5, 3], 1.0, 5),
        "G": ([5, 3], 2.0, 5),
        "c": ([3], 1.0, 1),
        "B": ([3, 8], 1.0, 3),
        "b": ([8], 1.0, 1),
    }


def _sigmoid_bottleneck(graph: GraphBuilder) -> blueprint_pb2.ValueRef:
    hidden = graph.node("sigmoid", graph.node("linear", graph.input, out=4))
    return graph.node("linear", hidden, out="D")


def _sigmoid_gate(graph: GraphBuilder) -> blueprint_pb2.ValueRef:
    value, gate = (graph.node("linear", graph.input, out=4) for _ in range(2))
    return graph.node("linear", graph.node("gate", value, gate), out="D")


def _broadcast_gate(graph: GraphBuilder) -> blueprint_pb2.ValueRef:
    value, gate = (graph.node("linear", graph.input, out=out) for out in (4, 1))
    return graph.node("linear", graph.node("gate", value, gate, activation="tanh"), out="D")


def _self_gate(graph: GraphBuilder) -> blueprint_pb2.ValueRef:
    hidden = graph.node("linear", graph.input, out=4)
    return graph.node("linear", graph.node("gate", hidden, hidden, activation="tanh"), out="D")


def _chained_gate(graph: GraphBuilder) -> blueprint_pb2.ValueRef:
    first = graph.node("linear", graph.input, out=4)
    second = graph.node("linear", first, out=4)
    return graph.node("linear", graph.node("gate", first, second, activation="tanh"), out="D")


def _half(graph: GraphBuilder) -> blueprint_pb2.ValueRef:
    return graph.node("scale", graph.input, factor=0.5)


@pytest.mark.parametrize(
    "build",
    [_sigmoid_bottleneck, _sigmoid_gate, _broadcast_gate, _self_gate, _chained_gate, _half],
)
def test_what_no_family_computes_goes_to_the_interpreter(
    build: Callable[[GraphBuilder], blueprint_pb2.ValueRef],
) -> None:
    graph = GraphBuilder()
    blueprint = blueprint_pb2.Blueprint(name="other", graph=graph.returns(build(graph)))
    kernel = lower(blueprint, place())
    assert kernel.WhichOneof("lowering") == "graph"
    check_kernel(kernel)


def squeeze_excite(
    pool: int = 0, groups: int = 1, activation: str = "tanh", out: str | int = "D"
) -> blueprint_pb2.Blueprint:
    graph = GraphBuilder(layout=Layout.PLANE_2D)
    pooled = graph.node("pool", graph.input, kernel=pool)
    hidden = graph.node("relu", graph.node("conv2d", pooled, out=4, kernel=1, groups=groups))
    gate = graph.node("conv2d", hidden, out=out, kernel=1)
    result = graph.node("gate", graph.input, gate, activation=activation)
    return blueprint_pb2.Blueprint(name="squeezed", graph=graph.returns(result))


def depthwise(groups: int = 8, pointwise: int = 1, **entry: int) -> blueprint_pb2.Blueprint:
    graph = GraphBuilder(layout=Layout.PLANE_2D)
    hidden = graph.node("conv2d", graph.input, out=8, groups=groups, **({"kernel": 3} | entry))
    hidden = graph.node("relu", hidden)
    out = graph.node("conv2d", hidden, out="D", kernel=pointwise)
    return blueprint_pb2.Blueprint(name="separable", graph=graph.returns(out))


@pytest.mark.parametrize(
    ("blueprint", "family"),
    [
        (squeeze_excite(), "squeeze_excite"),
        (squeeze_excite(pool=3), "graph"),
        (squeeze_excite(groups=2), "graph"),
        (squeeze_excite(activation="sigmoid"), "graph"),
        (squeeze_excite(out=1), "graph"),
        (depthwise(), "depthwise"),
        (depthwise(kernel=5), "depthwise"),
        (depthwise(groups=4), "graph"),
        (depthwise(groups=1), "graph"),
        (depthwise(dilation=2), "graph"),
        (depthwise(pointwise=3), "graph"),
    ],
)
def test_only_what_a_spatial_family_computes_runs_in_it(
    blueprint: blueprint_pb2.Blueprint, family: str
) -> None:
    kernel = lower(blueprint, place(kind=kernel_pb2.SLOT_KIND_CONV))
    assert kernel.WhichOneof("lowering") == family
    check_kernel(kernel)


@pytest.mark.parametrize(
    ("name", "field", "value", "rule"),
    [
        ("squeeze_excite", "rank", 0, "must be 1 to"),
        ("squeeze_excite", "activation", 9, "known activation"),
        ("squeeze_excite", "position_axes", 3, "must be 1 to 2"),
        ("depthwise", "window", 4, "must be odd"),
        ("depthwise", "window", 33, "must be 1 to 31"),
        ("depthwise", "position_axes", 0, "must be 1 to 2"),
    ],
)
def test_spatial_lowerings_out_of_bounds_are_refused(
    name: str, field: str, value: int, rule: str
) -> None:
    kernel = lower(get(name), place(kind=kernel_pb2.SLOT_KIND_CONV))
    setattr(lowering_of(kernel), field, value)
    with pytest.raises(BlueprintError) as caught:
        check_kernel(kernel)
    assert caught.value.field == f"kernel.{name}.{field}"
    assert rule in caught.value.rule


def test_a_scale_along_time_is_not_affine() -> None:
    graph = GraphBuilder(layout=Layout.PLANE_2D)
    features = graph.node("scale", graph.input, axis=1)
    blueprint = blueprint_pb2.Blueprint(name="scaled", graph=graph.returns(features))
    assert lower(blueprint, place(kind=kernel_pb2.SLOT_KIND_CONV)).HasField("affine")


def test_graph_kernels_have_every_symbol_bound_and_defaults_spelt_out() -> None:
    kernel = lower(get("norm_mlp", rank=5), place(8, 8))
    dims = [dim for dim in kernel.graph.graph.inputs[0].shape.dims]
    assert [dim.symbol or dim.size for dim in dims] == ["N", 8]
    sizes = {
        node.id: node.attributes["out"].dim_value.size
        for node in kernel.graph.graph.nodes
        if "out" in node.attributes
    }
    assert sizes == {"n1": 5, "n3": 8}
    assert kernel.graph.graph.nodes[0].attributes["eps"].float_value == 1e-5
    assert [spec.name for spec in kernel.parameters][:2] == ["n0_weight", "n0_bias"]


REFUSED: list[tuple[str, dict[str, Plain], dict[str, int], str, str]] = [
    ("bottleneck", {}, {"chunk_width": 0}, "signature.chunk_width", "at least 1"),
    ("bottleneck", {}, {"source_width": 9}, "signature.source_width", "equal chunk_width 8"),
    ("bottleneck", {}, {"slot_kind": 0}, "signature.slot_kind", "known value"),
    ("bottleneck", {}, {"slot_kind": 99}, "signature.slot_kind", "known value"),
    ("bottleneck", {}, {"dtype": 0}, "signature.dtype", "known value"),
    ("bottleneck", {}, {"device_class": 0}, "signature.device_class", "known value"),
    ("bottleneck", {}, {"source": 0}, "signature.source", "known value"),
    ("bottleneck", {}, {"source": 2}, "signature.source", "SEED_SOURCE_OUTPUT"),
    ("widen", {}, {}, "signature.source", "SEED_SOURCE_INPUT"),
    ("depthwise", {}, {}, "signature.slot_kind", "needs channels on axis 1"),
    (
        "bottleneck",
        {"rank": 65536},
        {"chunk_width": 2**20, "source_width": 2**20},
        "kernel.parameter_count",
        "at most 2147483647",
    ),
]


@pytest.mark.parametrize(("name", "hyperparameters", "changes", "field", "rule"), REFUSED)
def test_refuses_places_that_do_not_fit(
    name: str,
    hyperparameters: dict[str, int | float | str],
    changes: dict[str, int],
    field: str,
    rule: str,
) -> None:
    signature = place()
    for key, value in changes.items():
        setattr(signature, key, value)
    with pytest.raises(BlueprintError) as caught:
        lower(get(name, **hyperparameters), signature)
    assert caught.value.field == field
    assert rule in caught.value.rule


def test_a_blueprint_of_fixed_width_fits_that_width_alone() -> None:
    graph = GraphBuilder(width=6)
    blueprint = blueprint_pb2.Blueprint(
        name="six", graph=graph.returns(graph.node("softmax", graph.input))
    )
    assert lower(blueprint, place(6, 6)).HasField("graph")
    with pytest.raises(BlueprintError, match="source_width is '8': must be the 6 features"):
        lower(blueprint, place(8, 8))


def test_divisibility_is_decided_when_the_width_is_known() -> None:
    graph = GraphBuilder()
    parts = graph.node("split", graph.input, parts=2)
    blueprint = blueprint_pb2.Blueprint(
        name="halves", graph=graph.returns(graph.node("concat", parts, parts))
    )
    assert lower(blueprint, place(6, 6)).HasField("graph")
    with pytest.raises(BlueprintError, match=r"parts is '2': split: must divide axis 1 of size 7"):
        lower(blueprint, place(7, 7))


def test_sequence_graphs_need_features_last() -> None:
    graph = GraphBuilder(layout=Layout.SEQUENCE)
    blueprint = blueprint_pb2.Blueprint(
        name="attends", graph=graph.returns(graph.node("attention", graph.input, init="zeros"))
    )
    lower(blueprint, place(kind=kernel_pb2.SLOT_KIND_ATTENTION))
    with pytest.raises(BlueprintError, match="needs features on the last axis"):
        lower(blueprint, place(kind=kernel_pb2.SLOT_KIND_CONV))


@given(
    st.sampled_from(["lora", "bottleneck", "glu", "norm_mlp"]),
    st.sampled_from(["output", "input"]),
    st.integers(1, 300),
    st.integers(1, 300),
    st.integers(1, 40),
)
def test_costs_follow_from_the_widths(
    name: str, source: str, width: int, source_width: int, rank: int
) -> None:
    if source == "output":
        source_width = width
    signature = place(width, source_width, OUTPUT if source == "output" else INPUT)
    kernel = lower(get(name, rank=rank, source=source), signature)
    check_kernel(kernel)
    branches = 2 if name == "glu" else 1
    assert kernel.flops_per_token == 2 * rank * (branches * source_width + width)
    matrices = branches * source_width * rank + rank * width
    vectors = {
        "lora": 0,
        "glu": 0,
        "bottleneck": rank + width,
        "norm_mlp": 2 * source_width + rank + width,
    }[name]
    assert kernel.parameter_count == matrices + vectors


CORRUPTIONS: list[tuple[Callable[[kernel_pb2.Kernel], object], str]] = [
    (lambda k: k.ClearField("bottleneck"), "kernel.lowering"),
    (lambda k: setattr(k.bottleneck, "rank", 0), "kernel.bottleneck.rank"),
    (lambda k: setattr(k.bottleneck, "activation", 0), "kernel.bottleneck.activation"),
    (lambda k: setattr(k.bottleneck, "bias_gate", True), "kernel.bottleneck.bias_gate"),
    (lambda k: setattr(k.bottleneck, "rank", 17), "kernel.parameters[0].shape"),
    (lambda k: setattr(k.bottleneck, "bias_in", False), "kernel.parameters"),
    (lambda k: setattr(k.bottleneck, "gated", True), "kernel.parameters"),
    (lambda k: setattr(k.parameters[0], "name", "W"), "kernel.parameters[0].name"),
    (lambda k: setattr(k.parameters[0], "init", 0), "kernel.parameters[0].init"),
    (lambda k: setattr(k.parameters[0], "gain", float("nan")), "kernel.parameters[0].gain"),
    (lambda k: setattr(k.parameters[0], "fan_in", 0), "kernel.parameters[0].fan_in"),
    (lambda k: k.parameters.pop(), "kernel.parameters"),
    (lambda k: setattr(k, "parameter_count", 1), "kernel.parameter_count"),
    (lambda k: setattr(k, "flops_per_token", 1), "kernel.flops_per_token"),
    (lambda k: setattr(k.signature, "source_width", 9), "signature.source_width"),
]


@pytest.mark.parametrize(("corrupt", "field"), CORRUPTIONS)
def test_kernels_whose_fields_disagree_are_refused(
    corrupt: Callable[[kernel_pb2.Kernel], object], field: str
) -> None:
    kernel = lower(get("bottleneck"), place())
    check_kernel(kernel)
    corrupt(kernel)
    with pytest.raises(BlueprintError) as caught:
        check_kernel(kernel)
    assert caught.value.field == field


def test_the_pipelines_are_the_lowerings_of_a_kernel() -> None:
    lowerings = kernel_pb2.Kernel.DESCRIPTOR.oneofs_by_name["lowering"].fields
    assert {way.name for way in PIPELINES} == {field.name for field in lowerings}
    assert [way.name for way in PIPELINES if not way.native] == ["graph"]
