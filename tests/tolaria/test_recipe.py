"""A recipe arrives as it was sent, and a broken one is refused."""

import pytest

from esper.config import GrowthConfig
from esper.tamiyo.v1 import controller_pb2
from esper.tolaria.recipe import from_proto
from esper.tolaria.recipe import to_proto


@pytest.mark.parametrize(
    "config",
    [
        GrowthConfig(),
        GrowthConfig(when="plateau", where="random", stop="never", first_epoch=0, seed=7),
        GrowthConfig(when="early", where="gradient", max_live=11, reserved_share=0.25),
    ],
)
def test_a_recipe_arrives_as_it_was_sent(config: GrowthConfig) -> None:
    sent = controller_pb2.Recipe.FromString(to_proto(config).SerializeToString())
    assert from_proto(sent) == config


def test_an_unspecified_choice_is_the_default_and_an_unknown_one_is_refused() -> None:
    recipe = to_proto(GrowthConfig(where="random"))
    recipe.where = controller_pb2.WHERE_UNSPECIFIED
    assert from_proto(recipe) == GrowthConfig()
    recipe.where = 99
    with pytest.raises(ValueError, match="where is '99', but it must be one of residual"):
        from_proto(recipe)


@pytest.mark.parametrize(
    ("field", "value"),
    [("when", "late"), ("reserved_share", 1.0), ("max_live", 0), ("first_epoch", -1)],
)
def test_a_recipe_that_makes_no_sense_is_refused(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{field} is {value!r}, but it must"):
        GrowthConfig(**{field: value})
