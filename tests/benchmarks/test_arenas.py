"""The arenas compare what they say that they compare."""

from dataclasses import replace

import pytest
import torch
from scipy import stats

from benchmarks.growth import arenas
from benchmarks.growth.arena import FINAL_EQUAL
from benchmarks.growth.arena import GROWN
from benchmarks.growth.arena import Bar
from benchmarks.growth.arena import Outcome
from benchmarks.growth.comparison import paired
from benchmarks.growth.page import judge
from benchmarks.growth.training import Recipe
from benchmarks.growth.training import train_static
from benchmarks.growth.training import with_births


def test_the_interval_is_that_of_a_paired_t_test() -> None:
    first, second = [3.0, 4.0, 6.5, 2.0], [2.0, 4.5, 4.0, 1.0]
    found = paired(first, second)
    expected = stats.ttest_rel(first, second).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert found.mean == pytest.approx(1.0)


def _arm(name: str, figures: list[float], flops: int) -> list[Outcome]:
    return [
        Outcome(arm=name, seed=seed, figure=figure, parameters=1, flops=flops, wall_s=0.0)
        for seed, figure in enumerate(figures)
    ]


@pytest.mark.parametrize(
    ("bar", "reached"),
    [
        ({"point": 0.0}, True),
        ({"floor": 0.0}, False),
        ({"floor": -3.0, "compute": 0.5}, True),
        ({"compute": 0.4}, False),
    ],
)
def test_a_bar_asks_for_gain_interval_and_compute(bar: dict[str, float], reached: bool) -> None:
    arms = {"a": _arm("a", [1.0, 2.0, 3.0], 50), "b": _arm("b", [1.5, 1.0, 2.9], 100)}
    arena = arenas.width(0)
    gain, compute, verdict = judge(arena, Bar(arm="a", against="b", **bar), arms)
    assert (verdict, compute) == (reached, 0.5)
    assert gain.mean > 0 > gain.low
    lower_is_better = replace(arena, higher_is_better=False)
    assert judge(lower_is_better, Bar(arm="a", against="b"), arms)[0].mean == -gain.mean


def test_grown_and_controls_share_seed_batches_births_and_bill(plane: str) -> None:
    arena = replace(arenas.width(0), steps=72, epochs=12)
    grown = arena.grow(0, plane)
    again = arena.grow(0, plane)
    assert grown.births and grown.flops == again.flops
    for a, b in zip(grown.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b)
    twin = with_births(arena.task, arena.host(0), grown.births)
    assert sum(p.numel() for p in twin.parameters()) == grown.parameters
    host = arena.task.host(0)
    inputs = arena.task.validation.inputs
    with torch.no_grad():  # what is born adds nothing yet
        assert torch.equal(twin.eval()(inputs), host.eval()(inputs))
    equal = train_static(arena.task, twin, Recipe(learning_rate=0.01), 0, flops=grown.flops)
    assert 0.9 < equal.flops / grown.flops <= 1.0


def test_every_element_of_the_recipe_has_its_ablation() -> None:
    arena = arenas.width(0)
    changed = {repr(config) for config in arena.ablations.values()}
    assert len(changed) == len(arena.ablations)
    assert repr(arena.config) not in changed
    elements = {name.split(":")[0] for name in arena.ablations}
    assert elements == {"how", "when", "where", "isolation", "learning rate", "accept"}
    assert arena.bars[0].arm == GROWN and arena.bars[0].against == FINAL_EQUAL


def test_a_birth_scale_and_a_late_trial_are_elements_that_can_be_turned_off() -> None:
    arena = arenas.width(0)
    usual = arena.ablations["how: fan-in at the usual scale"]
    assert [c.ranks for c in usual.candidates] == [c.ranks for c in arena.config.candidates]
    assert [dict(c.hyperparameters) for c in usual.candidates] == [{}]
    soon = arena.ablations["accept: a trial after a third of the steps"]
    assert 3 * soon.graft.ramp_steps == arena.config.graft.ramp_steps
    assert "how: fan-in at the usual scale" not in arenas.text(0).ablations  # it has the usual one


def test_only_the_arms_that_are_asked_for_are_trained(plane: str) -> None:
    arena = replace(arenas.width(0), steps=24, epochs=4, arms=frozenset({FINAL_EQUAL}))
    outcomes = list(arena.run(0, plane, arena.task.validation))
    assert [outcome.arm for outcome in outcomes] == [GROWN, FINAL_EQUAL]
