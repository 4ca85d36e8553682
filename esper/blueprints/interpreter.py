"""The reference interpreter: graphs as plain torch modules, correct and differentiable."""

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch import nn
from torch.nn import functional as F

from esper.blueprints import rules
from esper.blueprints.checker import CheckedNode
from esper.blueprints.checker import Layout
from esper.blueprints.init import draw
from esper.blueprints.init import torch_dtype
from esper.blueprints.kernels import Computation
from esper.blueprints.kernels import check_kernel
from esper.blueprints.lowering import lower_with_mapping
from esper.blueprints.sizes import Size
from esper.common.v1 import blueprint_pb2
from esper.common.v1 import kernel_pb2


@dataclass(frozen=True)
class Step:
    """One node as plain numbers, so that tracing and copying a module meets nothing but those.

    Attributes:
        op: Name of the op.
        inputs: Operands as (value, output index); value 0 is the input, i + 1 is step i.
        parameters: Name in the module of each parameter by role.
        num_axes: Number of axes of the first operand.
        width: Size of its last axis, or 0 where that is known only at run time.

    The other attributes are those of the op table, with `axis` counted from the front.
    """

    op: str
    inputs: tuple[tuple[int, int], ...]
    parameters: Mapping[str, str]
    num_axes: int
    width: int
    axis: int = 0
    keepdim: bool = False
    eps: float = 0.0
    groups: int = 1
    kernel: int = 0
    padding: int = 0
    dilation: int = 1
    parts: int = 1
    heads: int = 1
    causal: bool = False
    activation: str = "identity"
    factor: float | None = None
    p: float = 0.0
    axes: tuple[int, ...] = ()
    shape: tuple[int | str, ...] = ()


@dataclass(frozen=True)
class Frame:
    """What holds for one evaluation.

    Attributes:
        sizes: Sizes of N, T, H and W, as far as the graph has them.
        training: Whether dropout is on.
    """

    sizes: Mapping[str, int]
    training: bool


Weights = Mapping[str, Tensor]
Execute = Callable[[Sequence[Tensor], Weights, Step, Frame], Tensor | tuple[Tensor, ...]]


class ReferenceModule(nn.Module):
    """A graph as plain torch ops.

    It maps the source in the layout of its slot, with any number of leading axes where the graph
    reads tokens, to g in the same layout: features last, or channels on axis 1 for convolution and
    channel-norm slots. It calls nothing but torch, branches on no data and can be traced by
    `torch.fx.symbolic_trace`.

    Args:
        computation: What to compute.
        weights: A tensor per parameter name.
    """

    def __init__(self, computation: Computation, weights: Weights) -> None:
        super().__init__()
        graph = computation.graph
        self.layout = graph.layout
        self.channels_first = computation.channels_first
        self.out_width = _number(graph.output_shape[graph.feature_axis])
        self.source_width = _number(graph.input_shape[graph.feature_axis])
        self.output = graph.output
        self.steps = tuple(
            _step(node, index, computation.names) for index, node in enumerate(graph.nodes)
        )
        for name in computation.names.values():
            self.register_parameter(name, nn.Parameter(weights[name].detach().clone()))

    def forward(self, source: Tensor) -> Tensor:
        """Returns g.

        Args:
            source: [..., F] or [batch, F, ...], as the slot lays its features out.

        Returns:
            The source's shape with D features in the place of F.
        """
        if self.layout is not Layout.TOKENS:
            num_axes = len(self.layout.value.split(","))
            torch._assert(source.dim() == num_axes, f"the seed needs a {self.layout.value} source")
            return self._evaluate(source)
        last = source.movedim(1, -1) if self.channels_first else source
        g = self._evaluate(last.reshape(-1, self.source_width))
        g = g.reshape(last.shape[:-1] + (self.out_width,))
        return g.movedim(-1, 1) if self.channels_first else g

    def _evaluate(self, source: Tensor) -> Tensor:
        axes = self.layout.value.strip("[]").split(", ")
        sizes = {name: source.shape[axis] for axis, name in enumerate(axes) if name != "F"}
        frame = Frame(sizes, self.training)
        values: list[tuple[Tensor, ...] | Tensor] = [(source,)]
        for step in self.steps:
            operands = [values[value][at] for value, at in step.inputs]
            weights = {role: getattr(self, name) for role, name in step.parameters.items()}
            result = _EXECUTE[step.op](operands, weights, step, frame)
            values.append(result if step.op == "split" else (result,))  # type: ignore[arg-type]
        return values[self.output[0]][self.output[1]]


