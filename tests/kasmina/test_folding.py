"""Fossils that become part of their module's weight: same outputs, same objects, clear refusals."""

import copy

import pytest
import torch
from fidelity_hosts import Tied
from seed_host import to_state
from torch import nn

import esper
from esper.kasmina import Bridge

LORA = ("lora", {"rank": 2})
LORA_IN = ("lora", {"rank": 2, "source": "input"})
WITH_BIASES = ("bottleneck", {"rank": 2, "activation": "identity"})
WITH_BIASES_IN = ("bottleneck", {"rank": 2, "activation": "identity", "source": "input"})
AFFINE = ("affine", {})


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(6, 6)

    def forward(self, x):
        return self.inner(torch.relu(self.inner(x)))


def _conv(*args, **kwargs):
    return nn.Sequential(nn.Conv2d(*args, **kwargs), nn.ReLU())


X = (5, 6)
IMAGES = (2, 4, 7, 7)
# name: (host, slot, shape of the input, blueprints that its weight can take)
HOSTS = {
    "linear": (
        lambda: nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 4)),
        "0",
        X,
        (LORA, LORA_IN, WITH_BIASES, WITH_BIASES_IN, AFFINE),
    ),
    "without bias": (
        lambda: nn.Sequential(nn.Linear(6, 8, bias=False)),
        "0",
        (3, 2, 6),
        (LORA, LORA_IN),
    ),
    "used twice": (Twice, "inner", X, (LORA, WITH_BIASES_IN)),
    "pointwise": (lambda: _conv(4, 8, 1), "0", IMAGES, (LORA, WITH_BIASES_IN, AFFINE)),
    "window": (lambda: _conv(4, 8, 3, padding=1), "0", IMAGES, (WITH_BIASES, WITH_BIASES_IN)),
    "circular": (
        lambda: _conv(4, 8, 5, padding=2, padding_mode="circular"),
        "0",
        IMAGES,
        (LORA, LORA_IN),
    ),
    "reflect, dilated": (
        lambda: _conv(4, 8, 3, padding=2, dilation=2, padding_mode="reflect"),
        "0",
        IMAGES,
        (LORA, LORA_IN),
    ),
    "even window": (
        lambda: _conv(4, 8, (2, 4), padding="same"),
        "0",
        IMAGES,
        (LORA, WITH_BIASES_IN),
    ),
    "strided": (lambda: _conv(4, 8, 3, stride=2), "0", IMAGES, (WITH_BIASES, AFFINE)),
    "grouped": (lambda: _conv(4, 8, 3, padding=1, groups=4), "0", IMAGES, (AFFINE,)),
    "a group of its own": (lambda: _conv(4, 9, 3, groups=1), "0", IMAGES, (LORA,)),
    "over time": (
        lambda: nn.Sequential(nn.Conv1d(4, 8, 3, padding="same")),
        "0",
        (2, 4, 9),
        (WITH_BIASES, LORA_IN),
    ),
    "in space": (
        lambda: nn.Sequential(nn.Conv3d(4, 8, 3, padding=1)),
        "0",
        (2, 4, 3, 3, 3),
        (WITH_BIASES, LORA_IN),
    ),
    "double precision": (
        lambda: nn.Sequential(nn.Linear(6, 8)).double(),
        "0",
        X,
        (WITH_BIASES, LORA_IN),
    ),
}
CASES = [(name, *kernel) for name, (_, _, _, kernels) in HOSTS.items() for kernel in kernels]


def grown(name, blueprint, hyperparameters):
    make, slot, shape, _ = HOSTS[name]
    torch.manual_seed(0)
    model = esper.wrap(make(), [slot], seeds_per_layer=3)
    dtype = next(model.parameters()).dtype
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=dtype)
    model(x)
    to_state(model, slot, 1, "FOSSILIZED", blueprint, **hyperparameters)
    return model, slot, x


