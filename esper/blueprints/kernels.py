"""What a kernel computes, as a graph whose parameters carry the kernel's names."""

from collections.abc import Mapping
from dataclasses import dataclass

from esper.blueprints.attributes import MAX_ELEMENTS
from esper.blueprints.builder import GraphBuilder
from esper.blueprints.checker import CheckedGraph
from esper.blueprints.checker import Layout
from esper.blueprints.checker import check_graph
from esper.blueprints.errors import BlueprintError
from esper.blueprints.rules import Parameter
from esper.common.v1 import blueprint_pb2
from esper.common.v1 import kernel_pb2

MAX_WINDOW = 31

CHANNEL_KINDS = (kernel_pb2.SLOT_KIND_CONV, kernel_pb2.SLOT_KIND_CHANNEL_NORM)

ACTIVATIONS = {
    "identity": kernel_pb2.ACTIVATION_IDENTITY,
    "relu": kernel_pb2.ACTIVATION_RELU,
    "gelu": kernel_pb2.ACTIVATION_GELU,
    "silu": kernel_pb2.ACTIVATION_SILU,
    "tanh": kernel_pb2.ACTIVATION_TANH,
}
_ACTIVATION_NAMES = {value: name for name, value in ACTIVATIONS.items()}

# (value number of a node minus 1, role) -> the kernel's name of the parameter
ParameterNames = Mapping[tuple[int, str], str]


@dataclass(frozen=True)
class Computation:
    """A graph with every symbol but N, T, H, W bound, and its parameters by the kernel's names.

    Attributes:
        graph: The graph.
        names: The kernel's name of each parameter by (index of the node, role), in the order in
            which the kernel lists them.
        channels_first: Whether the slot keeps its features on axis 1.
    """

    graph: CheckedGraph
    names: ParameterNames
    channels_first: bool

    def parameters(self) -> dict[str, Parameter]:
        """Returns the parameters by the kernel's names, in the kernel's order."""
        owned = {
            (index, parameter.role): parameter
            for index, node in enumerate(self.graph.nodes)
            for parameter in node.parameters
        }
        assert owned.keys() == self.names.keys()
        return {name: owned[key] for key, name in self.names.items()}

    def specs(self) -> list[kernel_pb2.ParameterSpec]:
        """Returns the parameters as a kernel lists them."""
        return [
            kernel_pb2.ParameterSpec(
                name=name,
                shape=fixed_shape(parameter),
                init=parameter.init,
                gain=parameter.gain,
                fan_in=parameter.fan_in.fixed or 0,
            )
            for name, parameter in self.parameters().items()
        ]

    def flops_per_token(self) -> int:
        """Returns the part of the cost that is proportional to the number of tokens.

        Costs per pair of positions (attention) or per sample (behind a global pool) depend on
        sizes that no kernel knows and are not part of it.
        """
        symbols = self.graph.layout.token_symbols
        return int(
            sum(
                node.spec.flops(node.input_shapes, node.attributes).coefficient(symbols)
                for node in self.graph.nodes
            )
        )


def fixed_shape(parameter: Parameter) -> tuple[int, ...]:
    """Returns the shape of a parameter of a bound graph."""
    shape = tuple(size.fixed for size in parameter.shape)
    assert None not in shape, parameter
    return tuple(size for size in shape if size is not None)


def graph_names(graph: CheckedGraph) -> dict[tuple[int, str], str]:
    """Returns the parameter names of a kernel that runs in the interpreter."""
    return {
        (index, parameter.role): f"n{index}_{parameter.role}"
        for index, node in enumerate(graph.nodes)
        for parameter in node.parameters
    }


def source_axes(kernel: kernel_pb2.Kernel) -> int | None:
    """Returns the number of axes that a kernel needs its source to have; None where any will do."""
    match kernel.WhichOneof("lowering"):
        case "squeeze_excite":
            return kernel.squeeze_excite.position_axes + 2
        case "depthwise":
            return kernel.depthwise.position_axes + 2
        case "graph":
            num_axes = len(kernel.graph.graph.inputs[0].shape.dims)
            return num_axes if num_axes > 2 else None  # two are tokens: any number is flattened
        case _:
            return None