def reference_module(kernel: kernel_pb2.Kernel, weights: Weights | None = None) -> ReferenceModule:
    """Returns a kernel as plain torch ops; its parameters are named and ordered as the kernel's.

    Native lowerings are rebuilt from their specification, without the compiled core.

    Args:
        kernel: The kernel.
        weights: A tensor per parameter; None draws them by the kernel's init with seed 0.

    Raises:
        BlueprintError: Where the kernel's fields do not agree.
    """
    computed = check_kernel(kernel)
    return ReferenceModule(computed, _born(kernel) if weights is None else weights)


def reference_from_blueprint(
    blueprint: blueprint_pb2.Blueprint,
    signature: kernel_pb2.KernelSignature,
    weights: Weights | None = None,
) -> ReferenceModule:
    """Returns a blueprint's own graph as plain torch ops, bound to a place.

    It does not go through the lowering: only the names of the parameters come from there, so that
    a kernel can be compared with what its blueprint says.

    Args:
        blueprint: The blueprint.
        signature: The place.
        weights: A tensor per parameter of the kernel; None draws them by its init with seed 0.

    Raises:
        BlueprintError: Where the blueprint is unsound or does not fit the place.
    """
    lowered = lower_with_mapping(blueprint, signature)
    weights = _born(lowered.kernel) if weights is None else weights
    return ReferenceModule(lowered.computation, weights)


def _born(kernel: kernel_pb2.Kernel) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    dtype = torch_dtype(kernel.signature.dtype)
    return {spec.name: draw(spec, generator).to(dtype) for spec in kernel.parameters}


def _number(size: Size) -> int:
    assert size.fixed is not None
    return size.fixed


def _step(node: CheckedNode, index: int, names: Mapping[tuple[int, str], str]) -> Step:
    shape = node.input_shapes[0]
    settings: dict[str, bool | int | float | str | tuple[int | str, ...]] = {}
    for name, value in node.attributes.values.items():
        if name in ("out", "rank", "bias", "init", "gain", "affine"):
            continue  # the parameters' shapes say these
        if isinstance(value, Size):
            settings[name] = _number(value)
        elif name == "shape":
            settings[name] = tuple(
                size.fixed or str(size) for size in node.attributes.shape("shape")
            )
        elif isinstance(value, tuple):
            settings[name] = node.attributes.integers(name)
        elif name == "axis":
            settings[name] = node.attributes.integer("axis") % len(shape)
        else:
            settings[name] = value
    if node.spec.name in ("conv1d", "conv2d"):
        settings["padding"] = rules.padding(node.attributes)
    return Step(
        op=node.spec.name,
        inputs=node.inputs,
        parameters={parameter.role: names[index, parameter.role] for parameter in node.parameters},
        num_axes=len(shape),
        width=shape[-1].fixed or 0,
        **settings,  # type: ignore[arg-type]
    )


def _biased(x: Tensor, weights: Weights) -> Tensor:
    return x + weights["bias"] if "bias" in weights else x


_ACTIVATE: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda x: x,
    "relu": torch.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
}


def _linear(x: Sequence[Tensor], w: Weights, step: Step, frame: Frame) -> Tensor:
    return _biased(x[0] @ w["weight"], w)


def _low_rank(x: Sequence[Tensor], w: Weights, step: Step, frame: Frame) -> Tensor:
    return _biased(x[0] @ w["down"] @ w["up"], w)


def _layer_norm(x: Sequence[Tensor], w: Weights, step: Step, frame: Frame) -> Tensor:
    return F.layer_norm(x[0], (step.width,), w.get("weight"), w.get("bias"), step.eps)


def _rms_norm(x: Sequence[Tensor], w: Weights, step: Step, frame: Frame) -> Tensor:
    return F.rms_norm(x[0], (step.width,), w.get("weight"), step.eps)


def _group_norm(x: Sequence[Tensor], w: Weights, step: Step, frame: Frame) -> Tensor:
    return F.group_norm(x[0], step.groups, w.get("weight"), w.get("bias"), step.eps)


