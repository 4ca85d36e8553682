"""Bridges: seeds that read one module's input and add to another one's output."""

import copy

import pytest
import torch
from seed_host import to_state
from torch import nn
from torch.nn import functional as F

import esper
from esper.kasmina import Bridge

BRIDGE = Bridge("first", "last")


class Perceptron(nn.Module):
    """Widths 6 -> 8 -> 4; the activation is a function, so nothing names what lies between."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.last = nn.Linear(8, 4)

    def forward(self, x):
        return self.last(torch.relu(self.first(x)))


class Convolutions(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.last = nn.Conv2d(8, 4, 3, padding=1)

    def forward(self, x):
        return self.last(torch.relu(self.norm(self.first(x))))


HOSTS = {
    "linear": (Perceptron, (5, 6)),
    "tokens": (Perceptron, (2, 3, 6)),
    "convolution": (Convolutions, (2, 3, 5, 5)),
}


def _wrapped(kind, targets=BRIDGE, **arguments):
    torch.manual_seed(0)
    make, shape = HOSTS[kind]
    model = esper.wrap(make(), targets, seeds_per_layer=1, **arguments)
    return model, torch.randn(shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", HOSTS)
def test_a_seed_adds_what_it_makes_of_the_first_modules_input(kind):
    model, x = _wrapped(kind)
    before = model(x)
    to_state(model, "last", 0, "FOSSILIZED", "widen", rank=3)
    parameters = dict(model.slots["last"].graft(0).named_parameters())
    tokens = x.movedim(1, -1) if kind == "convolution" else x
    added = torch.relu(tokens @ parameters["A"] + parameters["a"]) @ parameters["B"]
    added = added.movedim(-1, 1) if kind == "convolution" else added
    assert torch.allclose(model(x), before + added, atol=1e-5)
    assert not torch.allclose(model(x), before, atol=1e-2)


def test_a_widened_bridge_is_the_wider_network_and_trains_as_it_does():
    model, x = _wrapped("linear")
    to_state(model, "last", 0, "FOSSILIZED", "widen", rank=3)
    host, seed = model.host, dict(model.slots["last"].graft(0).named_parameters())
    wider = nn.Sequential(nn.Linear(6, 11), nn.ReLU(), nn.Linear(11, 4))
    with torch.no_grad():
        wider[0].weight.copy_(torch.cat([host.first.weight, seed["A"].T]))
        wider[0].bias.copy_(torch.cat([host.first.bias, seed["a"]]))
        wider[2].weight.copy_(torch.cat([host.last.weight, seed["B"].T], dim=1))
        wider[2].bias.copy_(host.last.bias)
    target = torch.randn(5, 4, generator=torch.Generator().manual_seed(2))
    one = torch.optim.SGD(model.parameters(), lr=0.1)
    two = torch.optim.SGD(wider.parameters(), lr=0.1)
    for _ in range(5):
        for net, optimizer in ((model, one), (wider, two)):
            optimizer.zero_grad()
            F.mse_loss(net(x), target).backward()
            optimizer.step()
    assert torch.allclose(model(x), wider(x), atol=1e-5)
    assert torch.allclose(wider[0].weight[8:], seed["A"].T, atol=1e-5)


@pytest.mark.parametrize("kind", HOSTS)
def test_a_seed_in_training_leaves_the_host_bit_for_bit_and_learns(kind):
    model, x = _wrapped(kind)
    bare = copy.deepcopy(model.host)
    bare(x).square().sum().backward()
    to_state(model, "last", 0, "TRAINING", "widen", rank=3)
    y = model(x)
    assert torch.equal(y, bare(x))
    y.square().sum().backward()
    for ours, theirs in zip(model.host.parameters(), bare.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)
    assert all(p.grad is not None for p in model.seed_parameters("last", 0))


@pytest.mark.parametrize("kind", HOSTS)
def test_what_is_saved_copied_hardened_and_unwrapped_computes_the_same(kind, tmp_path):
    model, x = _wrapped(kind)
    model(x)
    to_state(model, "last", 0, "FOSSILIZED", "widen", rank=3)
    model.eval()
    y = model(x)
    assert torch.equal(copy.deepcopy(model)(x), y)
    esper.save(model, tmp_path / "model")
    loaded = esper.load(tmp_path / "model", HOSTS[kind][0]()).eval()
    assert loaded.slots["last"].inlet.name == "first"
    assert torch.equal(loaded(x), y)
    hard = esper.harden(model)
    assert torch.allclose(hard(x), y, atol=1e-5)
    assert torch.allclose(copy.deepcopy(hard)(x), y, atol=1e-5)
    exported = torch.export.export(hard, (x,)).module()
    assert torch.allclose(exported(x), y, atol=1e-5)
    assert torch.allclose(torch.fx.symbolic_trace(hard)(x), y, atol=1e-5)
    assert torch.allclose(torch.compile(hard, fullgraph=True, backend="eager")(x), y, atol=1e-5)
    torch.save(hard, tmp_path / "hard.pt")
    assert torch.allclose(torch.load(tmp_path / "hard.pt", weights_only=False)(x), y, atol=1e-5)
    assert hard.first.graft_input_last == set()
    host = esper.unwrap(model)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in host.modules())


def test_a_hardened_bridge_keeps_its_own_input_after_a_copy():
    model, x = _wrapped("linear")
    model(x)
    to_state(model, "last", 0, "FOSSILIZED", "widen", rank=3)
    hard = esper.harden(model)
    torch.export.export(hard, (x,))
    clone = copy.deepcopy(hard)
    assert clone.first.graft_input_last is clone.last.graft_input_last
    assert clone.first.graft_input_last is not hard.first.graft_input_last


def test_torch_compile_carries_the_input_without_a_graph_break():
    model, x = _wrapped("linear")
    model(x)
    to_state(model, "last", 0, "FOSSILIZED", "widen", rank=3)
    y = model(x)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(x), y, atol=1e-6)
    compiled(x).sum().backward()
    assert all(p.grad is not None for p in model.seed_parameters("last", 0))


def test_a_bridge_that_sleeps_has_no_hook_and_one_that_died_leaves_none():
    model, x = _wrapped("linear")
    hooks = [model.host.first._forward_pre_hooks, model.host.last._forward_hooks]
    model.eval()(x)
    assert hooks == [{}, {}]
    to_state(model, "last", 0, "TRAINING", "widen", rank=3)
    assert [len(hook) for hook in hooks] == [1, 1]
    model.cull("last", 0)
    assert hooks == [{}, {}]


def test_an_input_that_never_came_is_named_and_an_old_one_is_never_used():
    class Skipping(Perceptron):
        skip = False

        def forward(self, x):
            hidden = x.new_ones(len(x), 8) if self.skip else torch.relu(self.first(x))
            return self.last(hidden)

    model = esper.wrap(Skipping(), BRIDGE, seeds_per_layer=1)
    x = torch.randn(5, 6)
    model(x)
    to_state(model, "last", 0, "GRAFTING", "widen", rank=3)
    model(x)
    model.host.skip = True
    with pytest.raises(ValueError, match="a seed reads the input of 'first', but"):
        model(x)


def test_an_input_that_was_left_behind_can_be_copied():
    model, x = _wrapped("linear")
    to_state(model, "last", 0, "TRAINING", "widen", rank=3)
    model.host.first(x.requires_grad_() * 2)
    assert torch.equal(copy.deepcopy(model)(x), model(x))


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (Bridge("frist", "last"), "has 'frist', but no module has such a name; near names: first"),
        (Bridge("first", "lst"), "has 'lst', but no module"),
        (Bridge("last", "last"), "a bridge leads from one module to another"),
    ],
)
def test_a_bridge_that_cannot_be_is_refused(target, message):
    with pytest.raises(ValueError, match=message):
        esper.wrap(Perceptron(), target)


def test_a_module_that_ends_a_bridge_is_one_slot():
    model = esper.wrap(Perceptron(), [nn.Linear, BRIDGE], seeds_per_layer=1)
    assert [(slot.name, slot.inlet.name) for slot in model.slots.values()] == [
        ("first", None),
        ("last", "first"),
    ]
    assert model.slots["last"].source_width == 6
