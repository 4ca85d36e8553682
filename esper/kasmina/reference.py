"""Seeds that the native families do not cover: the blueprint's graph, behind the native semantics.

With g the seed's function, the output gets ``alpha_fwd * g``, the seed's parameters ``alpha_bwd``
times their gradient and its source ``gamma`` times its own, just as in ``esper.kasmina.ops``.
"""

import contextlib
from collections.abc import Callable
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.func import functional_call

from esper.blueprints import ReferenceModule
from esper.kasmina.ops import scale_grad


class _Contain(torch.autograd.Function):
    """The identity, with a gradient that cannot carry a broken seed's NaN any further."""

    @staticmethod
    def forward(ctx: FunctionCtx, tensor: Tensor) -> Tensor:
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> Tensor:
        return torch.nan_to_num(grads[0], nan=0.0, posinf=0.0, neginf=0.0)


class _Blend(torch.autograd.Function):
    """Adds ``alpha * g`` to one chunk of y where the whole row of g is finite.

    Whatever alpha is, g receives the gradient of the chunk: alpha is a matter of the forward pass.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx, y: Tensor, g: Tensor, finite: Tensor, begin: int, alpha: float
    ) -> Tensor:
        ctx.save_for_backward(finite)
        end = begin + g.shape[-1]
        ctx.chunk = (begin, end)  # type: ignore[attr-defined]
        blended = y.clone()
        if alpha != 0.0:
            chunk = blended[..., begin:end]
            chunk.copy_(torch.where(finite, chunk + alpha * g, chunk))
        return blended

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = grads
        (finite,) = ctx.saved_tensors  # type: ignore[attr-defined]
        begin, end = ctx.chunk  # type: ignore[attr-defined]
        dg = None
        if ctx.needs_input_grad[1]:  # type: ignore[attr-defined]
            dg = dy[..., begin:end].where(finite, 0.0)
        return dy, dg, None, None, None


class _ScaleGradBy(torch.autograd.Function):
    """The identity, its contained gradient times a scale that a traced graph reads as it runs."""

    @staticmethod
    def forward(ctx: FunctionCtx, tensor: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(scale)
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[Tensor, None]:
        (scale,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return torch.nan_to_num(grads[0], nan=0.0, posinf=0.0, neginf=0.0) * scale, None


class _BlendBy(torch.autograd.Function):
    """As ``_Blend``, with an alpha that a traced graph reads as it runs."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, y: Tensor, g: Tensor, finite: Tensor, begin: int, alpha: Tensor
    ) -> Tensor:
        ctx.save_for_backward(finite)
        end = begin + g.shape[-1]
        ctx.chunk = (begin, end)  # type: ignore[attr-defined]
        chunk = y[..., begin:end]
        # At alpha 0 the chunk itself: a sum would turn its -0.0 into 0.0.
        mixed = torch.where(finite & (alpha != 0.0), chunk + alpha * g, chunk)
        return torch.slice_scatter(y, mixed, -1, begin, end)

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = grads
        (finite,) = ctx.saved_tensors  # type: ignore[attr-defined]
        begin, end = ctx.chunk  # type: ignore[attr-defined]
        return dy, dy[..., begin:end].where(finite, 0.0), None, None, None


_contain: Callable[[Tensor], Tensor] = _Contain.apply
_scale_grad_by: Callable[[Tensor, Tensor], Tensor] = _ScaleGradBy.apply
_blend_by: Callable[[Tensor, Tensor, Tensor, int, Tensor], Tensor] = _BlendBy.apply
_blend: Callable[[Tensor, Tensor, Tensor, int, float], Tensor] = _Blend.apply


@dataclass(frozen=True, slots=True)
class Energy:
    """What telemetry asks of a seed that runs here.

    Attributes:
        nonfinite_rows: Rows that were contained, int64 scalar.
        g_energy: Sum of squares of g over the other rows, float64 scalar.
    """

    nonfinite_rows: Tensor
    g_energy: Tensor


def run_seed(
    network: ReferenceModule,
    y: Tensor,
    source: Tensor,
    begin: int,
    scalars: tuple[float, float, float],
    draw_seed: int,
    *,
    measure: bool,
) -> tuple[Tensor, Energy | None]:
    """Blends one seed into its chunk.

    Args:
        network: The seed's function, ``[..., S] -> [..., d]``.
        y: Output so far, [..., D].
        source: What the seed reads, [..., S].
        begin: First feature of the seed's chunk.
        scalars: alpha_fwd, alpha_bwd and gamma.
        draw_seed: Where dropout starts to draw from in this call.
        measure: Whether to return the seed's energy.

    Returns:
        The output with the seed, a tensor of its own, and the energy if asked for.
    """
    alpha_fwd, alpha_bwd, gamma = scalars
    parameters = {
        name: (
            _contain(scale_grad(parameter, alpha_bwd)) if alpha_bwd != 0.0 else parameter.detach()
        ).to(y.dtype)
        for name, parameter in network.named_parameters()
    }
    fed = _contain(scale_grad(source, gamma)) if gamma != 0.0 else source.detach()
    fed = fed.to(y.dtype)
    with _own_randomness(network, draw_seed, y.device):
        g = _call(network, parameters, fed)
    finite = torch.isfinite(g.detach()).all(dim=-1, keepdim=True)
    energy = None
    if measure:
        kept = torch.where(finite, g.detach(), torch.zeros_like(g)).double()
        energy = Energy((~finite).sum(), kept.square().sum())
    return _blend(y, g, finite, begin, alpha_fwd), energy


def trace_seed(
    network: ReferenceModule, y: Tensor, source: Tensor, begin: int, scalars: Tensor
) -> Tensor:
    """Blends one seed into its chunk, in a graph that holds for every later value of its scalars.

    So nothing is left out where a scalar is 0; gradients are zeros then.

    Args:
        network: The seed's function, which may not draw.
        y: Output so far, [..., D].
        source: What the seed reads, [..., S].
        begin: First feature of the seed's chunk.
        scalars: alpha_fwd, alpha_bwd and gamma, [3].
    """
    alpha_fwd, alpha_bwd, gamma = scalars.to(y.device).unbind()
    parameters = {
        name: _scale_grad_by(parameter, alpha_bwd).to(y.dtype)
        for name, parameter in network.named_parameters()
    }
    g = _call(network, parameters, _scale_grad_by(source, gamma).to(y.dtype))
    finite = torch.isfinite(g.detach()).all(dim=-1, keepdim=True)
    return _blend_by(y, g, finite, begin, alpha_fwd)


def draws(network: ReferenceModule) -> bool:
    """Whether a seed's function draws random numbers as it stands."""
    return network.training and any(step.op == "dropout" for step in network.steps)


def _call(network: ReferenceModule, parameters: dict[str, Tensor], source: Tensor) -> Tensor:
    """Runs a seed's function with other parameters; features last."""
    if not network.channels_first:
        g: Tensor = functional_call(network, parameters, (source,))
        return g
    planes: Tensor = functional_call(network, parameters, (source.movedim(-1, 1),))
    return planes.movedim(1, -1)


@contextlib.contextmanager
def _own_randomness(network: ReferenceModule, seed: int, device: torch.device) -> Iterator[None]:
    """Lets dropout draw without moving the generators that the host draws from."""
    if not draws(network):
        yield
        return
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
