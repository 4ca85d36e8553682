"""A seed may be born looking where the wanted update points."""

import torch
from torch import nn

import esper
from esper import blueprints
from esper.common.v1 import blueprint_pb2
from esper.tolaria.births import singular_weights


def _teacher_gap() -> tuple[esper.MorphableModel, torch.Tensor]:
    """A host that is told to be larger where one direction of its input is positive."""
    torch.manual_seed(0)
    host = nn.Sequential(nn.Sequential(nn.Linear(12, 2), nn.ReLU(), nn.Linear(2, 3)))
    model = esper.wrap(host, target_layers=["0"], seeds_per_layer=1)
    model.telemetry_interval = 1
    direction = nn.functional.normalize(torch.randn(12), dim=0)
    for _ in range(8):
        inputs = torch.randn(256, 12)
        wanted = torch.relu(inputs @ direction).unsqueeze(1) * torch.tensor([4.0, -4.0, 0.0])
        nn.functional.mse_loss(model(inputs), wanted).backward()
    model.collect_signals(0)
    return model, direction


def test_fan_in_points_at_what_the_host_lacks() -> None:
    model, direction = _teacher_gap()
    source = blueprint_pb2.SEED_SOURCE_INPUT
    directions = model.growth_directions("0", 0, source)
    assert directions is not None and directions.shape[0] == 12
    kernel = blueprints.lower(blueprints.get("widen", rank=8), model.signature("0", 0, source))
    weights = singular_weights(kernel, directions, "0/0")
    assert weights is not None
    drawn = blueprints.init_parameters(kernel, torch.Generator().manual_seed(0))

    def alignment(matrix: torch.Tensor) -> float:
        return float((direction @ nn.functional.normalize(matrix, dim=0)).abs().mean())

    assert alignment(weights["A"]) > 0.7 > 0.5 > alignment(drawn["A"])
    assert torch.isclose(weights["A"].norm(), drawn["A"].norm(), rtol=0.2)
    assert not weights["B"].any()  # still the identity at birth
    other = singular_weights(kernel, directions, "0/1")
    assert other is not None and not torch.equal(other["A"], weights["A"])
    model.load_kernel("0", 0, kernel, weights)


def test_where_nothing_was_measured_the_blueprint_decides() -> None:
    model, _ = _teacher_gap()
    source = blueprint_pb2.SEED_SOURCE_INPUT
    signature = model.signature("0", 0, source)
    widen = blueprints.lower(blueprints.get("widen", rank=2), signature)
    assert singular_weights(widen, None, "0/0") is None
    assert singular_weights(widen, torch.zeros(12, 3), "0/0") is None
    model.collect_signals(1)  # an epoch without a step
    assert model.growth_directions("0", 0, source) is None
