"""Shape, parameter and cost rules that the op table is made of."""

from collections.abc import Sequence
from dataclasses import dataclass

from esper.blueprints.attributes import Attributes
from esper.blueprints.sizes import Shape
from esper.blueprints.sizes import Size
from esper.blueprints.sizes import format_shape
from esper.blueprints.sizes import product
from esper.common.v1 import kernel_pb2

Shapes = Sequence[Shape]


class RuleViolation(Exception):
    """A node's operands or attributes break its op's rule; the checker adds where the node is."""

    def __init__(self, where: str, value: object, rule: str) -> None:
        super().__init__(where, value, rule)
        self.where = where
        self.value = value
        self.rule = rule


@dataclass(frozen=True)
class Parameter:
    """One trainable tensor that a node owns.

    Attributes:
        role: Its name within the node, such as `weight`.
        shape: Its shape; free of run-time symbols.
        init: How it is born.
        gain: Scale of the random inits.
        fan_in: Number of inputs of one output feature, for the Kaiming init.
    """

    role: str
    shape: Shape
    init: kernel_pb2.InitKind
    gain: float = 1.0
    fan_in: Size = Size.of(1)


INITS: dict[str, kernel_pb2.InitKind] = {
    "zeros": kernel_pb2.INIT_KIND_ZEROS,
    "ones": kernel_pb2.INIT_KIND_ONES,
    "kaiming_uniform": kernel_pb2.INIT_KIND_KAIMING_UNIFORM,
    "normal": kernel_pb2.INIT_KIND_NORMAL,
}


def _axis(shape: Shape, attributes: Attributes) -> int:
    """Returns the node's axis counted from the front; never the leading one."""
    axis = attributes.integer("axis")
    if not -len(shape) <= axis < len(shape):
        raise RuleViolation("attributes.axis", axis, f"must be an axis of {format_shape(shape)}")
    if axis % len(shape) == 0:
        raise RuleViolation("attributes.axis", axis, "must not be the leading token axis N")
    return axis % len(shape)


def _features(shape: Shape, axis: int = -1) -> Size:
    """Returns the size of a feature axis, which parameters are made for."""
    size = shape[axis]
    if len(shape) < 2 or size.runtime:
        raise RuleViolation(
            "inputs[0]",
            format_shape(shape),
            f"axis {axis} must have a size that is known when the kernel is compiled",
        )
    return size


def _known(attributes: Attributes, name: str) -> Size:
    """Returns a size that parameters are made for."""
    size = attributes.size(name)
    if size.runtime:
        raise RuleViolation(f"attributes.{name}", size, "must be a number or one of D, C, R")
    return size


def _divide(where: str, size: Size, divisor: Size, what: str) -> Size:
    quotient = size.divide(divisor)
    if quotient is None:
        raise RuleViolation(where, divisor, f"must divide {what} of size {size}")
    return quotient


def same(inputs: Shapes, attributes: Attributes) -> list[Shape]:
    """An op that keeps its input's shape."""
    return [inputs[0]]


def feature_norm(inputs: Shapes, attributes: Attributes) -> list[Shape]:
    """A normalisation of the last axis."""
    _features(inputs[0])
    return [inputs[0]]


def broadcast(inputs: Shapes, attributes: Attributes) -> list[Shape]:
    """An elementwise op of two inputs, with sizes of 1 and missing leading axes broadcast."""
    return [_broadcast(inputs[0], inputs[1])]


def _broadcast(left: Shape, right: Shape) -> Shape:
    one = Size.of(1)
    axes = []
    if len(left) != len(right):
        raise RuleViolation(
            "inputs",
            f"{format_shape(left)} and {format_shape(right)}",
            f"must have the same number of axes, not {len(left)} and {len(right)}",
        )
    for axis, (a, b) in enumerate(zip(left, right, strict=True)):
        if a != b and one not in (a, b):
            raise RuleViolation(
                "inputs",
                f"{format_shape(left)} and {format_shape(right)}",
                f"sizes {a} and {b} of axis {axis} must be equal or 1",
            )
        axes.append(b if a == one else a)
    return tuple(axes)


def linear(inputs: Shapes, attributes: Attributes) -> list[Shape]:
    """A product with a weight over the last axis."""
    _features(inputs[0])
    return [(*inputs[0][:-1], _known(attributes, "out"))]


