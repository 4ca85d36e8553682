"""The compiled operators, with what torch needs to trace and count them.

With `h` the slot's output, `C_s` the chunk of seed s and `src` its source, one call computes

    y[..., C_s] = h[..., C_s] + alpha_fwd_s * g_s(src)

for all computing seeds of a slot, where g_s is a bottleneck `act(src A + a) B + b`, the same with a
gate `(act(src A + a) * (src G + c)) B + b`, affine `w * src + b`, or one of the spatial families,
whose tokens are positions of samples: squeeze-excite `src * tanh(B act(A mean(src) + a) + b)` with
the mean over a sample's positions (Hu et al., arXiv 1709.01507; 1 + tanh z is 2 sigmoid 2z, a gate
that is 1 at birth), and depthwise `B act(A (*) src + a) + b`, where each feature is correlated with
a window of its own and the features are mixed by a product. Backward sends `dy` to `h`
unchanged, `alpha_bwd_s * dg/dparams` to the seed's parameters and `gamma_s * dg/dsrc` to its
source. Where every gamma is 0 the gradient of `h` is `dy` itself; parameters of a seed whose
alpha_bwd is 0 get no gradient at all, so that an optimizer leaves them alone. (A graph traced by
torch.compile must hold for every later value of the scalars, so there they get zeros.) A token for
which g_s is not finite keeps `h` in that chunk and takes no part in any gradient; so does one whose
pre-activations are not finite in a spatial seed, and in squeeze-excite the whole sample with it.
"""

from collections.abc import Callable
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake
from torch.utils.flop_counter import register_flop_formula

from esper import _C

SOURCES = ("output", "input")
FAMILIES = ("bottleneck", "affine", "squeeze_excite", "depthwise")
ACTIVATIONS = ("identity", "relu", "gelu", "silu", "tanh")

PLAN_WIDTH = len(_C.PLAN_FIELDS)
_FAMILY = _C.PLAN_FIELDS.index("family")
_GATED = _C.PLAN_FIELDS.index("gated")
_RANK = _C.PLAN_FIELDS.index("rank")
_FIRST_PARAM = _C.PLAN_FIELDS.index("first_param")
_SPATIAL = ("squeeze_excite", "depthwise")
NUM_STATS = len(_C.STATS_COLUMNS)


@dataclass(frozen=True)
class SeedPlan:
    """Where one computing seed sits in its slot and what it computes.

    The operators check every field against the tensors of the call.

    Attributes:
        row: Row of the seed in `scalars`.
        offset: First feature of its chunk. Seeds come in ascending order without overlap.
        width: Features of its chunk, d.
        source: `output` (its chunk of h, S = d) or `input` (the slot's input x, S = D_in).
        family: One of `FAMILIES`.
        first_param: Index of its first tensor in `params`. Its tensors are, in this order, those in
            parentheses where the seed has them: A [S, r], (a [r]), (G [S, r]), (c [r]), B [r, d],
            (b [d]); of an affine seed w [d], (b [d]); of squeeze-excite A [r, S, 1...], (a [r]),
            B [d, r, 1...], (b [d]); of depthwise A [S, 1, window...], (a [S]), B [d, S, 1...],
            (b [d]), with an axis for each position axis.
        activation: One of `ACTIVATIONS`; `identity` for affine.
        rank: Width r of the hidden layer, from 1 up; 0 for affine, S for depthwise.
        gated: Whether it has a gate G.
        hidden_bias: Whether it has a.
        gate_bias: Whether it has c.
        output_bias: Whether it has b.
        window: Side of a depthwise seed's window, odd, at most 31; 0 for the other families.
    """

    row: int
    offset: int
    width: int
    source: str
    family: str
    first_param: int
    activation: str = "identity"
    rank: int = 0
    gated: bool = False
    hidden_bias: bool = False
    gate_bias: bool = False
    output_bias: bool = False
    window: int = 0

    @property
    def num_params(self) -> int:
        """How many tensors of `params` are this seed's."""
        products = 1 if self.family == "affine" else 2
        return products + sum((self.gated, self.hidden_bias, self.gate_bias, self.output_bias))

    def pack(self) -> list[int]:
        """Returns the seed's record of the plan, in the order of `_C.PLAN_FIELDS`.

        Raises:
            ValueError: For a source, family or activation that does not exist.
        """
        return [
            self.row,
            self.offset,
            self.width,
            _position("source", self.source, SOURCES),
            _position("family", self.family, FAMILIES),
            _position("activation", self.activation, ACTIVATIONS),
            int(self.gated),
            self.rank,
            self.first_param,
            self.hidden_bias + 2 * self.gate_bias + 4 * self.output_bias,
            self.window,
        ]