def computation(kernel: kernel_pb2.Kernel) -> Computation:
    """Returns what a kernel's lowering computes, made of plain ops.

    Raises:
        BlueprintError: Where signature or lowering are not sound.
    """
    check_signature(kernel.signature)
    signature = kernel.signature
    names: ParameterNames | None = None
    match kernel.WhichOneof("lowering"):
        case "bottleneck":
            graph, names = _bottleneck(kernel.bottleneck, signature)
        case "affine":
            graph, names = _affine(kernel.affine, signature)
        case "squeeze_excite":
            graph, names = _squeeze_excite(kernel.squeeze_excite, signature)
        case "depthwise":
            graph, names = _depthwise(kernel.depthwise, signature)
        case "noop":
            builder = GraphBuilder(signature.source)
            graph = builder.returns(builder.node("scale", builder.input, factor=0.0))
            names = {}
        case "graph":
            graph = kernel.graph.graph
        case _:
            raise BlueprintError("kernel.lowering", "absent", "must be given")
    checked = bind(graph, signature, {})
    if names is None:
        names = graph_names(checked)
    return Computation(checked, names, signature.slot_kind in CHANNEL_KINDS)


def bind(
    graph: blueprint_pb2.Graph,
    signature: kernel_pb2.KernelSignature,
    rank: Mapping[str, int],
) -> CheckedGraph:
    """Returns a graph with D and C bound by a signature and R by `rank`.

    Raises:
        BlueprintError: Where the graph is unsound or does not fit the place.
    """
    widths = {"D": signature.chunk_width, "C": signature.source_width}
    checked = check_graph(graph, {**widths, **rank})
    if checked.source != signature.source:
        raise BlueprintError(
            "signature.source",
            blueprint_pb2.SeedSource.Name(signature.source),
            f"must be what the graph reads, {blueprint_pb2.SeedSource.Name(checked.source)}",
        )
    width = checked.input_shape[checked.feature_axis].fixed
    if width != signature.source_width:
        raise BlueprintError(
            "signature.source_width",
            signature.source_width,
            f"must be the {width} features that the graph reads",
        )
    planes = checked.layout in (Layout.PLANE_1D, Layout.PLANE_2D)
    channels_first = signature.slot_kind in CHANNEL_KINDS
    if checked.layout is not Layout.TOKENS and planes != channels_first:
        raise BlueprintError(
            "signature.slot_kind",
            kernel_pb2.SlotKind.Name(signature.slot_kind),
            f"a graph over {checked.layout.value} needs "
            + ("channels on axis 1" if planes else "features on the last axis"),
        )
    return checked


def check_signature(signature: kernel_pb2.KernelSignature) -> None:
    """Raises BlueprintError unless a signature is complete and its widths agree."""
    required = {
        "slot_kind": (signature.slot_kind, kernel_pb2.SlotKind),
        "source": (signature.source, blueprint_pb2.SeedSource),
        "dtype": (signature.dtype, kernel_pb2.DataType),
        "device_class": (signature.device_class, kernel_pb2.DeviceClass),
    }
    for name, (value, enum) in required.items():
        if value == 0 or value not in enum.values():
            raise BlueprintError(f"signature.{name}", value, "must be a known value, not 0")
    for name, width in (
        ("chunk_width", signature.chunk_width),
        ("source_width", signature.source_width),
    ):
        if not 1 <= width <= MAX_ELEMENTS:
            raise BlueprintError(
                f"signature.{name}", width, f"must be at least 1 and at most {MAX_ELEMENTS}"
            )
    if (
        signature.source == blueprint_pb2.SEED_SOURCE_OUTPUT
        and signature.source_width != signature.chunk_width
    ):
        raise BlueprintError(
            "signature.source_width",
            signature.source_width,
            f"must equal chunk_width {signature.chunk_width} where the seed reads its own chunk",
        )


