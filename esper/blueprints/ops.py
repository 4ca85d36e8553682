"""The op table: the one place that says what each op takes, owns, returns and costs."""

from collections.abc import Callable
from dataclasses import dataclass

from esper.blueprints import rules
from esper.blueprints.attributes import Attributes
from esper.blueprints.attributes import AttributeSpec
from esper.blueprints.attributes import Kind
from esper.blueprints.rules import Parameter
from esper.blueprints.rules import Shapes
from esper.blueprints.sizes import Shape
from esper.blueprints.sizes import Size
from esper.common.v1 import blueprint_pb2

ACTIVATIONS = ("identity", "relu", "gelu", "silu", "tanh", "sigmoid")
MAX_PARTS = 64
MAX_KERNEL = 31


@dataclass(frozen=True)
class OpSpec:
    """What holds for one op.

    Attributes:
        op: The op.
        summary: What it computes, as a shape rule for people.
        attributes: Its attributes.
        shape: Returns the shapes of the outputs; raises RuleViolation.
        parameters: Returns the trainable tensors that a node owns.
        flops: Returns the floating-point operations, two per multiply-add.
        min_inputs: Least number of operands.
        max_inputs: Greatest number of operands.
    """

    op: blueprint_pb2.Op
    summary: str
    attributes: tuple[AttributeSpec, ...] = ()
    shape: Callable[[Shapes, Attributes], list[Shape]] = rules.same
    parameters: Callable[[Shapes, Attributes], list[Parameter]] = rules.no_parameters
    flops: Callable[[Shapes, Attributes], Size] = rules.no_flops
    min_inputs: int = 1
    max_inputs: int = 1

    @property
    def name(self) -> str:
        """The op's name in lower case, such as `layer_norm`."""
        return blueprint_pb2.Op.Name(self.op).removeprefix("OP_").lower()

    def num_outputs(self, attributes: Attributes) -> int:
        """Returns the number of outputs of a node with these attributes."""
        return attributes.integer("parts") if "parts" in attributes else 1


def _init(default: str, *choices: str) -> AttributeSpec:
    return AttributeSpec("init", Kind.STRING, default, choices=(default, *choices))


def _axis(default: int = -1) -> AttributeSpec:
    return AttributeSpec("axis", Kind.INT, default)


def _flag(name: str, default: bool) -> AttributeSpec:
    return AttributeSpec(name, Kind.BOOL, default)


_OUT = AttributeSpec("out", Kind.DIM, required=True)
_WEIGHT_INIT = _init("kaiming_uniform", "zeros", "normal")
_GAIN = AttributeSpec("gain", Kind.FLOAT, 1.0, low=1e-6, high=1e6)
_EPS = AttributeSpec("eps", Kind.FLOAT, 1e-5, low=1e-12, high=1.0)
_GROUPS = AttributeSpec("groups", Kind.DIM, Size.of(1))
_LINEAR = (_OUT, _flag("bias", True), _WEIGHT_INIT, _GAIN)
_CONV = (
    _OUT,
    AttributeSpec("kernel", Kind.INT, required=True, low=1, high=MAX_KERNEL),
    AttributeSpec("padding", Kind.INT, low=0, high=MAX_KERNEL * MAX_KERNEL),
    _GROUPS,
    AttributeSpec("dilation", Kind.INT, 1, low=1, high=MAX_KERNEL),
    _flag("bias", True),
    _WEIGHT_INIT,
    _GAIN,
)
_REDUCTION = (_axis(), _flag("keepdim", False))


def _elementwise(op: blueprint_pb2.Op, formula: str) -> OpSpec:
    summary = f"{formula}, sizes of 1 broadcast"
    return OpSpec(op, summary, shape=rules.broadcast, min_inputs=2, max_inputs=2)