def _position(field: str, value: str, names: tuple[str, ...]) -> int:
    if value not in names:
        raise ValueError(f"{field} is {value!r} but must be one of {', '.join(names)}")
    return names.index(value)


def slot_forward(
    h: Tensor,
    x: Tensor | None,
    params: Sequence[Tensor],
    scalars: Tensor,
    plan: Sequence[int],
    telemetry: bool = False,
) -> tuple[Tensor, Tensor]:
    """Runs all computing seeds of a slot; differentiable once.

    Args:
        h: The slot's output, [..., D], in float32, float64, bfloat16 or float16; [samples, T, D]
            or [samples, H, W, D] where a seed is spatial.
        x: The slot's input, [..., D_in] with as many tokens; None where no seed reads it.
        params: The seeds' tensors, of float32 or the type of `h`.
        scalars: alpha_fwd, alpha_bwd and gamma, [rows, 3] in float32 on the CPU. Read during the
            call, also for the backward pass that belongs to it.
        plan: The packed `SeedPlan` of each computing seed, one after the other.
        telemetry: Whether to measure the chunks.

    Returns:
        y [..., D], contiguous, or laid out as a convolution's output where `h` is so (on CUDA:
        and a seed is spatial); and the statistics [seeds, len(_C.STATS_COLUMNS)] in float64, with
        no rows where `telemetry` is False.

    Raises:
        ValueError: Where an argument does not fit the others; says which.
    """
    y, stats, _ = torch.ops.esper.slot_forward.default(h, x, params, scalars, plan, telemetry)
    return y, stats


class _ScaleGrad(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, tensor: Tensor, scale: float) -> Tensor:
        ctx.scale = scale  # type: ignore[attr-defined]
        return tensor.view_as(tensor)

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, *grads: Tensor | None
    ) -> tuple[Tensor | None, None]:
        (grad,) = grads
        scale: float = ctx.scale  # type: ignore[attr-defined]
        if grad is None or scale == 0.0:
            return None, None
        return (grad if scale == 1.0 else grad * scale), None


def scale_grad(tensor: Tensor, scale: float) -> Tensor:
    """Returns `tensor` as it is, its gradient times `scale`; none is sent where that is 0."""
    apply: Callable[[Tensor, float], Tensor] = _ScaleGrad.apply
    return apply(tensor, scale)


# ---------------------------------------------------------------- tracing


def _any_spatial(plan: Sequence[int]) -> bool:
    return any(FAMILIES[family] in _SPATIAL for family in plan[_FAMILY::PLAN_WIDTH])


def _hidden_width(plan: Sequence[int]) -> int:
    """Pre-activations of a token that forward keeps for backward: those of bottleneck seeds."""
    records = zip(
        plan[_FAMILY::PLAN_WIDTH], plan[_GATED::PLAN_WIDTH], plan[_RANK::PLAN_WIDTH], strict=True
    )
    return sum(
        rank * (1 + gated) for family, gated, rank in records if FAMILIES[family] == "bottleneck"
    )


def _in_planes(tensor: Tensor) -> bool:
    """Whether positions lie side by side and features apart, as a convolution leaves them."""
    if tensor.dim() < 3 or tensor.is_contiguous():
        return False
    return tensor.movedim(-1, 1).is_contiguous()


def _keeps_planes(host: Tensor, plan: Sequence[int]) -> bool:
    """Whether results are laid out as the host; else they are contiguous."""
    return _in_planes(host) and (host.device.type == "cpu" or _any_spatial(plan))


def _empty(like: Tensor, planes: bool) -> Tensor:
    if not planes:
        return like.new_empty(like.shape)
    return like.new_empty(like.movedim(-1, 1).shape).movedim(1, -1)


def _check_devices(
    host: str, on: torch.device, others: dict[str, Tensor | None], scalars: Tensor
) -> None:
    """Refuses a mix of devices; a call in which one of them is ``meta`` is checked nowhere else."""
    for name, other in others.items():
        if other is not None and other.device != on:
            raise ValueError(f"{name} is on {other.device}, but must be on {on} as {host} is")
    if scalars.device.type not in ("cpu", "meta" if on.type == "meta" else "cpu"):
        raise ValueError(f"scalars is on {scalars.device}, but must be on cpu")


def _numbered(params: Sequence[Tensor]) -> dict[str, Tensor | None]:
    return {f"params[{index}]": tensor for index, tensor in enumerate(params)}


