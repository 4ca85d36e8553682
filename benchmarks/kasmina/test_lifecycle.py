"""Ticks of a hundred thousand seeds, and a cached kernel put into a seed."""

import pytest

from benchmarks.kasmina.lifecycle import median_of
from benchmarks.kasmina.lifecycle import planted
from benchmarks.kasmina.lifecycle import ticking_bank


@pytest.mark.parametrize("seeds", [1_000, 10_000, 100_000])
def test_tick(benchmark, seeds: int) -> None:
    benchmark.group = "lifecycle tick, every seed on a ramp"
    bank = ticking_bank(seeds)
    benchmark.pedantic(bank.tick, rounds=21, warmup_rounds=2)


def test_a_cached_kernel_into_a_seed(benchmark) -> None:
    benchmark.group = "a cached kernel into a seed"
    _model, load, swap = planted()
    benchmark.extra_info["swap_median_s"] = median_of(swap)
    benchmark.extra_info["load_median_s"] = median_of(load)
    benchmark.pedantic(load, rounds=21, warmup_rounds=2)