def low_rank(inputs: Shapes, attributes: Attributes) -> list[Shape]:
    """A product with two thin weights over the last axis."""
    _known(attributes, "rank")
    return linear(inputs, attributes)


def matmul(inputs: Shapes, attributes: Attributes) -> list[Shape]:
    """A product over the last two axes; axes before them broadcast."""
    left, right = inputs
    if len(left) < 3 or len(right) < 3:
        raise RuleViolation(
            "inputs",
            f"{format_shape(left)} and {format_shape(right)}",
            "must have two axes after the token axis N",
        )
    if left[-1] != right[-2]:
        raise RuleViolation(
            "inputs",
            f"{format_shape(left)} and {format_shape(right)}",
            f"inner sizes {left[-1]} and {right[-2]} must be equal",
        )
    return [(*_broadcast(left[:-2], right[:-2]), left[-2], right[-1])]


def along_axis(inputs: Shapes, attributes: Attributes) -> list[Shape]:
    """An op along `axis` that keeps the shape."""
    _axis(inputs[0], attributes)
    return [inputs[0]]


def reduce(inputs: Shapes, attributes: Attributes) -> list[Shape]:
    """A reduction over `axis`."""
    (shape,) = inputs
    axis = _axis(shape, attributes)
    middle = (Size.of(1),) if attributes.flag("keepdim") else ()
    return [shape[:axis] + middle + shape[axis + 1 :]]


def reshape(inputs: Shapes, attributes: Attributes) -> list[Shape]:
    """A new shape with as many elements and the same leading axis."""
    target = attributes.shape("shape")
    if target[0] != inputs[0][0]:
        raise RuleViolation(
            "attributes.shape", format_shape(target), "must begin with the token axis N"
        )
    if product(target) != product(inputs[0]):
        raise RuleViolation(
            "attributes.shape",
            format_shape(target),
            f"{product(target)} elements must equal the {product(inputs[0])} of "
            f"{format_shape(inputs[0])}",
        )
    return [target]


def permute(inputs: Shapes, attributes: Attributes) -> list[Shape]:
    """The axes in another order; the leading one stays."""
    axes = attributes.integers("axes")
    if sorted(axes) != list(range(len(inputs[0]))) or axes[0] != 0:
        raise RuleViolation(
            "attributes.axes",
            list(axes),
            f"must be 0 and then the other axes of {format_shape(inputs[0])}, each once",
        )
    return [tuple(inputs[0][axis] for axis in axes)]


def concat(inputs: Shapes, attributes: Attributes) -> list[Shape]:
    """The inputs joined along `axis`."""
    first = inputs[0]
    axis = _axis(first, attributes)
    total = first[axis]
    for index, shape in enumerate(inputs[1:], start=1):
        if len(shape) != len(first):
            raise RuleViolation(
                f"inputs[{index}]",
                format_shape(shape),
                f"must have as many axes as {format_shape(first)}",
            )
        for other in range(len(first)):
            if other != axis and shape[other] != first[other]:
                raise RuleViolation(
                    f"inputs[{index}]",
                    format_shape(shape),
                    f"sizes {first[other]} and {shape[other]} of axis {other} must be equal",
                )
        total = total + shape[axis]
    return [(*first[:axis], total, *first[axis + 1 :])]


def split(inputs: Shapes, attributes: Attributes) -> list[Shape]:
    """Equal parts along `axis`, one output each."""
    (shape,) = inputs
    axis = _axis(shape, attributes)
    parts = attributes.integer("parts")
    part = _divide("attributes.parts", shape[axis], Size.of(parts), f"axis {axis}")
    return [(*shape[:axis], part, *shape[axis + 1 :])] * parts


def _spatial(shape: Shape, allowed: tuple[int, ...]) -> None:
    if len(shape) - 2 not in allowed:
        layouts = " or ".join({1: "[N, C, T]", 2: "[N, C, H, W]"}[count] for count in allowed)
        raise RuleViolation("inputs[0]", format_shape(shape), f"must be laid out as {layouts}")


def padding(attributes: Attributes) -> int:
    """Returns a convolution's padding on each side; absent means as much as keeps the size."""
    if "padding" in attributes:
        return attributes.integer("padding")
    return attributes.integer("dilation") * (attributes.integer("kernel") - 1) // 2


