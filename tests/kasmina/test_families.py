"""Seeds of every family side by side in one slot of a wrapped model."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import esper

FAMILIES = {
    0: ("squeeze_excite", {"rank": 2}),
    1: ("depthwise", {}),
    2: ("depthwise", {"source": "input", "kernel": 5}),
    3: ("bottleneck", {"rank": 3}),
    4: ("widen", {"rank": 2}),
    5: ("affine", {}),
    6: ("norm_mlp", {"rank": 2}),  # through the interpreter
}


class Calls(TorchDispatchMode):
    """Counts the slot operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = {"slot_forward": 0, "slot_backward": 0}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().removeprefix("esper::")
        if name in self.counts:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture
def model():
    torch.manual_seed(0)
    host = nn.Sequential(nn.Conv2d(3, 21, 3, padding=1), nn.ReLU(), nn.Conv2d(21, 2, 1))
    model = esper.wrap(host, target_layers=["0"], seeds_per_layer=len(FAMILIES))
    model.telemetry_interval = 1
    model(torch.randn(2, 3, 8, 8))
    for seed, (name, choices) in FAMILIES.items():
        model.germinate("0", seed, name, **choices)
        model.advance("0", seed, "TRAINING")
    return model


def test_one_call_runs_them_all_and_each_learns(model):
    images = torch.randn(4, 3, 8, 8)
    host = model.host[0](images)
    model.enable_telemetry(False)  # a sampled step measures the seeds of the interpreter by a call
    with Calls() as calls:
        model(images).square().mean().backward()
    assert calls.counts == {"slot_forward": 1, "slot_backward": 1}
    assert torch.equal(model.host[2](host.relu()), model(images))  # TRAINING: not yet blended
    for seed in FAMILIES:
        grads = [p.grad for p in model.seed_parameters("0", seed)]
        assert any(g is not None and g.any() for g in grads), FAMILIES[seed]


def test_telemetry_knows_every_family(model):
    for seed in FAMILIES:
        for parameter in model.seed_parameters("0", seed):
            parameter.data.normal_()
    model(torch.randn(4, 3, 8, 8)).square().mean().backward()
    for signal in model.collect_signals(epoch=0):
        assert signal.relative_energy > 0, signal