@pytest.mark.parametrize(("name", "blueprint", "hyperparameters"), CASES)
def test_a_folded_model_computes_the_same_without_the_seed(name, blueprint, hyperparameters):
    model, slot, x = grown(name, blueprint, hyperparameters)
    # Others of the slot stay at work beside it.
    to_state(model, slot, 2, "FINE_TUNING", "bottleneck")
    expected = model(x).detach()
    bare = copy.deepcopy(model)
    with bare.muted(slot, 1):
        assert (bare(x) - expected).abs().max() > 0.01, "the seed acts"
    host = {key: (p, p.data_ptr()) for key, p in model.host.named_parameters()}
    seed = model.seed_parameters(slot, 1)
    digest = esper.blueprints.kernel_digest(model.kernel_of(slot, 1))
    moves = []
    model.observers.append(moves.append)
    assert list(map(id, model.fold(slot, 1))) == list(map(id, seed))
    scale = float(expected.abs().max())
    assert float((model(x) - expected).abs().max()) <= 1e-6 * scale
    for key, parameter in model.host.named_parameters():
        assert (parameter, parameter.data_ptr()) == host[key], "objects and memory stay"
    assert not set(map(id, seed)) & set(map(id, model.parameters()))
    assert model.seed_state(slot, 1).name == "FOSSILIZED"
    assert [(m.before.name, m.after.name, m.kernel, m.reason) for m in moves] == [
        ("FOSSILIZED", "FOSSILIZED", digest, f"folded into the weight of {slot}")
    ]
    model.cull(slot, 2)
    assert not model.slots[slot].hooked, "nothing of it runs any more"


@pytest.mark.parametrize("name", ["linear", "window"])
def test_a_folded_model_is_trained_saved_loaded_and_hardened(name, tmp_path):
    model, slot, x = grown(name, *WITH_BIASES)
    optimizer = torch.optim.Adam(model.host.parameters(), lr=0.01)
    for _ in range(2):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    moments = copy.deepcopy(optimizer.state_dict())
    model.fold(slot, 1)
    assert str(optimizer.state_dict()) == str(moments)
    before = [p.detach().clone() for p in model.host.parameters()]
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()
    for old, new in zip(before, model.host.parameters(), strict=True):
        assert new.grad is not None and not torch.equal(old, new)

    esper.save(model, tmp_path / "model")
    loaded = esper.load(tmp_path / "model", HOSTS[name][0]())
    assert torch.equal(loaded(x), model(x))
    assert loaded.seed_state(slot, 1).name == "FOSSILIZED"
    assert loaded.seed_parameters(slot, 1) == []
    plain = esper.harden(model)
    assert torch.equal(plain(x), model(x))
    assert not any(module._forward_hooks for module in plain.modules())
    clone = copy.deepcopy(model)
    assert torch.equal(clone(x), model(x))


def test_a_frozen_fossil_goes_into_a_frozen_weight():
    model, slot, x = grown("linear", *LORA)
    model.host[0].requires_grad_(False)
    model.freeze_fossil(slot, 1, True)
    expected = model(x)
    model.fold(slot, 1)
    torch.testing.assert_close(model(x), expected, rtol=1e-6, atol=1e-6)


# ---------------------------------------------------------------- refusals


class Shifted(nn.Linear):
    def forward(self, x):
        return super().forward(x) + 1


def _with_hook():
    host = nn.Sequential(nn.Linear(6, 8))
    host[0].register_forward_hook(lambda module, args, output: output.tanh())
    return host


def _patched():
    host = nn.Sequential(nn.Linear(6, 8))
    forward = host[0].forward
    host[0].forward = lambda x: forward(x) * 2
    return host


def _linear(**kwargs):
    return lambda: nn.Sequential(nn.Linear(6, 8, **kwargs))


