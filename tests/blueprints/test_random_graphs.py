"""Properties that must hold for every sound graph."""

import random
from collections.abc import Callable

import pytest
import torch
from hypothesis import assume
from hypothesis import given
from hypothesis import strategies as st

from esper.blueprints.builder import GraphBuilder
from esper.blueprints.builder import output
from esper.blueprints.checker import check
from esper.blueprints.digest import blueprint_digest
from esper.blueprints.digest import kernel_digest
from esper.blueprints.errors import BlueprintError
from esper.blueprints.init import init_parameters
from esper.blueprints.interpreter import reference_from_blueprint
from esper.blueprints.interpreter import reference_module
from esper.blueprints.kernels import check_kernel
from esper.blueprints.lowering import lower
from esper.blueprints.ops import OPS
from esper.common.v1 import blueprint_pb2
from esper.common.v1 import kernel_pb2

UNARY = ("relu", "gelu", "silu", "tanh", "sigmoid", "softmax", "dropout")
BINARY = ("add", "sub", "mul", "gate")
Value = blueprint_pb2.ValueRef
Make = Callable[[GraphBuilder, list[Value], random.Random], Value]


def _any(values: list[Value], rng: random.Random) -> Value:
    return rng.choice(values)


def _linear(graph: GraphBuilder, values: list[Value], rng: random.Random) -> Value:
    return graph.node(
        "linear", _any(values, rng), out="D", bias=rng.random() < 0.5, gain=rng.choice([0.5, 1.0])
    )


def _low_rank(graph: GraphBuilder, values: list[Value], rng: random.Random) -> Value:
    return graph.node("low_rank_matmul", _any(values, rng), out="D", rank=rng.choice([1, 3, "R"]))


def _norm(graph: GraphBuilder, values: list[Value], rng: random.Random) -> Value:
    op = rng.choice(["layer_norm", "rms_norm"])
    return graph.node(op, _any(values, rng), affine=rng.random() < 0.5, eps=1e-3)


def _scale(graph: GraphBuilder, values: list[Value], rng: random.Random) -> Value:
    if rng.random() < 0.5:
        return graph.node("scale", _any(values, rng), factor=rng.choice([-2.0, 0.5, 3.0]))
    return graph.node("scale", _any(values, rng), bias=rng.random() < 0.5)


def _unary(graph: GraphBuilder, values: list[Value], rng: random.Random) -> Value:
    return graph.node(rng.choice(UNARY), _any(values, rng))


def _binary(graph: GraphBuilder, values: list[Value], rng: random.Random) -> Value:
    return graph.node(rng.choice(BINARY), _any(values, rng), _any(values, rng))


def _concat_split(graph: GraphBuilder, values: list[Value], rng: random.Random) -> Value:
    joined = graph.node("concat", _any(values, rng), _any(values, rng))
    parts = graph.node("split", joined, parts=2)
    return graph.node("sub", output(parts, 1), output(parts, 0))


def _centre(graph: GraphBuilder, values: list[Value], rng: random.Random) -> Value:
    value = _any(values, rng)
    reduced = graph.node(rng.choice(["mean", "max", "sum"]), value, keepdim=True)
    return graph.node("sub", value, reduced)


MAKERS: tuple[Make, ...] = (
    _linear,
    _low_rank,
    _norm,
    _scale,
    _unary,
    _binary,
    _concat_split,
    _centre,
)


def random_blueprint(seed: int, num_steps: int) -> blueprint_pb2.Blueprint:
    """Returns a sound blueprint over [N, D] in which every node is needed."""
    rng = random.Random(seed)
    graph = GraphBuilder()
    values = [graph.input]
    for _ in range(num_steps):
        values.append(rng.choice(MAKERS)(graph, values, rng))
    used = {ref.node for node in graph.graph.nodes for ref in node.inputs}
    result = values[-1]
    for value in values[:-1]:
        if value.node not in used and value.node != "x":
            result = graph.node("add", result, value)
    return blueprint_pb2.Blueprint(
        name="random",
        hyperparameters=[
            blueprint_pb2.Hyperparameter(
                name="rank", value=blueprint_pb2.Attribute(int_value=rng.randint(1, 5))
            )
        ],
        graph=graph.returns(result),
    )


