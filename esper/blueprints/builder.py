"""Builds blueprint graphs from Python values."""

from esper.blueprints.attributes import Kind
from esper.blueprints.attributes import encode
from esper.blueprints.checker import Layout
from esper.blueprints.ops import BY_NAME
from esper.blueprints.sizes import SYMBOLS
from esper.blueprints.sizes import Shape
from esper.blueprints.sizes import Size
from esper.common.v1 import blueprint_pb2

Plain = bool | int | float | str | tuple[int | str, ...]


class GraphBuilder:
    """A graph under construction.

    Attributes:
        graph: The message; complete once `returns` was called.
        input: The value that the graph reads.

    Args:
        source: What the seed feeds in.
        layout: How it is laid out.
        width: Size of its feature axis; None means the symbol that belongs to the source.
    """

    def __init__(
        self,
        source: blueprint_pb2.SeedSource = blueprint_pb2.SEED_SOURCE_OUTPUT,
        layout: Layout = Layout.TOKENS,
        width: int | None = None,
    ) -> None:
        symbol = "D" if source == blueprint_pb2.SEED_SOURCE_OUTPUT else "C"
        axes = layout.value.strip("[]").split(", ")
        dims = [width or symbol if axis == "F" else axis for axis in axes]
        self.graph = blueprint_pb2.Graph()
        self.graph.inputs.add(id="x", source=source, shape=encode_shape(dims).dims_value)
        self.input = blueprint_pb2.ValueRef(node="x")

    def node(
        self, op: str, *operands: blueprint_pb2.ValueRef, **attributes: Plain
    ) -> blueprint_pb2.ValueRef:
        """Adds a node and returns its first output.

        Args:
            op: Name of the op in lower case.
            *operands: The values that it reads, in order.
            **attributes: Its attributes; dims as a number or a symbol, lists as tuples.

        Raises:
            KeyError: Where op or attribute is unknown.
        """
        spec = BY_NAME[op]
        kinds = {attribute.name: attribute.kind for attribute in spec.attributes}
        node = self.graph.nodes.add(id=f"{op}_{len(self.graph.nodes)}", op=spec.op, inputs=operands)
        for name, value in attributes.items():
            node.attributes[name].CopyFrom(_encode_plain(kinds[name], value))
        return blueprint_pb2.ValueRef(node=node.id)

    def returns(self, value: blueprint_pb2.ValueRef) -> blueprint_pb2.Graph:
        """Declares the graph's output and returns the graph."""
        self.graph.outputs.add().CopyFrom(value)
        return self.graph


def output(value: blueprint_pb2.ValueRef, index: int) -> blueprint_pb2.ValueRef:
    """Returns another output of the node that a value belongs to."""
    return blueprint_pb2.ValueRef(node=value.node, output_index=index)


def encode_shape(dims: list[int | str]) -> blueprint_pb2.Attribute:
    """Returns a shape of numbers and symbols as an attribute."""
    return encode(Kind.DIMS, tuple(_size(dim) for dim in dims))


def _size(dim: int | str) -> Size:
    assert isinstance(dim, int) or dim in SYMBOLS, dim
    return Size.of(dim) if isinstance(dim, int) else Size.symbol(dim)


def _encode_plain(kind: Kind, value: Plain) -> blueprint_pb2.Attribute:
    if kind is Kind.DIM:
        assert isinstance(value, int | str)
        return encode(kind, _size(value))
    if kind is Kind.DIMS:
        assert isinstance(value, tuple)
        shape: Shape = tuple(_size(dim) for dim in value)
        return encode(kind, shape)
    if kind is Kind.FLOAT:
        assert isinstance(value, int | float)
        return encode(kind, float(value))
    if kind is Kind.INTS:
        assert isinstance(value, tuple)
        return encode(kind, tuple(number for number in value if isinstance(number, int)))
    assert isinstance(value, bool | int | str)
    return encode(kind, value)
