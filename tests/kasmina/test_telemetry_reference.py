"""What ``collect_signals`` tells, against float64, over random hosts, types, layouts and states."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
from seed_host import to_state
from torch import nn

from esper.blueprints import reference_module
from esper.kasmina import wrap
from esper.kasmina.rows import MAX_ROWS
from esper.kasmina.rows import SampledStep

STATES = ("TRAINING", "GRAFTING", "STABILIZATION", "FINE_TUNING", "FOSSILIZED")
BLUEPRINTS = ("bottleneck", "lora", "affine", "widen", "glu", "norm_mlp")


@st.composite
def hosts(draw):
    """A layer, the shape of its batches, and what is planted in its second and third seed."""
    torch.manual_seed(draw(st.integers(0, 2**31)))
    width, source = draw(st.integers(3, 24)), draw(st.integers(1, 12))
    dtype = draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
    if draw(st.booleans()):
        layer, shape = nn.Linear(source, width), (draw(st.integers(1, 30)), source)
        if draw(st.booleans()):
            shape = (2, *shape)
    else:
        layer, shape = nn.Conv2d(source, width, 1), (2, source, 3, draw(st.integers(1, 10)))
    with torch.no_grad():
        layer.bias.add_(draw(st.sampled_from([0.0, 5.0, -100.0])))
    planted = {
        seed: (draw(st.sampled_from(STATES)), draw(st.sampled_from(BLUEPRINTS[:5])))
        for seed in draw(st.sets(st.sampled_from([1, 2])))
    }
    steps = draw(st.integers(1, 4))
    batches = [torch.randn(shape).to(dtype) for _ in range(steps)]
    return layer.to(dtype), batches, planted


def rows_of(tensor, layer):
    """[tokens, features] in float64."""
    channels = isinstance(layer, nn.Conv2d)
    tensor = tensor.movedim(1, -1) if channels else tensor
    return tensor.detach().reshape(-1, tensor.shape[-1]).double()


def trained(layer, batches, planted):
    """A wrapped layer after some steps; its h, dL/dy and the seeds' gradients by step."""
    model = wrap(nn.Sequential(layer), seeds_per_layer=3)
    model(batches[0])
    model.collect_signals(0)
    for seed, (state, blueprint) in planted.items():
        to_state(
            model, "0", seed, state, blueprint, **({} if blueprint == "affine" else {"rank": 2})
        )
        if state == "GRAFTING":
            model.set_seed_alpha("0", seed, 0.25)
    model.telemetry_interval = 1
    hs, dys, squares = [], [], {seed: [] for seed in planted}
    for x in batches:
        model.zero_grad()
        y = model(x)
        y.retain_grad()
        (y.float() * torch.linspace(-1, 1, y.shape[-1])).square().mean().backward()
        hs.append(rows_of(call(layer, x), layer))
        dys.append(rows_of(y.grad, layer))
        for seed in planted:
            gradients = [p.grad for p in model.seed_parameters("0", seed) if p.grad is not None]
            squares[seed].append([float(g.double().square().sum()) for g in gradients])
    return model, torch.cat(hs), torch.cat(dys), squares


def call(layer, x):
    """The layer's own output, without its hooks."""
    with torch.no_grad():
        return layer.forward(x)


@settings(max_examples=40, deadline=None)
@given(hosts())
def test_every_figure_is_that_of_the_values(case):
    layer, batches, planted = case
    model, h, dy, squares = trained(layer, batches, planted)
    sources = torch.cat([rows_of(x, layer) for x in batches])
    wide = layer.weight.dtype != torch.bfloat16
    for signal in model.collect_signals(0):
        begin, end = model.slots["0"].bounds[signal.seed]
        own = h[:, begin:end]
        centred = own - own.mean()
        m2 = float(centred.square().sum())
        size = float(own.square().mean().sqrt())
        assert signal.num_samples == own.numel()
        assert signal.mean == pytest.approx(float(own.mean()), abs=1e-5 * size + 1e-12)
        noise = (1e-5 * size) ** 2  # of float32 in m2
        assert signal.variance == pytest.approx(m2 / own.numel(), rel=1e-3, abs=noise)
        assert signal.dead_ratio == float((own.abs() < 1e-12).double().mean())
        if m2 / own.numel() > 100 * noise:
            ring = float((centred * centred.roll(-1, dims=1)).sum()) / m2
            assert signal.correlation == pytest.approx(ring, abs=2e-3)
        gradient = float(dy[:, begin:end].square().mean().sqrt())
        assert signal.output_gradient_norm == pytest.approx(gradient, rel=1e-4)
        assert signal.HasField("relative_energy") == (signal.seed in planted)
        if signal.seed not in planted:
            assert not signal.HasField("num_nonfinite_rows")
            assert not signal.HasField("weight_gradient_norm")
            continue
        graft = model.slots["0"].graft(signal.seed)
        g = function(graft, sources if graft.reads_input else own)
        assert signal.num_nonfinite_rows == 0
        energy = float(g.square().sum() / own.square().sum())
        assert signal.relative_energy == pytest.approx(energy, rel=1e-3 if wide else 3e-2)
        sums = [sum(step) for step in squares[signal.seed] if step]
        assert signal.HasField("weight_gradient_norm") == bool(sums)
        if sums:
            root = math.sqrt(sum(sums) / len(sums))
            assert signal.weight_gradient_norm == pytest.approx(root, rel=1e-5)


