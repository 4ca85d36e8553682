"""The growth recipe on its way to the controller."""

from dataclasses import asdict
from dataclasses import fields

from esper.config import GrowthConfig
from esper.tamiyo.v1 import controller_pb2

_ENUMS = {"when": controller_pb2.When, "where": controller_pb2.Where, "stop": controller_pb2.Stop}
_FIELDS = tuple(field.name for field in fields(GrowthConfig))


def to_proto(config: GrowthConfig) -> controller_pb2.Recipe:
    """Returns a recipe as it is sent."""
    recipe = controller_pb2.Recipe()
    for name, value in asdict(config).items():
        choice = f"{name}_{value}".upper()
        setattr(recipe, name, _ENUMS[name].Value(choice) if name in _ENUMS else value)
    return recipe


def from_proto(recipe: controller_pb2.Recipe) -> GrowthConfig:
    """Returns a recipe as it was sent; an unspecified choice is the default.

    Raises:
        ValueError: If a field breaks its rule; the message names field, value and rule.
    """
    values: dict[str, object] = {}
    for name in _FIELDS:
        value = getattr(recipe, name)
        if name not in _ENUMS:
            values[name] = value
        elif value != 0:
            known = {number: word for word, number in _ENUMS[name].items()}
            values[name] = known.get(value, str(value)).removeprefix(f"{name.upper()}_").lower()
    return GrowthConfig(**values)  # type: ignore[arg-type]  # checked by GrowthConfig itself
