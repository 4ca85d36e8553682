"""What the checker refuses, and how it says so."""

import math
from collections.abc import Callable

import pytest

from esper.blueprints.builder import GraphBuilder
from esper.blueprints.builder import output
from esper.blueprints.checker import Layout
from esper.blueprints.checker import check
from esper.blueprints.errors import BlueprintError
from esper.blueprints.library import get
from esper.common.v1 import blueprint_pb2

Change = Callable[[blueprint_pb2.Blueprint], object]
INPUT = blueprint_pb2.SEED_SOURCE_INPUT


def _cycle(blueprint: blueprint_pb2.Blueprint) -> None:
    blueprint.graph.nodes[0].inputs[0].node = blueprint.graph.nodes[1].id


def _unreachable_cycle(blueprint: blueprint_pb2.Blueprint) -> None:
    for own, other in (("left", "right"), ("right", "left")):
        blueprint.graph.nodes.add(id=own, op=blueprint_pb2.OP_TANH).inputs.add(node=other)


def _no_value(blueprint: blueprint_pb2.Blueprint) -> None:
    blueprint.graph.nodes[0].attributes["out"].ClearField("dim_value")


def _drop(name: str) -> Change:
    return lambda blueprint: blueprint.graph.nodes[0].attributes.pop(name)


def _attribute(index: int, name: str, **value: int | float | str) -> Change:
    return (
        lambda blueprint: blueprint.graph.nodes[index]
        .attributes[name]
        .CopyFrom(blueprint_pb2.Attribute(**value))  # type: ignore[arg-type]
    )


def _hyperparameter(name: str, **value: int | float) -> Change:
    return lambda blueprint: blueprint.hyperparameters.add(
        name=name, value=blueprint_pb2.Attribute(**value)  # type: ignore[arg-type]
    )


