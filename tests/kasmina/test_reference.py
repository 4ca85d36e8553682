"""The interpreter path: native semantics, row by row containment, randomness of its own."""

import pytest
import torch
from torch import nn

from esper.blueprints import lower
from esper.blueprints import reference_module
from esper.blueprints.builder import GraphBuilder
from esper.common.v1 import blueprint_pb2
from esper.common.v1 import kernel_pb2
from esper.kasmina import SeedLifecycleState
from esper.kasmina import wrap
from esper.kasmina.reference import run_seed

State = SeedLifecycleState


def signature(width):
    return kernel_pb2.KernelSignature(
        slot_kind=kernel_pb2.SLOT_KIND_LINEAR,
        chunk_width=width,
        source_width=width,
        source=blueprint_pb2.SEED_SOURCE_OUTPUT,
        dtype=kernel_pb2.DATA_TYPE_FLOAT32,
        device_class=kernel_pb2.DEVICE_CLASS_CPU,
    )


def blueprint(name, build):
    builder = GraphBuilder()
    graph = builder.returns(build(builder))
    return blueprint_pb2.Blueprint(name=name, graph=graph)


def pole():
    """w x for positive features, infinite for the others."""

    def build(builder):
        scaled = builder.node("scale", builder.input)
        ratio = builder.node("div", builder.input, builder.node("relu", builder.input))
        return builder.node("mul", scaled, ratio)

    return blueprint("pole", build)


def dropout(p=0.5):
    return blueprint(
        "noise",
        lambda b: b.node("scale", b.node("dropout", b.input, p=p)),
    )


def network_of(bp, width):
    network = reference_module(lower(bp, signature(width)))
    for parameter in network.parameters():
        nn.init.uniform_(parameter, 0.5, 1.5, generator=torch.Generator().manual_seed(1))
    return network


@pytest.mark.parametrize("scalars", [(0.0, 1.0, 0.0), (0.3, 0.3, 0.3), (1.0, 0.0, 1.0), (1, 1, 1)])
def test_scalars_scale_forward_parameters_and_source_apart(scalars):
    alpha_fwd, alpha_bwd, gamma = scalars
    network = network_of(pole(), 3)
    source = torch.rand(4, 3).add_(0.5).requires_grad_()
    y = torch.randn(4, 5, requires_grad=True)
    result, energy = run_seed(network, y, source, 1, scalars, 0, measure=True)
    weights = torch.randn(4, 5)
    (result * weights).sum().backward()
    ours = [p.grad for p in network.parameters()]
    network.zero_grad()
    plain = source.detach().clone().requires_grad_()
    g = network(plain)
    (g * weights[:, 1:4]).sum().backward()
    expected = y.detach().clone()
    expected[:, 1:4] += alpha_fwd * g.detach()
    torch.testing.assert_close(result.detach(), expected)
    assert torch.equal(y.grad, weights)
    for ours_p, plain_p in zip(ours, network.parameters(), strict=True):
        if alpha_bwd == 0:
            assert ours_p is None
        else:
            torch.testing.assert_close(ours_p, alpha_bwd * plain_p.grad)
    if gamma == 0:
        assert source.grad is None
    else:
        torch.testing.assert_close(source.grad, gamma * plain.grad)
    assert int(energy.nonfinite_rows) == 0
    torch.testing.assert_close(energy.g_energy, g.detach().double().square().sum())


def test_only_the_rows_that_are_not_finite_keep_the_host():
    network = network_of(pole(), 3)
    source = torch.rand(4, 3) + 0.5
    source[2, 1] = -1.0  # division by zero
    source.requires_grad_()
    y = torch.randn(4, 3, requires_grad=True)
    result, energy = run_seed(network, y, source, 0, (1.0, 1.0, 1.0), 0, measure=True)
    assert torch.equal(result[2], y[2])
    assert bool((result[[0, 1, 3]] != y[[0, 1, 3]]).all())
    assert int(energy.nonfinite_rows) == 1
    result.square().sum().backward()
    torch.testing.assert_close(y.grad, 2 * result.detach())
    assert bool(torch.isfinite(source.grad).all())
    assert bool((source.grad[2] == 0).all()) and bool((source.grad[0] != 0).any())
    assert all(bool(torch.isfinite(p.grad).all()) for p in network.parameters())


def planted(state, bp):
    torch.manual_seed(0)
    model = wrap(nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 4)))
    model.germinate("0", 0, bp)
    for stage in range(State.TRAINING, State[state] + 1):
        model.advance("0", 0, stage)
    for parameter in model.seed_parameters("0", 0):
        nn.init.ones_(parameter)
    return model


def test_dropout_of_a_seed_draws_apart_from_the_hosts():
    x = torch.randn(50, 6)
    model = planted("TRAINING", dropout())
    torch.manual_seed(5)
    first = model(x)
    state = torch.get_rng_state()
    with model.muted("0", 0):
        torch.manual_seed(5)
        assert torch.equal(model(x), first)
    model.cull("0", 0)
    torch.manual_seed(5)
    assert torch.equal(model(x), first)
    assert torch.equal(torch.get_rng_state(), state)


def test_dropout_of_a_seed_changes_from_step_to_step_and_stops_in_eval_mode():
    x = torch.randn(50, 6)
    model = planted("FINE_TUNING", dropout())
    slot = model.host[0]
    one, two = slot(x), slot(x)
    assert not torch.equal(one, two)
    model.eval()
    assert torch.equal(slot(x), slot(x))