def check_kernel(kernel: kernel_pb2.Kernel) -> Computation:
    """Returns what a kernel computes after checking that all of its fields agree.

    Raises:
        BlueprintError: Where they do not; names the field, its value and the rule.
    """
    computed = computation(kernel)
    expected = computed.specs()
    if len(kernel.parameters) != len(expected):
        raise BlueprintError(
            "kernel.parameters", len(kernel.parameters), f"the lowering takes {len(expected)}"
        )
    for index, (given, wanted) in enumerate(zip(kernel.parameters, expected, strict=True)):
        field = f"kernel.parameters[{index}]"
        if given.name != wanted.name:
            raise BlueprintError(f"{field}.name", given.name, f"must be {wanted.name}")
        if given.shape != wanted.shape:
            raise BlueprintError(f"{field}.shape", list(given.shape), f"must be {wanted.shape}")
        if given.init not in (
            kernel_pb2.INIT_KIND_ZEROS,
            kernel_pb2.INIT_KIND_ONES,
            kernel_pb2.INIT_KIND_KAIMING_UNIFORM,
            kernel_pb2.INIT_KIND_NORMAL,
        ):
            raise BlueprintError(f"{field}.init", given.init, "must be a known init")
        if not 0 <= given.gain <= 1e6:
            raise BlueprintError(f"{field}.gain", given.gain, "must be at least 0 and at most 1e6")
        if given.init == kernel_pb2.INIT_KIND_KAIMING_UNIFORM and given.fan_in < 1:
            raise BlueprintError(f"{field}.fan_in", given.fan_in, "must be at least 1")
    count = parameter_count(expected)
    for name, given_value, wanted_value in (
        ("parameter_count", kernel.parameter_count, count),
        ("flops_per_token", kernel.flops_per_token, computed.flops_per_token()),
    ):
        if given_value != wanted_value:
            raise BlueprintError(f"kernel.{name}", given_value, f"must be {wanted_value}")
    return computed


def parameter_count(specs: list[kernel_pb2.ParameterSpec]) -> int:
    """Returns the number of trainable elements.

    Raises:
        BlueprintError: Where it is more than a kernel may have.
    """
    total = 0
    for spec in specs:
        elements = 1
        for size in spec.shape:
            elements *= size
        total += elements
    if total > MAX_ELEMENTS:
        raise BlueprintError("kernel.parameter_count", total, f"must be at most {MAX_ELEMENTS}")
    return total


def _bottleneck(
    lowering: kernel_pb2.BottleneckLowering, signature: kernel_pb2.KernelSignature
) -> tuple[blueprint_pb2.Graph, ParameterNames]:
    activation = _activation("bottleneck", lowering.activation)
    _check_range("bottleneck.rank", lowering.rank, 1, MAX_ELEMENTS)
    if lowering.bias_gate and not lowering.gated:
        raise BlueprintError("kernel.bottleneck.bias_gate", True, "must be false without gated")
    builder = GraphBuilder(signature.source)
    rank = lowering.rank
    names: dict[tuple[int, str], str] = {}

    def name(node: int, weight: str, bias: str, biased: bool) -> None:
        names[node, "weight"] = weight
        if biased:
            names[node, "bias"] = bias

    if lowering.gated:
        # gate(value, activated): the value branch is node 0, the activated one node 1.
        value = builder.node("linear", builder.input, out=rank, bias=lowering.bias_gate)
        hidden = builder.node("linear", builder.input, out=rank, bias=lowering.bias_in)
        hidden = builder.node("gate", value, hidden, activation=activation)
        name(1, "A", "a", lowering.bias_in)
        name(0, "G", "c", lowering.bias_gate)
    else:
        hidden = builder.node("linear", builder.input, out=rank, bias=lowering.bias_in)
        if activation != "identity":
            hidden = builder.node(activation, hidden)
        name(0, "A", "a", lowering.bias_in)
    out = len(builder.graph.nodes)
    hidden = builder.node("linear", hidden, out="D", bias=lowering.bias_out)
    name(out, "B", "b", lowering.bias_out)
    return builder.returns(hidden), names


