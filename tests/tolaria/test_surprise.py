"""False alarms come no more often than they may, and what is wrong is noticed soon."""

import math
import random
from collections.abc import Callable
from dataclasses import replace

import pytest

from esper.tolaria.surprise import Surprise
from esper.tolaria.surprise import collapsed

Noise = Callable[[random.Random, int], float]

SOUND: dict[str, Noise] = {
    "log-normal": lambda draw, step: draw.lognormvariate(0, 0.5),
    "wide log-normal": lambda draw, step: draw.lognormvariate(0, 1.5),
    "heavy tail": lambda draw, step: draw.paretovariate(1.0),
    "mean of few": lambda draw, step: sum(draw.gauss(0, 1) ** 2 for _ in range(8)),
    "falling": lambda draw, step: draw.lognormvariate(-step / 500, 0.3),
    "rising": lambda draw, step: draw.lognormvariate(step / 500, 0.3),
    "of both signs": lambda draw, step: draw.gauss(0, 1),
    "constant": lambda draw, step: 0.25,
    "zero now and then": lambda draw, step: float(draw.random() < 0.1),
}


@pytest.mark.parametrize("kind", SOUND)
def test_sound_figures_raise_no_more_alarms_than_they_may(kind: str) -> None:
    draw, rate = random.Random(kind), 1e-3
    alarms = 0
    for _ in range(20):
        watched = Surprise(rate)
        for step in range(1000):
            if watched.observe(SOUND[kind](draw, step)):
                alarms += 1
                watched = Surprise(rate)
    # 20 are allowed on average; a Poisson number of that mean exceeds 35 once in a thousand.
    assert alarms <= 35


@pytest.mark.parametrize(("factor", "within"), [(1e6, 1), (100, 2), (10, 4)])
def test_a_jump_is_noticed_within_a_few_figures(factor: float, within: int) -> None:
    for seed in range(10):
        draw, watched = random.Random(seed), Surprise(1e-6)
        assert not any(watched.observe(draw.lognormvariate(0, 0.3)) for _ in range(300))
        assert any(watched.observe(factor * draw.lognormvariate(0, 0.3)) for _ in range(within))


def test_a_single_outlier_is_forgiven_and_a_lasting_level_is_learnt() -> None:
    draw, watched = random.Random(0), Surprise(1e-6)
    for _ in range(300):
        watched.observe(draw.lognormvariate(0, 0.3))
    assert not watched.observe(5.0)
    assert watched.suspicious
    assert not any(watched.observe(draw.lognormvariate(0, 0.3)) for _ in range(5))
    assert not watched.suspicious
    usual = watched.usual
    assert usual is not None and 0.7 < usual < 1.4
    assert not any(watched.observe(1.01**step) for step in range(400))
    assert watched.usual is not None and watched.usual > 40


def converging(draw: random.Random, step: int) -> float:
    """Falls smoothly, and rises again by far when what is trained changes."""
    since = step % 150
    return draw.lognormvariate(-since / 30, 0.05)


def test_a_height_that_the_run_has_had_is_forgiven_where_that_is_asked() -> None:
    draw, strict, mild = (
        random.Random(0),
        Surprise(1e-6),
        Surprise(1e-6, forgives_return=True),
    )
    figures = [converging(draw, step) for step in range(600)]
    assert any(strict.observe(figure) for figure in figures)
    assert not any(mild.observe(figure) for figure in figures)
    assert any(mild.observe(200 * max(figures)) for _ in range(3))
    again = Surprise(1e-6, forgives_return=True)
    again.resume(mild.state())
    assert not any(again.observe(max(figures)) for _ in range(50))


def test_it_goes_on_from_its_state() -> None:
    draw, first = random.Random(0), Surprise(1e-6)
    for _ in range(100):
        first.observe(draw.lognormvariate(0, 0.3))
    first.observe(6.0)
    second = Surprise(1e-6)
    second.resume(first.state())
    figures = [draw.lognormvariate(0, 0.3) for _ in range(50)] + [9.0] * 5
    assert [first.observe(f) for f in figures] == [second.observe(f) for f in figures]
    assert first.state() == second.state() != replace(first.state(), evidence=1.0)


def test_a_collapse_is_a_jump_and_no_slow_loss() -> None:
    falling = [2.3 * math.exp(-epoch / 4) for epoch in range(8)]
    steady = [falling[-1] * (1 + 0.05 * (-1) ** epoch) for epoch in range(20)]
    assert collapsed([*falling, *steady, 2.3], 1e-4)
    assert not collapsed([*falling, *steady, 1.5 * steady[-1]], 1e-4)
    overfitting = [steady[-1] * 1.1**epoch for epoch in range(30)]
    assert not any(
        collapsed([*falling, *overfitting[:count]], 1e-4) for count in range(1, len(overfitting))
    )
    assert not collapsed([1.0, 100.0], 0.5)
