"""Checks blueprints and graphs: structure, attributes, and shapes by symbolic inference."""

import math
import re
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from esper.blueprints.attributes import MAX_ELEMENTS
from esper.blueprints.attributes import Attributes
from esper.blueprints.attributes import Value
from esper.blueprints.attributes import decode
from esper.blueprints.attributes import decode_dims
from esper.blueprints.errors import BlueprintError
from esper.blueprints.ops import OPS
from esper.blueprints.ops import OpSpec
from esper.blueprints.rules import Parameter
from esper.blueprints.rules import RuleViolation
from esper.blueprints.sizes import Shape
from esper.blueprints.sizes import Size
from esper.blueprints.sizes import format_shape
from esper.common.v1 import blueprint_pb2

MAX_NODES = 1024
MAX_HYPERPARAMETERS = 64
MAX_TAGS = 32
MAX_TAG_LENGTH = 64
MAX_RANK = 65536

_WORD = re.compile(r"[a-z][a-z0-9_]{0,63}")
_WORD_RULE = "must be a lower_snake_case word of at most 64 characters"


class Layout(Enum):
    """How a graph's input is laid out; F is its feature axis.

    TOKENS fits every slot: all axes but the features are flattened into N. SEQUENCE needs features
    last, PLANE_1D and PLANE_2D need channels on axis 1.
    """

    TOKENS = "[N, F]"
    SEQUENCE = "[N, T, F]"
    PLANE_1D = "[N, F, T]"
    PLANE_2D = "[N, F, H, W]"

    @property
    def feature_axis(self) -> int:
        """Which axis holds the features."""
        return 2 if self is Layout.SEQUENCE else 1

    @property
    def token_symbols(self) -> tuple[str, ...]:
        """The sorted symbols whose product is the number of tokens."""
        return {
            Layout.TOKENS: ("N",),
            Layout.SEQUENCE: ("N", "T"),
            Layout.PLANE_1D: ("N", "T"),
            Layout.PLANE_2D: ("H", "N", "W"),
        }[self]


@dataclass(frozen=True)
class CheckedNode:
    """A node whose operands, attributes and shapes are sound.

    Attributes:
        id: Its id in the graph that was checked.
        spec: Its op.
        inputs: Its operands as (value, output index); value 0 is the graph's input and value
            i + 1 is node i of the checked graph.
        attributes: Its attributes, defaults filled in.
        input_shapes: Shapes of the operands.
        output_shapes: Shapes of the outputs.
        parameters: The trainable tensors that it owns.
    """

    id: str
    spec: OpSpec
    inputs: tuple[tuple[int, int], ...]
    attributes: Attributes
    input_shapes: tuple[Shape, ...]
    output_shapes: tuple[Shape, ...]
    parameters: tuple[Parameter, ...]


@dataclass(frozen=True)
class CheckedGraph:
    """A sound graph in canonical order: depth-first post-order from the output, operands in order.

    Attributes:
        source: What the input reads.
        layout: How the input is laid out.
        input_shape: Shape of the input.
        nodes: The nodes, each after its operands.
        output: The value returned, numbered as in CheckedNode.inputs.
        output_shape: Its shape.
    """

    source: blueprint_pb2.SeedSource
    layout: Layout
    input_shape: Shape
    nodes: tuple[CheckedNode, ...]
    output: tuple[int, int]
    output_shape: Shape

    @property
    def feature_axis(self) -> int:
        """The axis of input and output that holds the features."""
        return self.layout.feature_axis


@dataclass(frozen=True)
class CheckedBlueprint:
    """A sound blueprint.

    Attributes:
        name: Its name.
        hyperparameters: Their values by name.
        graph: Its graph with the symbol R bound and D and C free.
    """

    name: str
    hyperparameters: Mapping[str, blueprint_pb2.Attribute]
    graph: CheckedGraph


