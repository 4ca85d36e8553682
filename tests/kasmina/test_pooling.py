"""What two halves of a batch show, put together, is what the batch shows."""

import copy

import pytest
import torch
from torch import nn

from esper.common.v1 import signal_pb2
from esper.kasmina import MorphableModel
from esper.kasmina import wrap

ROWS = 48


def _trained(model: MorphableModel, rows: slice) -> MorphableModel:
    """A copy of the model that has seen some rows of one batch, forward and backward."""
    generator = torch.Generator().manual_seed(1)
    x_NX = torch.randn(ROWS, 12, generator=generator)
    target_ND = torch.randn(ROWS, 6, generator=generator)
    twin = copy.deepcopy(model)
    nn.functional.mse_loss(twin(x_NX[rows]), target_ND[rows]).backward()
    return twin


def _signals(model: MorphableModel) -> dict[tuple[str, int], signal_pb2.HealthSignal]:
    return {(signal.slot, signal.seed): signal for signal in model.collect_signals(0)}


def test_halves_put_together_are_the_whole() -> None:
    torch.manual_seed(0)
    host = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 6))
    model = wrap(host, target_layers=["0", "2"], seeds_per_layer=2)
    model.telemetry_interval = 1
    model(torch.zeros(1, 12))
    model.germinate("2", 1, "bottleneck", rank=2)
    model.advance("2", 1, "TRAINING")
    whole = _trained(model, slice(None))
    half, other = _trained(model, slice(ROWS // 2)), _trained(model, slice(ROWS // 2, ROWS))
    half.pool([half.runtime(), other.runtime()])
    expected, found = _signals(whole), _signals(half)
    assert found.keys() == expected.keys()
    for key, one in expected.items():
        two = found[key]
        assert two.num_samples == one.num_samples > 0
        for name in ("mean", "variance", "dead_ratio", "correlation", "output_gradient_norm"):
            assert one.HasField(name) == two.HasField(name), (key, name)
            assert getattr(two, name) == pytest.approx(getattr(one, name), rel=1e-4), (key, name)
        assert len(one.growth_scores) == len(two.growth_scores)
        for score, again in zip(one.growth_scores, two.growth_scores, strict=True):
            # Features are centred in each half by itself, so scores agree roughly.
            assert again.source == score.source
            assert again.score == pytest.approx(score.score, rel=0.2), key
            assert again.null_score == pytest.approx(score.null_score, rel=0.2), key
            assert again.gradient_score == pytest.approx(score.gradient_score, rel=0.2), key
    assert sum(len(signal.growth_scores) for signal in found.values()) >= 3
    trained, alone = found["2", 1], expected["2", 1]
    assert trained.relative_energy == pytest.approx(alone.relative_energy, rel=1e-5, abs=1e-12)
    assert trained.num_nonfinite_rows == alone.num_nonfinite_rows == 0
    assert trained.weight_gradient_norm >= 0.9 * expected["2", 1].weight_gradient_norm > 0
