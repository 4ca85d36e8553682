"""A seed that is full of NaN or infinity harms no host, in any state and of any family."""

import copy

import pytest
import torch
from torch import nn

from esper.kasmina import SeedLifecycleState as State
from esper.kasmina import wrap

FAMILIES = {
    "bottleneck": {"rank": 2},
    "glu": {"rank": 2},
    "lora": {"rank": 2},
    "widen": {"rank": 2},
    "affine": {},
    "squeeze_excite": {"rank": 2},
    "depthwise": {},
    "norm_mlp": {"rank": 2},  # through the interpreter
}
STATES = [state for state in State if state.holds_graft]


def run(model, inputs):
    """The output, and the gradients of the inputs and of the host's parameters."""
    inputs = inputs.clone().requires_grad_()
    output = model(inputs)
    output.square().mean().backward()
    host = getattr(model, "host", model)
    return [output.detach(), inputs.grad, *(parameter.grad for parameter in host.parameters())]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("state", STATES, ids=lambda state: state.name)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_host_stays_finite_and_in_training_unchanged(family, state, value):
    torch.manual_seed(0)
    host = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.Tanh(), nn.Conv2d(6, 2, 1))
    bare = copy.deepcopy(host)
    inputs = torch.randn(2, 3, 5, 4)
    model = wrap(host, target_layers=["0"], seeds_per_layer=2)
    model.telemetry_interval = 1  # measuring must bear it as well
    model(inputs)  # spatial seeds ask for the output's axes
    model.germinate("0", 1, family, **FAMILIES[family])
    for stage in range(State.TRAINING, state + 1):
        model.advance("0", 1, stage)
    if state == State.GRAFTING:
        model.set_seed_alpha("0", 1, 0.5)
    with torch.no_grad():
        for parameter in model.seed_parameters("0", 1):
            parameter.fill_(value)
    seen, expected = run(model, inputs), run(bare, inputs)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in seen)
    if state <= State.TRAINING:
        assert all(torch.equal(mine, plain) for mine, plain in zip(seen, expected, strict=True))