def disguised(blueprint: blueprint_pb2.Blueprint, rng: random.Random) -> blueprint_pb2.Blueprint:
    """Returns the same architecture with other ids, order and metadata, and defaults spelt out."""
    result = blueprint_pb2.Blueprint()
    result.CopyFrom(blueprint)
    result.name, result.description, result.author = "other", "words", "someone"
    result.tags.append("tag")
    for hyperparameter in result.hyperparameters:
        hyperparameter.description = "more words"
    graph = result.graph
    ids = [graph.inputs[0].id, *(node.id for node in graph.nodes)]
    renamed = dict(zip(ids, rng.sample([f"id{i}" for i in range(len(ids))], len(ids)), strict=True))
    graph.inputs[0].id = renamed[graph.inputs[0].id]
    nodes = list(graph.nodes)
    rng.shuffle(nodes)
    del graph.nodes[:]
    graph.nodes.extend(nodes)
    for node in graph.nodes:
        node.id = renamed[node.id]
        for ref in node.inputs:
            ref.node = renamed[ref.node]
        if OPS[node.op].name == "linear" and "init" not in node.attributes:
            node.attributes["init"].string_value = "kaiming_uniform"
    graph.outputs[0].node = renamed[graph.outputs[0].node]
    return result


GRAPHS = st.builds(random_blueprint, st.integers(0, 2**32), st.integers(1, 12))


def signature(width: int, dtype: kernel_pb2.DataType) -> kernel_pb2.KernelSignature:
    return kernel_pb2.KernelSignature(
        slot_kind=kernel_pb2.SLOT_KIND_LINEAR,
        chunk_width=width,
        source_width=width,
        source=blueprint_pb2.SEED_SOURCE_OUTPUT,
        dtype=dtype,
        device_class=kernel_pb2.DEVICE_CLASS_CPU,
    )


@given(GRAPHS, st.randoms())
def test_names_order_metadata_and_spelt_out_defaults_do_not_count(
    blueprint: blueprint_pb2.Blueprint, rng: random.Random
) -> None:
    other = disguised(blueprint, rng)
    assert blueprint_digest(other) == blueprint_digest(blueprint)
    place = signature(6, kernel_pb2.DATA_TYPE_FLOAT32)
    assert kernel_digest(lower(other, place)) == kernel_digest(lower(blueprint, place))


@given(GRAPHS, st.data())
def test_swapping_the_operands_of_a_sub_counts(
    blueprint: blueprint_pb2.Blueprint, data: st.DataObject
) -> None:
    subs = [
        node
        for node in blueprint.graph.nodes
        if node.op == blueprint_pb2.OP_SUB and node.inputs[0] != node.inputs[1]
    ]
    assume(subs)
    before = blueprint_digest(blueprint)
    node = data.draw(st.sampled_from(subs))
    first, second = node.inputs
    del node.inputs[:]
    node.inputs.extend([second, first])
    assert blueprint_digest(blueprint) != before


def changed(attribute: blueprint_pb2.Attribute) -> blueprint_pb2.Attribute:
    """Returns another value of the same type."""
    match attribute.WhichOneof("value"):
        case "int_value":
            return blueprint_pb2.Attribute(int_value=attribute.int_value + 1)
        case "float_value":
            return blueprint_pb2.Attribute(float_value=attribute.float_value * 0.5)
        case "bool_value":
            return blueprint_pb2.Attribute(bool_value=not attribute.bool_value)
        case "dim_value":
            size = attribute.dim_value.size + 1
            return blueprint_pb2.Attribute(dim_value=blueprint_pb2.Dim(size=size))
        case "string_value":
            word = "zeros" if attribute.string_value != "zeros" else "kaiming_uniform"
            return blueprint_pb2.Attribute(string_value=word)
    raise AssertionError(attribute)


