"""What a slot measures, compared with the same figures computed by hand."""

import math

import pytest
import torch
from torch import nn

from esper.blueprints import reference_module
from esper.common.v1 import blueprint_pb2
from esper.common.v1 import lifecycle_pb2
from esper.kasmina import SeedLifecycleState
from esper.kasmina import wrap

State = SeedLifecycleState


def host():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))


def batches(count, rows=10):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(rows, 6, generator=generator) for _ in range(count)]


def run(model, inputs):
    """Training steps; returns outputs and gradients of the slots by hand-made hooks."""
    seen = {name: [] for name in model.slots}
    for x in inputs:
        handles = []
        for name, layer in model.slots.items():

            def keep(module, args, output, name=name):
                h = output.detach().clone()
                output.register_hook(lambda dy, name=name, h=h: seen[name].append((h, dy)))

            handles.append(layer.module.register_forward_hook(keep))
        model.zero_grad()
        model(x).square().mean().backward()
        for handle in handles:
            handle.remove()
    return seen


def plant(model, slot, seed, state, blueprint="bottleneck", **hyperparameters):
    model.germinate(slot, seed, blueprint, **hyperparameters)
    for stage in range(State.TRAINING, State[state] + 1):
        model.advance(slot, seed, stage)
    for parameter in model.seed_parameters(slot, seed):
        nn.init.normal_(parameter, std=0.5, generator=torch.Generator().manual_seed(2))


def signals_of(model, epoch=0):
    return {(signal.slot, signal.seed): signal for signal in model.collect_signals(epoch)}


def check_chunk(signal, observations, begin, end):
    h = torch.cat([o[0] for o in observations])[:, begin:end].double()
    dy = torch.cat([o[1] for o in observations])[:, begin:end].double()
    assert signal.num_samples == h.numel()
    assert signal.mean == pytest.approx(float(h.mean()), abs=1e-7)
    assert signal.variance == pytest.approx(float(h.var(correction=0)), rel=1e-5)
    assert signal.dead_ratio == pytest.approx(float((h == 0).double().mean()))
    centred = h - h.mean()
    neighbours = (centred * centred.roll(-1, dims=1)).sum() / centred.square().sum()
    assert signal.correlation == pytest.approx(float(neighbours), abs=1e-5)
    assert signal.output_gradient_norm == pytest.approx(float(dy.square().mean().sqrt()), rel=1e-5)


def test_dormant_chunks_are_measured_on_every_sampled_step():
    model = wrap(host())
    model.telemetry_interval = 1
    seen = run(model, batches(3))
    signals = signals_of(model, epoch=7)
    assert len(signals) == 8
    for (slot, seed), signal in signals.items():
        check_chunk(signal, seen[slot], *model.slots[slot].bounds[seed])
        assert signal.epoch == 7 and signal.state == lifecycle_pb2.SEED_STATE_DORMANT
        assert signal.host_flops_per_token == {"0": 96, "2": 64}[slot]
        assert signal.tokens_per_sample == 1.0
        for field in ("alpha", "num_nonfinite_rows", "relative_energy", "weight_gradient_norm"):
            assert not signal.HasField(field)
        assert signal.kernel == "" and not signal.ready_for_transition
        assert [score.source for score in signal.growth_scores] == [
            blueprint_pb2.SEED_SOURCE_INPUT,
            blueprint_pb2.SEED_SOURCE_OUTPUT,
        ]
        assert all(score.HasField("null_score") for score in signal.growth_scores)


@pytest.mark.parametrize("blueprint", ["bottleneck", "norm_mlp", "affine", "noop"])
@pytest.mark.parametrize("state", ["TRAINING", "FINE_TUNING", "STABILIZATION"])
def test_computing_seeds_measure_their_host_chunk_and_themselves(blueprint, state):
    model = wrap(host())
    model.telemetry_interval = 1
    plant(model, "0", 1, state, blueprint)
    graft = model.slots["0"].graft(1)
    # The user's hooks run after the slot's own, so h is taken by hand here.
    xs = batches(2)
    weights_norms = []
    rows = []
    for x in xs:
        model.zero_grad()
        model(x).square().mean().backward()
        gradients = [p.grad for p in model.seed_parameters("0", 1) if p.grad is not None]
        weights_norms.append(sum(float(g.double().square().sum()) for g in gradients))
        rows.append(nn.functional.linear(x, model.host[0].weight, model.host[0].bias).detach())
    signal = signals_of(model)["0", 1]
    h = torch.cat(rows)[:, 2:4].double()
    assert signal.mean == pytest.approx(float(h.mean()), abs=1e-6)
    assert signal.variance == pytest.approx(float(h.var(correction=0)), rel=1e-4)
    assert signal.kernel == graft.digest
    assert signal.alpha == (0.0 if state == "TRAINING" else 1.0)
    assert signal.num_nonfinite_rows == 0
    assert signal.state == lifecycle_pb2.SeedState.Value(f"SEED_STATE_{state}")
    if blueprint == "noop":
        assert signal.relative_energy == 0
    else:
        names = [spec.name for spec in graft.kernel.parameters]
        weights = dict(zip(names, model.seed_parameters("0", 1), strict=True))
        g = reference_module(graft.kernel, weights)(h.float()).detach().double()
        expected = float(g.square().sum() / h.square().sum())
        assert signal.relative_energy == pytest.approx(expected, rel=1e-3)
    if blueprint != "noop" and state != "STABILIZATION":
        expected = math.sqrt(sum(weights_norms) / len(weights_norms))
        assert signal.weight_gradient_norm == pytest.approx(expected, rel=1e-5)
    else:
        assert not signal.HasField("weight_gradient_norm")
    assert len(signal.growth_scores) == 0  # of dormant chunks only
    assert len(signals_of(model)["0", 0].growth_scores) == 0