# The blueprint is `bottleneck`: nodes linear, gelu, linear, all [N, ...]; input x.
REFUSED: list[tuple[Change, str, str, str]] = [
    (lambda b: setattr(b, "name", "Bad Name"), "name", "Bad Name", "lower_snake_case"),
    (lambda b: b.tags.extend("t" * 33), "tags", "33", "at most 32"),
    (lambda b: b.tags.append("t" * 65), "tags[0]", "t" * 65, "1 to 64 characters"),
    (_hyperparameter("rank", int_value=1), "hyperparameters[4].name", "rank", "unique"),
    (_hyperparameter("Rank", int_value=1), "hyperparameters[4].name", "Rank", "lower_snake_case"),
    (_hyperparameter("p", float_value=math.nan), "hyperparameters[4].value", "nan", "finite"),
    (_hyperparameter("p"), "hyperparameters[4].value", "absent", "must be a whole number"),
    (
        lambda b: setattr(b.hyperparameters[0].value, "int_value", 0),
        "hyperparameters[0].value",
        "0",
        "from 1 to 65536",
    ),
    (
        lambda b: setattr(b.hyperparameters[0].value, "float_value", 4.0),
        "hyperparameters[0].value",
        "float_value",
        "whole number",
    ),
    (
        lambda b: [b.hyperparameters.add(name=f"h{i}") for i in range(61)],
        "hyperparameters",
        "65",
        "at most 64",
    ),
    (lambda b: b.ClearField("graph"), "graph.inputs", "0", "exactly 1"),
    (lambda b: b.graph.inputs[0].ClearField("shape"), "graph.inputs[0].shape", "0", "1 to 8 axes"),
    (
        lambda b: b.graph.inputs[0].shape.dims.add(),
        "graph.inputs[0].shape.dims[2]",
        "",
        "must have a size or a symbol",
    ),
    (lambda b: b.graph.inputs.add(), "graph.inputs", "2", "exactly 1"),
    (lambda b: b.graph.outputs.add(node="x"), "graph.outputs", "2", "exactly 1"),
    (lambda b: setattr(b.graph.inputs[0], "source", 0), "graph.inputs[0].source", "0", "OUTPUT"),
    (lambda b: setattr(b.graph.inputs[0], "id", ""), "graph.inputs[0].id", "", "not be empty"),
    (
        lambda b: b.graph.inputs[0].shape.dims.add(symbol="D"),
        "graph.inputs[0].shape",
        "[N, D, D]",
        "must be one of [N, D], [N, T, D], [N, D, T], [N, D, H, W]",
    ),
    (
        lambda b: b.graph.inputs[0].shape.dims.add(symbol="Q"),
        "graph.inputs[0].shape.dims[2].symbol",
        "Q",
        "must be one of N, T, H, W, D, C, R",
    ),
    (
        lambda b: setattr(b.graph.inputs[0].shape.dims[1], "symbol", "C"),
        "graph.inputs[0].shape",
        "[N, C]",
        "with D or a number",
    ),
    (lambda b: setattr(b.graph.nodes[1], "id", ""), "graph.nodes[1].id", "", "not be empty"),
    (lambda b: setattr(b.graph.nodes[1], "id", "x"), "graph.nodes[1].id", "x", "unique"),
    (lambda b: setattr(b.graph.nodes[1], "op", 0), "graph.nodes[1].op", "0", "op of the table"),
    (lambda b: setattr(b.graph.nodes[1], "op", 99), "graph.nodes[1].op", "99", "op of the table"),
    (_cycle, "graph.nodes", "gelu_1 -> linear_0 -> gelu_1", "must not form a cycle"),
    (_unreachable_cycle, "graph.nodes", "right -> left -> right", "must not form a cycle"),
    (
        lambda b: b.graph.nodes.add(id="idle", op=blueprint_pb2.OP_TANH).inputs.add(node="x"),
        "graph.nodes[3].id",
        "idle",
        "needed by the graph's output",
    ),
    (
        lambda b: b.graph.nodes[1].inputs.add(node="x"),
        "graph.nodes[1].inputs",
        "2",
        "gelu takes 1",
    ),
    (
        lambda b: setattr(b.graph.nodes[1].inputs[0], "node", "nowhere"),
        "graph.nodes[1].inputs[0].node",
        "nowhere",
        "id of a node or graph input",
    ),
    (
        lambda b: setattr(b.graph.outputs[0], "node", "nowhere"),
        "graph.outputs[0].node",
        "nowhere",
        "id of a node or graph input",
    ),
    (
        lambda b: setattr(b.graph.nodes[1].inputs[0], "output_index", 1),
        "graph.nodes[1].inputs[0].output_index",
        "1",
        "'linear_0' has 1 output(s)",
    ),
    (
        lambda b: setattr(b.graph.nodes[1].inputs[0], "output_index", -1),
        "graph.nodes[1].inputs[0].output_index",
        "-1",
        "counted from 0",
    ),
    (
        _attribute(0, "width", int_value=3),
        "graph.nodes[0].attributes.width",
        "int_value",
        "linear has no attribute of this name, only out, bias, init, gain",
    ),
    (
        _attribute(1, "gain", float_value=3.0),
        "graph.nodes[1].attributes.gain",
        "float_value",
        "gelu has no attribute of this name, only none",
    ),
    (_drop("out"), "graph.nodes[0].attributes.out", "absent", "linear requires it"),
    (_no_value, "graph.nodes[0].attributes.out", "absent", "must be given as dim_value"),
    (
        _attribute(0, "gain", int_value=1),
        "graph.nodes[0].attributes.gain",
        "int_value",
        "must be given as float_value",
    ),
    (
        _attribute(0, "gain", float_value=math.inf),
        "graph.nodes[0].attributes.gain",
        "inf",
        "must be finite",
    ),
    (
        _attribute(0, "gain", float_value=0.0),
        "graph.nodes[0].attributes.gain",
        "0.0",
        "must be at least 1e-06",
    ),
    (
        _attribute(0, "init", string_value="random"),
        "graph.nodes[0].attributes.init",
        "random",
        "must be one of kaiming_uniform, zeros, normal",
    ),
    (
        lambda b: setattr(b.graph.nodes[0].attributes["out"].dim_value, "size", 0),
        "graph.nodes[0].attributes.out.size",
        "0",
        "at least 1",
    ),
    (
        lambda b: setattr(b.graph.nodes[0].attributes["out"].dim_value, "size", 2**31),
        "graph.nodes[0].attributes.out.size",
        "2147483648",
        "at most 2147483647",
    ),
    (
        lambda b: setattr(b.graph.nodes[0].attributes["out"].dim_value, "symbol", "N"),
        "graph.nodes[0].attributes.out",
        "N",
        "a number or one of D, C, R",
    ),
    (
        lambda b: setattr(b.graph.nodes[2].attributes["out"].dim_value, "symbol", "R"),
        "graph.outputs[0]",
        "[N, 16]",
        "must have the shape [N, D] of the chunk",
    ),
]