def check(blueprint: blueprint_pb2.Blueprint) -> CheckedBlueprint:
    """Returns the blueprint's checked form.

    Raises:
        BlueprintError: Where it breaks a rule; names the field, its value and the rule.
    """
    if not _WORD.fullmatch(blueprint.name):
        raise BlueprintError("name", blueprint.name, _WORD_RULE)
    if len(blueprint.tags) > MAX_TAGS:
        raise BlueprintError("tags", len(blueprint.tags), f"must be at most {MAX_TAGS}")
    for index, tag in enumerate(blueprint.tags):
        if not 1 <= len(tag) <= MAX_TAG_LENGTH:
            raise BlueprintError(
                f"tags[{index}]", tag, f"must have 1 to {MAX_TAG_LENGTH} characters"
            )
    hyperparameters = _check_hyperparameters(blueprint.hyperparameters)
    return CheckedBlueprint(
        blueprint.name, hyperparameters, check_graph(blueprint.graph, rank_binding(blueprint))
    )


def rank_binding(blueprint: blueprint_pb2.Blueprint) -> dict[str, int]:
    """Returns the number that the hyperparameter `rank` gives to the symbol R, if there is one."""
    named = {entry.name: entry.value.int_value for entry in blueprint.hyperparameters}
    return {"R": named["rank"]} if "rank" in named else {}


def _check_hyperparameters(
    given: Sequence[blueprint_pb2.Hyperparameter],
) -> dict[str, blueprint_pb2.Attribute]:
    if len(given) > MAX_HYPERPARAMETERS:
        raise BlueprintError(
            "hyperparameters", len(given), f"must be at most {MAX_HYPERPARAMETERS}"
        )
    values: dict[str, blueprint_pb2.Attribute] = {}
    for index, hyperparameter in enumerate(given):
        field = f"hyperparameters[{index}]"
        name, value = hyperparameter.name, hyperparameter.value
        if not _WORD.fullmatch(name):
            raise BlueprintError(f"{field}.name", name, _WORD_RULE)
        if name in values:
            raise BlueprintError(f"{field}.name", name, "must be unique in the blueprint")
        kind = value.WhichOneof("value")
        if kind not in ("int_value", "float_value", "bool_value", "string_value"):
            raise BlueprintError(
                f"{field}.value", kind or "absent", "must be a whole number, number, truth or word"
            )
        if kind == "float_value" and not math.isfinite(value.float_value):
            raise BlueprintError(f"{field}.value", value.float_value, "must be finite")
        if name == "rank" and (kind != "int_value" or not 1 <= value.int_value <= MAX_RANK):
            shown = value.int_value if kind == "int_value" else kind
            raise BlueprintError(
                f"{field}.value", shown, f"rank must be a whole number from 1 to {MAX_RANK}"
            )
        values[name] = value
    return values


def check_graph(graph: blueprint_pb2.Graph, bindings: Mapping[str, int]) -> CheckedGraph:
    """Returns a graph's checked form.

    Args:
        graph: The graph.
        bindings: Numbers of the symbols D, C, R that are bound; the others stay symbolic.

    Raises:
        BlueprintError: Where it breaks a rule.
    """
    if len(graph.inputs) != 1:
        raise BlueprintError("graph.inputs", len(graph.inputs), "must be exactly 1")
    if len(graph.outputs) != 1:
        raise BlueprintError("graph.outputs", len(graph.outputs), "must be exactly 1")
    if len(graph.nodes) > MAX_NODES:
        raise BlueprintError("graph.nodes", len(graph.nodes), f"must be at most {MAX_NODES}")
    layout, input_shape = _check_input(graph.inputs[0], bindings)
    names = _check_ids(graph)
    specs = [_check_op(index, node) for index, node in enumerate(graph.nodes)]
    attributes = [
        _check_attributes(f"graph.nodes[{index}].attributes", node, spec, bindings)
        for index, (node, spec) in enumerate(zip(graph.nodes, specs, strict=True))
    ]
    num_outputs = [1] + [
        spec.num_outputs(given) for spec, given in zip(specs, attributes, strict=True)
    ]
    operands = []
    for index, (node, spec) in enumerate(zip(graph.nodes, specs, strict=True)):
        field = f"graph.nodes[{index}].inputs"
        if not spec.min_inputs <= len(node.inputs) <= spec.max_inputs:
            wanted = f"{spec.min_inputs}"
            if spec.max_inputs != spec.min_inputs:
                wanted += f" to {spec.max_inputs}"
            raise BlueprintError(field, len(node.inputs), f"{spec.name} takes {wanted}")
        operands.append(
            [
                _resolve(f"{field}[{at}]", ref, names, num_outputs)
                for at, ref in enumerate(node.inputs)
            ]
        )
    output = _resolve("graph.outputs[0]", graph.outputs[0], names, num_outputs)
    _refuse_cycle(graph, operands)
    order = _post_order(output[0], operands)
    _refuse_unreachable(graph, order)
    number = {0: 0} | {value: position for position, value in enumerate(order, start=1)}
    shapes: list[tuple[Shape, ...]] = [(input_shape,)]
    nodes: list[CheckedNode] = []
    for value in order:
        index = value - 1
        inputs = tuple((number[operand], at) for operand, at in operands[index])
        inferred = _infer(
            index,
            graph.nodes[index].id,
            specs[index],
            inputs,
            attributes[index],
            tuple(shapes[operand][at] for operand, at in inputs),
        )
        nodes.append(inferred)
        shapes.append(inferred.output_shapes)
    final = (number[output[0]], output[1])
    output_shape = shapes[final[0]][final[1]]
    source = graph.inputs[0].source
    _check_output(source, layout, input_shape, output_shape, bindings)
    return CheckedGraph(source, layout, input_shape, tuple(nodes), final, output_shape)


