"""Loads of calls, and what they took."""

import asyncio
import itertools
import statistics
import time
from collections.abc import Awaitable
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import field


@dataclass
class Load:
    """One round of calls.

    Attributes:
        seconds: From the first call to the last answer.
        operations: What was done: calls, or events of a stream.
        num_bytes: Bytes that were carried.
        latencies_s: Of the calls, in seconds.
    """

    seconds: float
    operations: int
    num_bytes: int = 0
    latencies_s: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Figures:
    """Several rounds of one load: the median rate, and percentiles over all of their calls."""

    per_second: float
    mb_per_second: float
    p50_ms: float
    p95_ms: float
    p99_ms: float

    def __str__(self) -> str:
        text = f"{self.per_second:9.1f}/s"
        if self.mb_per_second:
            text += f"  {self.mb_per_second:7.1f} MB/s"
        return text + f"  p50 {self.p50_ms:.2f}  p95 {self.p95_ms:.2f}  p99 {self.p99_ms:.2f} ms"


def figures(loads: Sequence[Load]) -> Figures:
    """Returns what the rounds of one load come to."""
    latencies = sorted(1e3 * value for load in loads for value in load.latencies_s)

    def percentile(share: float) -> float:
        return latencies[min(int(share * len(latencies)), len(latencies) - 1)]

    return Figures(
        statistics.median(load.operations / load.seconds for load in loads),
        statistics.median(load.num_bytes / load.seconds for load in loads) / 1e6,
        percentile(0.5),
        percentile(0.95),
        percentile(0.99),
    )


def one_by_one(call: Callable[[], object], calls: int = 1, num_bytes: int = 0) -> Load:
    """Makes calls, each after the one before; `num_bytes` is what each carries."""
    latencies = []
    started_s = time.perf_counter()
    for _ in range(calls):
        began_s = time.perf_counter()
        call()
        latencies.append(time.perf_counter() - began_s)
    return Load(time.perf_counter() - started_s, calls, calls * num_bytes, latencies)


async def together(
    call: Callable[[], Awaitable[object]], clients: int, calls: int, num_bytes: int = 0
) -> Load:
    """Makes calls, `clients` of them at a time; `num_bytes` is what each carries."""
    left: Iterator[None] = itertools.repeat(None, calls)
    latencies: list[float] = []

    async def client() -> None:
        for _ in left:
            began_s = time.perf_counter()
            await call()
            latencies.append(time.perf_counter() - began_s)

    started_s = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    return Load(time.perf_counter() - started_s, calls, calls * num_bytes, latencies)
