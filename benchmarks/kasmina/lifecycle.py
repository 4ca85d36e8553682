"""What moves of the lifecycle cost: ticks of a big bank, and kernels put into seeds."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

import esper
from esper import _C
from esper.blueprints import get
from esper.blueprints import lower
from esper.common.v1 import blueprint_pb2
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


@dataclass(frozen=True)
class Moves:
    """Seconds of what puts a cached kernel into a seed.

    Attributes:
        whole: ``load_kernel`` and ``advance`` to TRAINING: digest, cache, checks, parameters, both
            moves of the lifecycle and the slot's new plan. The next forward computes the kernel.
        swap: The part of it in which the slot takes up its new plan: the bank writes the plan, the
            slot finds its parameters and its hook, and compiled graphs learn of it.
    """

    whole: float
    swap: float


def planting(busy: bool) -> Callable[[], Moves]:
    """Returns a move that puts a cached kernel into a seed of a slot whose others compute.

    Args:
        busy: Whether the model runs between two moves, so that they find the caches cold.
    """
    torch.manual_seed(0)
    model = esper.wrap(
        nn.Sequential(nn.Linear(768, 768)), seeds_per_layer=SEEDS, preserve_original=False
    )
    layer, inputs, last = model.slots[SLOT], torch.randn(4, 768), SEEDS - 1
    signature = model.signature(SLOT, last, blueprint_pb2.SEED_SOURCE_OUTPUT)
    kernel = lower(get("bottleneck", rank=16), signature)
    for seed in range(last):
        model.load_kernel(SLOT, seed, kernel)
        model.advance(SLOT, seed, SeedLifecycleState.TRAINING)

    def move() -> Moves:
        started = time.perf_counter()
        model.load_kernel(SLOT, last, kernel)
        model.advance(SLOT, last, SeedLifecycleState.TRAINING)
        planted = time.perf_counter()
        model._switch(layer)  # once more, alone
        switched = time.perf_counter()
        if busy:
            model(inputs)
        model.cull(SLOT, last)
        model.advance(SLOT, last, SeedLifecycleState.DORMANT)
        return Moves(planted - started, switched - planted)

    return move


def median_moves(busy: bool = False, times: int = 501) -> Moves:
    """Returns the median of each part."""
    move = planting(busy)
    moves = [move() for _ in range(times)]
    return Moves(
        statistics.median(each.whole for each in moves),
        statistics.median(each.swap for each in moves),
    )