def _conv(shape: Shape, attributes: Attributes, num_spatial: int) -> list[Shape]:
    _spatial(shape, (num_spatial,))
    channels = _features(shape, 1)
    out = _known(attributes, "out")
    groups = _known(attributes, "groups")
    _divide("attributes.groups", channels, groups, "the input channels")
    _divide("attributes.groups", out, groups, "the output channels")
    reach = attributes.integer("dilation") * (attributes.integer("kernel") - 1)
    if "padding" not in attributes and reach % 2:
        raise RuleViolation(
            "attributes.kernel",
            attributes.integer("kernel"),
            "must be odd, or dilation even, where padding is not given",
        )
    axes = []
    for axis in range(2, 2 + num_spatial):
        size = shape[axis] + (2 * padding(attributes) - reach)
        smallest = size.constant_term if size.runtime else size.constant_term - 1
        if smallest < 0:
            raise RuleViolation(
                "attributes.padding",
                padding(attributes),
                f"must not shrink axis {axis} of {format_shape(shape)} below what the seed reads",
            )
        axes.append(size)
    return [(shape[0], out, *axes)]


def conv1d(inputs: Shapes, attributes: Attributes) -> list[Shape]:
    """A convolution over [N, C, T]."""
    return _conv(inputs[0], attributes, 1)


def conv2d(inputs: Shapes, attributes: Attributes) -> list[Shape]:
    """A convolution over [N, C, H, W]."""
    return _conv(inputs[0], attributes, 2)


def pool(inputs: Shapes, attributes: Attributes) -> list[Shape]:
    """An average over windows that keeps the shape, or over all positions."""
    (shape,) = inputs
    _spatial(shape, (1, 2))
    kernel = attributes.integer("kernel")
    if kernel == 0:
        return [shape[:2] + (Size.of(1),) * (len(shape) - 2)]
    if kernel % 2 == 0:
        raise RuleViolation("attributes.kernel", kernel, "must be 0 or odd")
    return [shape]


def group_norm(inputs: Shapes, attributes: Attributes) -> list[Shape]:
    """A normalisation of groups of channels."""
    channels = _features(inputs[0], 1)
    _divide("attributes.groups", channels, _known(attributes, "groups"), "the channels")
    return [inputs[0]]


def attention(inputs: Shapes, attributes: Attributes) -> list[Shape]:
    """Self-attention over [N, T, D]."""
    (shape,) = inputs
    if len(shape) != 3:
        raise RuleViolation("inputs[0]", format_shape(shape), "must be laid out as [N, T, D]")
    heads = Size.of(attributes.integer("heads"))
    _divide("attributes.heads", _features(shape), heads, "the features")
    return [shape]


def scale(inputs: Shapes, attributes: Attributes) -> list[Shape]:
    """A product with a learned vector along `axis`, or with the constant `factor`."""
    axis = _axis(inputs[0], attributes)
    if "factor" not in attributes:
        _features(inputs[0], axis)
    elif attributes.flag("bias"):
        raise RuleViolation("attributes.bias", True, "must be false where factor is given")
    return [inputs[0]]


def no_parameters(inputs: Shapes, attributes: Attributes) -> list[Parameter]:
    """An op without parameters."""
    return []


def _bias(attributes: Attributes, size: Size) -> list[Parameter]:
    if not attributes.flag("bias"):
        return []
    return [Parameter("bias", (size,), kernel_pb2.INIT_KIND_ZEROS)]


def linear_parameters(inputs: Shapes, attributes: Attributes) -> list[Parameter]:
    """Weight [in, out] by `init`, bias [out] zeros."""
    width, out = inputs[0][-1], attributes.size("out")
    init = INITS[attributes.word("init")]
    weight = Parameter("weight", (width, out), init, attributes.number("gain"), width)
    return [weight, *_bias(attributes, out)]