def _check_input(
    given: blueprint_pb2.GraphInput, bindings: Mapping[str, int]
) -> tuple[Layout, Shape]:
    width_symbols = {
        blueprint_pb2.SEED_SOURCE_OUTPUT: "D",
        blueprint_pb2.SEED_SOURCE_INPUT: "C",
    }
    if given.source not in width_symbols:
        raise BlueprintError("graph.inputs[0].source", given.source, "must be OUTPUT or INPUT")
    width_symbol = width_symbols[given.source]
    field = "graph.inputs[0].shape"
    shape = decode_dims(field, given.shape, bindings)
    n, t, h, w = (Size.symbol(name) for name in ("N", "T", "H", "W"))
    for layout, others in (
        (Layout.TOKENS, (n,)),
        (Layout.SEQUENCE, (n, t)),
        (Layout.PLANE_1D, (n, t)),
        (Layout.PLANE_2D, (n, h, w)),
    ):
        axis = layout.feature_axis
        if len(shape) != len(others) + 1 or shape[:axis] + shape[axis + 1 :] != others:
            continue
        if shape[axis].fixed is not None or shape[axis] == Size.symbol(width_symbol):
            return layout, shape
    raise BlueprintError(
        field,
        format_shape(shape),
        "must be one of "
        + ", ".join(layout.value.replace("F", width_symbol) for layout in Layout)
        + f", with {width_symbol} or a number on the feature axis",
    )


def _check_ids(graph: blueprint_pb2.Graph) -> dict[str, int]:
    """Returns the value number of every id."""
    names = {graph.inputs[0].id: 0}
    if not graph.inputs[0].id:
        raise BlueprintError("graph.inputs[0].id", "", "must not be empty")
    for index, node in enumerate(graph.nodes):
        if not node.id:
            raise BlueprintError(f"graph.nodes[{index}].id", "", "must not be empty")
        if node.id in names:
            raise BlueprintError(
                f"graph.nodes[{index}].id", node.id, "must be unique in the graph, inputs included"
            )
        names[node.id] = index + 1
    return names


def _check_op(index: int, node: blueprint_pb2.Node) -> OpSpec:
    if node.op not in OPS:
        raise BlueprintError(f"graph.nodes[{index}].op", node.op, "must be an op of the table")
    return OPS[node.op]


def _check_attributes(
    field: str, node: blueprint_pb2.Node, spec: OpSpec, bindings: Mapping[str, int]
) -> Attributes:
    known = {attribute.name: attribute for attribute in spec.attributes}
    for name in sorted(node.attributes):
        if name not in known:
            allowed = ", ".join(known) or "none"
            raise BlueprintError(
                f"{field}.{name}",
                node.attributes[name].WhichOneof("value") or "absent",
                f"{spec.name} has no attribute of this name, only {allowed}",
            )
    values: dict[str, Value] = {}
    for name, attribute in known.items():
        if name in node.attributes:
            values[name] = decode(f"{field}.{name}", attribute, node.attributes[name], bindings)
        elif attribute.required:
            raise BlueprintError(f"{field}.{name}", "absent", f"{spec.name} requires it")
        elif attribute.default is not None:
            values[name] = attribute.default
    return Attributes(values)


