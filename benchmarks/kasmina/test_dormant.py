"""What a wrapped model costs while nothing has germinated, against the bare model.

Steps of both alternate, and whole telemetry intervals are summed, so that the sampled steps count.
Processor time is compared: what other processes take of a shared machine is no cost of ours.
"""

import copy
import statistics
import time
from collections.abc import Callable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import nn

import esper


def _transformer() -> nn.Module:
    layer = nn.TransformerEncoderLayer(256, 4, 1024, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 12, enable_nested_tensor=False)


def _mlp() -> nn.Module:
    return nn.Sequential(*[nn.Sequential(nn.Linear(256, 256), nn.ReLU()) for _ in range(8)])


CASES = {"transformer": (_transformer, (8, 64, 256), 3), "mlp": (_mlp, (256, 256), 31)}


@pytest.mark.parametrize("telemetry", [False, True], ids=["plain", "telemetry"])
@pytest.mark.parametrize("case", CASES)
def test_a_training_step(benchmark: BenchmarkFixture, case: str, telemetry: bool) -> None:
    build, shape, num_rounds = CASES[case]
    torch.manual_seed(0)
    bare = build()
    wrapped = esper.wrap(copy.deepcopy(bare), telemetry_enabled=telemetry, preserve_original=False)
    inputs = torch.randn(shape)

    def step(model: nn.Module) -> None:
        model(inputs).square().mean().backward()
        model.zero_grad(set_to_none=True)

    for _ in range(wrapped.telemetry_interval):  # probes are made at a slot's first turn
        step(wrapped)
    ratios = [_ratio(step, wrapped, bare, wrapped.telemetry_interval) for _ in range(num_rounds)]
    ratio = statistics.median(ratios)
    benchmark.group = f"dormant, {len(wrapped.slots)} slots"
    benchmark.extra_info["time_over_bare"] = ratio
    benchmark.pedantic(step, args=(wrapped,), rounds=wrapped.telemetry_interval)
    print(f"\n{case}, {benchmark.group}: {ratio:.4f} times the bare model {sorted(ratios)}")


def _ratio(
    step: Callable[[nn.Module], None], wrapped: nn.Module, bare: nn.Module, num_steps: int
) -> float:
    spent_s = {wrapped: 0.0, bare: 0.0}
    for number in range(num_steps):
        for model in (wrapped, bare) if number % 2 else (bare, wrapped):
            started = time.process_time()
            step(model)
            spent_s[model] += time.process_time() - started
    return spent_s[wrapped] / spent_s[bare]