def _fake_forward(
    h: Tensor,
    x: Tensor | None,
    params: Sequence[Tensor],
    scalars: Tensor,
    plan: Sequence[int],
    telemetry: bool,
    keep: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    _check_devices("h", h.device, {"x": x, **_numbered(params)}, scalars)
    rows = len(plan) // PLAN_WIDTH if telemetry else 0
    y = _empty(h, planes=_keeps_planes(h, plan))
    keeps = _hidden_width(plan) if keep and h.device.type == "cpu" else 0
    return (
        y,
        h.new_empty((rows, NUM_STATS), dtype=torch.float64),
        h.new_empty(
            (h.numel() // h.shape[-1] * keeps,),
            dtype=h.dtype if h.dtype is torch.float64 else torch.float32,
        ),
    )


def _fake_backward(
    dy: Tensor,
    h: Tensor | None,
    x: Tensor | None,
    params: Sequence[Tensor],
    scalars: Tensor,
    plan: Sequence[int],
    need: Sequence[int],
    hidden: Tensor | None = None,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    _check_devices(
        "dy", dy.device, {"h": h, "x": x, "hidden": hidden, **_numbered(params)}, scalars
    )
    planes = _keeps_planes(dy if h is None else h, plan)
    dh = _empty(dy, planes) if need[0] else dy.new_empty((0,))
    dx = dy.new_empty((0,)) if x is None or not need[1] else _empty(x, planes)
    dparams = [
        p.new_empty(p.shape if wanted else (0,)) for p, wanted in zip(params, need[2:], strict=True)
    ]
    return dh, dx, dparams


torch.library.register_fake("esper::slot_forward", _fake_forward)
torch.library.register_fake("esper::slot_backward", _fake_backward)


# ---------------------------------------------------------------- counting


def _records(
    host: Tensor, x: Tensor | None, scalars: Tensor, plan: Sequence[int]
) -> list[tuple[int, int, bool, tuple[float, float, float]]]:
    """For each seed: multiply-adds into hidden and into g, whether it reads x, and its scalars."""
    tokens = host.numel() // host.shape[-1]
    records = []
    for start in range(0, len(plan), PLAN_WIDTH):
        row, _, width, source, family, _, gated, rank, _, _, window = plan[
            start : start + PLAN_WIDTH
        ]
        source_width = x.shape[-1] if source and x is not None else width
        match FAMILIES[family]:
            case "affine":
                down, up = 0, tokens * width
            case "squeeze_excite":
                down = up = host.shape[0] * width * rank
            case "depthwise":
                down = tokens * rank * window ** (host.dim() - 2)
                up = tokens * rank * width
            case _:
                down = tokens * source_width * rank * (1 + gated)
                up = tokens * width * rank
        # Values of a traced tensor are unknown: every part is then counted as done.
        values = (1.0, 1.0, 1.0) if is_fake(scalars) else tuple(scalars[row].tolist())
        records.append((down, up, bool(source), values))
    return records


@register_flop_formula(torch.ops.esper.slot_forward, get_raw=True)
def _forward_flops(
    h: Tensor,
    x: Tensor | None,
    params: Sequence[Tensor],
    scalars: Tensor,
    plan: Sequence[int],
    telemetry: bool,
    keep: bool = False,
    out_val: object = None,
) -> int:
    return sum(
        2 * (down + up)
        for down, up, _, (alpha_fwd, _, _) in _records(h, x, scalars, plan)
        if telemetry or alpha_fwd != 0.0
    )


@register_flop_formula(torch.ops.esper.slot_backward, get_raw=True)
def _backward_flops(
    dy: Tensor,
    h: Tensor | None,
    x: Tensor | None,
    params: Sequence[Tensor],
    scalars: Tensor,
    plan: Sequence[int],
    need: Sequence[int],
    hidden: Tensor | None = None,
    out_val: object = None,
) -> int:
    bounds = [*plan[_FIRST_PARAM::PLAN_WIDTH], len(params)]
    total = 0
    for i, (down, up, reads_x, values) in enumerate(_records(dy, x, scalars, plan)):
        alpha_fwd, alpha_bwd, gamma = values
        family = FAMILIES[plan[i * PLAN_WIDTH + _FAMILY]]
        kept = hidden is not None and family == "bottleneck" and alpha_fwd != 0.0
        trains = alpha_bwd != 0.0 and any(need[2 + bounds[i] : 2 + bounds[i + 1]])
        sends = gamma != 0.0 and bool(need[1 if reads_x else 0])
        if trains or sends:
            # The hidden layer, unless it was kept, and its gradient; then the weights' gradients
            # and the source's.
            total += 2 * (
                down * (not kept) + up + (down + up) * trains + (down if down else up) * sends
            )
    return total


@register_flop_formula(torch.ops.esper.measure_chunks)
def _measuring_flops(
    rows_shape: Sequence[int],
    step: int,
    seeds: Sequence[int],
    bounds: Sequence[int],
    stats_shape: Sequence[int],
    out_shape: object = None,
    **kwargs: object,
) -> int:
    widths = sum(bounds[1::2]) - sum(bounds[::2])
    return 2 * -(-rows_shape[0] // step) * widths
