"""Slot calls with the tensors that they need, and what they must compute in nothing but torch."""

from collections.abc import Iterator
from dataclasses import dataclass
from dataclasses import field
from dataclasses import replace

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from esper import _C
from esper.kasmina import ops
from esper.kasmina.ops import SeedPlan

TRAINING = (0.0, 1.0, 0.0)
GRAFTING = (0.3, 0.3, 0.3)
HELD = (1.0, 0.0, 1.0)
FULL = (1.0, 1.0, 1.0)
STATES = [TRAINING, GRAFTING, HELD, FULL, (0.0, 0.0, 0.0)]
COLUMN = {name: i for i, name in enumerate(_C.STATS_COLUMNS)}

ACT = {
    "identity": lambda v: v,
    "relu": torch.relu,
    "gelu": torch.nn.functional.gelu,
    "silu": torch.nn.functional.silu,
    "tanh": torch.tanh,
}


@dataclass
class Slot:
    """A slot call: the seeds' plans with their tensors, and the tensors that they read."""

    h: Tensor
    x: Tensor
    scalars: Tensor
    seeds: list[SeedPlan] = field(default_factory=list)
    params: list[Tensor] = field(default_factory=list)

    @property
    def plan(self) -> list[int]:
        return [number for seed in self.seeds for number in seed.pack()]

    def add(self, offset: int, width: int, row: int, **kind) -> None:
        seed = SeedPlan(row=row, offset=offset, width=width, first_param=len(self.params), **kind)
        source = self.x.shape[-1] if seed.source == "input" else width
        if seed.family == "depthwise":
            seed = replace(seed, rank=source)
        shapes = []
        positions = self.h.dim() - 2
        if seed.family == "depthwise":
            shapes = [(source, 1, *[seed.window] * positions)] + [(source,)] * seed.hidden_bias
            shapes.append((width, source, *[1] * positions))
        elif seed.family == "squeeze_excite":
            shapes = [(seed.rank, source, *[1] * positions)] + [(seed.rank,)] * seed.hidden_bias
            shapes.append((width, seed.rank, *[1] * positions))
        elif seed.family == "bottleneck":
            shapes = [(source, seed.rank)] + [(seed.rank,)] * seed.hidden_bias
            shapes += [(source, seed.rank)] * seed.gated + [(seed.rank,)] * seed.gate_bias
            shapes.append((seed.rank, width))
        else:
            shapes.append((width,))
        shapes += [(width,)] * seed.output_bias
        self.params += [torch.randn(s, dtype=self.h.dtype) / s[0] ** 0.5 for s in shapes]
        assert len(shapes) == seed.num_params
        self.seeds.append(seed)

    def run(self, telemetry: bool = False) -> tuple[Tensor, Tensor]:
        return ops.slot_forward(self.h, self.x, self.params, self.scalars, self.plan, telemetry)

    def with_grad(self) -> "Slot":
        leaves = [t.detach().clone().requires_grad_() for t in (self.h, self.x, *self.params)]
        return Slot(leaves[0], leaves[1], self.scalars, self.seeds, leaves[2:])


def seed_function(seed: SeedPlan, source: Tensor, params: list[Tensor]) -> Tensor:
    own = iter(params[seed.first_param : seed.first_param + seed.num_params])
    if seed.family in ("depthwise", "squeeze_excite"):
        return spatial_function(seed, source, own)
    if seed.family == "affine":
        g = next(own) * source
    else:
        before = source @ next(own)
        if seed.hidden_bias:
            before = before + next(own)
        hidden = ACT[seed.activation](before)
        if seed.gated:
            gate = source @ next(own)
            if seed.gate_bias:
                gate = gate + next(own)
            hidden = hidden * gate
        g = hidden @ next(own)
    return g + next(own) if seed.output_bias else g


