"""Checks of request fields that several services make; each returns what is wrong."""

import math
from collections.abc import Sequence

from google.protobuf.descriptor import EnumDescriptor

from esper.services.serving.errors import FieldViolation

MAX_TAGS = 32
MAX_TAG_CHARS = 64
DEFAULT_PAGE_SIZE = 50
MAX_PAGE_SIZE = 500


def check_text(
    field: str, value: str, max_chars: int, *, required: bool = False
) -> list[FieldViolation]:
    """Checks the length of a text."""
    if required and not value:
        return [FieldViolation(field, value, "must not be empty")]
    if len(value) > max_chars:
        return [FieldViolation(field, value, f"must have at most {max_chars} characters")]
    return []


def check_tags(field: str, tags: Sequence[str]) -> list[FieldViolation]:
    """Checks the number and the lengths of tags."""
    found = []
    if len(tags) > MAX_TAGS:
        found.append(FieldViolation(field, len(tags), f"tags are too many: at most {MAX_TAGS}"))
    for index, tag in enumerate(tags[:MAX_TAGS]):
        found += check_text(f"{field}[{index}]", tag, MAX_TAG_CHARS, required=True)
    return found


def check_enum(
    field: str, value: int, enum: EnumDescriptor, *, required: bool = True
) -> list[FieldViolation]:
    """Checks that a number is a value of `enum` that this release knows."""
    if value not in enum.values_by_number:
        return [FieldViolation(field, value, f"is not a value of {enum.name}")]
    if required and value == 0:
        name = enum.values_by_number[0].name
        return [FieldViolation(field, name, "must be another value")]
    return []


def check_number(
    field: str, value: float, low: float = -math.inf, high: float = math.inf
) -> list[FieldViolation]:
    """Checks that a number is finite and within [low, high]."""
    if math.isfinite(value) and low <= value <= high:
        return []
    bounds = [
        *(["finite"] if not math.isfinite(value) else []),
        *([f"at least {low:g}"] if math.isfinite(low) else []),
        *([f"at most {high:g}"] if math.isfinite(high) else []),
    ]
    return [FieldViolation(field, value, f"must be {' and '.join(bounds)}")]


def check_page_size(page_size: int) -> list[FieldViolation]:
    """Checks the size of a page: 0 is the default and too many are fewer; only negatives fail."""
    return check_number("page_size", page_size, low=0)


def effective_page_size(page_size: int) -> int:
    """Returns how many records a page holds at most."""
    return min(page_size or DEFAULT_PAGE_SIZE, MAX_PAGE_SIZE)