_SPECS = (
    OpSpec(
        blueprint_pb2.OP_LINEAR,
        "[..., F] to [..., out]: x W + b",
        _LINEAR,
        rules.linear,
        rules.linear_parameters,
        rules.linear_flops,
    ),
    OpSpec(
        blueprint_pb2.OP_MATMUL,
        "[N, ..., i, j] by [N, ..., j, k] to [N, ..., i, k]",
        shape=rules.matmul,
        flops=rules.matmul_flops,
        min_inputs=2,
        max_inputs=2,
    ),
    _elementwise(blueprint_pb2.OP_ADD, "a + b"),
    _elementwise(blueprint_pb2.OP_SUB, "a - b"),
    _elementwise(blueprint_pb2.OP_MUL, "a * b"),
    _elementwise(blueprint_pb2.OP_DIV, "a / b"),
    OpSpec(blueprint_pb2.OP_RELU, "max(x, 0)"),
    OpSpec(blueprint_pb2.OP_GELU, "x times the normal distribution function of x, exact"),
    OpSpec(blueprint_pb2.OP_SILU, "x * sigmoid(x)"),
    OpSpec(blueprint_pb2.OP_TANH, "tanh(x)"),
    OpSpec(blueprint_pb2.OP_SIGMOID, "1 / (1 + exp(-x))"),
    OpSpec(blueprint_pb2.OP_SOFTMAX, "softmax over axis", (_axis(),), rules.along_axis),
    OpSpec(
        blueprint_pb2.OP_LAYER_NORM,
        "[..., F]: (x - mean) / sqrt(variance + eps) * w + b over the last axis",
        (_EPS, _flag("affine", True)),
        rules.feature_norm,
        rules.layer_norm_parameters,
    ),
    OpSpec(
        blueprint_pb2.OP_RMS_NORM,
        "[..., F]: x / sqrt(mean(x^2) + eps) * w over the last axis",
        (_EPS, _flag("affine", True)),
        rules.feature_norm,
        rules.rms_norm_parameters,
    ),
    OpSpec(
        blueprint_pb2.OP_GROUP_NORM,
        "[N, C, ...]: as layer_norm over each of `groups` groups of channels and all positions",
        (_GROUPS, _EPS, _flag("affine", True)),
        rules.group_norm,
        rules.group_norm_parameters,
    ),
    OpSpec(blueprint_pb2.OP_SUM, "sum over axis", _REDUCTION, rules.reduce),
    OpSpec(blueprint_pb2.OP_MEAN, "mean over axis", _REDUCTION, rules.reduce),
    OpSpec(
        blueprint_pb2.OP_MAX,
        "maximum over axis; equal maxima share the gradient",
        _REDUCTION,
        rules.reduce,
    ),
    OpSpec(
        blueprint_pb2.OP_RESHAPE,
        "[N, ...] to shape, as many elements in the same order",
        (AttributeSpec("shape", Kind.DIMS, required=True),),
        rules.reshape,
    ),
    OpSpec(
        blueprint_pb2.OP_PERMUTE,
        "axis i of the output is axis axes[i] of the input; axes[0] is 0",
        (AttributeSpec("axes", Kind.INTS, required=True),),
        rules.permute,
    ),
    OpSpec(
        blueprint_pb2.OP_CONCAT,
        "inputs joined along axis; their other sizes are equal",
        (_axis(),),
        rules.concat,
        min_inputs=2,
        max_inputs=MAX_PARTS,
    ),
    OpSpec(
        blueprint_pb2.OP_SPLIT,
        "`parts` outputs, equal cuts along axis",
        (_axis(), AttributeSpec("parts", Kind.INT, required=True, low=2, high=MAX_PARTS)),
        rules.split,
    ),
    OpSpec(
        blueprint_pb2.OP_CONV1D,
        "[N, C, T] to [N, out, T + 2 padding - dilation (kernel - 1)], stride 1",
        _CONV,
        rules.conv1d,
        rules.conv_parameters,
        rules.conv_flops,
    ),
    OpSpec(
        blueprint_pb2.OP_CONV2D,
        "[N, C, H, W] to [N, out, ...], each position axis as conv1d, stride 1",
        _CONV,
        rules.conv2d,
        rules.conv_parameters,
        rules.conv_flops,
    ),
    OpSpec(
        blueprint_pb2.OP_POOL,
        "[N, C, T] or [N, C, H, W]: mean over the window around each position that lies inside, "
        "or with kernel 0 over all positions to size 1",
        (AttributeSpec("kernel", Kind.INT, 0, low=0, high=MAX_KERNEL),),
        rules.pool,
    ),
    OpSpec(
        blueprint_pb2.OP_LOW_RANK_MATMUL,
        "[..., F] to [..., out]: x down up + b, with `rank` features between",
        (AttributeSpec("rank", Kind.DIM, required=True), *_LINEAR),
        rules.low_rank,
        rules.low_rank_parameters,
        rules.low_rank_flops,
    ),
    OpSpec(
        blueprint_pb2.OP_ATTENTION,
        "[N, T, F]: softmax(q k^T / sqrt(F / heads)) v per head, projected by out",
        (
            AttributeSpec("heads", Kind.INT, 1, low=1, high=4096),
            _flag("causal", False),
            _WEIGHT_INIT,
        ),
        rules.attention,
        rules.attention_parameters,
        rules.attention_flops,
    ),
    OpSpec(
        blueprint_pb2.OP_GATE,
        "a * activation(b), sizes of 1 broadcast",
        (AttributeSpec("activation", Kind.STRING, "sigmoid", choices=ACTIVATIONS),),
        rules.broadcast,
        min_inputs=2,
        max_inputs=2,
    ),
    OpSpec(
        blueprint_pb2.OP_SCALE,
        "x * w + b with a vector along axis, or x * factor where factor is given",
        (
            AttributeSpec("factor", Kind.FLOAT),
            _axis(),
            _flag("bias", False),
            _init("ones", "zeros"),
        ),
        rules.scale,
        rules.scale_parameters,
    ),
    OpSpec(
        blueprint_pb2.OP_DROPOUT,
        "in training, x / (1 - p) with probability 1 - p and 0 otherwise; else x",
        (AttributeSpec("p", Kind.FLOAT, 0.1, low=0.0, high=0.99),),
    ),
)

OPS: dict[int, OpSpec] = {spec.op: spec for spec in _SPECS}
BY_NAME: dict[str, OpSpec] = {spec.name: spec for spec in _SPECS}