@pytest.mark.parametrize(
    ("change", "field", "value", "rule"), REFUSED, ids=[f"{case[1]}={case[2]}" for case in REFUSED]
)
def test_refuses_a_bottleneck(change: Change, field: str, value: str, rule: str) -> None:
    blueprint = get("bottleneck")
    check(blueprint)
    change(blueprint)
    with pytest.raises(BlueprintError) as caught:
        check(blueprint)
    assert (caught.value.field, caught.value.value) == (field, value)
    assert rule in caught.value.rule
    assert str(caught.value) == f"{field} is {value!r}: {caught.value.rule}"


def blueprint_of(graph: GraphBuilder, value: blueprint_pb2.ValueRef) -> blueprint_pb2.Blueprint:
    return blueprint_pb2.Blueprint(name="trial", graph=graph.returns(value))


def _add_mismatch() -> blueprint_pb2.Blueprint:
    graph = GraphBuilder(INPUT)
    return blueprint_of(
        graph, graph.node("add", graph.input, graph.node("linear", graph.input, out="D"))
    )


def _add_axes() -> blueprint_pb2.Blueprint:
    graph = GraphBuilder()
    return blueprint_of(graph, graph.node("add", graph.input, graph.node("sum", graph.input)))


def _matmul_inner() -> blueprint_pb2.Blueprint:
    graph = GraphBuilder(layout=Layout.SEQUENCE)
    return blueprint_of(graph, graph.node("matmul", graph.input, graph.input))


def _matmul_tokens() -> blueprint_pb2.Blueprint:
    graph = GraphBuilder()
    return blueprint_of(graph, graph.node("matmul", graph.input, graph.input))


def _one(op: str, layout: Layout = Layout.TOKENS, **attributes: object) -> Callable[[], object]:
    def build() -> blueprint_pb2.Blueprint:
        graph = GraphBuilder(layout=layout)
        return blueprint_of(graph, graph.node(op, graph.input, **attributes))  # type: ignore

    return build


def _concat() -> blueprint_pb2.Blueprint:
    graph = GraphBuilder(layout=Layout.SEQUENCE)
    turned = graph.node("permute", graph.input, axes=(0, 2, 1))
    return blueprint_of(graph, graph.node("concat", graph.input, turned, axis=1))


def _concat_axes() -> blueprint_pb2.Blueprint:
    graph = GraphBuilder()
    reduced = graph.node("sum", graph.input)
    return blueprint_of(graph, graph.node("concat", graph.input, reduced))


def _too_wide() -> blueprint_pb2.Blueprint:
    graph = GraphBuilder()
    wide = graph.node("linear", graph.input, out=2**30)
    return blueprint_of(graph, graph.node("concat", wide, wide, wide))


def _split_output() -> blueprint_pb2.Blueprint:
    graph = GraphBuilder(width=6)
    parts = graph.node("split", graph.input, parts=2)
    return blueprint_of(graph, output(parts, 2))


