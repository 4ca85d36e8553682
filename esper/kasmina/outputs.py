"""Finding and replacing the tensor that a slot works on inside whatever a module returns.

A module may return a tensor, or a tuple, list, dict, dataclass or mapping-like model output that
holds one; the slot works on the first floating-point tensor in order.
"""

import copy
import dataclasses
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import MutableMapping

import torch
from torch import Tensor

from esper.kasmina.sites import OutputPath


def _children(output: object) -> Iterator[tuple[int | str, object]]:
    if isinstance(output, Mapping):
        yield from output.items()
    elif isinstance(output, tuple | list):
        yield from enumerate(output)
    elif dataclasses.is_dataclass(output) and not isinstance(output, type):
        for field in dataclasses.fields(output):
            yield field.name, getattr(output, field.name)


def find_tensor(output: object) -> tuple[OutputPath, Tensor] | None:
    """Returns path and value of the first floating-point tensor, depth first; None if none."""
    if isinstance(output, Tensor):
        return ((), output) if output.is_floating_point() else None
    for key, child in _children(output):
        found = find_tensor(child)
        if found is not None:
            return ((type(output).__name__, key), *found[0]), found[1]
    return None


def replace_tensor(output: object, path: OutputPath, tensor: Tensor) -> object:
    """Returns a copy of ``output`` with the tensor at ``path`` replaced; types are kept."""
    if not path:
        return tensor
    (_, key), rest = path[0], path[1:]
    if isinstance(output, Mapping):
        clone = copy.copy(output)
        assert isinstance(clone, MutableMapping), f"{type(output).__name__} cannot be written to"
        clone[key] = replace_tensor(output[key], rest, tensor)
        return clone
    if isinstance(output, tuple | list):
        assert isinstance(key, int)
        items = list(output)
        items[key] = replace_tensor(items[key], rest, tensor)
        if hasattr(output, "_fields"):  # a namedtuple takes its items one by one
            return type(output)(*items)
        return type(output)(items)
    assert dataclasses.is_dataclass(output) and not isinstance(output, type)
    assert isinstance(key, str)
    return dataclasses.replace(output, **{key: replace_tensor(getattr(output, key), rest, tensor)})


def features_last(tensor: Tensor, channel_axis: int | None) -> Tensor:
    """Returns a view with the feature axis last.

    Args:
        tensor: Output of a slot's module.
        channel_axis: Where the features are; None where they are last already.
    """
    return tensor if channel_axis is None else tensor.movedim(channel_axis, -1)


def restore_layout(y: Tensor, like: Tensor, channel_axis: int | None) -> Tensor:
    """Undoes ``features_last`` and gives the result the memory layout of the host's output.

    Kernels of later layers choose their arithmetic by layout, so an output that is equal in value
    but not in strides would not keep the model's results bit for bit.

    Args:
        y: Features last, of the values of ``like``.
        like: The host's output.
        channel_axis: As for ``features_last``.
    """
    if channel_axis is not None:
        y = y.movedim(-1, channel_axis)
    if y.stride() == like.stride():
        return y
    return torch.empty_like(like, requires_grad=False).copy_(y)
