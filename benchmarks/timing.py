"""Interleaved timing, and the peaks of the machine that figures are held against.

Absolute times mean nothing on shared machines. One round calls every alternative once, so that
whatever slows the machine slows them all, and medians over the rounds are compared.
"""

import ctypes
import functools
import statistics
import time
from collections.abc import Callable
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from esper import _C

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
    rounds: int = ROUNDS,
    least_rounds: int = LEAST_ROUNDS,
    warm_up: int = WARM_UP,
) -> dict[str, float]:
    """Returns the median seconds of each, over rounds that call each once.

    Args:
        contenders: Calls by name.
        clock: What measures. The processor's time, the default, suits what computes on one thread:
            a neighbour who takes the core away is not counted. What waits for others needs
            ``time.perf_counter``.
        budget_s: Rounds end after this time, but not before ``least_rounds``. Rounds that warm up
            do not count: what has to be compiled is compiled in them.
        rounds: At most so many rounds are measured.
        least_rounds: At least so many are.
        warm_up: Rounds before them that are not measured, but no more than ``rounds``.
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}
    warm_up = min(warm_up, rounds)
    for round_number in range(warm_up + rounds):
        measured = round_number - warm_up
        if measured == 0:
            began = time.perf_counter()
        if measured >= least_rounds and time.perf_counter() - began > budget_s:
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


def peak_of_temporaries(call: Callable[[], object]) -> float:
    """Returns how far, in MB, the resident memory rises above its level before a call."""
    call()
    _C.release_memory()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before = _resident("VmRSS")
    call()
    return (_resident("VmHWM") - before) / 1024


def _resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {field}")
