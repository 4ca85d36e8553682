"""Ramps that wait for a host whose output moves."""

import copy
import math

import numpy as np
import pytest
import torch
from seed_host import to_state
from torch import nn
from torch._dynamo.testing import CompileCounter

from esper.common.v1 import lifecycle_pb2
from esper.config import GraftConfig
from esper.kasmina import wrap
from esper.kasmina.drift import DriftMeter
from esper.kasmina.drift import drift_between

STEPS = 8
TOLERANCE = 0.2
X = torch.randn(12, 6, generator=torch.Generator().manual_seed(1))
KINDS = {
    "drift": lifecycle_pb2.ALPHA_SCHEDULE_KIND_DRIFT,
    "linear": lifecycle_pb2.ALPHA_SCHEDULE_KIND_LINEAR,
}


def wrapped():
    torch.manual_seed(0)
    return wrap(nn.Sequential(nn.Linear(6, 8), nn.Tanh()), seeds_per_layer=2)


def ramping(kind="drift", **changes):
    model = wrapped()
    model(X)  # tells the slots their shapes
    schedule = {"kind": KINDS[kind], "steps": STEPS, "drift_tolerance": TOLERANCE} | changes
    to_state(model, "0", 0, "GERMINATED")
    model.set_schedule("0", 0, lifecycle_pb2.AlphaSchedule(**schedule))
    model.advance("0", 0, "TRAINING")
    model.advance("0", 0, "GRAFTING")
    return model


def restored(model):
    """Another model with the host's weights, the seeds and the lifecycle of one, not its past."""
    fresh = wrapped()
    fresh.host.load_state_dict(model.host.state_dict())
    slots = {name: layer.slot_state() for name, layer in model.slots.items()}
    weights = dict(model.slots["0"].graft(0).named_parameters())
    fresh.restore(model.bank.to_bytes(), slots, {("0", 0): (model.kernel_of("0", 0), weights)})
    return fresh


def alphas_of(model, move=lambda host, step: None, x=X, forward=None, steps=STEPS):
    """Alphas after each step of a ramp; `move` changes the host before its forward."""
    seen = []
    for step in range(steps):
        move(model.host[0], step)
        (model if forward is None else forward)(x)
        model.tick()
        seen.append(model.alpha("0", 0))
    return seen


def grow_longer(host, step):
    with torch.no_grad():
        host.weight.mul_(1.3)
        host.bias.mul_(1.3)


def turn(host, step):
    """Moves every feature to the next one's place: as long as before, in another direction."""
    with torch.no_grad():
        host.weight.copy_(host.weight.roll(1, 0))
        host.bias.copy_(host.bias.roll(1, 0))


def jump(host, step):
    if step == 3:
        grow_longer(host, step)


def expected_alphas(outputs, tolerance=TOLERANCE):
    """The same ramp in float64, from the host's outputs of each step."""
    reference, elapsed, alphas = None, 0.0, []
    for h in outputs:
        h = h.double().flatten(0, -2)
        profile = torch.cat([h.mean(0), h.square().mean(0).sqrt()])
        reference = profile if reference is None else reference
        cosine = 1 - torch.nn.functional.cosine_similarity(profile, reference, dim=0)
        norm = abs(profile.norm() - reference.norm()) / max(profile.norm(), reference.norm())
        reference = 0.9 * reference + 0.1 * profile
        elapsed += 1 / (1 + float(cosine + norm) / tolerance)
        alphas.append(min(1.0, elapsed / STEPS))
    return alphas


def test_a_still_host_ramps_linearly():
    alphas = alphas_of(ramping())
    assert alphas == alphas_of(ramping("linear")) == [step / STEPS for step in range(1, STEPS + 1)]


@pytest.mark.parametrize("move", [grow_longer, turn, jump])
def test_a_host_that_moves_slows_the_ramp(move):
    model = ramping()
    outputs = []
    model.host[0].register_forward_pre_hook(
        lambda module, args: outputs.append(
            nn.functional.linear(args[0], module.weight, module.bias).detach()
        )
    )
    alphas = alphas_of(model, move)
    assert alphas == pytest.approx(expected_alphas(outputs), rel=1e-5)
    assert alphas[-1] < 0.95
    # A host that rests again is at rest: of the last steps of a long wait each one is whole.
    for _ in range(200):
        model(X)
        if model.tick():
            break
    assert model.alpha("0", 0) == 1.0


