"""Refusals of arguments, in one form: field, value and rule."""

from numbers import Real


def check_fraction(field: str, value: object) -> None:
    """Refuses what is not a number in [0, 1].

    Args:
        field: What the caller calls it.
        value: What was given.

    Raises:
        ValueError: With field, value and rule.
    """
    if not isinstance(value, Real) or value < 0 or not value <= 1:
        raise ValueError(f"{field} is {value!r}, but it must be a number in [0, 1]")


def check_whole(field: str, value: object, low: int, high: int | None = None) -> None:
    """Refuses what is not a whole number in bounds.

    Args:
        field: What the caller calls it.
        value: What was given.
        low: Least value.
        high: Largest value; None for no bound.

    Raises:
        ValueError: With field, value and rule.
    """
    if type(value) is not int or value < low or (high is not None and value > high):
        bounds = f"of at least {low}" if high is None else f"from {low} to {high}"
        raise ValueError(f"{field} is {value!r}, but it must be a whole number {bounds}")


def check_kind(field: str, value: object, kind: type) -> None:
    """Refuses what is not of a type.

    Args:
        field: What the caller calls it.
        value: What was given.
        kind: What it must be an instance of.

    Raises:
        ValueError: With field, type of the value, and rule.
    """
    if not isinstance(value, kind):
        given = type(value).__name__
        raise ValueError(f"{field} is of type {given}, but it must be of type {kind.__name__}")
