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
            dg = torch.where(finite, dy[..., begin:end], torch.zeros_like(dy[..., begin:end]))
        return dy, dg, None, None, None


_contain: Callable[[Tensor], Tensor] = _Contain.apply
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
        if network.channels_first:
            g = functional_call(network, parameters, (fed.movedim(-1, 1),)).movedim(1, -1)
        else:
            g = functional_call(network, parameters, (fed,))
    finite = torch.isfinite(g.detach()).all(dim=-1, keepdim=True)
    energy = None
    if measure:
        kept = torch.where(finite, g.detach(), torch.zeros_like(g)).double()
        energy = Energy((~finite).sum(), kept.square().sum())
    return _blend(y, g, finite, begin, alpha_fwd), energy


@contextlib.contextmanager
def _own_randomness(network: ReferenceModule, seed: int, device: torch.device) -> Iterator[None]:
    """Lets dropout draw without moving the generators that the host draws from."""
    if not network.training or all(step.op != "dropout" for step in network.steps):
        yield
        return
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