def _reshape(x: Sequence[Tensor], w: Weights, step: Step, frame: Frame) -> Tensor:
    return x[0].reshape(
        [frame.sizes[size] if isinstance(size, str) else size for size in step.shape]
    )


def _split(x: Sequence[Tensor], w: Weights, step: Step, frame: Frame) -> tuple[Tensor, ...]:
    return torch.chunk(x[0], step.parts, dim=step.axis)


def _conv1d(x: Sequence[Tensor], w: Weights, step: Step, frame: Frame) -> Tensor:
    return F.conv1d(x[0], w["weight"], w.get("bias"), 1, step.padding, step.dilation, step.groups)


def _conv2d(x: Sequence[Tensor], w: Weights, step: Step, frame: Frame) -> Tensor:
    return F.conv2d(x[0], w["weight"], w.get("bias"), 1, step.padding, step.dilation, step.groups)


def _pool(x: Sequence[Tensor], w: Weights, step: Step, frame: Frame) -> Tensor:
    if step.kernel == 0:
        return x[0].mean(dim=tuple(range(2, step.num_axes)), keepdim=True)
    average = F.avg_pool1d if step.num_axes == 3 else F.avg_pool2d
    return average(x[0], step.kernel, 1, step.kernel // 2, False, False)


def _attention(x: Sequence[Tensor], w: Weights, step: Step, frame: Frame) -> Tensor:
    n, t = x[0].shape[0], x[0].shape[1]
    heads = (n, t, step.heads, step.width // step.heads)
    parts = torch.chunk(x[0] @ w["qkv"], 3, dim=-1)
    q, k, v = (parts[part].reshape(heads).transpose(1, 2) for part in range(3))
    mixed = F.scaled_dot_product_attention(q, k, v, is_causal=step.causal)
    return mixed.transpose(1, 2).flatten(2) @ w["out"]


def _scale(x: Sequence[Tensor], w: Weights, step: Step, frame: Frame) -> Tensor:
    if step.factor is not None:
        return x[0] * step.factor
    trailing = (1,) * (step.num_axes - 1 - step.axis)
    scaled = x[0] * w["weight"].reshape(-1, *trailing)
    return scaled + w["bias"].reshape(-1, *trailing) if "bias" in w else scaled


_EXECUTE: dict[str, Execute] = {
    "linear": _linear,
    "matmul": lambda x, w, step, frame: x[0] @ x[1],
    "add": lambda x, w, step, frame: x[0] + x[1],
    "sub": lambda x, w, step, frame: x[0] - x[1],
    "mul": lambda x, w, step, frame: x[0] * x[1],
    "div": lambda x, w, step, frame: x[0] / x[1],
    "relu": lambda x, w, step, frame: torch.relu(x[0]),
    "gelu": lambda x, w, step, frame: F.gelu(x[0]),
    "silu": lambda x, w, step, frame: F.silu(x[0]),
    "tanh": lambda x, w, step, frame: torch.tanh(x[0]),
    "sigmoid": lambda x, w, step, frame: torch.sigmoid(x[0]),
    "softmax": lambda x, w, step, frame: torch.softmax(x[0], dim=step.axis),
    "layer_norm": _layer_norm,
    "rms_norm": _rms_norm,
    "group_norm": _group_norm,
    "sum": lambda x, w, step, frame: torch.sum(x[0], dim=step.axis, keepdim=step.keepdim),
    "mean": lambda x, w, step, frame: torch.mean(x[0], dim=step.axis, keepdim=step.keepdim),
    "max": lambda x, w, step, frame: torch.amax(x[0], dim=step.axis, keepdim=step.keepdim),
    "reshape": _reshape,
    "permute": lambda x, w, step, frame: x[0].permute(step.axes),
    "concat": lambda x, w, step, frame: torch.cat(list(x), dim=step.axis),
    "split": _split,
    "conv1d": _conv1d,
    "conv2d": _conv2d,
    "pool": _pool,
    "low_rank_matmul": _low_rank,
    "attention": _attention,
    "gate": lambda x, w, step, frame: x[0] * _ACTIVATE[step.activation](x[1]),
    "scale": _scale,
    "dropout": lambda x, w, step, frame: F.dropout(x[0], step.p, frame.training),
}