def spatial_function(seed: SeedPlan, source: Tensor, own: Iterator[Tensor]) -> Tensor:
    convolve = {3: F.conv1d, 4: F.conv2d}[source.dim()]
    planes = source.movedim(-1, 1)
    if seed.family == "depthwise":
        before = convolve(planes, next(own), padding=seed.window // 2, groups=planes.shape[1])
    else:
        pooled = planes.mean(dim=tuple(range(2, planes.dim())), keepdim=True)
        before = convolve(pooled, next(own))
    if seed.hidden_bias:
        before = before + column(next(own), planes)
    g = convolve(ACT[seed.activation](before), next(own))
    if seed.output_bias:
        g = g + column(next(own), planes)
    if seed.family == "squeeze_excite":
        g = planes * torch.tanh(g)
    return g.movedim(1, -1)


def column(bias: Tensor, planes: Tensor) -> Tensor:
    return bias.reshape(-1, *[1] * (planes.dim() - 2))


def oracle(slot: Slot) -> Tensor:
    """y with the gradients that the lifecycle asks for, from nothing but torch."""
    y = slot.h.clone()
    for seed in slot.seeds:
        alpha_fwd, alpha_bwd, gamma = slot.scalars[seed.row].tolist()
        columns = slice(seed.offset, seed.offset + seed.width)
        source = slot.x if seed.source == "input" else slot.h[..., columns]
        to_params = seed_function(seed, source.detach(), slot.params)
        to_source = seed_function(seed, source, [p.detach() for p in slot.params])
        straight = alpha_bwd * (to_params - to_params.detach())
        straight = straight + gamma * (to_source - to_source.detach())
        y[..., columns] = y[..., columns] + alpha_fwd * to_params.detach() + straight
    return y


LEADS = [(1,), (3,), (0,), (65,), (2, 70), (3, 0, 2), (1, 1), (2, 5, 4), (3, 1, 9), (1, 12, 17)]


@st.composite
def kinds(draw, positions: bool, source_is_wide: bool):
    """What a seed computes, as fields of its plan.

    `positions`: whether the slot has samples of positions; torch convolves no empty ones.
    `source_is_wide`: whether the slot's input has as many features as the seed's chunk.
    """
    families = ["bottleneck", "bottleneck", "affine"]
    if positions:
        families += ["squeeze_excite", "depthwise"]
    family = draw(st.sampled_from(families))
    gated = family == "bottleneck" and draw(st.booleans())
    elementwise = family in ("affine", "squeeze_excite")
    kind = {"family": family, "output_bias": draw(st.booleans())}
    kind["source"] = draw(
        st.sampled_from(("output",) if elementwise and not source_is_wide else ops.SOURCES)
    )
    if family == "affine":
        return kind
    if family == "depthwise":
        kind["window"] = draw(st.sampled_from([1, 3, 5]))
    return kind | {
        "activation": draw(st.sampled_from(ops.ACTIVATIONS)),
        "rank": draw(st.integers(1, 40)),
        "hidden_bias": draw(st.booleans()),
        "gated": gated,
        "gate_bias": gated and draw(st.booleans()),
    }


@st.composite
def slots(draw, dtype=torch.float32, states=None):
    """Slots of any shape and layout, with up to four seeds of any family side by side."""
    torch.manual_seed(draw(st.integers(0, 2**31)))
    lead = draw(st.sampled_from(LEADS))
    input_width = draw(st.integers(1, 40))
    count = draw(st.integers(1, 4))
    widths = draw(st.lists(st.integers(1, 70), min_size=count, max_size=count))
    gaps = draw(st.lists(st.integers(0, 3), min_size=count + 1, max_size=count + 1))
    total = sum(widths) + sum(gaps)
    layout = draw(st.sampled_from(["features last", "channels first"]))
    h, x = (
        laid_out(torch.randn(*lead, width, dtype=dtype), layout) for width in (total, input_width)
    )
    chosen = draw(st.lists(st.sampled_from(states or STATES), min_size=count, max_size=count))
    slot = Slot(h, x, torch.tensor(chosen))
    offset = 0
    for i, width in enumerate(widths):
        offset += gaps[i]
        slot.add(
            offset, width, i, **draw(kinds(h.dim() >= 3 and h.numel() > 0, width == input_width))
        )
        offset += width
    return slot


def laid_out(tensor: Tensor, layout: str) -> Tensor:
    """The tensor [samples, positions..., features] with the strides of a convolution's output."""
    if layout == "features last" or tensor.dim() < 3:
        return tensor
    return tensor.movedim(-1, 1).contiguous().movedim(1, -1)


def small_slot(state=FULL, dtype=torch.float32, tokens=(130,)) -> Slot:
    """Three seeds of three kinds, with odd widths."""
    torch.manual_seed(1)
    slot = Slot(
        torch.randn(*tokens, 47, dtype=dtype),
        torch.randn(*tokens, 13, dtype=dtype),
        torch.tensor([state] * 3),
    )
    slot.add(
        0,
        19,
        0,
        source="output",
        family="bottleneck",
        activation="gelu",
        rank=5,
        hidden_bias=True,
        output_bias=True,
    )
    slot.add(
        19,
        17,
        1,
        source="input",
        family="bottleneck",
        activation="silu",
        rank=3,
        gated=True,
        gate_bias=True,
    )
    slot.add(38, 9, 2, source="output", family="affine", output_bias=True)
    return slot


def spatial_slot(state=FULL, dtype=torch.float32, layout="channels first") -> Slot:
    """Seeds of all families side by side over images, two of them reading the slot's input."""
    torch.manual_seed(1)
    h, x = (laid_out(torch.randn(2, 4, 3, width, dtype=dtype), layout) for width in (21, 5))
    slot = Slot(h, x, torch.tensor([state] * 5))
    shared = {"activation": "gelu", "hidden_bias": True, "output_bias": True}
    slot.add(0, 4, 0, source="output", family="depthwise", window=3, **shared)
    slot.add(4, 5, 1, source="input", family="squeeze_excite", rank=2, **shared)
    slot.add(9, 4, 2, source="output", family="bottleneck", rank=3, **shared)
    slot.add(13, 3, 3, source="output", family="affine", output_bias=True)
    slot.add(17, 4, 4, source="input", family="depthwise", window=1)
    return slot


def close(actual: Tensor, expected: Tensor, scale: float = 1.0) -> None:
    tolerance = 1e-10 if actual.dtype == torch.float64 else 2e-5
    size = max(1.0, expected.abs().max().item()) if expected.numel() else 1.0
    torch.testing.assert_close(
        actual.double(), expected.double(), rtol=0, atol=tolerance * size * scale
    )


def doubled(slot: Slot) -> Slot:
    return Slot(
        slot.h.double(),
        slot.x.double(),
        slot.scalars,
        slot.seeds,
        [p.double() for p in slot.params],
    ).with_grad()


def check_against_oracle(slot: Slot) -> None:
    ours, reference = slot.with_grad(), doubled(slot)
    y, _ = ours.run()
    expected = oracle(reference)
    close(y, expected)
    dy = torch.randn_like(y)
    y.backward(dy)
    expected.backward(dy.double())
    for actual, wanted in zip(
        (ours.h, ours.x, *ours.params), (reference.h, reference.x, *reference.params), strict=True
    ):
        expected_grad = torch.zeros_like(wanted) if wanted.grad is None else wanted.grad
        if actual.grad is None:
            assert not expected_grad.any()
        else:
            close(actual.grad, expected_grad, scale=4.0)