IDS = torch.arange(6).view(2, 3)
FLOATS = torch.randn(X, generator=torch.Generator().manual_seed(1))
PICTURES = torch.randn(IMAGES, generator=torch.Generator().manual_seed(1))
# name: (host, slot, input, kernel, message)
REFUSED = {
    "activation": (_linear(), "0", FLOATS, ("bottleneck", {"rank": 2}), "only one that is linear"),
    "gate": (
        _linear(),
        "0",
        FLOATS,
        ("glu", {"rank": 2, "activation": "identity"}),
        "only one tha",
    ),
    "interpreted": (_linear(), "0", FLOATS, ("norm_mlp", {"rank": 2}), "only one that is linear"),
    "tied": (Tied, "head", IDS, LORA, "its weight is tied"),
    "own forward": (lambda: nn.Sequential(Shifted(6, 8)), "0", FLOATS, LORA, "on a Shifted, but"),
    "patched forward": (_patched, "0", FLOATS, LORA, "on a Linear, but only"),
    "parametrized": (
        lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(6, 8))),
        "0",
        FLOATS,
        LORA,
        "by a weight of their own",
    ),
    "hook of the user's": (_with_hook, "0", FLOATS, LORA, "other forward hooks"),
    "embedding": (lambda: nn.Sequential(nn.Embedding(7, 8)), "0", IDS, LORA, "on a Embedding"),
    "no bias": (_linear(bias=False), "0", FLOATS, WITH_BIASES, "has a bias, but its module has no"),
    "frozen host": (
        lambda: nn.Sequential(nn.Linear(6, 8).requires_grad_(False), nn.Linear(8, 8)),
        "0",
        FLOATS,
        LORA,
        "the seed trains, but as part of the weight it would stand still",
    ),
    "16 bits": (
        lambda: nn.Sequential(nn.Linear(6, 8)).bfloat16(),
        "0",
        FLOATS.bfloat16(),
        LORA,
        "bfloat16, in which the sum",
    ),
    "groups, output": (
        lambda: _conv(4, 8, 3, groups=4),
        "0",
        PICTURES,
        LORA,
        "mixes features 3 to 5, but the 4 groups",
    ),
    "groups, input": (
        lambda: _conv(4, 8, 3, padding=1, groups=2),
        "0",
        PICTURES,
        LORA_IN,
        "reads all channels",
    ),
    "no centre": (
        lambda: _conv(4, 8, 2, padding=1, dilation=2),
        "0",
        PICTURES,
        LORA_IN,
        "no tap of the convolution's window",
    ),
    "bridge": (
        lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)),
        Bridge("0", "2"),
        FLOATS,
        LORA_IN,
        "reads the input of '0'",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_algebra_or_the_training_does_not_allow_is_refused(name):
    make, target, x, (blueprint, hyperparameters), message = REFUSED[name]
    torch.manual_seed(0)
    model = esper.wrap(make(), [target], seeds_per_layer=3)
    model(x)
    slot = model.get_layer_names()[0]
    to_state(model, slot, 1, "FOSSILIZED", blueprint, **hyperparameters)
    assert_refused(model, slot, x, f"slot '{slot}', seed 1 cannot be folded: .*{message}")


def assert_refused(model, slot, x, message):
    expected = model(x).detach()
    state = copy.deepcopy(model.state_dict())
    moves = []
    model.observers.append(moves.append)
    with pytest.raises(ValueError, match=message):
        model.fold(slot, 1)
    assert torch.equal(model(x), expected) and moves == []
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("linear", float("nan")),
        ("linear", float("inf")),
        ("linear", 3e38),
        ("double precision", float("nan")),
    ],
)
def test_a_broken_fossil_is_not_let_into_the_host(name, value):
    model, slot, x = grown(name, *LORA)
    for parameter in model.seed_parameters(slot, 1):
        nn.init.constant_(parameter, value)
    before = [p.detach().clone() for p in model.host.parameters()]
    assert torch.isfinite(model(x)).all()
    with pytest.raises(ValueError, match="the sum of weight and seed is not finite"):
        model.fold(slot, 1)
    assert all(torch.equal(*pair) for pair in zip(before, model.host.parameters(), strict=True))


def test_a_bias_that_does_not_change_may_stand_still():
    model, slot, x = grown("linear", *LORA_IN)
    model.host[0].bias.requires_grad_(False)
    model.fold(slot, 1)
    model, slot, x = grown("linear", *LORA)
    model.host[0].bias.requires_grad_(False)
    assert_refused(model, slot, x, "the seed trains, but as part of the bias it would stand still")


def test_a_fossil_that_stands_still_is_not_made_to_train():
    model, slot, x = grown("linear", *LORA)
    model.freeze_fossil(slot, 1, True)
    assert_refused(model, slot, x, "the seed stands still, but as part of the weight it would trai")


def test_only_a_fossil_that_acts_is_folded():
    model, slot, x = grown("linear", *LORA)
    with model.muted(slot, 1), pytest.raises(ValueError, match="is muted, but only a FOSSILIZED"):
        model.fold(slot, 1)
    with pytest.raises(ValueError, match="seed 0 is DORMANT, but only a FOSSILIZED"):
        model.fold(slot, 0)
    to_state(model, slot, 0, "FINE_TUNING", "lora")
    with pytest.raises(ValueError, match="seed 0 is FINE_TUNING, but only a FOSSILIZED"):
        model.fold(slot, 0)
    model.fold(slot, 1)
    with pytest.raises(ValueError, match="blueprint 'noop', but only one that is linear"):
        model.fold(slot, 1)
