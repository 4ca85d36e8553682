"""The starting blueprints; each adds exactly zero at birth."""

from collections.abc import Callable
from collections.abc import Mapping
from dataclasses import dataclass

from esper.blueprints.attributes import Attributes
from esper.blueprints.attributes import AttributeSpec
from esper.blueprints.attributes import Kind
from esper.blueprints.attributes import Value
from esper.blueprints.attributes import encode
from esper.blueprints.builder import GraphBuilder
from esper.blueprints.checker import MAX_RANK
from esper.blueprints.checker import Layout
from esper.blueprints.errors import BlueprintError
from esper.blueprints.kernels import ACTIVATIONS
from esper.blueprints.kernels import MAX_WINDOW
from esper.common.v1 import blueprint_pb2

_SOURCES = {
    "output": blueprint_pb2.SEED_SOURCE_OUTPUT,
    "input": blueprint_pb2.SEED_SOURCE_INPUT,
}
# Keeps the variance of a signal through a layer that drops its negative half (He et al., 2015).
_RECTIFIER_GAIN = 2.0**0.5


@dataclass(frozen=True)
class Hyperparameter:
    """A choice that a starting blueprint leaves open.

    Attributes:
        spec: Name, type, default and bounds.
        description: What it does.
    """

    spec: AttributeSpec
    description: str


@dataclass(frozen=True)
class Template:
    """A starting blueprint.

    Attributes:
        description: What it is good for.
        hyperparameters: What may be chosen.
        build: Makes the graph for values of these.
    """

    description: str
    hyperparameters: tuple[Hyperparameter, ...]
    build: Callable[[Attributes], blueprint_pb2.Graph]


def _rank(default: int, description: str = "number of hidden features") -> Hyperparameter:
    return Hyperparameter(
        AttributeSpec("rank", Kind.INT, default, low=1, high=MAX_RANK), description
    )


def _gain(default: float) -> Hyperparameter:
    return Hyperparameter(
        AttributeSpec("gain", Kind.FLOAT, default, low=1e-3, high=1e3),
        "scale at which the weights that read the source are born",
    )


def _activation(default: str) -> Hyperparameter:
    return Hyperparameter(
        AttributeSpec("activation", Kind.STRING, default, choices=tuple(ACTIVATIONS)),
        "nonlinearity of the hidden features",
    )


_SOURCE = Hyperparameter(
    AttributeSpec("source", Kind.STRING, "output", choices=tuple(_SOURCES)),
    "what the seed reads: its chunk of the slot's output, or the slot's input",
)


def _noop(chosen: Attributes) -> blueprint_pb2.Graph:
    graph = GraphBuilder()
    return graph.returns(graph.node("scale", graph.input, factor=0.0))


def _affine(chosen: Attributes) -> blueprint_pb2.Graph:
    graph = GraphBuilder()
    return graph.returns(graph.node("scale", graph.input, bias=True, init="zeros"))


def _lora(chosen: Attributes) -> blueprint_pb2.Graph:
    graph = GraphBuilder(_SOURCES[chosen.word("source")])
    out = graph.node(
        "low_rank_matmul",
        graph.input,
        rank="R",
        out="D",
        bias=False,
        init="zeros",
        gain=chosen.number("gain"),
    )
    return graph.returns(out)


def _bottleneck(chosen: Attributes) -> blueprint_pb2.Graph:
    activation = chosen.word("activation")
    graph = GraphBuilder(_SOURCES[chosen.word("source")])
    hidden = graph.node("linear", graph.input, out="R", gain=chosen.number("gain"))
    if activation != "identity":
        hidden = graph.node(activation, hidden)
    return graph.returns(graph.node("linear", hidden, out="D", init="zeros"))


def _widen(chosen: Attributes) -> blueprint_pb2.Graph:
    graph = GraphBuilder(blueprint_pb2.SEED_SOURCE_INPUT)
    hidden = graph.node("linear", graph.input, out="R", gain=chosen.number("gain"))
    hidden = graph.node("relu", hidden)
    return graph.returns(graph.node("linear", hidden, out="D", bias=False, init="zeros"))


def _glu(chosen: Attributes) -> blueprint_pb2.Graph:
    graph = GraphBuilder(_SOURCES[chosen.word("source")])
    gain = chosen.number("gain")
    value = graph.node("linear", graph.input, out="R", bias=False, gain=gain)
    gate = graph.node("linear", graph.input, out="R", bias=False, gain=gain)
    hidden = graph.node("gate", value, gate, activation=chosen.word("activation"))
    return graph.returns(graph.node("linear", hidden, out="D", bias=False, init="zeros"))


def _norm_mlp(chosen: Attributes) -> blueprint_pb2.Graph:
    graph = GraphBuilder(_SOURCES[chosen.word("source")])
    hidden = graph.node("layer_norm", graph.input)
    hidden = graph.node("linear", hidden, out="R", gain=chosen.number("gain"))
    hidden = graph.node("gelu", hidden)
    return graph.returns(graph.node("linear", hidden, out="D", init="zeros"))


def _squeeze_excite(chosen: Attributes) -> blueprint_pb2.Graph:
    layout, conv = _planes(chosen)
    activation = chosen.word("activation")
    graph = GraphBuilder(layout=layout)
    hidden = graph.node("pool", graph.input, kernel=0)
    hidden = graph.node(conv, hidden, out="R", kernel=1, gain=chosen.number("gain"))
    if activation != "identity":
        hidden = graph.node(activation, hidden)
    gate = graph.node(conv, hidden, out="D", kernel=1, init="zeros")
    return graph.returns(graph.node("gate", graph.input, gate, activation="tanh"))