@given(GRAPHS, st.data())
def test_changing_any_attribute_counts_or_is_refused(
    blueprint: blueprint_pb2.Blueprint, data: st.DataObject
) -> None:
    stated = [
        (index, name)
        for index, node in enumerate(blueprint.graph.nodes)
        for name in sorted(node.attributes)
    ]
    assume(stated)
    before = blueprint_digest(blueprint)
    index, name = data.draw(st.sampled_from(stated))
    attribute = blueprint.graph.nodes[index].attributes[name]
    attribute.CopyFrom(changed(attribute))
    try:
        assert blueprint_digest(blueprint) != before
    except BlueprintError as error:
        assert "graph." in error.field


@given(GRAPHS)
def test_hyperparameters_count(blueprint: blueprint_pb2.Blueprint) -> None:
    digests = {blueprint_digest(blueprint)}
    blueprint.hyperparameters[0].value.int_value += 1
    digests.add(blueprint_digest(blueprint))
    blueprint.hyperparameters.add(name="note").value.int_value = 1
    digests.add(blueprint_digest(blueprint))
    blueprint.hyperparameters[1].value.float_value = 1.0
    digests.add(blueprint_digest(blueprint))
    blueprint.hyperparameters[1].value.bool_value = True
    digests.add(blueprint_digest(blueprint))
    blueprint.hyperparameters[1].value.float_value = 0.0
    digests.add(blueprint_digest(blueprint))
    blueprint.hyperparameters[1].value.float_value = -0.0
    digests.add(blueprint_digest(blueprint))
    assert len(digests) == 7


@given(GRAPHS, st.integers(1, 9), st.lists(st.integers(0, 4), max_size=2))
def test_a_lowered_kernel_computes_what_the_blueprint_says(
    blueprint: blueprint_pb2.Blueprint, width: int, leading: list[int]
) -> None:
    place = signature(width, kernel_pb2.DATA_TYPE_FLOAT64)
    kernel = lower(blueprint, place)
    check_kernel(kernel)
    weights = init_parameters(kernel, torch.Generator().manual_seed(1))
    weights = {name: tensor + 0.1 for name, tensor in weights.items()}
    lowered = reference_module(kernel, weights).eval()
    original = reference_from_blueprint(blueprint, place, weights).eval()
    assert list(dict(lowered.named_parameters())) == [spec.name for spec in kernel.parameters]
    source = torch.randn(*leading, width, dtype=torch.float64)
    result = lowered(source)
    assert result.shape == source.shape
    torch.testing.assert_close(result, original(source), rtol=0, atol=0, equal_nan=True)
    traced = torch.fx.symbolic_trace(lowered)
    torch.testing.assert_close(traced(source), result, rtol=0, atol=0, equal_nan=True)


def test_sharing_counts_where_parameters_are_owned() -> None:
    def twice(shared: bool) -> blueprint_pb2.Blueprint:
        graph = GraphBuilder()
        first = graph.node("linear", graph.input, out="D")
        second = first if shared else graph.node("linear", graph.input, out="D")
        return blueprint_pb2.Blueprint(
            name="twice", graph=graph.returns(graph.node("add", first, second))
        )

    assert blueprint_digest(twice(True)) != blueprint_digest(twice(False))


def test_a_deep_chain_is_within_the_limits_and_one_node_more_is_not() -> None:
    graph = GraphBuilder()
    value = graph.input
    for _ in range(1024):
        value = graph.node("tanh", value)
    blueprint = blueprint_pb2.Blueprint(name="deep", graph=graph.returns(value))
    assert len(blueprint_digest(blueprint)) == 64
    blueprint.graph.nodes.add(id="more", op=blueprint_pb2.OP_TANH).inputs.add(node="x")
    with pytest.raises(BlueprintError, match="graph.nodes is '1025': must be at most 1024"):
        check(blueprint)