def low_rank_parameters(inputs: Shapes, attributes: Attributes) -> list[Parameter]:
    """Thin weights down [in, rank] Kaiming and up [rank, out] by `init`, bias [out] zeros."""
    width, rank, out = inputs[0][-1], attributes.size("rank"), attributes.size("out")
    kaiming = kernel_pb2.INIT_KIND_KAIMING_UNIFORM
    down = Parameter("down", (width, rank), kaiming, attributes.number("gain"), width)
    up = Parameter("up", (rank, out), INITS[attributes.word("init")], 1.0, rank)
    return [down, up, *_bias(attributes, out)]


def conv_parameters(inputs: Shapes, attributes: Attributes) -> list[Parameter]:
    """Weight [out, in/groups, kernel, ...] by `init`, bias [out] zeros."""
    out = attributes.size("out")
    group = inputs[0][1].divide(attributes.size("groups"))
    assert group is not None
    window = (Size.of(attributes.integer("kernel")),) * (len(inputs[0]) - 2)
    init = INITS[attributes.word("init")]
    shape = (out, group, *window)
    weight = Parameter("weight", shape, init, attributes.number("gain"), product(shape[1:]))
    return [weight, *_bias(attributes, out)]


def _norm_parameters(width: Size, attributes: Attributes, bias: bool) -> list[Parameter]:
    if not attributes.flag("affine"):
        return []
    weight = Parameter("weight", (width,), kernel_pb2.INIT_KIND_ONES)
    return [weight] + [Parameter("bias", (width,), kernel_pb2.INIT_KIND_ZEROS)] * bias


def layer_norm_parameters(inputs: Shapes, attributes: Attributes) -> list[Parameter]:
    """With `affine`, weight [F] ones and bias [F] zeros."""
    return _norm_parameters(inputs[0][-1], attributes, bias=True)


def rms_norm_parameters(inputs: Shapes, attributes: Attributes) -> list[Parameter]:
    """With `affine`, weight [F] ones."""
    return _norm_parameters(inputs[0][-1], attributes, bias=False)


def group_norm_parameters(inputs: Shapes, attributes: Attributes) -> list[Parameter]:
    """With `affine`, weight [C] ones and bias [C] zeros."""
    return _norm_parameters(inputs[0][1], attributes, bias=True)


def attention_parameters(inputs: Shapes, attributes: Attributes) -> list[Parameter]:
    """Weights qkv [F, 3F] Kaiming and out [F, F] by `init`."""
    width = inputs[0][-1]
    kaiming = kernel_pb2.INIT_KIND_KAIMING_UNIFORM
    qkv = Parameter("qkv", (width, width * 3), kaiming, 1.0, width)
    return [qkv, Parameter("out", (width, width), INITS[attributes.word("init")], 1.0, width)]


def scale_parameters(inputs: Shapes, attributes: Attributes) -> list[Parameter]:
    """Without `factor`, weight [F] by `init` and, with `bias`, bias [F] zeros."""
    if "factor" in attributes:
        return []
    width = inputs[0][attributes.integer("axis")]
    weight = Parameter("weight", (width,), INITS[attributes.word("init")])
    return [weight, *_bias(attributes, width)]


def no_flops(inputs: Shapes, attributes: Attributes) -> Size:
    """An op without matrix products."""
    return Size.of(0)


def linear_flops(inputs: Shapes, attributes: Attributes) -> Size:
    """Two per multiply-add."""
    return product(inputs[0]) * attributes.size("out") * 2


def low_rank_flops(inputs: Shapes, attributes: Attributes) -> Size:
    """Two per multiply-add of both products."""
    rows = product(inputs[0][:-1])
    widths = inputs[0][-1] + attributes.size("out")
    return rows * attributes.size("rank") * widths * 2


def matmul_flops(inputs: Shapes, attributes: Attributes) -> Size:
    """Two per multiply-add."""
    (out,) = matmul(inputs, attributes)
    return product(out) * inputs[0][-1] * 2


def conv_flops(inputs: Shapes, attributes: Attributes) -> Size:
    """Two per multiply-add."""
    (out,) = _conv(inputs[0], attributes, len(inputs[0]) - 2)
    weight = conv_parameters(inputs, attributes)[0]
    return product(out) * product(weight.shape[1:]) * 2


def attention_flops(inputs: Shapes, attributes: Attributes) -> Size:
    """Two per multiply-add: the projections, and the two products over pairs of positions."""
    elements = product(inputs[0])
    return elements * inputs[0][-1] * 8 + elements * inputs[0][-2] * 4
