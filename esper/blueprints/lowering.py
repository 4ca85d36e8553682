"""Lowers blueprints to kernels: a native family where the graph is one, else the interpreter."""

from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass

from esper.blueprints.attributes import encode
from esper.blueprints.attributes import encode_size
from esper.blueprints.checker import CheckedGraph
from esper.blueprints.checker import CheckedNode
from esper.blueprints.checker import check
from esper.blueprints.checker import rank_binding
from esper.blueprints.digest import blueprint_digest
from esper.blueprints.kernels import ACTIVATIONS
from esper.blueprints.kernels import CHANNEL_KINDS
from esper.blueprints.kernels import Computation
from esper.blueprints.kernels import bind
from esper.blueprints.kernels import check_signature
from esper.blueprints.kernels import graph_names
from esper.blueprints.kernels import parameter_count
from esper.common.v1 import blueprint_pb2
from esper.common.v1 import kernel_pb2


@dataclass(frozen=True)
class Pipeline:
    """A way to lower a blueprint.

    Attributes:
        name: The field of `Kernel.lowering`.
        description: Which blueprints it takes.
        native: Whether the kernel runs in the compiled core.
    """

    name: str
    description: str
    native: bool


PIPELINES = (
    Pipeline("noop", "scale by the factor 0: adds nothing", True),
    Pipeline("affine", "one learned scale along the features, with or without bias", True),
    Pipeline(
        "bottleneck",
        "low_rank_matmul; or linear, activation (identity, relu, gelu, silu, tanh), linear; or two "
        "linears joined by a gate with one of these activations, then linear",
        True,
    ),
    Pipeline(
        "squeeze_excite",
        "the source gated by tanh of: global pool, pointwise convolution, activation, pointwise "
        "convolution",
        True,
    ),
    Pipeline(
        "depthwise",
        "depthwise convolution with an odd window that keeps the size, activation, pointwise "
        "convolution",
        True,
    ),
    Pipeline("graph", "any other graph, by the reference interpreter", False),
)


@dataclass(frozen=True)
class Lowered:
    """A kernel and how the blueprint's own graph maps onto it.

    Attributes:
        kernel: The kernel.
        computation: The blueprint's graph, bound, with its parameters under the kernel's names.
    """

    kernel: kernel_pb2.Kernel
    computation: Computation


def lower(
    blueprint: blueprint_pb2.Blueprint, signature: kernel_pb2.KernelSignature
) -> kernel_pb2.Kernel:
    """Returns the kernel of a blueprint for one place.

    Raises:
        BlueprintError: Where the blueprint or signature is unsound, or one does not fit the other.
    """
    return lower_with_mapping(blueprint, signature).kernel


def lower_with_mapping(
    blueprint: blueprint_pb2.Blueprint, signature: kernel_pb2.KernelSignature
) -> Lowered:
    """Returns the kernel of a blueprint and the mapping between the two.

    Raises:
        BlueprintError: Where the blueprint or signature is unsound, or one does not fit the other.
    """
    check(blueprint)
    check_signature(signature)
    graph = bind(blueprint.graph, signature, rank_binding(blueprint))
    kernel = kernel_pb2.Kernel(
        blueprint_digest=blueprint_digest(blueprint),
        blueprint_name=blueprint.name,
        signature=signature,
    )
    names = (
        _match_noop(graph, kernel)
        or _match_affine(graph, kernel)
        or _match_low_rank(graph, kernel)
        or _match_bottleneck(graph, kernel)
        or _match_gated(graph, kernel)
        or _match_squeeze_excite(graph, kernel)
        or _match_depthwise(graph, kernel)
        or _fall_back(graph, kernel)
    )
    channels_first = signature.slot_kind in CHANNEL_KINDS
    computed = Computation(graph, names.by_parameter, channels_first)
    specs = computed.specs()
    kernel.parameters.extend(specs)
    kernel.parameter_count = parameter_count(specs)
    kernel.flops_per_token = computed.flops_per_token()
    return Lowered(kernel, computed)


@dataclass(frozen=True)
class _Names:
    """The kernel's parameter names; a class of its own as a match without parameters is a match."""

    by_parameter: Mapping[tuple[int, str], str]


