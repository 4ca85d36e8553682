"""Side-by-side timing: alternatives run interleaved in one test, and ratios are reported.

pytest-benchmark times ours; ratios stand in its JSON as ``extra_info`` and in a table at the end
of the run.
"""

import time
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from dataclasses import dataclass

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.timing import ROUNDS
from benchmarks.timing import Work
from benchmarks.timing import interleaved
from benchmarks.timing import peak_bytes
from benchmarks.timing import peak_flops


@dataclass(frozen=True)
class _Row:
    group: str
    name: str
    median_s: float
    ratios: Mapping[str, float]
    roofline: float | None


_ROWS: list[_Row] = []

SideBySide = Callable[..., None]


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds what is measured, and how long."""
    parser.addoption(
        "--with-compile", action="store_true", help="torch.compile forms as well, minutes a shape"
    )
    parser.addoption("--rounds", type=int, default=ROUNDS, help="rounds that are measured at most")
    parser.addoption(
        "--store-rows", type=int, default=100_000, help="largest store of the row benchmarks"
    )
    parser.addoption("--store-folder", help="where these stores are kept; default: nowhere")


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
        work: Work | None = None,
    ) -> None:
        # What does counted work computes; the rest may wait for other processes.
        clock = time.perf_counter if work is None else time.process_time
        rounds = request.config.getoption("rounds")
        medians = interleaved({"ours": ours, **others}, clock=clock, rounds=rounds)
        ratios = {name: medians[name] / medians["ours"] for name in others}
        benchmark.group = group
        benchmark.extra_info["median_over_ours"] = ratios
        benchmark.extra_info["interleaved_median_s"] = medians["ours"]
        roofline = None
        if work is not None:
            roofline = work.least_s() / medians["ours"]
            benchmark.extra_info["share_of_roofline"] = roofline
            benchmark.extra_info["peak_flops"] = peak_flops()
            benchmark.extra_info["peak_bytes"] = peak_bytes()
        benchmark.pedantic(ours, rounds=min(5, rounds), warmup_rounds=1)
        _ROWS.append(_Row(group, request.node.name, medians["ours"], ratios, roofline))

    return run


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Prints how many times longer each alternative took than ours."""
    if not _ROWS:
        return
    terminalreporter.section("median time over ours, interleaved (above 1: ours is faster)")
    for row in _ROWS:
        terminalreporter.write_line(f"{row.group}: {row.name}")
        line = f"    ours {1e6 * row.median_s:.0f} us"
        if row.roofline is not None:
            line += f", {row.roofline:.0%} of the roofline"
        if row.ratios:
            best = min(row.ratios, key=lambda other: row.ratios[other])
            shown = "  ".join(f"{other} {ratio:.2f}" for other, ratio in row.ratios.items())
            line += f"; {shown}; best alternative: {best}"
        terminalreporter.write_line(line)
