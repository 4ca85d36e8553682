"""Ticks of a hundred thousand seeds, and a cached kernel put into a seed."""

import pytest

from benchmarks.kasmina.lifecycle import planting
from benchmarks.kasmina.lifecycle import ticking_bank


@pytest.mark.parametrize("seeds", [1_000, 10_000, 100_000])
def test_tick(benchmark, seeds: int) -> None:
    benchmark.group = "lifecycle tick, every seed on a ramp"
    bank = ticking_bank(seeds)
    benchmark.pedantic(bank.tick, rounds=21, warmup_rounds=2)


@pytest.mark.parametrize("busy", [False, True], ids=["alone", "after a forward"])
def test_a_cached_kernel_into_a_seed_and_out_again(benchmark, busy: bool) -> None:
    benchmark.group = "a cached kernel into a seed"
    benchmark.pedantic(planting(busy), rounds=201, warmup_rounds=2)
