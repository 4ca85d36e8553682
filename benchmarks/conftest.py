"""Side-by-side timing: alternatives run interleaved in one test, and ratios are reported.

Absolute times mean nothing on shared machines. One round calls every alternative once, so that
whatever slows the machine slows them all; medians over the rounds are compared. pytest-benchmark
times ours; the ratios stand in its JSON as ``extra_info`` and in a table at the end of the run.
"""

import statistics
import time
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from typing import Protocol

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

_ROUNDS = 31
_WARM_UP = 3
_ROWS: list[tuple[str, str, float, dict[str, float]]] = []


class SideBySide(Protocol):
    """Times one call beside others; `rounds` is how often each is timed."""

    def __call__(  # noqa: D102
        self,
        group: str,
        ours: Callable[[], object],
        others: Mapping[str, Callable[[], object]],
        rounds: int = _ROUNDS,
    ) -> None: ...


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Runs every benchmark on one thread: two cores of a shared machine are not two free cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def side_by_side(benchmark: BenchmarkFixture, request: pytest.FixtureRequest) -> SideBySide:
    """Times ours beside the alternatives and records their medians over ours."""

    def run(
        group: str,
        ours: Callable[[], object],
        others: Mapping[str, Callable[[], object]],
        rounds: int = _ROUNDS,
    ) -> None:
        contenders = {"ours": ours, **others}
        times: dict[str, list[float]] = {name: [] for name in contenders}
        for round_number in range(_WARM_UP + rounds):
            for name, call in contenders.items():
                started = time.perf_counter()
                call()
                elapsed = time.perf_counter() - started
                if round_number >= _WARM_UP:
                    times[name].append(elapsed)
        medians = {name: statistics.median(values) for name, values in times.items()}
        ratios = {name: medians[name] / medians["ours"] for name in others}
        benchmark.group = group
        benchmark.extra_info["median_over_ours"] = ratios
        benchmark.pedantic(ours, rounds=rounds, warmup_rounds=1)
        _ROWS.append((group, request.node.name, medians["ours"], ratios))

    return run


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Prints how many times longer each alternative took than ours."""
    if not _ROWS:
        return
    terminalreporter.section("median time over ours, interleaved (above 1: ours is faster)")
    for group, name, median_s, ratios in _ROWS:
        best = min(ratios, key=lambda other: ratios[other])
        shown = "  ".join(f"{other} {ratio:.2f}" for other, ratio in ratios.items())
        terminalreporter.write_line(f"{group}: {name}")
        terminalreporter.write_line(
            f"    ours {1e6 * median_s:.0f} us; {shown}; best alternative: {best}"
        )