def _depthwise(chosen: Attributes) -> blueprint_pb2.Graph:
    kernel = chosen.integer("kernel")
    if kernel % 2 == 0:
        raise BlueprintError("hyperparameters.kernel", kernel, "must be odd")
    layout, conv = _planes(chosen)
    source = chosen.word("source")
    channels = "D" if source == "output" else "C"
    graph = GraphBuilder(_SOURCES[source], layout)
    hidden = graph.node(
        conv,
        graph.input,
        out=channels,
        groups=channels,
        kernel=kernel,
        gain=chosen.number("gain"),
    )
    hidden = graph.node("relu", hidden)
    return graph.returns(graph.node(conv, hidden, out="D", kernel=1, init="zeros"))


def _planes(chosen: Attributes) -> tuple[Layout, str]:
    one = chosen.integer("positions") == 1
    return (Layout.PLANE_1D, "conv1d") if one else (Layout.PLANE_2D, "conv2d")


_POSITIONS = Hyperparameter(
    AttributeSpec("positions", Kind.INT, 2, low=1, high=2),
    "axes of the slot beside samples and channels",
)
_KERNEL = Hyperparameter(
    AttributeSpec("kernel", Kind.INT, 3, low=1, high=MAX_WINDOW), "side of the window, odd"
)

_TEMPLATES: Mapping[str, Template] = {
    "noop": Template("Adds nothing; the null control of experiments.", (), _noop),
    "affine": Template("A learned scale and shift of each feature.", (), _affine),
    "lora": Template(
        "A linear map of low rank (Hu et al., arXiv 2106.09685).",
        (_rank(8, "rank of the map"), _SOURCE, _gain(1.0)),
        _lora,
    ),
    "bottleneck": Template(
        "A residual adapter with one hidden layer (Houlsby et al., arXiv 1902.00751).",
        (_rank(16), _activation("gelu"), _SOURCE, _gain(_RECTIFIER_GAIN)),
        _bottleneck,
    ),
    "widen": Template(
        "More hidden units for a block: reads what the block reads, adds to what it returns.",
        (_rank(16, "number of hidden units"), _gain(_RECTIFIER_GAIN)),
        _widen,
    ),
    "glu": Template(
        "A gated hidden layer (Shazeer, arXiv 2002.05202).",
        (_rank(16), _activation("silu"), _SOURCE, _gain(1.0)),
        _glu,
    ),
    "norm_mlp": Template(
        "A normalised hidden layer, as in a transformer block.",
        (_rank(16), _SOURCE, _gain(_RECTIFIER_GAIN)),
        _norm_mlp,
    ),
    "squeeze_excite": Template(
        "A gate for each channel, learned from its mean (Hu et al., arXiv 1709.01507).",
        (_rank(8), _activation("relu"), _POSITIONS, _gain(_RECTIFIER_GAIN)),
        _squeeze_excite,
    ),
    "depthwise": Template(
        "A convolution of each channel by itself, mixed by a pointwise one (Chollet, arXiv "
        "1610.02357).",
        (_KERNEL, _POSITIONS, _SOURCE, _gain(_RECTIFIER_GAIN)),
        _depthwise,
    ),
}


def names() -> tuple[str, ...]:
    """Returns the names of the starting blueprints."""
    return tuple(_TEMPLATES)


def get(name: str, **hyperparameters: int | float | str) -> blueprint_pb2.Blueprint:
    """Returns a starting blueprint.

    Args:
        name: One of `names()`.
        **hyperparameters: Values for what it leaves open; absent ones take their default.

    Raises:
        BlueprintError: Where name or hyperparameter are unknown, or a value has the wrong type or
            is out of bounds.
    """
    if name not in _TEMPLATES:
        raise BlueprintError("blueprint", name, f"must be one of {', '.join(_TEMPLATES)}")
    template = _TEMPLATES[name]
    known = {entry.spec.name: entry for entry in template.hyperparameters}
    for given in hyperparameters:
        if given not in known:
            raise BlueprintError(
                f"hyperparameters.{given}",
                hyperparameters[given],
                f"{name} has no hyperparameter of this name, only {', '.join(known) or 'none'}",
            )
    chosen: dict[str, Value] = {}
    for key, entry in known.items():
        default = entry.spec.default
        assert default is not None
        field = f"hyperparameters.{key}"
        chosen[key] = _typed(field, entry.spec.kind, hyperparameters.get(key, default))
        entry.spec.check(field, chosen[key])
    return blueprint_pb2.Blueprint(
        name=name,
        description=template.description,
        author="The Esper authors",
        hyperparameters=[
            blueprint_pb2.Hyperparameter(
                name=key,
                value=encode(entry.spec.kind, chosen[key]),
                description=entry.description,
            )
            for key, entry in known.items()
        ],
        graph=template.build(Attributes(chosen)),
    )


def _typed(field: str, kind: Kind, value: object) -> Value:
    match kind:
        case Kind.INT if isinstance(value, int) and not isinstance(value, bool):
            return value
        case Kind.FLOAT if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
        case Kind.STRING if isinstance(value, str):
            return value
    wanted = {Kind.INT: "a whole number", Kind.FLOAT: "a number", Kind.STRING: "a word"}[kind]
    raise BlueprintError(field, repr(value), f"must be {wanted}")
