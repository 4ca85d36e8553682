"""What a wrapped model costs while nothing has germinated, against the bare model."""

import copy

import pytest
import torch
from torch import nn

import esper


def _transformer() -> nn.Module:
    layer = nn.TransformerEncoderLayer(128, 4, 256, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)


def _mlp() -> nn.Module:
    return nn.Sequential(*[nn.Sequential(nn.Linear(256, 256), nn.ReLU()) for _ in range(8)])


@pytest.mark.parametrize("telemetry", [False, True], ids=["plain", "telemetry"])
@pytest.mark.parametrize("build", [_transformer, _mlp], ids=["transformer", "mlp"])
def test_a_training_step(side_by_side, build, telemetry: bool) -> None:
    torch.manual_seed(0)
    bare = build()
    wrapped = esper.wrap(copy.deepcopy(bare), telemetry_enabled=telemetry)
    inputs = torch.randn(8, 64, 128) if build is _transformer else torch.randn(256, 256)

    def step(model: nn.Module) -> None:
        model(inputs).square().mean().backward()
        model.zero_grad(set_to_none=True)

    interval = wrapped.telemetry_interval if telemetry else 1
    side_by_side(
        f"{interval} dormant training steps, one of them sampled" if telemetry else "dormant step",
        lambda: [step(wrapped) for _ in range(interval)],
        {"bare": lambda: [step(bare) for _ in range(interval)]},
    )
