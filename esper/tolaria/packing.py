"""Typed records as data: JSON for what is small, named tensors for what is not.

A record is a dataclass of plain values, tensors, containers and further records. ``pack`` takes it
apart, ``unpack`` checks every field's type while it puts it together again. What torch's own
``state_dict`` methods return has no fixed type; it travels as ``Opaque``.
"""

import base64
import copy
import math
from collections import Counter
from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import fields
from dataclasses import is_dataclass
from functools import cache
from typing import TypeVar
from typing import cast

import cattrs
import torch
from torch import Tensor

from esper.artifacts.fields import Json
from esper.tolaria.randomness import RandomState

T = TypeVar("T")

_TAG = "$"
# A RandomState is a copy already, of many numbers.
_UNCHANGING = frozenset((type(None), bool, int, float, str, bytes, RandomState))


class PackingError(ValueError):
    """Something that is no data, or data that is not the record wanted."""


@dataclass(frozen=True, slots=True)
class Opaque:
    """Plain values, tensors and containers of them, in whatever shape their owner gave them."""

    value: object


@dataclass(frozen=True, slots=True)
class Packed:
    """A record taken apart.

    Attributes:
        document: Everything but the tensors, which it names.
        tensors: The tensors by name, as they were given: not copied, on their own device.
    """

    document: Json
    tensors: dict[str, Tensor]


def pack(record: object, name: str) -> Packed:
    """Takes a record apart.

    Args:
        record: A dataclass.
        name: What to call it in errors.

    Raises:
        PackingError: If it holds something other than data; names where.
    """
    tensors: dict[str, Tensor] = {}
    return Packed(_encode(_converter().unstructure(record), tensors, name), tensors)


def unpack(kind: type[T], packed: Packed, name: str) -> T:
    """Puts a record together.

    Args:
        kind: The dataclass.
        packed: What ``pack`` returned.
        name: What to call it in errors.

    Raises:
        PackingError: If a field is missing, unknown or of another type.
    """
    try:
        return _converter().structure(_decode(packed.document, packed.tensors), kind)
    except (KeyError, TypeError, ValueError, cattrs.BaseValidationError) as error:
        if isinstance(error, cattrs.BaseValidationError):
            reason = "; ".join(cattrs.transform_error(error, path=name))
        else:
            reason = f"{name}: {error}"
        raise PackingError(f"no {kind.__name__}: {reason}") from error


@cache
def _converter() -> cattrs.Converter:
    converter = cattrs.Converter(forbid_extra_keys=True)
    for kind in (Tensor, bytes):

        def checked(value: object, wanted: type) -> object:
            if not isinstance(value, wanted):
                raise TypeError(f"it is a {type(value).__name__}, but must be a {wanted.__name__}")
            return value

        converter.register_structure_hook(kind, checked)
        converter.register_unstructure_hook(kind, lambda value: value)
    converter.register_unstructure_hook_func(
        lambda kind: isinstance(kind, type) and issubclass(kind, Tensor), lambda value: value
    )
    converter.register_structure_hook(Opaque, lambda value, _: Opaque(value))
    converter.register_unstructure_hook(Opaque, lambda opaque: opaque.value)
    return converter


def _encode(value: object, tensors: dict[str, Tensor], path: str) -> Json:
    match value:
        case None | bool() | str():
            return value
        case int():
            return int(value)
        case float():
            return float(value) if math.isfinite(value) else {_TAG: "float", "value": repr(value)}
        case Tensor():
            tensors[path] = value.detach()
            return {_TAG: "tensor", "value": path}
        case bytes():
            return {_TAG: "bytes", "value": base64.b64encode(value).decode("ascii")}
        case list() | tuple():
            items: list[Json] = [
                _encode(item, tensors, f"{path}[{index}]") for index, item in enumerate(value)
            ]
            return items if isinstance(value, list) else {_TAG: "tuple", "value": items}
        case Mapping():
            if not isinstance(value, Counter) and all(
                isinstance(key, str) and key != _TAG for key in value
            ):
                return {key: _encode(item, tensors, f"{path}.{key}") for key, item in value.items()}
            pairs: list[Json] = [
                [_encode(key, tensors, path), _encode(item, tensors, f"{path}[{key!r}]")]
                for key, item in value.items()
            ]
            return {_TAG: "counter" if isinstance(value, Counter) else "dict", "value": pairs}
    raise PackingError(
        f"{path} is a {type(value).__name__}, but only numbers, text, bytes, tensors and "
        "containers of them can be kept as data"
    )


def _decode(value: Json, tensors: Mapping[str, Tensor]) -> object:
    if isinstance(value, list):
        return [_decode(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if _TAG not in value:
        return {key: _decode(item, tensors) for key, item in value.items()}
    content = value["value"]
    match value[_TAG], content:
        case "float", str():
            return float(content)
        case "tensor", str():
            return tensors[content]
        case "bytes", str():
            return base64.b64decode(content, validate=True)
        case "tuple", list():
            return tuple(_decode(item, tensors) for item in content)
        case ("dict" | "counter") as kind, list():
            pairs = {
                _decode(key, tensors): _decode(item, tensors)
                for key, item in cast(list[tuple[Json, Json]], content)
            }
            return Counter(cast(dict[object, int], pairs)) if kind == "counter" else pairs
    raise ValueError(f"{value[_TAG]!r} is no kind of value")


def copied(record: T, keep: Callable[[Tensor], Tensor]) -> T:
    """Returns a copy of a record that shares nothing with it that may change.

    Args:
        record: A record, or any part of one.
        keep: Copies a tensor.
    """
    return cast(T, _copied(record, keep))


def _copied(value: object, keep: Callable[[Tensor], Tensor]) -> object:
    kind = type(value)
    if kind in _UNCHANGING:
        return value
    if isinstance(value, Tensor):
        return keep(value)
    if kind is dict:
        items = cast(dict[object, object], value).items()
        return {key: _copied(item, keep) for key, item in items}
    if kind is list or kind is tuple:
        return kind([_copied(item, keep) for item in cast(Sequence[object], value)])
    if is_dataclass(kind):
        parts = {name: _copied(getattr(value, name), keep) for name in _field_names(kind)}
        return kind(**parts)
    return copy.deepcopy(value)


@cache
def _field_names(kind: type) -> tuple[str, ...]:
    return tuple(part.name for part in fields(kind))


def kept(tensor: Tensor) -> Tensor:
    """Returns a copy of a tensor in the memory of the host, pinned where it comes from a GPU."""
    copy = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
    return copy.copy_(tensor.detach())