def function(graft, rows):
    """The seed's function in float64, whatever its slot looks like."""
    kernel = graft.kernel
    weights = dict(
        zip(
            [spec.name for spec in kernel.parameters],
            [p.detach().double() for p in graft.ordered_parameters()],
            strict=True,
        )
    )
    module = reference_module(kernel, weights).double()
    if module.channels_first:
        rows = rows.T[None, :, :, None]
        return module(rows)[0, :, :, 0].T.detach()
    return module(rows).detach()


@pytest.mark.parametrize("blueprint", BLUEPRINTS)
def test_broken_rows_are_counted_and_left_out_of_the_energy(blueprint):
    """Two of nine rows make g infinite while the host's own output is finite."""
    torch.manual_seed(0)
    layer = nn.Linear(6, 6, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.eye(6))
    model = wrap(nn.Sequential(layer), seeds_per_layer=1)
    x = torch.randn(9, 6)
    x[[2, 5]] *= 1e18
    model(x)
    model.collect_signals(0)
    to_state(
        model, "0", 0, "FINE_TUNING", blueprint, **({} if blueprint == "affine" else {"rank": 2})
    )
    with torch.no_grad():
        for parameter in model.seed_parameters("0", 0):
            scale = 1e11 if blueprint == "glu" else 1e16  # whose hidden layer is a square
            parameter.mul_(scale if parameter.dim() == 2 else 1.0)
        if blueprint in ("affine", "norm_mlp"):
            model.seed_parameters("0", 0)[-1 if blueprint == "norm_mlp" else 0].mul_(1e21)
    model.telemetry_interval = 1
    y = model(x)
    graft = model.slots["0"].graft(0)
    weights = {
        s.name: p for s, p in zip(graft.kernel.parameters, graft.ordered_parameters(), strict=True)
    }
    g = reference_module(graft.kernel, weights)(x).detach()
    broken = ~torch.isfinite(g).all(dim=1)
    signal = model.collect_signals(0)[0]
    assert signal.num_nonfinite_rows == int(broken.sum())
    expected = float(g[~broken].double().square().sum() / x.double().square().sum())
    assert signal.relative_energy == pytest.approx(expected, rel=1e-3, abs=1e-30)
    assert torch.equal(y[broken], x[broken])
    if blueprint != "norm_mlp":  # a norm makes its rows alike
        assert broken.tolist() == [row in (2, 5) for row in range(9)]


def test_gradients_of_long_batches_are_those_of_the_sampled_rows():
    torch.manual_seed(0)
    layer = nn.Linear(5, 6)
    model = wrap(nn.Sequential(layer), seeds_per_layer=2)
    model.telemetry_interval = 1
    squares, count = torch.zeros(6, dtype=torch.float64), 0
    for number in range(3):
        x = torch.randn(7, 100, 5)
        y = model(x)
        y.retain_grad()
        y.square().mean().backward()
        rows = SampledStep(number).rows(y).take(y.grad).double()
        assert len(rows) == MAX_ROWS
        squares, count = squares + rows.square().sum(0), count + len(rows)
    for signal in model.collect_signals(0):
        begin, end = model.slots["0"].bounds[signal.seed]
        root = math.sqrt(float(squares[begin:end].sum()) / (count * (end - begin)))
        assert signal.output_gradient_norm == pytest.approx(root, rel=1e-5)
