"""Strict reading of JSON: every field has its type, nothing is missing, nothing is unknown."""

import json
from typing import TypeVar

from esper.artifacts.folder import ModelFolderError

Json = None | bool | int | float | str | list["Json"] | dict[str, "Json"]
"""What JSON can hold."""

T = TypeVar("T")


def parse(data: bytes, name: str) -> "Fields":
    """Returns the object that a JSON document holds.

    Args:
        data: UTF-8 JSON.
        name: What to call the document in errors.

    Raises:
        ModelFolderError: If it is no JSON object, or holds NaN, infinity or a repeated key.
    """

    def refuse(word: str) -> None:
        raise ModelFolderError(name, word, "JSON has no such number")

    def unique(pairs: list[tuple[str, Json]]) -> dict[str, Json]:
        result = dict(pairs)
        if len(result) != len(pairs):
            keys = [key for key, _ in pairs]
            repeated = next(key for key in keys if keys.count(key) > 1)
            raise ModelFolderError(name, repeated, "a key may stand only once in an object")
        return result

    try:
        value = json.loads(data, parse_constant=refuse, object_pairs_hook=unique)
    except ModelFolderError:
        raise
    except (ValueError, RecursionError) as error:
        raise ModelFolderError(
            name, "unreadable", f"it must be JSON; it is truncated or corrupt ({error})"
        ) from error
    return Fields(value, name)


class Fields:
    """An object whose fields are taken one by one; ``finish`` refuses what is left.

    Args:
        value: The object.
        path: Where it stands in the document, for errors.
    """

    def __init__(self, value: Json, path: str) -> None:
        if not isinstance(value, dict):
            raise ModelFolderError(path, value, "it must be an object")
        self.path = path
        self._left = dict(value)

    def take(self, name: str) -> Json:
        """Returns a field of any type."""
        if name not in self._left:
            raise ModelFolderError(f"{self.path}.{name}", "missing", "it is required")
        return self._left.pop(name)

    def text(self, name: str) -> str:
        """Returns a string."""
        return self._typed(name, self.take(name), str, "a string")

    def optional_text(self, name: str) -> str | None:
        """Returns a string, or None for null."""
        value = self.take(name)
        return None if value is None else self._typed(name, value, str, "a string or null")

    def count(self, name: str, least: int = 0) -> int:
        """Returns a whole number that is at least ``least``."""
        return self._whole(name, self.take(name), least)

    def optional_count(self, name: str, least: int = 0) -> int | None:
        """Returns a whole number that is at least ``least``, or None for null."""
        value = self.take(name)
        return None if value is None else self._whole(name, value, least)

    def number(self, name: str) -> float:
        """Returns a number."""
        value = self.take(name)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ModelFolderError(f"{self.path}.{name}", value, "it must be a number")
        return float(value)

    def counts(self, name: str) -> tuple[int, ...]:
        """Returns a list of whole numbers that are at least 0."""
        values = self._typed(name, self.take(name), list, "a list")
        return tuple(self._whole(f"{name}[{i}]", value, 0) for i, value in enumerate(values))

    def fields(self, name: str) -> "Fields":
        """Returns an object."""
        return Fields(self.take(name), f"{self.path}.{name}")

    def objects(self, name: str) -> list["Fields"]:
        """Returns a list of objects."""
        values = self._typed(name, self.take(name), list, "a list")
        return [Fields(value, f"{self.path}.{name}[{i}]") for i, value in enumerate(values)]

    def entries(self) -> dict[str, "Fields"]:
        """Returns every field left; each must be an object."""
        return {key: Fields(value, f"{self.path}[{key!r}]") for key, value in self.rest().items()}

    def text_entries(self) -> dict[str, str]:
        """Returns every field left; each must be a string."""
        return {key: self._typed(key, value, str, "a string") for key, value in self.rest().items()}

    def rest(self) -> dict[str, Json]:
        """Returns every field left, unchecked."""
        left, self._left = self._left, {}
        return left

    def finish(self) -> None:
        """Refuses fields that nobody has taken."""
        if self._left:
            raise ModelFolderError(
                f"{self.path}.{next(iter(self._left))}", "given", "this format has no such field"
            )

    def _whole(self, name: str, value: Json, least: int) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ModelFolderError(
                f"{self.path}.{name}", value, f"it must be a whole number of at least {least}"
            )
        return value

    def _typed(self, name: str, value: Json, kind: type[T], rule: str) -> T:
        if not isinstance(value, kind):
            raise ModelFolderError(f"{self.path}.{name}", value, f"it must be {rule}")
        return value