def test_a_jump_is_forgotten_within_some_steps():
    model = ramping(steps=200)
    before = [0.0, *alphas_of(model, jump, steps=60)]
    speeds = np.diff(before) * 200
    assert speeds[:3] == pytest.approx(1.0)
    assert speeds[3] < 0.6
    assert (np.diff(speeds[3:]) > 0).all() and speeds[-1] > 0.99


def test_only_a_ramp_that_asks_for_it_is_measured():
    model = ramping("linear")
    assert model.slots["0"].drift is None
    drifting = lifecycle_pb2.AlphaSchedule(kind=KINDS["drift"], steps=3)
    model.set_schedule("0", 0, drifting)
    assert model.slots["0"].drift is not None
    model.set_seed_alpha("0", 0, 0.5)  # held
    model.set_schedule("0", 1, drifting)  # of a seed that is not on a ramp
    model.set_schedule("0", 0, lifecycle_pb2.AlphaSchedule(steps=3))
    assert model.slots["0"].drift is None and model.drift_sums() == []
    model.set_schedule("0", 0, drifting)
    assert len(model.drift_sums()) == 1
    model.advance("0", 0, "STABILIZATION")
    assert model.slots["0"].drift is None
    model.advance("0", 0, "EVALUATING")
    model.advance("0", 0, "GRAFTING")
    assert model.slots["0"].drift is not None
    model.cull("0", 0)
    assert model.slots["0"].drift is None


def test_ramps_of_one_slot_share_their_measure():
    model = ramping()
    alphas_of(model, grow_longer, steps=2)
    to_state(model, "0", 1, "GERMINATED")
    model.set_schedule("0", 1, lifecycle_pb2.AlphaSchedule(kind=KINDS["drift"], steps=STEPS))
    model.advance("0", 1, "TRAINING")
    model.advance("0", 1, "GRAFTING")
    before = model.alpha("0", 0)
    alphas_of(model, grow_longer, steps=1)
    assert 0 < model.alpha("0", 1) < model.alpha("0", 0) - before  # its tolerance is half as large
    model.cull("0", 0)
    assert model.slots["0"].drift is not None


def test_parts_of_a_batch_are_one_step_and_evaluation_is_none():
    def in_parts(model):
        def forward(x):
            for part in x.split(5):
                model(part)
            model.eval()
            model(100 * x)
            model.train()
            with torch.no_grad():
                model(100 * x)

        return forward

    whole, parts = ramping(), ramping()
    assert alphas_of(parts, grow_longer, forward=in_parts(parts)) == pytest.approx(
        alphas_of(whole, grow_longer), rel=1e-5
    )


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e30])
def test_what_is_not_finite_is_left_out(bad):
    """A broken token costs its own place; a step that is all broken keeps the last drift."""
    clean = alphas_of(ramping(), grow_longer)
    broken = torch.cat([X, torch.full((3, 6), bad)])
    alphas = alphas_of(ramping(), grow_longer, broken)
    assert alphas == clean
    model = ramping()
    alphas = alphas_of(model, grow_longer, steps=3)
    model(torch.full((4, 6), bad))
    model.tick()
    assert model.alpha("0", 0) - alphas[2] == pytest.approx(alphas[2] - alphas[1], rel=1e-4)
    model(X)
    model.tick()
    assert math.isfinite(model.alpha("0", 0))
    state = model.runtime().slots["0"].drift
    assert torch.isfinite(state.reference).all() and not state.sums.any()


def test_a_slot_that_does_not_run_keeps_its_drift():
    model = ramping()
    alphas = alphas_of(model, grow_longer, steps=3)
    model.tick()
    assert model.alpha("0", 0) - alphas[2] == pytest.approx(alphas[2] - alphas[1], rel=1e-4)