def _match_noop(graph: CheckedGraph, kernel: kernel_pb2.Kernel) -> _Names | None:
    if _ops(graph) != ["scale"] or graph.nodes[0].attributes.values.get("factor") != 0.0:
        return None
    kernel.noop.SetInParent()
    return _Names({})


def _match_affine(graph: CheckedGraph, kernel: kernel_pb2.Kernel) -> _Names | None:
    if _ops(graph) != ["scale"] or "factor" in graph.nodes[0].attributes:
        return None
    # The checker allows a learned scale along a size that is known now, and that is the features'.
    bias = graph.nodes[0].attributes.flag("bias")
    kernel.affine.bias = bias
    return _Names({(0, "weight"): "w"} | ({(0, "bias"): "b"} if bias else {}))


def _match_low_rank(graph: CheckedGraph, kernel: kernel_pb2.Kernel) -> _Names | None:
    if _ops(graph) != ["low_rank_matmul"]:
        return None
    (node,) = graph.nodes
    bias = node.attributes.flag("bias")
    kernel.bottleneck.activation = kernel_pb2.ACTIVATION_IDENTITY
    kernel.bottleneck.rank = node.attributes.size("rank").fixed or 0
    kernel.bottleneck.bias_out = bias
    return _Names({(0, "down"): "A", (0, "up"): "B"} | ({(0, "bias"): "b"} if bias else {}))


def _match_bottleneck(graph: CheckedGraph, kernel: kernel_pb2.Kernel) -> _Names | None:
    ops = _ops(graph)
    if ops == ["linear", "linear"]:
        activation = "identity"
    elif len(ops) == 3 and ops[0] == ops[2] == "linear" and ops[1] in ACTIVATIONS:
        activation = ops[1]
    else:
        return None
    # Reachable nodes of one operand each form a chain, and for the checker to let a linear read the
    # input its features are on the last axis.
    last = len(ops) - 1
    entry, leave = graph.nodes[0], graph.nodes[last]
    kernel.bottleneck.activation = ACTIVATIONS[activation]
    kernel.bottleneck.rank = entry.attributes.size("out").fixed or 0
    kernel.bottleneck.bias_in = entry.attributes.flag("bias")
    kernel.bottleneck.bias_out = leave.attributes.flag("bias")
    return _Names(_linear_names(entry, 0, "A", "a") | _linear_names(leave, last, "B", "b"))


def _match_gated(graph: CheckedGraph, kernel: kernel_pb2.Kernel) -> _Names | None:
    if _ops(graph) != ["linear", "linear", "gate", "linear"]:
        return None
    first, second, gate, leave = graph.nodes
    from_input = first.inputs == second.inputs == ((0, 0),)
    # Post-order puts the gate's first operand, the value branch, first.
    joined = gate.inputs == ((1, 0), (2, 0)) and leave.inputs == ((3, 0),)
    activation = gate.attributes.word("activation")
    if not from_input or not joined or activation not in ACTIVATIONS:
        return None
    if first.attributes.size("out") != second.attributes.size("out"):
        return None
    kernel.bottleneck.activation = ACTIVATIONS[activation]
    kernel.bottleneck.rank = second.attributes.size("out").fixed or 0
    kernel.bottleneck.gated = True
    kernel.bottleneck.bias_in = second.attributes.flag("bias")
    kernel.bottleneck.bias_gate = first.attributes.flag("bias")
    kernel.bottleneck.bias_out = leave.attributes.flag("bias")
    return _Names(
        _linear_names(second, 1, "A", "a")
        | _linear_names(first, 0, "G", "c")
        | _linear_names(leave, 3, "B", "b")
    )


def _match_squeeze_excite(graph: CheckedGraph, kernel: kernel_pb2.Kernel) -> _Names | None:
    ops = _ops(graph)
    if not ops or ops[0] != "pool" or ops[-1] != "gate":
        return None
    matched = _activated_convolutions(graph, ops[1:-1])
    last = len(ops) - 2
    pool, gate = graph.nodes[0], graph.nodes[-1]
    # Chained up to the gate, which multiplies the input itself by what the chain made of it.
    chained = all(graph.nodes[index].inputs == ((index, 0),) for index in range(last + 1))
    if matched is None or not chained or gate.inputs != ((0, 0), (last + 1, 0)):
        return None
    entry, leave = graph.nodes[1], graph.nodes[last]
    if pool.attributes.integer("kernel") != 0 or gate.attributes.word("activation") != "tanh":
        return None
    # The gate has the input's features: others would have to be broadcast.
    if not _is_pointwise(entry) or leave.attributes.size("out").fixed != _channels(graph):
        return None
    kernel.squeeze_excite.activation = matched
    kernel.squeeze_excite.rank = entry.attributes.size("out").fixed or 0
    kernel.squeeze_excite.bias_in = entry.attributes.flag("bias")
    kernel.squeeze_excite.bias_out = leave.attributes.flag("bias")
    kernel.squeeze_excite.position_axes = len(graph.input_shape) - 2
    return _Names(_linear_names(entry, 1, "A", "a") | _linear_names(leave, last, "B", "b"))


