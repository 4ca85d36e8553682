"""Writes a fossil into the weight of the module that it sits on, where the algebra allows it.

A seed without an activation is linear in what it reads: with M = A B (or diag(w)) and c = a B + b
it computes ``src M + c``. Over the rows W_s, b_s of its chunk in a Linear ``x -> x W^T + b`` that
gives

    source input:   W_s + M^T             b_s + c
    source output:  (I + M)^T W_s         b_s (I + M) + c

A convolution is a Linear for each tap of its window. What reads the output mixes the rows of every
tap; what reads the input adds to the tap that sees the position itself, so there has to be one.
This is the merge of LoRA (Hu et al., arXiv 2106.09685) for both sources, computed in float64.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch import nn
from torch.nn.modules.conv import _ConvNd

from esper.common.v1 import kernel_pb2
from esper.kasmina.grafts import Graft
from esper.kasmina.layer import KasminaLayer

_FORWARDS = {kind.forward for kind in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)}
_WIDE = (torch.float32, torch.float64)


@dataclass(frozen=True, slots=True)
class _Linear:
    """A seed as ``src M + c``.

    Attributes:
        product: M, float64 [S, d].
        offset: c, float64 [d]; None where the kernel has no bias.
        diagonal: Whether every feature is scaled by itself alone.
    """

    product: Tensor
    offset: Tensor | None
    diagonal: bool


def fold(host: nn.Module, layer: KasminaLayer, seed: int, *, trains: bool) -> None:
    """Makes a seed at alpha 1 part of its module's weight and bias, which stay the same objects.

    Args:
        host: The user's model, to see who else uses the weight.
        layer: The seed's slot.
        seed: A seed that holds a kernel.
        trains: Whether the seed trains on; the weight must, exactly if it does.

    Raises:
        ValueError: If the weight cannot take the seed: says why, and nothing has changed.
    """
    graft = layer.graft(seed)
    assert graft is not None
    module = layer.module
    linear = _as_linear(graft)
    weight, bias = _own_tensors(module)
    _check_module(module, layer)
    if linear.offset is not None and bias is None:
        raise ValueError("the seed has a bias, but its module has none")
    if linear.offset is None and graft.reads_input:
        bias = None  # it stays as it is
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None:
            _check_parameter(host, module, name, parameter, trains)
    begin, end = layer.bounds[seed]
    with torch.no_grad():
        rows = weight[begin:end].to(torch.float64, copy=True)
        shift = None if bias is None else bias[begin:end].to(torch.float64, copy=True)
        if graft.reads_input:
            tap: tuple[slice | int, ...] = (slice(None), slice(None), *_centre(module, layer))
            rows[tap] += linear.product.T
        else:
            _check_groups(module, begin, end, linear)
            rows += (linear.product.T @ rows.flatten(1)).view_as(rows)
            if shift is not None:
                shift += shift @ linear.product
        if shift is not None and linear.offset is not None:
            shift += linear.offset
        sums = [rows.to(weight.dtype)] + ([] if shift is None else [shift.to(weight.dtype)])
        if not all(bool(torch.isfinite(part).all()) for part in sums):
            raise ValueError("the sum of weight and seed is not finite")
        weight[begin:end] = sums[0]
        if bias is not None:
            bias[begin:end] = sums[1]


def _as_linear(graft: Graft) -> _Linear:
    kernel = graft.kernel
    names = [spec.name for spec in kernel.parameters]
    tensors = {
        name: parameter.detach().double()
        for name, parameter in zip(names, graft.ordered_parameters(), strict=True)
    }
    offset = tensors.get("b")
    match kernel.WhichOneof("lowering"):
        case "affine":
            return _Linear(torch.diag(tensors["w"]), offset, diagonal=True)
        case "bottleneck" if (
            kernel.bottleneck.activation == kernel_pb2.ACTIVATION_IDENTITY
            and not kernel.bottleneck.gated
        ):
            if "a" in tensors:
                through = tensors["a"] @ tensors["B"]
                offset = through if offset is None else through + offset
            return _Linear(tensors["A"] @ tensors["B"], offset, diagonal=False)
    raise ValueError(
        f"the kernel is of blueprint {kernel.blueprint_name!r}, but only one that is linear in "
        "what it reads (such as lora or affine) can become part of a weight"
    )


def _own_tensors(module: nn.Module) -> tuple[nn.Parameter, nn.Parameter | None]:
    """Weight and bias of a module whose output they determine."""
    own = "forward" in vars(module) or type(module).forward not in _FORWARDS
    weight = module._parameters.get("weight")
    if own or weight is None:
        raise ValueError(
            f"the slot sits on a {type(module).__name__}, but only Linear, Conv1d, Conv2d and "
            "Conv3d that compute as torch's own, by a weight of their own, can take a seed"
        )
    return weight, module._parameters.get("bias")


def _check_module(module: nn.Module, layer: KasminaLayer) -> None:
    if layer.inlet.name is not None:
        raise ValueError(
            f"the seed reads the input of {layer.inlet.name!r}, which the weight of "
            f"{layer.name!r} never sees"
        )
    if any(hook is not layer for hook in module._forward_hooks.values()):
        raise ValueError(
            "the module has other forward hooks, which may change what the seed works on"
        )


def _check_parameter(
    host: nn.Module, module: nn.Module, name: str, parameter: nn.Parameter, trains: bool
) -> None:
    if type(parameter) is not nn.Parameter:
        raise ValueError(f"its {name} is a {type(parameter).__name__}, but must be a plain tensor")
    if parameter.dtype not in _WIDE:
        raise ValueError(
            f"its {name} is of type {parameter.dtype}, in which the sum of weight and seed would "
            "lose part of the seed; it must be float32 or float64"
        )
    users = [
        other for other in host.modules() if any(p is parameter for p in other._parameters.values())
    ]
    if users != [module] or sum(p is parameter for p in module._parameters.values()) > 1:
        raise ValueError(f"its {name} is tied to that of another module, which has no such seed")
    if parameter.requires_grad != trains:
        now, then = ("trains", "stand still") if trains else ("stands still", "train")
        raise ValueError(f"the seed {now}, but as part of the {name} it would {then}")


def _check_groups(module: nn.Module, begin: int, end: int, linear: _Linear) -> None:
    """Rows can be mixed where they read the same channels."""
    if not isinstance(module, _ConvNd) or linear.diagonal:
        return
    width = module.out_channels // module.groups
    if begin // width != (end - 1) // width:
        raise ValueError(
            f"the seed mixes features {begin} to {end - 1}, but the {module.groups} groups of the "
            f"convolution have {width} features each and read different channels"
        )


def _centre(module: nn.Module, layer: KasminaLayer) -> tuple[int, ...]:
    """The tap of a module's window that sees the position of the output itself; () for a Linear."""
    if not isinstance(module, _ConvNd):
        return ()
    if module.groups > 1:
        raise ValueError(
            f"the seed reads all channels, but a convolution of {module.groups} groups does not"
        )
    taps: list[int] = []
    for axis, (size, stride, dilation) in enumerate(
        zip(module.kernel_size, module.stride, module.dilation, strict=True)
    ):
        if isinstance(module.padding, str):  # "same" puts the odd position behind, "valid" none
            before = dilation * (size - 1) // 2 if module.padding == "same" else 0
        else:
            before = module.padding[axis]
        tap, rest = divmod(before, dilation)
        if stride != 1 or rest or tap >= size:
            raise ValueError(
                f"the seed reads the input of {layer.name!r} at the position of the output, which "
                "no tap of the convolution's window sees"
            )
        taps.append(tap)
    return tuple(taps)