@pytest.mark.parametrize("midst", [False, True])
def test_a_resumed_ramp_is_the_uninterrupted_one(midst):
    """Also from the midst of a step, between a forward and its tick."""

    def train(model, steps):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
        alphas = []
        for number in steps:
            model(X.roll(number, 0)[:7]).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            model.tick()
            alphas.append(model.alpha("0", 0))
        return alphas

    whole = ramping(steps=20)
    train(whole, range(6))
    if midst:
        whole(X[:3])
    fresh = restored(whole)
    fresh.resume(whole.runtime())
    clone = copy.deepcopy(whole)
    rest = train(whole, range(6, 14))
    assert rest[-1] < 0.7
    assert train(fresh, range(6, 14)) == rest
    assert train(clone, range(6, 14)) == rest
    assert fresh.bank.to_bytes() == whole.bank.to_bytes()


def test_a_restored_ramp_without_its_past_takes_its_reference_anew():
    model = ramping()
    alphas_of(model, grow_longer, steps=3)
    fresh = restored(model)
    before = fresh.alpha("0", 0)
    assert np.diff([before, *alphas_of(fresh, steps=2)]) == pytest.approx(1 / STEPS)


def test_compiled_models_measure_the_same_in_one_graph():
    torch.compiler.reset()
    model, eager = ramping(), ramping()
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    alphas = alphas_of(model, grow_longer, forward=compiled)
    assert counter.frame_count == 1
    assert alphas == pytest.approx(alphas_of(eager, grow_longer), rel=1e-6)
    assert alphas[-1] < 0.7
    model.advance("0", 0, "STABILIZATION")
    compiled(X)
    model.advance("0", 0, "EVALUATING")
    compiled(X)
    assert counter.frame_count == 2, "without the measure is one more graph"
    model.advance("0", 0, "GRAFTING")
    alphas_of(model, forward=compiled, steps=2)
    assert counter.frame_count <= 3
    torch.compiler.reset()


def test_a_compiled_still_host_ramps_linearly():
    torch.compiler.reset()
    model = ramping()
    assert alphas_of(model, forward=torch.compile(model, backend="aot_eager")) == [
        step / STEPS for step in range(1, STEPS + 1)
    ]
    torch.compiler.reset()


def test_a_ramping_model_is_exported():
    model = ramping()
    program = torch.export.export(model, (X,), strict=False)
    torch.testing.assert_close(program.module()(X), model(X))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(7, 5), (2, 3, 4, 5), (1, 5), (5,), (0, 5), (4, 600, 5)])
def test_the_profile_is_that_of_the_tokens(shape, dtype):
    torch.manual_seed(3)
    meter = DriftMeter(5, torch.device("cpu"))
    h = (torch.randn(shape) * 3 + 1).to(dtype)
    other = h.movedim(-1, 0).contiguous().movedim(0, -1)  # channels first
    rows = h.double().reshape(-1, 5)
    stride = max(1, len(rows) // 256)
    rows = rows[::stride]
    expected = torch.cat([rows.sum(0), rows.square().sum(0), torch.tensor([float(len(rows))])])
    for layout in (h, other):
        meter.take(layout)
        torch.testing.assert_close(meter.sums, expected.double(), rtol=1e-5, atol=1e-4)
        meter.measure()
        assert not meter.sums.any()


def test_drift_has_bounds():
    e, zero = np.eye(3), np.zeros(3)
    assert drift_between(e[0], e[0]) == (0.0, 0.0)
    assert drift_between(zero, zero) == (0.0, 0.0)
    assert drift_between(zero, e[0]) == drift_between(e[0], zero) == (0.0, 1.0)
    assert drift_between(-e[0], 4 * e[0]) == pytest.approx((2.0, 0.75))
    assert drift_between(e[0], e[1]) == pytest.approx((1.0, 0.0))
    assert drift_between(1e150 * e[0], 1e-150 * e[0]) == (0.0, 1.0)


@pytest.mark.parametrize("tolerance", [0.0, -1.0, math.nan, math.inf])
def test_a_tolerance_without_sense_is_refused(tolerance):
    with pytest.raises(ValueError, match=f"drift_tolerance is {tolerance}, but it must be finite"):
        GraftConfig(drift_tolerance=tolerance)
    with pytest.raises(ValueError, match="slot '0', seed 0: tolerance is"):
        ramping(drift_tolerance=tolerance)
