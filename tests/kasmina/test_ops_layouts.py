"""Layouts and 16-bit elements pass through the kernels' tiles with the values of plain tensors."""

import pytest
import torch
from slot_oracle import FULL
from slot_oracle import GRAFTING
from slot_oracle import TRAINING
from slot_oracle import Slot
from slot_oracle import small_slot
from torch import Tensor

from esper.kasmina import ops

HALVES = [torch.bfloat16, torch.float16]


def leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_()


def run(h: Tensor, x: Tensor, dy: Tensor) -> list[Tensor]:
    """y, statistics and all gradients of the small slot's seeds on given tensors."""
    seeds = small_slot(GRAFTING)
    params = [p.requires_grad_() for p in seeds.params]
    slot = Slot(leaf(h), leaf(x), seeds.scalars, seeds.seeds, params)
    y, stats = slot.run(telemetry=True)
    y.backward(dy)
    return [y.detach(), stats, slot.h.grad, slot.x.grad, *(p.grad for p in params)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALVES])
@pytest.mark.parametrize("positions", [(7, 5), (1, 1), (9, 8), (130,), (1,)])
def test_channels_first_equals_features_last_and_keeps_its_layout(dtype, positions):
    torch.manual_seed(0)
    h, x, dy = (
        torch.randn(3, width, *positions).to(dtype).movedim(1, -1) for width in (47, 13, 47)
    )
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    mine = run(h, x, dy)
    plain = run(*(t.to(wide).contiguous() for t in (h, x, dy)))
    for ours, wanted in zip(mine, plain, strict=True):
        assert torch.equal(ours, wanted.to(ours.dtype))
    for ours, like in zip((mine[0], mine[2], mine[3]), (h, h, x), strict=True):
        assert ours.dtype == dtype
        assert ours.movedim(-1, 1).is_contiguous() or like.is_contiguous()


@pytest.mark.parametrize("kind", ["gradient", "input", "host"])
def test_layouts_may_differ_between_the_tensors_of_a_call(kind):
    torch.manual_seed(0)
    tensors = [torch.randn(4, 6, width) for width in (47, 13, 47)]
    wanted = run(*tensors)
    at = {"host": 0, "input": 1, "gradient": 2}[kind]
    tensors[at] = tensors[at].movedim(-1, 1).contiguous().movedim(1, -1)
    for ours, expected in zip(run(*tensors), wanted, strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("host", [torch.float32, torch.float64, *HALVES])
@pytest.mark.parametrize("other", [torch.float32, torch.float64, *HALVES])
def test_the_input_may_be_of_another_type(host, other):
    torch.manual_seed(0)
    h, dy = torch.randn(4, 6, 47).to(host), torch.randn(4, 6, 47).to(host)
    x = torch.randn(4, 6, 13).to(other)
    wide = torch.float64 if host == torch.float64 else torch.float32
    for ours, wanted in zip(run(h, x, dy), run(h.to(wide), x.to(wide), dy.to(wide)), strict=True):
        assert torch.equal(ours, wanted.to(ours.dtype))
    assert run(h, x, dy)[3].dtype == other


def test_a_gradient_without_strides():
    torch.manual_seed(0)
    h, x = torch.randn(4, 6, 47), torch.randn(4, 6, 13)
    expanded = run(h, x, torch.ones(()).expand(4, 6, 47))
    for ours, wanted in zip(expanded, run(h, x, torch.ones(4, 6, 47)), strict=True):
        assert torch.equal(ours, wanted)


@pytest.mark.parametrize("dtype", HALVES)
def test_every_value_of_16_bits_survives(dtype):
    values = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
    slot = Slot(values.reshape(-1, 64), torch.zeros(1024, 1, dtype=dtype), torch.tensor([TRAINING]))
    slot.add(0, 64, 0, source="output", family="bottleneck", rank=1)
    y, _ = slot.run(telemetry=True)
    nan = slot.h.isnan()
    assert torch.equal(y.isnan(), nan)
    assert torch.equal(y.view(torch.int16)[~nan], slot.h.view(torch.int16)[~nan])


@pytest.mark.parametrize("dtype", HALVES)
def test_results_are_rounded_as_torch_rounds_them(dtype):
    torch.manual_seed(0)
    sizes = [torch.randn(512) * 10.0**power for power in range(-9, 6)]
    limit = torch.finfo(dtype).max
    edges = torch.tensor([limit, limit * 1.0003, limit * 1.003, 6e-8, 2.9e-8, 3e-8, -0.0, 1e-40])
    values = torch.cat([*sizes, edges])
    width = len(values)
    slot = Slot(torch.zeros(1, width, dtype=dtype), torch.zeros(1, 1), torch.tensor([FULL]))
    slot.add(0, width, 0, source="output", family="affine", output_bias=True)
    y, _ = ops.slot_forward(
        slot.h, None, [torch.zeros(width), values], slot.scalars, slot.plan, False
    )
    assert torch.equal(y[0], (values + 0.0).to(dtype))
