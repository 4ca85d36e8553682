"""Interleaved timing, and the peaks of the machine that figures are held against.

Absolute times mean nothing on shared machines. One round calls every alternative once, so that
whatever slows the machine slows them all, and medians over the rounds are compared.
"""

import functools
import statistics
import time
from collections.abc import Callable
from collections.abc import Mapping
from dataclasses import dataclass

import torch

WARM_UP = 3
ROUNDS = 31
LEAST_ROUNDS = 7


@dataclass(frozen=True)
class Work:
    """What a call must do at the least.

    Attributes:
        flops: Floating-point operations of its products.
        num_bytes: Bytes of the tensors that it reads and writes, each once.
    """

    flops: float
    num_bytes: float

    def least_s(self) -> float:
        """Seconds that one core needs at its peaks, arithmetic and memory overlapped."""
        return max(self.flops / peak_flops(), self.num_bytes / peak_bytes())


def interleaved(
    contenders: Mapping[str, Callable[[], object]],
    budget_s: float = 4.0,
    clock: Callable[[], float] = time.process_time,
) -> dict[str, float]:
    """Returns the median seconds of each, over rounds that call each once.

    Args:
        contenders: Calls by name.
        clock: What measures. The processor's time, the default, suits what computes on one thread:
            a neighbour who takes the core away is not counted. What waits for others needs
            ``time.perf_counter``.
        budget_s: Rounds end after this time, but not before ``LEAST_ROUNDS``.
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}
    began = time.perf_counter()
    for round_number in range(WARM_UP + ROUNDS):
        measured = round_number - WARM_UP
        if measured >= LEAST_ROUNDS and time.perf_counter() - began > budget_s:
            break
        for name, call in contenders.items():
            started = clock()
            call()
            elapsed = clock() - started
            if measured >= 0:
                times[name].append(elapsed)
    return {name: statistics.median(values) for name, values in times.items()}


def _fastest(call: Callable[[], object]) -> float:
    best = float("inf")
    for _ in range(15):
        started = time.process_time()
        call()
        best = min(best, time.process_time() - started)
    return best


@functools.cache
def peak_flops() -> float:
    """Float32 operations a second of one core: those of a large product of the BLAS."""
    a, b = torch.randn(768, 768), torch.randn(768, 768)
    out = torch.empty(768, 768)
    return 2 * 768**3 / _fastest(lambda: torch.mm(a, b, out=out))


@functools.cache
def peak_bytes() -> float:
    """Bytes a second, read and written, of one core that copies 8 MB."""
    source = torch.randn(1 << 21)
    to = torch.empty_like(source)
    return 2 * 4 * source.numel() / _fastest(lambda: to.copy_(source))
