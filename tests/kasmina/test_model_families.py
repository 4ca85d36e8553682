"""Every family of models through the whole life of its seeds, against plain torch."""

import copy

import pytest
import torch
from model_families import FAMILIES
from torch import Tensor

import esper

ROAD = ("TRAINING", "GRAFTING", "STABILIZATION", "EVALUATING", "FINE_TUNING", "FOSSILIZED")

families = pytest.mark.parametrize("family", FAMILIES)


def twins(family):
    """The bare host and a wrapped copy of it; both have seen one batch, which tells slots a lot."""
    torch.manual_seed(0)
    bare = FAMILIES[family].make()
    slots = [slot for slot, _, _ in FAMILIES[family].grafts]
    model = esper.wrap(copy.deepcopy(bare), slots, seeds_per_layer=2)
    for one in (bare, model):
        call(one, family, 0)
    return bare, model


def plant(model, family, until):
    """A kernel in the second seed of every slot, whose effect is not that of a newborn."""
    generator = torch.Generator().manual_seed(4)
    for slot, blueprint, hyperparameters in FAMILIES[family].grafts:
        model.germinate(slot, 1, blueprint, **hyperparameters)
        for parameter in model.seed_parameters(slot, 1):
            torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    for state in ROAD[: ROAD.index(until) + 1]:
        advance(model, state)


def advance(model, state):
    for slot, seed in model.occupied_seeds():
        model.advance(slot, seed, state)


def set_alpha(model, alpha):
    for slot, seed in model.occupied_seeds():
        model.set_seed_alpha(slot, seed, alpha)


def call(model, family, step):
    """The output of a batch; what draws random numbers draws the same for every model."""
    args, kwargs = FAMILIES[family].inputs(step)
    torch.manual_seed(step)
    output = model(*args, **kwargs)
    return output["logits"] if isinstance(output, dict) else output


def backward(model, family, step):
    """Output, and the gradients of the host's parameters by name."""
    model.zero_grad()
    output = call(model, family, step)
    weights = torch.linspace(-1, 1, output.numel()).view_as(output)
    (output * weights).sum().backward()
    host = getattr(model, "host", model)
    gradients = {name: p.grad.clone() for name, p in host.named_parameters() if p.grad is not None}
    return output.detach(), gradients


def assert_equal(left, right):
    if isinstance(left, Tensor):
        assert torch.equal(left, right)
        return
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert torch.equal(value, right[name]), name


@families
def test_while_seeds_train_the_host_trains_bit_for_bit_as_if_alone(family):
    bare, model = twins(family)
    plant(model, family, "TRAINING")
    seeds = [p for at in model.occupied_seeds() for p in model.seed_parameters(*at)]
    born = [p.detach().clone() for p in seeds]
    alone = torch.optim.AdamW(bare.parameters(), lr=0.01)
    together = torch.optim.AdamW(model.host.parameters(), lr=0.01)
    newborn = torch.optim.AdamW(seeds, lr=0.01)
    for step in range(4):
        expected, plain = backward(bare, family, step)
        output, gradients = backward(model, family, step)
        assert_equal(output, expected)
        assert_equal(gradients, plain)
        alone.step()
        together.step()
        newborn.step()
    assert_equal(dict(model.host.state_dict()), dict(bare.state_dict()))
    moved = [not torch.equal(before, p) for before, p in zip(born, seeds, strict=True)]
    # A bias before a softmax or a norm may be without effect, but no seed stands still.
    assert sum(moved) >= len(moved) - 1


@families
@pytest.mark.parametrize("state", ["GRAFTING", "FINE_TUNING"])
def test_at_alpha_one_all_gradients_of_the_host_are_those_of_the_plain_expression(family, state):
    _, model = twins(family)
    plant(model, family, state)
    if state == "GRAFTING":
        set_alpha(model, 1.0)
    for module in model.host.modules():  # noise goes by the layout of memory, which may differ
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        elif isinstance(module, torch.nn.MultiheadAttention):
            module.dropout = 0.0
    plain = esper.harden(model)
    expected, reference = backward(plain, family, 1)
    output, gradients = backward(model, family, 1)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    whole = torch.stack([gradient.norm() for gradient in reference.values()]).norm()
    for name, gradient in gradients.items():
        # Some gradients are zero but for rounding, such as that of a bias before a batch norm.
        allowed = 1e-5 * reference[name].norm() + 1e-7 * whole
        assert (gradient - reference[name]).norm() <= allowed, name
    for slot, seed in model.occupied_seeds():
        names = [spec.name for spec in model.kernel_of(slot, seed).parameters]
        for name, parameter in zip(names, model.seed_parameters(slot, seed), strict=True):
            there = plain.get_submodule(slot).get_parameter(f"graft{seed}_{name}".replace(".", "_"))
            allowed = 1e-5 * there.grad.norm() + 1e-7 * whole
            assert (parameter.grad - there.grad).norm() <= allowed, (slot, name)


@families
def test_nothing_jumps_on_the_way_from_the_ramp_to_the_fossil(family):
    bare, model = twins(family)
    bare.eval()
    model.eval()
    plant(model, family, "GRAFTING")
    outputs = []
    for alpha in torch.linspace(0, 1, 17).tolist():
        set_alpha(model, alpha)
        outputs.append(call(model, family, 1).detach())
    assert_equal(outputs[0], call(bare, family, 1))
    strides = torch.stack([(b - a).norm() for a, b in zip(outputs[:-1], outputs[1:], strict=True)])
    assert strides.max() < 4 * strides.mean(), "the output moves as evenly as alpha does"
    arrived, gradients = backward(model, family, 1)
    for state in ROAD[2:]:
        advance(model, state)
        output, now = backward(model, family, 1)
        assert_equal(output, arrived)
        assert_equal(now, gradients)


@families
def test_what_is_saved_or_hardened_computes_the_same(family, tmp_path):
    _, model = twins(family)
    plant(model, family, "FOSSILIZED")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for step in range(2):
        backward(model, family, step)
        optimizer.step()
    esper.save(model, tmp_path / "model")
    torch.manual_seed(9)
    loaded = esper.load(tmp_path / "model", FAMILIES[family].make())
    for training in (False, True):
        model.train(training)
        loaded.train(training)
        assert_equal(call(loaded, family, 1), call(model, family, 1))
    model.eval()
    plain = esper.harden(model)
    torch.testing.assert_close(call(plain, family, 1), call(model, family, 1), rtol=1e-5, atol=1e-5)


@families
def test_a_culled_seed_leaves_the_bare_model_bit_for_bit(family):
    bare, model = twins(family)
    plant(model, family, "GRAFTING")
    set_alpha(model, 0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for step in range(2):
        output, _ = backward(model, family, step)
        optimizer.step()
    for slot, seed in model.occupied_seeds():
        model.cull(slot, seed)
    model.tick()
    bare.load_state_dict(model.host.state_dict())
    assert [name for name, _ in model.named_parameters()] == [
        f"host.{name}" for name, _ in bare.named_parameters()
    ]
    for module in model.host.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks
    for step in range(2, 4):
        expected, plain = backward(bare, family, step)
        output, gradients = backward(model, family, step)
        assert_equal(output, expected)
        assert_equal(gradients, plain)
    assert_equal(dict(model.host.state_dict()), dict(bare.state_dict()))
