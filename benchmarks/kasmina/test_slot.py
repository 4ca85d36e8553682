"""One slot with many bottleneck seeds, against what a user would otherwise write.

Some shapes of the grid: one that stands for it, and its neighbours along tokens, seeds, rank and
width; ``benchmarks.kasmina.grid`` measures all of it. ``--with-compile`` adds what
``torch.compile`` makes of the loop and of the stacked form: minutes a shape, as every shape is
compiled anew.
"""

from collections.abc import Callable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from benchmarks.kasmina.problem import Problem
from benchmarks.kasmina.problem import agreeing
from benchmarks.kasmina.problem import first_of
from benchmarks.kasmina.problem import with_compiled
from benchmarks.timing import peak_of_temporaries

SOME = [
    (2048, 768, 12, 16),
    (32, 64, 4, 16),
    (512, 64, 4, 16),
    (8192, 768, 16, 16),
    (512, 768, 1, 16),
    (512, 768, 16, 4),
    (512, 768, 16, 16),
    (512, 768, 16, 64),
    (512, 768, 64, 16),
    (512, 768, 256, 4),
    (512, 4096, 16, 16),
]
Shape = tuple[int, int, int, int]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    metafunc.parametrize(
        "shape", SOME, ids=[f"N{n}-D{d}-S{s}-r{r}" for n, d, s, r in SOME], scope="module"
    )


@pytest.fixture(scope="module")
def problem(shape: Shape) -> Problem:
    return agreeing(*shape)


Forwards = dict[str, Callable[[], Tensor]]
Measured = dict[str, Callable[[], tuple[Tensor, ...]]]


@pytest.fixture
def others(problem: Problem, request: pytest.FixtureRequest) -> Forwards:
    forwards = problem.forwards()
    return with_compiled(forwards) if request.config.getoption("with_compile") else forwards


@pytest.fixture
def measured(problem: Problem, request: pytest.FixtureRequest) -> Measured:
    calls = {name: problem.measured(forward) for name, forward in problem.forwards().items()}
    return with_compiled(calls) if request.config.getoption("with_compile") else calls


def test_forward(side_by_side, problem: Problem, others: Forwards) -> None:
    with torch.no_grad():
        side_by_side("forward", problem.ours, others, problem.forward_work)


def test_forward_with_telemetry(side_by_side, problem: Problem, measured: Measured) -> None:
    with torch.no_grad():
        side_by_side(
            "forward with telemetry",
            lambda: problem.ours(telemetry=True),
            measured,
            problem.forward_work,
        )


def test_forward_and_backward(side_by_side, problem: Problem, others: Forwards) -> None:
    trained = {name: problem.trained(forward) for name, forward in others.items()}
    side_by_side(
        "forward and backward", problem.trained(problem.ours), trained, problem.training_work
    )


def test_forward_and_backward_with_telemetry(
    side_by_side, problem: Problem, measured: Measured
) -> None:
    trained = {name: problem.trained(first_of(call)) for name, call in measured.items()}
    side_by_side(
        "forward and backward with telemetry",
        problem.trained(lambda: problem.ours(telemetry=True)),
        trained,
        problem.training_work,
    )


def test_memory(benchmark: BenchmarkFixture, problem: Problem) -> None:
    """Bytes that forward and backward take beside what is there before."""
    calls = {"ours": problem.ours, **problem.forwards()}
    peaks = {name: peak_of_temporaries(problem.trained(call)) for name, call in calls.items()}
    benchmark.group = "peak of temporaries"
    benchmark.extra_info["megabytes"] = peaks
    benchmark.pedantic(problem.trained(problem.ours), rounds=1)
