"""What the slot operators compute, against a plain float64 oracle."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings
from slot_oracle import COLUMN
from slot_oracle import FULL
from slot_oracle import GRAFTING
from slot_oracle import HELD
from slot_oracle import TRAINING
from slot_oracle import Slot
from slot_oracle import check_against_oracle
from slot_oracle import close
from slot_oracle import seed_function
from slot_oracle import slots
from slot_oracle import small_slot
from torch import Tensor

from esper import _C


@given(slot=slots())
@settings(deadline=None, max_examples=120)
def test_float32_matches_the_oracle(slot):
    check_against_oracle(slot)


@given(slot=slots(dtype=torch.float64))
@settings(deadline=None, max_examples=60)
def test_float64_matches_the_oracle(slot):
    check_against_oracle(slot)


def backward(slot: Slot, dy: Tensor, hidden: Tensor | None) -> list[Tensor]:
    dh, dx, dparams = torch.ops.esper.slot_backward.default(
        dy,
        slot.h,
        slot.x,
        slot.params,
        slot.scalars,
        slot.plan,
        [1] * (2 + len(slot.params)),
        hidden,
    )
    return [dh, dx, *dparams]


@given(slot=slots())
@settings(deadline=None, max_examples=60)
def test_a_kept_hidden_layer_is_the_one_that_backward_computes(slot):
    dy = torch.randn_like(slot.h)
    _, _, hidden = torch.ops.esper.slot_forward.default(
        slot.h, slot.x, slot.params, slot.scalars, slot.plan, False, keep=True
    )
    ranks = [s.rank * (1 + s.gated) for s in slot.seeds if s.family == "bottleneck"]
    assert hidden.numel() == sum(ranks) * slot.h.shape[:-1].numel()
    kept = backward(slot, dy, hidden if hidden.numel() else None)
    for one, other in zip(kept, backward(slot, dy, None), strict=True):
        assert torch.equal(one, other)


def test_a_hidden_layer_that_does_not_fit_is_refused():
    slot = small_slot()
    dy = torch.randn_like(slot.h)
    for wrong in (torch.zeros(7), torch.zeros(130 * 11).double(), torch.zeros(130, 11)):
        with pytest.raises(
            ValueError, match=r"hidden is .* but must be a contiguous Float \[1430\]"
        ):
            backward(slot, dy, wrong)


@pytest.mark.parametrize("family", ["squeeze_excite", "depthwise"])
def test_no_positions_give_no_gradient(family):
    slot = Slot(torch.zeros(2, 0, 4, 6), torch.zeros(2, 0, 4, 6), torch.tensor([FULL]))
    slot.add(0, 6, 0, source="output", family=family, rank=3, window=3 * (family == "depthwise"))
    slot = slot.with_grad()
    y, _ = slot.run(telemetry=True)
    y.sum().backward()
    assert y.shape == slot.h.shape and all(not p.grad.any() for p in slot.params)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_hosts_accumulate_in_float32(dtype):
    slot = small_slot(GRAFTING)
    ours = Slot(
        slot.h.to(dtype), slot.x.to(dtype), slot.scalars, slot.seeds, slot.params
    ).with_grad()
    exact = Slot(ours.h.float(), ours.x.float(), slot.scalars, slot.seeds, slot.params).with_grad()
    y, _ = ours.run()
    wanted, _ = exact.run()
    assert y.dtype == dtype and torch.equal(y, wanted.to(dtype))
    dy = torch.randn_like(y)
    y.backward(dy)
    wanted.backward(dy.float())
    assert torch.equal(ours.h.grad, exact.h.grad.to(dtype))
    assert torch.equal(ours.x.grad, exact.x.grad.to(dtype))
    for actual, expected in zip(ours.params, exact.params, strict=True):
        assert actual.grad.dtype == torch.float32 and torch.equal(actual.grad, expected.grad)
    own = Slot(ours.h, ours.x, slot.scalars, slot.seeds, [p.to(dtype) for p in slot.params])
    assert own.run()[0].dtype == dtype


def test_training_seeds_leave_the_host_untouched():
    slot = small_slot(TRAINING).with_grad()
    y, _ = slot.run(telemetry=True)
    assert torch.equal(y, slot.h)
    dy = torch.randn_like(y)
    y.backward(dy)
    assert torch.equal(slot.h.grad, dy)
    assert slot.x.grad is None
    assert all(p.grad is not None and p.grad.any() for p in slot.params)


def test_held_seeds_get_no_gradient():
    slot = small_slot(HELD).with_grad()
    slot.run()[0].sum().backward()
    assert all(p.grad is None for p in slot.params)
    assert slot.x.grad is not None and not torch.equal(slot.h.grad, torch.ones_like(slot.h))


def test_backward_uses_the_scalars_of_its_forward():
    bank = _C.SeedBank([3])
    for seed in range(3):
        for state in (1, 2):
            bank.advance(0, seed, state)
    slot = small_slot().with_grad()
    slot.scalars = torch.from_numpy(bank.scalars())
    y, _ = slot.run()
    for seed in range(3):
        bank.advance(0, seed, 3)
        bank.set_alpha(0, seed, 1.0)
    dy = torch.randn_like(y)
    y.backward(dy)
    assert torch.equal(slot.h.grad, dy)  # gamma was 0
    assert not torch.equal(slot.run()[0], y)


@pytest.mark.parametrize("state", [TRAINING, GRAFTING, FULL])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["all parameters", "one weight", "three tokens"])
def test_containment(state, bad, where):
    slot = small_slot(state)
    rows = slice(None)
    if where == "all parameters":
        for p in slot.params:
            p.fill_(bad)
    elif where == "one weight":
        for seed in slot.seeds:
            slot.params[seed.first_param + seed.num_params - 1].view(-1)[3] = bad
    else:
        rows = [1, 64, 129]
        slot.x[rows] = bad  # seed 1 alone reads x
    slot = slot.with_grad()
    y, stats = slot.run(telemetry=True)
    dy = torch.randn_like(y)
    y.backward(dy)
    columns = slice(19, 36) if where == "three tokens" else slice(None)
    assert torch.equal(y[rows, columns], slot.h[rows, columns])
    assert torch.equal(slot.h.grad[rows, columns], dy[rows, columns])
    for tensor in (y, slot.h.grad, slot.x.grad, *(p.grad for p in slot.params), stats):
        assert tensor is None or torch.isfinite(tensor).all()
    counted = stats[:, COLUMN["nonfinite_rows"]].tolist()
    assert counted == ([0, 3, 0] if where == "three tokens" else [130, 130, 130])
    if where != "three tokens":
        assert all(not p.grad.any() for p in slot.params)
        return
    # The other tokens train as if the contained ones were not there.
    kept = [i for i in range(130) if i not in rows]
    alone = Slot(slot.h[kept], slot.x[kept], slot.scalars, slot.seeds, slot.params).with_grad()
    alone.run()[0].backward(dy[kept])
    seed = slot.seeds[1]
    for p in range(seed.first_param, seed.first_param + seed.num_params):
        close(slot.params[p].grad, alone.params[p].grad)
    if slot.x.grad is not None:
        assert not slot.x.grad[rows].any()


def test_overflow_is_contained_where_inputs_are_finite():
    slot = Slot(torch.full((4, 8), 1e30), torch.zeros(4, 1), torch.tensor([FULL]))
    slot.add(0, 8, 0, source="output", family="bottleneck", rank=2)
    slot.params = [torch.full((8, 2), 1e4), torch.full((2, 8), 1e4)]
    slot.h[2] = 1.0
    slot = slot.with_grad()
    y, stats = slot.run(telemetry=True)
    y.sum().backward()
    assert torch.equal(y[[0, 1, 3]], slot.h[[0, 1, 3]])
    assert torch.equal(y[2], torch.full((8,), 1.0 + 8 * 1e4 * 2 * 1e4))
    assert stats[0, COLUMN["nonfinite_rows"]] == 3
    assert all(torch.isfinite(p.grad).all() and p.grad.any() for p in slot.params)


def welford(h: Tensor) -> list[float]:
    """count, mean, m2, dead, neighbour_cov and h_energy of [N, d], in float64."""
    h = h.double()
    centred = h - h.mean()
    return [
        h.numel(),
        h.mean().item(),
        (centred**2).sum().item(),
        (h.abs() < 1e-12).sum().item(),
        (centred * centred.roll(-1, dims=1)).sum().item(),
        (h**2).sum().item(),
    ]


@pytest.mark.parametrize("width", [1, 2, 16, 17, 64, 70])
@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (1e4, 1.0), (-3e5, 0.5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_telemetry(width, mean, std, dtype):
    torch.manual_seed(0)
    h = (torch.randn(200, width + 2, dtype=dtype) * std + mean).cumsum(1) / (width + 2)
    h[3, 1:3] = 0.0
    slot = Slot(h, h[:, :1], torch.tensor([GRAFTING]))
    slot.add(1, width, 0, source="output", family="bottleneck", activation="tanh", rank=3)
    _, stats = slot.run(telemetry=True)
    assert stats.dtype == torch.float64 and stats.shape == (1, len(_C.STATS_COLUMNS))
    names = ("count", "mean", "m2", "dead", "neighbour_cov", "h_energy")
    measured = [stats[0, COLUMN[name]].item() for name in names]
    np.testing.assert_allclose(measured, welford(h[:, 1:-1]), rtol=1e-5, atol=1e-3)
    g = seed_function(slot.seeds[0], h[:, 1:-1].double(), [p.double() for p in slot.params])
    energy = stats[0, COLUMN["g_energy"]].item()
    np.testing.assert_allclose(energy, (g**2).sum().item(), rtol=1e-4)
    assert slot.run(telemetry=False)[1].shape == (0, len(_C.STATS_COLUMNS))


def test_merged_telemetry_equals_telemetry_of_the_whole():
    slot = small_slot(tokens=(200,))
    slot.h[:70] += 100.0
    _, whole = slot.run(telemetry=True)
    acc = np.zeros_like(whole.numpy())
    for part in (slice(0, 70), slice(70, 71), slice(71, 71), slice(71, 200)):
        piece = Slot(slot.h[part], slot.x[part], slot.scalars, slot.seeds, slot.params)
        _C.merge_stats(acc, piece.run(telemetry=True)[1].numpy())
    np.testing.assert_allclose(acc, whole.numpy(), rtol=1e-6)
    with pytest.raises(ValueError, match="same number of rows"):
        _C.merge_stats(acc, acc[:2].copy())
    with pytest.raises(TypeError):
        _C.merge_stats(acc.astype(np.float32), acc)


def test_non_contiguous_and_overlapping_inputs():
    slot = small_slot(tokens=(6, 5))
    wanted, _ = slot.run()
    h = slot.h.transpose(0, 1).contiguous().transpose(0, 1)
    x = torch.stack([slot.x, slot.x], -1)[..., 0]
    params = [p.t().contiguous().t() if p.dim() == 2 else p for p in slot.params]
    assert not h.is_contiguous() and not x.is_contiguous()
    y, _ = Slot(h, x, slot.scalars, slot.seeds, params).run()
    assert torch.equal(y, wanted) and y.is_contiguous()
    expanded = Slot(
        slot.h[:1, :1].expand(6, 5, 47),
        slot.x[:1, :1].expand(6, 5, 13),
        slot.scalars,
        slot.seeds,
        params,
    )
    assert torch.equal(expanded.run()[0][5, 4], wanted[0, 0])