def _resolve(
    field: str, ref: blueprint_pb2.ValueRef, names: Mapping[str, int], num_outputs: Sequence[int]
) -> tuple[int, int]:
    if ref.node not in names:
        raise BlueprintError(f"{field}.node", ref.node, "must be the id of a node or graph input")
    value = names[ref.node]
    if not 0 <= ref.output_index < num_outputs[value]:
        raise BlueprintError(
            f"{field}.output_index",
            ref.output_index,
            f"{ref.node!r} has {num_outputs[value]} output(s), counted from 0",
        )
    return value, ref.output_index


def _post_order(root: int, operands: Sequence[Sequence[tuple[int, int]]]) -> list[int]:
    """Returns the values that `root` needs, itself included, each after its operands."""
    order: list[int] = []
    done = {0}
    stack = [root]
    while stack:
        value = stack[-1]
        if value not in done:
            pending = [operand for operand, _ in operands[value - 1] if operand not in done]
            if pending:
                stack.append(pending[0])
                continue
            done.add(value)
            order.append(value)
        stack.pop()
    return order


def _refuse_cycle(
    graph: blueprint_pb2.Graph, operands: Sequence[Sequence[tuple[int, int]]]
) -> None:
    done: set[int] = {0}
    for start in range(1, len(operands) + 1):
        path: list[int] = [] if start in done else [start]
        on_path = set(path)
        while path:
            pending = [operand for operand, _ in operands[path[-1] - 1] if operand not in done]
            if not pending:
                on_path.discard(path[-1])
                done.add(path.pop())
            elif pending[0] in on_path:
                cycle = path[path.index(pending[0]) :]
                ids = [graph.nodes[value - 1].id for value in reversed(cycle)]
                raise BlueprintError(
                    "graph.nodes", " -> ".join([*ids, ids[0]]), "must not form a cycle"
                )
            else:
                path.append(pending[0])
                on_path.add(pending[0])


def _refuse_unreachable(graph: blueprint_pb2.Graph, order: Sequence[int]) -> None:
    reached = set(order)
    for index, node in enumerate(graph.nodes):
        if index + 1 not in reached:
            raise BlueprintError(
                f"graph.nodes[{index}].id", node.id, "must be needed by the graph's output"
            )


def _infer(
    index: int,
    node_id: str,
    spec: OpSpec,
    inputs: tuple[tuple[int, int], ...],
    attributes: Attributes,
    input_shapes: tuple[Shape, ...],
) -> CheckedNode:
    field = f"graph.nodes[{index}]"
    try:
        output_shapes = tuple(spec.shape(input_shapes, attributes))
        parameters = tuple(spec.parameters(input_shapes, attributes))
    except RuleViolation as violation:
        raise BlueprintError(
            f"{field}.{violation.where}", violation.value, f"{spec.name}: {violation.rule}"
        ) from None
    for shape in output_shapes:
        for size in shape:
            if size.fixed is not None and size.fixed > MAX_ELEMENTS:
                raise BlueprintError(
                    field, format_shape(shape), f"axes must have at most {MAX_ELEMENTS} elements"
                )
    return CheckedNode(node_id, spec, inputs, attributes, input_shapes, output_shapes, parameters)


def _check_output(
    source: blueprint_pb2.SeedSource,
    layout: Layout,
    input_shape: Shape,
    output_shape: Shape,
    bindings: Mapping[str, int],
) -> None:
    axis = layout.feature_axis
    width = Size.symbol("D").bind(bindings)
    if source == blueprint_pb2.SEED_SOURCE_OUTPUT:
        width = input_shape[axis]
    elif "D" not in bindings and len(output_shape) > axis:
        # A number stands for D until lowering binds D and compares.
        width = width if output_shape[axis].fixed is None else output_shape[axis]
    expected = (*input_shape[:axis], width, *input_shape[axis + 1 :])
    if output_shape != expected:
        raise BlueprintError(
            "graph.outputs[0]",
            format_shape(output_shape),
            f"must have the shape {format_shape(expected)} of the chunk",
        )
