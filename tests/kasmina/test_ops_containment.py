"""Broken seeds of every family, in every state: what they may not do to the host."""

import math

import pytest
import torch
from hypothesis import assume
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
from slot_oracle import COLUMN
from slot_oracle import TRAINING
from slot_oracle import Slot
from slot_oracle import slots

BAD = (math.nan, math.inf, -math.inf)


@st.composite
def broken_slots(draw):
    """A slot and the position of the one seed whose parameters are broken, wholly or in part."""
    slot = draw(slots(dtype=draw(st.sampled_from([torch.float32, torch.float64]))))
    position = draw(st.integers(0, len(slot.seeds) - 1))
    seed = slot.seeds[position]
    own = slot.params[seed.first_param : seed.first_param + seed.num_params]
    bad = draw(st.sampled_from(BAD))
    if draw(st.booleans()):
        for tensor in own:
            tensor.fill_(bad)
    else:
        tensor = draw(st.one_of(st.just(own[0]), st.sampled_from(own)))
        tensor.view(-1)[draw(st.integers(0, tensor.numel() - 1))] = bad
    return slot, position


@given(case=broken_slots())
@settings(deadline=None, max_examples=150)
def test_a_broken_seed_of_any_family_in_any_state_harms_nothing(case):
    slot, position = case
    ours = slot.with_grad()
    y, stats = ours.run(telemetry=True)
    dy = torch.randn_like(y)
    y.backward(dy)
    for tensor in (y, stats, ours.h.grad, ours.x.grad, *(p.grad for p in ours.params)):
        assert tensor is None or torch.isfinite(tensor).all()
    seed = slot.seeds[position]
    chunk = slice(seed.offset, seed.offset + seed.width)
    assert torch.equal(y[..., chunk], slot.h[..., chunk])
    assert torch.equal(ours.h.grad[..., chunk], dy[..., chunk])
    assert stats[position, COLUMN["nonfinite_rows"]] == slot.h[..., 0].numel()
    assert stats[position, COLUMN["g_energy"]] == 0
    own = ours.params[seed.first_param : seed.first_param + seed.num_params]
    assert all(p.grad is None or not p.grad.any() for p in own)
    # The other seeds go on as if this one were not there.
    rest = [i for i in range(len(slot.seeds)) if i != position]
    without = without_seeds(slot, rest).with_grad()
    z, _ = without.run()
    z.backward(dy)
    outside = torch.ones(slot.h.shape[-1], dtype=torch.bool)
    outside[chunk] = False
    assert torch.equal(y[..., outside], z[..., outside])
    assert torch.equal(ours.h.grad, without.h.grad)


def without_seeds(slot: Slot, kept: list[int]) -> Slot:
    scalars = slot.scalars.clone()
    for i, seed in enumerate(slot.seeds):
        if i not in kept:
            scalars[seed.row] = 0.0
    return Slot(slot.h, slot.x, scalars, slot.seeds, slot.params)


@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_an_infinite_weight_behind_an_activation_that_hides_it(activation):
    torch.manual_seed(0)
    slot = Slot(torch.randn(6, 3), torch.zeros(6, 1), torch.ones(1, 3))
    slot.add(0, 3, 0, source="output", family="bottleneck", activation=activation, rank=2)
    slot.params[0][0, 0] = math.inf
    slot = slot.with_grad()
    y, _ = slot.run()
    y.sum().backward()
    assert torch.equal(y, slot.h) and torch.equal(slot.h.grad, torch.ones(6, 3))


@given(slot=slots(states=[TRAINING]), bad=st.sampled_from(BAD), all_bad=st.booleans())
@settings(deadline=None, max_examples=60)
def test_training_seeds_of_any_family_leave_the_host_alone_bit_for_bit(slot, bad, all_bad):
    assume(slot.h.numel() > 0)
    if all_bad:
        for p in slot.params:
            p.fill_(bad)
    ours = slot.with_grad()
    y, _ = ours.run(telemetry=True)
    assert torch.equal(y, slot.h)
    dy = torch.randn_like(y)
    y.backward(dy)
    assert torch.equal(ours.h.grad, dy) and ours.x.grad is None
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in ours.params)
    assert any(p.grad.any() for p in ours.params) != all_bad


@pytest.mark.parametrize("family", ["squeeze_excite", "depthwise"])
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("layout", ["features last", "channels first"])
def test_a_broken_position_costs_what_depends_on_it(family, bad, layout):
    torch.manual_seed(0)
    h = torch.randn(3, 6, 7, 5)
    h[1, 2, 3, 4] = bad
    if layout == "channels first":
        h = h.movedim(-1, 1).contiguous().movedim(1, -1)
    slot = Slot(h, h, torch.ones(1, 3))
    kind = {"rank": 2} if family == "squeeze_excite" else {"rank": 5, "window": 3}
    slot.add(0, 5, 0, source="output", family=family, activation="relu", **kind)
    slot = slot.with_grad()
    y, stats = slot.run(telemetry=True)
    lost = torch.zeros(3, 6, 7, dtype=torch.bool)
    if family == "squeeze_excite":
        lost[1] = True  # the mean is that of the sample
    else:
        lost[1, 1:4, 2:5] = True  # the window is 3 wide
    assert torch.equal(stats[0, COLUMN["nonfinite_rows"]], lost.sum().double())
    torch.testing.assert_close(y[lost], slot.h[lost], rtol=0, atol=0, equal_nan=True)
    assert (y[~lost] != slot.h[~lost]).any()
    dy = torch.randn_like(y)
    y.backward(dy)
    assert torch.isfinite(slot.h.grad).all()
    assert all(torch.isfinite(p.grad).all() and p.grad.any() for p in slot.params)
