"""The state of an optimizer by the names of its parameters, as data.

``Optimizer.state_dict`` numbers parameters, and ``load_state_dict`` wants the same groups of the
same sizes; a growing model has neither. Names survive growth, loss and replacement of a seed.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from torch import nn
from torch.optim import Optimizer

from esper.common.sharding import like
from esper.tolaria.packing import Opaque

_PARAMETERS = ("params", "param_names")


@dataclass(frozen=True, slots=True)
class GroupState:
    """One parameter group.

    Attributes:
        parameters: Names of its parameters, in order.
        labels: Its ``param_names``; None for an optimizer made of bare parameters.
        options: Learning rate and all other options.
    """

    parameters: list[str]
    labels: list[str] | None
    options: Opaque


@dataclass(frozen=True, slots=True)
class OptimizerState:
    """A whole optimizer.

    Attributes:
        groups: Its groups.
        state: What it keeps for each parameter, by name.
        strangers: Values of parameters that are not the model's, by name.
    """

    groups: list[GroupState]
    state: dict[str, Opaque]
    strangers: dict[str, Tensor]


def capture(optimizer: Optimizer, names: Mapping[nn.Parameter, str]) -> OptimizerState:
    """Returns the state of an optimizer; the tensors are its own.

    Args:
        optimizer: Any optimizer that keeps its state by parameter.
        names: Names of the model's parameters. Others are named by their place in the optimizer.
    """
    groups: list[GroupState] = []
    state: dict[str, Opaque] = {}
    strangers: dict[str, Tensor] = {}
    for number, group in enumerate(optimizer.param_groups):
        called: list[str] = []
        for position, parameter in enumerate(group["params"]):
            name = names.get(parameter)
            if name is None:
                name = _stranger(number, position)
                strangers[name] = parameter
            called.append(name)
            if parameter in optimizer.state:
                state[name] = Opaque(dict(optimizer.state[parameter]))
        options = {key: value for key, value in group.items() if key not in _PARAMETERS}
        labels = list(group["param_names"]) if "param_names" in group else None
        groups.append(GroupState(called, labels, Opaque(options)))
    return OptimizerState(groups, state, strangers)


def restore(
    optimizer: Optimizer, saved: OptimizerState, parameters: Mapping[str, nn.Parameter]
) -> None:
    """Puts an optimizer into a state; its groups stay the same objects, as schedulers hold them.

    Args:
        optimizer: An optimizer made as the saved one was.
        saved: The state.
        parameters: The model's parameters by name, its seeds' included.

    Raises:
        ValueError: If the optimizer has other groups, or the model lacks a parameter; nothing has
            changed.
    """
    if len(saved.groups) != len(optimizer.param_groups):
        raise ValueError(
            f"optimizer has {len(optimizer.param_groups)} parameter groups, but the saved one has "
            f"{len(saved.groups)}"
        )
    chosen: list[list[nn.Parameter]] = []
    for number, (group, state) in enumerate(zip(optimizer.param_groups, saved.groups, strict=True)):
        chosen.append([])
        for position, name in enumerate(state.parameters):
            own = group["params"][position] if name == _stranger(number, position) else None
            parameter = parameters.get(name, own)
            if parameter is None:
                raise ValueError(
                    f"optimizer group {number} is to train {name}, but the model has no such "
                    "parameter"
                )
            chosen[-1].append(parameter)
    optimizer.state.clear()
    for group, state, members in zip(optimizer.param_groups, saved.groups, chosen, strict=True):
        for key, value in cast(dict[str, object], state.options.value).items():
            group[key] = value.clone() if isinstance(value, Tensor) else value
        group["params"] = members
        if state.labels is not None:
            group["param_names"] = list(state.labels)
        for name, parameter in zip(state.parameters, members, strict=True):
            if name in saved.strangers:
                with torch.no_grad():
                    parameter.copy_(saved.strangers[name])
            if name in saved.state:
                values = cast(dict[str, object], saved.state[name].value)
                optimizer.state[parameter] = {
                    key: _placed(key, value, parameter, group) for key, value in values.items()
                }


def _stranger(group: int, position: int) -> str:
    return f"optimizer.groups[{group}].params[{position}]"


def _placed(
    key: str, value: object, parameter: nn.Parameter, group: Mapping[str, object]
) -> object:
    """A copy of what is kept for a parameter, where torch wants it."""
    if not isinstance(value, Tensor):
        return value
    on_host = key == "step" and not (group.get("capturable") or group.get("fused"))
    return like(value.to("cpu" if on_host else parameter.device, copy=True), parameter)
