"""Programs: slot calls past torch's dispatcher compute what the operators compute, to the bit."""

import pytest
import torch
from hypothesis import given
from hypothesis import settings
from slot_oracle import FULL
from slot_oracle import GRAFTING
from slot_oracle import HELD
from slot_oracle import STATES
from slot_oracle import TRAINING
from slot_oracle import Slot
from slot_oracle import slots
from slot_oracle import small_slot
from slot_oracle import spatial_slot
from torch import Tensor
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import esper
from esper import _C
from esper.kasmina import SeedLifecycleState as State


def run(slot: Slot, telemetry: bool = False, direct: bool = False) -> tuple[Tensor, Tensor] | None:
    program = _C.SlotProgram(slot.plan)
    return program.run(slot.h, slot.x, slot.params, slot.scalars, telemetry, direct)


def result_of(slot: Slot, **options: bool) -> Tensor:
    result = run(slot, **options)
    assert result is not None
    return result[0]


def grads_of(slot: Slot) -> list[Tensor | None]:
    return [tensor.grad for tensor in (slot.h, slot.x, *slot.params)]


def same(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return one.dtype == other.dtype and torch.equal(one.nan_to_num(7.0), other.nan_to_num(7.0))


@pytest.mark.parametrize("direct", [False, True])
@settings(max_examples=60, deadline=None)
@given(slot=slots(states=STATES))
def test_equals_the_operator(direct, slot):
    with torch.no_grad():
        y, stats = slot.run(telemetry=True)
        ours, our_stats = run(slot, telemetry=True)
        assert torch.equal(y, ours) and same(stats, our_stats)
        assert y.stride() == ours.stride()
    one, other = slot.with_grad(), slot.with_grad()
    dy = torch.randn(slot.h.shape, dtype=slot.h.dtype)
    one.run()[0].backward(dy)
    result_of(other, direct=direct).backward(dy)
    assert all(map(same, grads_of(one), grads_of(other)))


@pytest.mark.parametrize("make", [small_slot, spatial_slot])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("state", [TRAINING, HELD, FULL])
def test_equals_the_operator_in_other_types(make, dtype, state):
    one = make(state, dtype).with_grad()
    other = one.with_grad()
    one.run()[0].sum().backward()
    result_of(other).sum().backward()
    assert all(map(same, grads_of(one), grads_of(other)))


@pytest.mark.parametrize("direct", [False, True])
def test_frozen_parameters_get_no_gradient(direct):
    slot = small_slot(FULL).with_grad()
    frozen = slot.params[::2]
    for tensor in frozen:
        tensor.requires_grad_(False)
    result_of(slot, direct=direct).sum().backward()
    assert [tensor.grad is None for tensor in slot.params] == [
        any(tensor is other for other in frozen) for tensor in slot.params
    ]


def test_what_only_the_dispatcher_knows_is_left_to_it():
    slot = small_slot(FULL).with_grad()
    assert run(slot) is not None
    with FlopCounterMode(display=False):
        assert run(slot) is None
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert run(slot) is None
    with TorchFunctionMode():
        assert run(slot) is None
    with forward_ad.dual_level():
        assert run(slot) is None
    asked = []

    def under_transform(h: Tensor) -> Tensor:
        program = _C.SlotProgram(slot.plan)
        asked.append(program.run(h, slot.x, slot.params, slot.scalars))
        return h.sum()

    torch.func.grad(under_transform)(slot.h.detach())
    assert asked == [None]
    slot.params[0] = slot.params[0].to("meta")
    assert run(slot) is None


def test_bad_arguments_are_refused_as_by_the_operator():
    slot = small_slot(FULL)
    slot.params[0] = slot.params[0][:-1]
    with pytest.raises(ValueError) as theirs:
        slot.run()
    with pytest.raises(ValueError) as ours:
        run(slot)
    assert str(ours.value) == str(theirs.value)
    assert "params[0]" in str(ours.value)


def test_changes_between_forward_and_backward_are_noticed():
    for position in (0, 1, 2):
        slot = small_slot(FULL).with_grad()
        y = result_of(slot)
        with torch.no_grad():
            [slot.h, slot.x, slot.params[0]][position].add_(1.0)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


def test_twice_backward_needs_the_graph_to_be_retained():
    slot = small_slot(FULL).with_grad()
    y = result_of(slot)
    y.sum().backward(retain_graph=True)
    once = [grad.clone() for grad in grads_of(slot)]
    y.sum().backward()
    assert all(
        torch.equal(grad, 2 * first) for grad, first in zip(grads_of(slot), once, strict=True)
    )
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        y.sum().backward()


def test_second_derivatives_are_refused():
    slot = small_slot(GRAFTING).with_grad()
    (grad,) = torch.autograd.grad(result_of(slot).sin().sum(), slot.h, create_graph=True)
    with pytest.raises(RuntimeError, match="slot_backward"):
        grad.sum().backward()


def test_gradients_can_be_asked_for_one_by_one():
    slot = small_slot(FULL).with_grad()
    other = Slot(slot.h, slot.x, slot.scalars, slot.seeds, slot.params)
    wanted = [slot.x, slot.params[1], slot.params[-1]]
    ours = torch.autograd.grad(result_of(slot).sum(), wanted)
    theirs = torch.autograd.grad(other.run()[0].sum(), wanted)
    assert all(map(torch.equal, ours, theirs))
    assert grads_of(slot) == [None] * len(grads_of(slot))


def test_checkpointing_recomputes():
    slot = small_slot(FULL).with_grad()
    other = slot.with_grad()
    program = _C.SlotProgram(slot.plan)

    def forward(h: Tensor, x: Tensor) -> Tensor:
        y, _ = program.run(h * 2, x, slot.params, slot.scalars)
        return y.sin()

    checkpoint(forward, slot.h, slot.x, use_reentrant=False).sum().backward()
    doubled = Slot(other.h * 2, other.x, other.scalars, other.seeds, other.params)
    doubled.run()[0].sin().sum().backward()
    assert all(map(same, grads_of(slot), grads_of(other)))


# ---------------------------------------------------------------- direct gradients


def test_direct_gradients_add_up():
    one = small_slot(FULL).with_grad()
    other = one.with_grad()
    for factor in (1.0, -3.0):
        (one.run()[0] * factor).sum().backward()
        (result_of(other, direct=True) * factor).sum().backward()
    assert all(map(same, grads_of(one), grads_of(other)))


def test_direct_gradients_are_not_touched_where_others_are_asked_for():
    slot = small_slot(FULL).with_grad()
    y = result_of(slot, direct=True)
    (dh,) = torch.autograd.grad(y.sum(), slot.h, retain_graph=True)
    assert all(tensor.grad is None for tensor in slot.params)
    assert torch.equal(dh, torch.autograd.grad(slot.run()[0].sum(), slot.h)[0])
    with pytest.raises(RuntimeError, match="not have been used in the graph"):
        torch.autograd.grad(y.sum(), slot.params)


@pytest.mark.parametrize("kind", ["tensor", "accumulated", "node"])
def test_hooks_are_called_with_direct_gradients(kind):
    slot = small_slot(FULL).with_grad()
    seen, hooked = [], slot.params[2]
    if kind == "tensor":
        hooked.register_hook(lambda grad: seen.append(grad) or grad * 2)
    elif kind == "accumulated":
        hooked.register_post_accumulate_grad_hook(lambda tensor: seen.append(tensor.grad))
    else:  # as data parallelism does it
        node = hooked.view_as(hooked).grad_fn.next_functions[0][0]
        node.register_hook(lambda *_: seen.append(hooked.grad))
    other = slot.with_grad()
    other.run()[0].sum().backward()
    result_of(slot, direct=True).sum().backward()
    assert len(seen) == 1
    factor = 2 if kind == "tensor" else 1
    assert torch.equal(hooked.grad, factor * other.params[2].grad)
    assert torch.equal(slot.params[0].grad, other.params[0].grad)


def test_direct_gradients_refuse_what_they_cannot_do():
    slot = small_slot(FULL).with_grad()
    y = result_of(slot, direct=True)
    slot.params[-1].register_hook(lambda grad: grad)
    with pytest.raises(RuntimeError, match="has got a hook since forward"):
        y.sum().backward()
    assert grads_of(slot) == [None] * len(grads_of(slot))
    slot = small_slot(FULL).with_grad()
    with (
        pytest.warns(UserWarning, match="create_graph=True"),
        pytest.raises(RuntimeError, match="turn them off"),
    ):
        result_of(slot, direct=True).sum().backward(create_graph=True)


def test_direct_gradients_train_the_same_model():
    def trained(direct: bool) -> tuple[list[Tensor], bool]:
        torch.manual_seed(0)
        host = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 4))
        model = esper.wrap(host, seeds_per_layer=2, telemetry_enabled=False)
        model.direct_gradients = direct
        assert model.direct_gradients is direct
        for seed, state in enumerate((State.TRAINING, State.FINE_TUNING)):
            model.germinate("0", seed, "bottleneck", rank=2)
            for stage in range(State.TRAINING, state + 1):
                model.advance("0", seed, stage)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
        generator = torch.Generator().manual_seed(1)
        for _ in range(4):
            model(torch.randn(5, 6, generator=generator)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        y = model(torch.randn(5, 6, generator=generator))
        reached = set()
        nodes = [y.grad_fn]
        while nodes:
            node = nodes.pop()
            reached.add(id(getattr(node, "variable", None)))
            nodes += [following for following, _ in node.next_functions if following is not None]
        seeds = [p for seed in (0, 1) for p in model.seed_parameters("0", seed)]
        return [p.detach() for p in model.parameters()], any(id(p) in reached for p in seeds)

    usual, through_engine = trained(False)
    direct, still_through_engine = trained(True)
    assert through_engine and not still_through_engine
    assert all(map(torch.equal, usual, direct))