def _affine(
    lowering: kernel_pb2.AffineLowering, signature: kernel_pb2.KernelSignature
) -> tuple[blueprint_pb2.Graph, ParameterNames]:
    builder = GraphBuilder(signature.source)
    result = builder.node("scale", builder.input, bias=lowering.bias)
    names = {(0, "weight"): "w"}
    if lowering.bias:
        names[0, "bias"] = "b"
    return builder.returns(result), names


def _squeeze_excite(
    lowering: kernel_pb2.SqueezeExciteLowering, signature: kernel_pb2.KernelSignature
) -> tuple[blueprint_pb2.Graph, ParameterNames]:
    activation = _activation("squeeze_excite", lowering.activation)
    _check_range("squeeze_excite.rank", lowering.rank, 1, MAX_ELEMENTS)
    layout, conv = _planes("squeeze_excite", lowering.position_axes)
    builder = GraphBuilder(signature.source, layout)
    pooled = builder.node("pool", builder.input, kernel=0)
    hidden = builder.node(conv, pooled, out=lowering.rank, kernel=1, bias=lowering.bias_in)
    if activation != "identity":
        hidden = builder.node(activation, hidden)
    last = len(builder.graph.nodes)
    gate = builder.node(conv, hidden, out="D", kernel=1, bias=lowering.bias_out)
    result = builder.node("gate", builder.input, gate, activation="tanh")
    return builder.returns(result), _product_names(1, lowering.bias_in, last, lowering.bias_out)


def _depthwise(
    lowering: kernel_pb2.DepthwiseLowering, signature: kernel_pb2.KernelSignature
) -> tuple[blueprint_pb2.Graph, ParameterNames]:
    activation = _activation("depthwise", lowering.activation)
    _check_range("depthwise.window", lowering.window, 1, MAX_WINDOW)
    if lowering.window % 2 == 0:
        raise BlueprintError("kernel.depthwise.window", lowering.window, "must be odd")
    layout, conv = _planes("depthwise", lowering.position_axes)
    builder = GraphBuilder(signature.source, layout)
    channels = signature.source_width
    hidden = builder.node(
        conv,
        builder.input,
        out=channels,
        groups=channels,
        kernel=lowering.window,
        bias=lowering.bias_in,
    )
    if activation != "identity":
        hidden = builder.node(activation, hidden)
    last = len(builder.graph.nodes)
    result = builder.node(conv, hidden, out="D", kernel=1, bias=lowering.bias_out)
    return builder.returns(result), _product_names(0, lowering.bias_in, last, lowering.bias_out)


def _product_names(first: int, bias_in: bool, last: int, bias_out: bool) -> ParameterNames:
    """Names of what goes into the hidden features at one node and out of them at another."""
    names = {(first, "weight"): "A"}
    if bias_in:
        names[first, "bias"] = "a"
    names[last, "weight"] = "B"
    if bias_out:
        names[last, "bias"] = "b"
    return names


def _planes(family: str, position_axes: int) -> tuple[Layout, str]:
    _check_range(f"{family}.position_axes", position_axes, 1, 2)
    return (Layout.PLANE_1D, "conv1d") if position_axes == 1 else (Layout.PLANE_2D, "conv2d")


def _activation(family: str, activation: kernel_pb2.Activation) -> str:
    if activation not in _ACTIVATION_NAMES:
        raise BlueprintError(
            f"kernel.{family}.activation", activation, "must be a known activation"
        )
    return _ACTIVATION_NAMES[activation]


def _check_range(field: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise BlueprintError(f"kernel.{field}", value, f"must be {low} to {high}")