def _match_depthwise(graph: CheckedGraph, kernel: kernel_pb2.Kernel) -> _Names | None:
    ops = _ops(graph)
    matched = _activated_convolutions(graph, ops)
    if matched is None:
        return None
    last = len(ops) - 1
    entry, leave = graph.nodes[0], graph.nodes[last]
    window, channels = entry.attributes.integer("kernel"), _channels(graph)
    per_channel = entry.attributes.size("groups").fixed == channels
    if not per_channel or entry.attributes.size("out").fixed != channels:
        return None
    # A window without dilation keeps the size, as the checker demands, only where it is odd.
    if entry.attributes.integer("dilation") != 1 and window > 1:
        return None
    kernel.depthwise.activation = matched
    kernel.depthwise.window = window
    kernel.depthwise.bias_in = entry.attributes.flag("bias")
    kernel.depthwise.bias_out = leave.attributes.flag("bias")
    kernel.depthwise.position_axes = len(graph.input_shape) - 2
    return _Names(_linear_names(entry, 0, "A", "a") | _linear_names(leave, last, "B", "b"))


def _activated_convolutions(
    graph: CheckedGraph, ops: Sequence[str]
) -> kernel_pb2.Activation | None:
    """The activation between two convolutions, the second of them pointwise; None if it is else."""
    convolutions = ("conv1d", "conv2d")
    if len(ops) not in (2, 3) or ops[0] not in convolutions or ops[-1] not in convolutions:
        return None
    between = ops[1] if len(ops) == 3 else "identity"
    leave = max(i for i, node in enumerate(graph.nodes) if node.spec.name in convolutions)
    if between not in ACTIVATIONS or not _is_pointwise(graph.nodes[leave]):
        return None
    return ACTIVATIONS[between]


def _is_pointwise(node: CheckedNode) -> bool:
    whole = node.attributes.size("groups").fixed == 1
    return whole and node.attributes.integer("kernel") == 1


def _channels(graph: CheckedGraph) -> int | None:
    return graph.input_shape[graph.feature_axis].fixed


def _fall_back(graph: CheckedGraph, kernel: kernel_pb2.Kernel) -> _Names:
    kernel.graph.graph.CopyFrom(canonical_graph(graph))
    return _Names(graph_names(graph))


def canonical_graph(graph: CheckedGraph) -> blueprint_pb2.Graph:
    """Returns a checked graph as a message with ids by position and defaults filled in."""
    ids = ["x"] + [f"n{index}" for index in range(len(graph.nodes))]
    message = blueprint_pb2.Graph()
    given = message.inputs.add(id="x", source=graph.source)
    given.shape.dims.extend(encode_size(size) for size in graph.input_shape)
    for index, node in enumerate(graph.nodes):
        added = message.nodes.add(id=f"n{index}", op=node.spec.op)
        added.inputs.extend(
            blueprint_pb2.ValueRef(node=ids[value], output_index=at) for value, at in node.inputs
        )
        kinds = {attribute.name: attribute.kind for attribute in node.spec.attributes}
        for name, value in node.attributes.values.items():
            added.attributes[name].CopyFrom(encode(kinds[name], value))
    message.outputs.add(node=ids[graph.output[0]], output_index=graph.output[1])
    return message


def _ops(graph: CheckedGraph) -> list[str]:
    return [node.spec.name for node in graph.nodes]


def _linear_names(
    node: CheckedNode, index: int, weight: str, bias: str
) -> dict[tuple[int, str], str]:
    names = {(index, "weight"): weight}
    return names | ({(index, "bias"): bias} if node.attributes.flag("bias") else {})
