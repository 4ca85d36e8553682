"""Typed attributes of ops: their specifications, and their values between protobuf and Python."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from esper.blueprints.errors import BlueprintError
from esper.blueprints.sizes import SYMBOLS
from esper.blueprints.sizes import Shape
from esper.blueprints.sizes import Size
from esper.common.v1 import blueprint_pb2

MAX_ELEMENTS = 2**31 - 1
MAX_AXES = 8

Value = bool | int | float | str | Size | Shape | tuple[int, ...]


class Kind(Enum):
    """The type of an attribute; the value is the field of `Attribute` that holds it."""

    INT = "int_value"
    FLOAT = "float_value"
    BOOL = "bool_value"
    STRING = "string_value"
    DIM = "dim_value"
    DIMS = "dims_value"
    INTS = "ints_value"


@dataclass(frozen=True)
class AttributeSpec:
    """One attribute of an op.

    Attributes:
        name: Its name.
        kind: Its type.
        default: The value where it is absent; None where absence has a meaning of its own.
        required: Whether it must be given.
        low: Least value of a number, inclusive.
        high: Greatest value of a number, inclusive.
        choices: The words that a string may be.
    """

    name: str
    kind: Kind
    default: Value | None = None
    required: bool = False
    low: float | None = None
    high: float | None = None
    choices: tuple[str, ...] = ()

    def check(self, field: str, value: Value) -> None:
        """Raises BlueprintError unless a value of the right type is within the bounds."""
        if self.choices and value not in self.choices:
            raise BlueprintError(field, value, f"must be one of {', '.join(self.choices)}")
        if isinstance(value, int | float):
            if not math.isfinite(value):
                raise BlueprintError(field, value, "must be finite")
            if self.low is not None and value < self.low:
                raise BlueprintError(field, value, f"must be at least {self.low:g}")
            if self.high is not None and value > self.high:
                raise BlueprintError(field, value, f"must be at most {self.high:g}")


class Attributes:
    """The attributes of one node, defaults filled in."""

    def __init__(self, values: Mapping[str, Value]) -> None:
        self.values = dict(values)

    def __contains__(self, name: str) -> bool:
        return name in self.values

    def integer(self, name: str) -> int:
        """Returns an INT."""
        value = self.values[name]
        assert isinstance(value, int)
        return value

    def number(self, name: str) -> float:
        """Returns a FLOAT."""
        value = self.values[name]
        assert isinstance(value, float)
        return value

    def flag(self, name: str) -> bool:
        """Returns a BOOL."""
        value = self.values[name]
        assert isinstance(value, bool)
        return value

    def word(self, name: str) -> str:
        """Returns a STRING."""
        value = self.values[name]
        assert isinstance(value, str)
        return value

    def size(self, name: str) -> Size:
        """Returns a DIM."""
        value = self.values[name]
        assert isinstance(value, Size)
        return value

    def shape(self, name: str) -> Shape:
        """Returns a DIMS."""
        value = self.values[name]
        assert isinstance(value, tuple)
        return tuple(size for size in value if isinstance(size, Size))

    def integers(self, name: str) -> tuple[int, ...]:
        """Returns an INTS."""
        value = self.values[name]
        assert isinstance(value, tuple)
        return tuple(number for number in value if isinstance(number, int))


def decode_dim(field: str, dim: blueprint_pb2.Dim, bindings: Mapping[str, int]) -> Size:
    """Returns the size that a dim stands for, with bound symbols replaced.

    Raises:
        BlueprintError: Where it has no value, an unknown symbol, or a size out of bounds.
    """
    match dim.WhichOneof("value"):
        case "size":
            if not 1 <= dim.size <= MAX_ELEMENTS:
                raise BlueprintError(
                    f"{field}.size", dim.size, f"must be at least 1 and at most {MAX_ELEMENTS}"
                )
            return Size.of(dim.size)
        case "symbol":
            if dim.symbol not in SYMBOLS:
                raise BlueprintError(
                    f"{field}.symbol", dim.symbol, f"must be one of {', '.join(SYMBOLS)}"
                )
            return Size.symbol(dim.symbol).bind(bindings)
        case _:
            raise BlueprintError(field, "", "must have a size or a symbol")


def decode_dims(field: str, dims: blueprint_pb2.Dims, bindings: Mapping[str, int]) -> Shape:
    """Returns the shape that a list of dims stands for, with bound symbols replaced.

    Raises:
        BlueprintError: Where it has no or too many axes, or one of them is unsound.
    """
    if not 1 <= len(dims.dims) <= MAX_AXES:
        raise BlueprintError(field, len(dims.dims), f"must have 1 to {MAX_AXES} axes")
    return tuple(
        decode_dim(f"{field}.dims[{axis}]", dim, bindings) for axis, dim in enumerate(dims.dims)
    )


def decode(
    field: str, spec: AttributeSpec, attribute: blueprint_pb2.Attribute, bindings: Mapping[str, int]
) -> Value:
    """Returns an attribute's value after checking it against its specification.

    Args:
        field: Path of the attribute for errors.
        spec: What it must be.
        attribute: The protobuf message.
        bindings: Numbers of the symbols that are bound.

    Raises:
        BlueprintError: Where the type is another, a number is not finite or out of bounds, or a
            word is unknown.
    """
    given = attribute.WhichOneof("value")
    if given != spec.kind.value:
        shown = "absent" if given is None else given
        raise BlueprintError(field, shown, f"must be given as {spec.kind.value}")
    value: Value
    match spec.kind:
        case Kind.INT:
            value = attribute.int_value
        case Kind.FLOAT:
            value = attribute.float_value
        case Kind.BOOL:
            value = attribute.bool_value
        case Kind.STRING:
            value = attribute.string_value
        case Kind.DIM:
            value = decode_dim(field, attribute.dim_value, bindings)
        case Kind.DIMS:
            value = decode_dims(field, attribute.dims_value, bindings)
        case Kind.INTS:
            value = tuple(attribute.ints_value.values)
            if len(value) > MAX_AXES:
                raise BlueprintError(field, len(value), f"must have at most {MAX_AXES} numbers")
    spec.check(field, value)
    return value


def encode_size(size: Size) -> blueprint_pb2.Dim:
    """Returns the dim of a fixed size or a lone symbol, the only sizes that attributes hold."""
    if size.fixed is not None:
        return blueprint_pb2.Dim(size=size.fixed)
    (name,) = size.symbols
    return blueprint_pb2.Dim(symbol=name)


def encode(kind: Kind, value: Value) -> blueprint_pb2.Attribute:
    """Returns a value of a kind as its protobuf message."""
    match kind:
        case Kind.INT:
            assert isinstance(value, int)
            return blueprint_pb2.Attribute(int_value=value)
        case Kind.FLOAT:
            assert isinstance(value, float)
            return blueprint_pb2.Attribute(float_value=value)
        case Kind.BOOL:
            assert isinstance(value, bool)
            return blueprint_pb2.Attribute(bool_value=value)
        case Kind.STRING:
            assert isinstance(value, str)
            return blueprint_pb2.Attribute(string_value=value)
        case Kind.DIM:
            assert isinstance(value, Size)
            return blueprint_pb2.Attribute(dim_value=encode_size(value))
        case Kind.DIMS:
            shape = Attributes({"shape": value}).shape("shape")
            dims = [encode_size(size) for size in shape]
            return blueprint_pb2.Attribute(dims_value=blueprint_pb2.Dims(dims=dims))
        case Kind.INTS:
            numbers = Attributes({"numbers": value}).integers("numbers")
            return blueprint_pb2.Attribute(ints_value=blueprint_pb2.Ints(values=numbers))