def test_dormant_neighbours_of_a_computing_seed_are_still_scored():
    model = wrap(host())
    plant(model, "0", 1, "TRAINING", rank=2)
    run(model, batches(1))
    signals = signals_of(model)
    assert [len(signals["0", seed].growth_scores) for seed in range(4)] == [2, 0, 2, 2]


def test_collecting_starts_anew():
    model = wrap(host())
    model.telemetry_interval = 1
    run(model, batches(2))
    first = signals_of(model)
    assert first["0", 0].num_samples == 40
    empty = signals_of(model)["0", 0]
    for field in ("num_samples", "mean", "variance", "correlation", "output_gradient_norm"):
        assert not empty.HasField(field), field
    assert len(empty.growth_scores) == 0
    run(model, batches(1))
    assert signals_of(model)["0", 0].num_samples == 20


def test_before_the_first_forward_nothing_is_measured():
    model = wrap(nn.Sequential(nn.Sequential(nn.Linear(6, 8), nn.ReLU())), "0")
    signal, *others = model.collect_signals(0)
    assert len(others) == 3
    for field in ("num_samples", "host_flops_per_token", "tokens_per_sample"):
        assert not signal.HasField(field)
    model(torch.randn(5, 7, 6))
    assert all(signal.tokens_per_sample == 7.0 for signal in model.collect_signals(0))


def test_a_large_mean_does_not_drown_the_variance():
    model = wrap(nn.Sequential(nn.Linear(4, 4)))
    with torch.no_grad():
        model.host[0].bias.fill_(1e4)
        model.host[0].weight.mul_(0.01)
    model.telemetry_interval = 1
    xs = [torch.randn(50, 4, generator=torch.Generator().manual_seed(i)) for i in range(30)]
    rows = []
    for x in xs:
        rows.append(model(x).detach().double())
    h = torch.cat(rows)[:, :1]
    signal = signals_of(model)["0", 0]
    assert signal.variance == pytest.approx(float(h.var(correction=0)), rel=1e-6)


def test_a_host_that_is_not_finite_is_not_reported_as_numbers():
    model = wrap(host())
    with torch.no_grad():
        model.host[0].bias[0] = float("nan")
    run(model, batches(1))
    signal = signals_of(model)["0", 0]
    assert not signal.HasField("mean") and not signal.HasField("variance")
    assert len(signal.growth_scores) == 0
    assert not signal.HasField("num_nonfinite_rows")


def test_the_seeds_own_figures_leave_with_the_seed():
    model = wrap(host())
    model.telemetry_interval = 1
    plant(model, "0", 1, "FINE_TUNING", rank=2)
    run(model, batches(1))
    model.cull("0", 1)
    signal = signals_of(model)["0", 1]
    for field in ("num_nonfinite_rows", "relative_energy", "weight_gradient_norm", "alpha"):
        assert not signal.HasField(field)
    assert signal.num_samples == 20  # the chunk's own stay


def test_ready_says_that_the_ramp_is_done():
    model = wrap(host())
    plant(model, "0", 0, "GRAFTING", rank=1)
    model.set_schedule("0", 0, lifecycle_pb2.AlphaSchedule(steps=2))
    ready = []
    for _ in range(3):
        ready.append(signals_of(model)["0", 0].ready_for_transition)
        model.tick()
    assert ready == [False, False, True]


def test_gradient_accumulation_measures_what_has_accumulated():
    model = wrap(host())
    plant(model, "0", 0, "TRAINING", rank=2)
    first, second, third = batches(3)
    model(first).square().mean().backward()  # sampled
    model(second).square().mean().backward()  # not sampled
    parameters = model.seed_parameters("0", 0)
    model.telemetry_interval = 1
    before = sum(float(p.grad.double().square().sum()) for p in parameters)
    signals_of(model)
    model(third).square().mean().backward()
    after = sum(float(p.grad.double().square().sum()) for p in parameters)
    norm = signals_of(model)["0", 0].weight_gradient_norm
    assert norm == pytest.approx(math.sqrt(after), rel=1e-6) and after != before


def test_a_sampled_forward_without_backward_leaves_nothing_armed():
    model = wrap(host())
    plant(model, "0", 0, "TRAINING", rank=2)
    x, y = batches(2)
    model(x)  # sampled, never differentiated
    model.telemetry_interval = 1
    model(y).square().mean().backward()
    parameters = model.seed_parameters("0", 0)
    expected = math.sqrt(sum(float(p.grad.double().square().sum()) for p in parameters))
    assert signals_of(model)["0", 0].weight_gradient_norm == pytest.approx(expected, rel=1e-6)
    assert all(not p._post_accumulate_grad_hooks for p in parameters)


def test_convolutions_are_measured_over_their_channels():
    torch.manual_seed(0)
    model = wrap(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Flatten()))
    x = torch.randn(2, 3, 5, 5)
    y = model(x)
    y.square().mean().backward()
    signals = signals_of(model)
    maps = model.host[0](x).detach()
    for seed in range(4):
        assert signals["0", seed].num_samples == 50
        assert signals["0", seed].mean == pytest.approx(float(maps[:, seed].mean()), abs=1e-6)
        gradient = 2 * maps[:, seed] / maps.numel()
        expected = float(gradient.square().mean().sqrt())
        assert signals["0", seed].output_gradient_norm == pytest.approx(expected, rel=1e-5)
        assert len(signals["0", seed].growth_scores) == 2
    assert model.slots["0"].tokens_per_sample == 25