SEQUENCE, PLANE = Layout.SEQUENCE, Layout.PLANE_2D
SHAPES: list[tuple[Callable[[], object], str, str]] = [
    (_add_mismatch, "graph.nodes[1].inputs", "add: sizes C and D of axis 1 must be equal or 1"),
    (_add_axes, "graph.nodes[1].inputs", "same number of axes, not 2 and 1"),
    (_matmul_inner, "graph.nodes[0].inputs", "inner sizes D and T must be equal"),
    (_matmul_tokens, "graph.nodes[0].inputs", "two axes after the token axis N"),
    (_one("softmax", axis=0), "graph.nodes[0].attributes.axis", "not be the leading token axis"),
    (_one("softmax", axis=-2), "graph.nodes[0].attributes.axis", "not be the leading token axis"),
    (_one("softmax", axis=2), "graph.nodes[0].attributes.axis", "must be an axis of [N, D]"),
    (_one("sum"), "graph.outputs[0]", "must have the shape [N, D]"),
    (_one("split", parts=2, axis=1, layout=SEQUENCE), "graph.nodes[0].attributes.parts", "size T"),
    (_split_output, "graph.outputs[0].output_index", "has 2 output(s)"),
    (_concat, "graph.nodes[1].inputs[1]", "sizes D and T of axis 2 must be equal"),
    (_one("permute", axes=(0,) * 9), "graph.nodes[0].attributes.axes", "at most 8 numbers"),
    (_concat_axes, "graph.nodes[1].inputs[1]", "must have as many axes as [N, D]"),
    (_too_wide, "graph.nodes[1]", "axes must have at most 2147483647 elements"),
    (_one("permute", axes=(1, 0)), "graph.nodes[0].attributes.axes", "must be 0 and then"),
    (_one("permute", axes=(0, 0)), "graph.nodes[0].attributes.axes", "each once"),
    (_one("reshape", shape=("D", "N")), "graph.nodes[0].attributes.shape", "begin with the token"),
    (
        _one("reshape", shape=("N", 4, 4)),
        "graph.nodes[0].attributes.shape",
        "16*N elements must equal the D*N of [N, D]",
    ),
    (_one("attention"), "graph.nodes[0].inputs[0]", "laid out as [N, T, D]"),
    (_one("conv2d", out="D", kernel=3), "graph.nodes[0].inputs[0]", "laid out as [N, C, H, W]"),
    (_one("conv1d", out="D", kernel=3), "graph.nodes[0].inputs[0]", "laid out as [N, C, T]"),
    (_one("pool"), "graph.nodes[0].inputs[0]", "[N, C, T] or [N, C, H, W]"),
    (
        _one("conv2d", PLANE, out="D", kernel=2),
        "graph.nodes[0].attributes.kernel",
        "must be odd, or dilation even",
    ),
    (
        _one("conv2d", PLANE, out="D", kernel=3, padding=0),
        "graph.nodes[0].attributes.padding",
        "must not shrink axis 2 of [N, D, H, W]",
    ),
    (_one("conv2d", PLANE, out="D", kernel=3, padding=2), "graph.outputs[0]", "[N, D, H, W]"),
    (
        _one("conv2d", PLANE, out=4, groups="D", kernel=1),
        "graph.nodes[0].attributes.groups",
        "must divide the output channels of size 4",
    ),
    (_one("pool", PLANE, kernel=2), "graph.nodes[0].attributes.kernel", "must be 0 or odd"),
    (_one("pool", PLANE), "graph.outputs[0]", "must have the shape [N, D, H, W]"),
    (_one("linear", PLANE, out="D"), "graph.nodes[0].inputs[0]", "known when the kernel is comp"),
    (_one("layer_norm", PLANE), "graph.nodes[0].inputs[0]", "known when the kernel is compiled"),
    (_one("scale", axis=1, layout=SEQUENCE), "graph.nodes[0].inputs[0]", "known when the kernel"),
    (
        _one("scale", factor=2.0, bias=True),
        "graph.nodes[0].attributes.bias",
        "must be false where factor is given",
    ),
    (_one("dropout", p=1.0), "graph.nodes[0].attributes.p", "must be at most 0.99"),
]


@pytest.mark.parametrize(("build", "field", "rule"), SHAPES)
def test_refuses_shapes_that_do_not_fit(
    build: Callable[[], blueprint_pb2.Blueprint], field: str, rule: str
) -> None:
    with pytest.raises(BlueprintError) as caught:
        check(build())
    assert caught.value.field == field
    assert rule in caught.value.rule


def test_convolutions_may_widen_and_narrow_again() -> None:
    graph = GraphBuilder(layout=Layout.PLANE_2D)
    wide = graph.node("conv2d", graph.input, out="D", kernel=3, padding=3)
    narrow = graph.node("conv2d", wide, out="D", kernel=5, padding=0)
    checked = check(blueprint_of(graph, narrow)).graph
    assert [str(size) for size in checked.nodes[0].output_shapes[0]] == ["N", "D", "H+4", "W+4"]
    assert checked.output_shape == checked.input_shape


def test_rank_binds_r() -> None:
    shapes = [node.output_shapes[0] for node in check(get("bottleneck", rank=5)).graph.nodes]
    assert [str(shape[1]) for shape in shapes] == ["5", "5", "D"]


def test_canonical_order_is_post_order_with_operands_in_order() -> None:
    checked = check(get("glu")).graph
    assert [node.spec.name for node in checked.nodes] == ["linear", "linear", "gate", "linear"]
    assert checked.nodes[2].inputs == ((1, 0), (2, 0))
    assert checked.output == (4, 0)
