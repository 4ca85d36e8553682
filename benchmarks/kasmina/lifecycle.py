"""What moves of the lifecycle cost: ticks of a big bank, and kernels put into seeds."""

import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

import esper
from esper import _C
from esper.blueprints import get
from esper.blueprints import lower
from esper.common.v1 import blueprint_pb2
from esper.kasmina import MorphableModel
from esper.kasmina import SeedLifecycleState

SLOT = "0"
SEEDS = 12


def ticking_bank(seeds: int) -> _C.SeedBank:
    """Returns a bank of slots of 100 seeds, all of them on a ramp that lasts."""
    bank = _C.SeedBank([100] * (seeds // 100))
    for slot in range(seeds // 100):
        for seed in range(100):
            for state in (1, 2, 3):
                bank.advance(slot, seed, state)
            bank.set_schedule(slot, seed, "cosine", 1_000_000)
    return bank


def planted() -> tuple[MorphableModel, Callable[[], float], Callable[[], float]]:
    """Returns a model with a full slot, and two moves that give the seconds they took.

    The first plants a kernel that the cache holds in the slot's last seed, everything checked and
    the plan rebuilt; the second is the slot's swap to a new plan alone.
    """
    torch.manual_seed(0)
    model = esper.wrap(
        nn.Sequential(nn.Linear(768, 768)), seeds_per_layer=SEEDS, preserve_original=False
    )
    model(torch.randn(4, 768))
    signature = model.signature(SLOT, SEEDS - 1, blueprint_pb2.SEED_SOURCE_OUTPUT)
    kernel = lower(get("bottleneck", rank=16), signature)
    for seed in range(SEEDS):
        model.load_kernel(SLOT, seed, kernel)
        if seed < SEEDS - 1:
            model.advance(SLOT, seed, SeedLifecycleState.TRAINING)
    layer = model.slots[SLOT]

    def load() -> float:
        model.unload_kernel(SLOT, SEEDS - 1)
        model.advance(SLOT, SEEDS - 1, SeedLifecycleState.DORMANT)
        started = time.process_time()
        model.load_kernel(SLOT, SEEDS - 1, kernel)
        return time.process_time() - started

    def swap() -> float:
        states = [model.seed_state(SLOT, seed) for seed in range(SEEDS)]
        started = time.process_time()
        layer.rebuild(states)
        return time.process_time() - started

    return model, load, swap


def median_of(move: Callable[[], float], times: int = 51) -> float:
    """Returns the median seconds of a move."""
    return statistics.median(move() for _ in range(times))
