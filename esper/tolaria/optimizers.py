"""Newborn optimizers: train a seed's parameters without touching the user's optimizer.

A newborn's parameters live in an optimizer of their own, of the user's own class, with their own
step count: Adam moments padded with zeros under the host's step count would shrink their updates.
Its learning rate follows the host's parameter group, schedulers included. At fossilisation the
parameters join the user's group together with their state; adding a *group* after a scheduler was
made breaks most schedulers of torch, extending an existing group breaks none.
"""

import inspect
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.optim import LBFGS
from torch.optim import Optimizer

from esper.tolaria import optimizer_state
from esper.tolaria.optimizer_state import OptimizerState


def host_group_index(optimizer: Optimizer, host_parameters: Iterable[nn.Parameter]) -> int:
    """Returns the index of the user's group that holds the first of the host's parameters.

    Args:
        optimizer: The user's optimizer.
        host_parameters: Parameters of the module that the slot sits on; may be empty.

    Returns:
        The group's index; 0 where no group holds any of them (a frozen host).
    """
    wanted = {id(parameter) for parameter in host_parameters}
    for index, group in enumerate(optimizer.param_groups):
        if any(id(parameter) in wanted for parameter in group["params"]):
            return index
    return 0


def check_supported(optimizer: Optimizer) -> None:
    """Refuses an optimizer that newborns cannot be trained beside.

    Raises:
        ValueError: For LBFGS, which re-evaluates the whole model inside one step, and for a class
            that cannot be made anew from a parameter group.
    """
    if isinstance(optimizer, LBFGS):
        raise ValueError(
            "optimizer is LBFGS, but a growing model needs an optimizer with one update per "
            "step; use any other torch.optim optimizer"
        )
    for group in optimizer.param_groups:
        # Two axes: some optimizers take matrices only, and what they refuse is known per seed.
        _twin(optimizer, group, [nn.Parameter(torch.zeros(1, 1))])


@dataclass(frozen=True, slots=True)
class NewbornState:
    """Where a newborn's optimizer is.

    Attributes:
        num_steps: Steps that it has taken.
        optimizer: Its state.
    """

    num_steps: int
    optimizer: OptimizerState


class NewbornOptimizer:
    """Optimizer of one seed between germination and fossilisation.

    Args:
        parameters: The seed's parameters; at least one.
        optimizer: The user's optimizer, whose class and options are copied.
        group_index: Index of the user's group to follow.
        learning_rate_scale: Newborn learning rate over the group's present one.
        warmup_steps: Steps over which the learning rate rises linearly to its full value.
        names: Names of the parameters, for an optimizer that was made from named parameters.

    Raises:
        ValueError: If the user's optimizer takes no such parameters.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        optimizer: Optimizer,
        group_index: int,
        *,
        learning_rate_scale: float = 1.0,
        warmup_steps: int = 0,
        names: Sequence[str] = (),
    ) -> None:
        self._user_optimizer = optimizer
        self._group_index = group_index
        self._learning_rate_scale = learning_rate_scale
        self._warmup_steps = warmup_steps
        self._num_steps = 0
        self._parameters = list(parameters)
        self._names = list(names)
        group = optimizer.param_groups[group_index]
        self._optimizer = _twin(optimizer, group, self._parameters)

    @property
    def learning_rate(self) -> float:
        """Learning rate that the next step will use."""
        group = self._user_optimizer.param_groups[self._group_index]
        progress = (self._num_steps + 1) / (self._warmup_steps + 1)
        return float(group["lr"]) * self._learning_rate_scale * min(1.0, progress)

    def step(self) -> None:
        """Updates the parameters that have gradients, then clears all gradients."""
        if any(parameter.grad is not None for parameter in self._parameters):
            for group in self._optimizer.param_groups:
                group["lr"] = self.learning_rate
            self._optimizer.step()
            self._num_steps += 1
        self.clear()

    def clear(self) -> None:
        """Drops the gradients without a step."""
        for parameter in self._parameters:
            parameter.grad = None

    def state(self, names: Mapping[nn.Parameter, str]) -> NewbornState:
        """Returns the optimizer's state; the tensors are its own.

        Args:
            names: Names of the model's parameters.
        """
        return NewbornState(self._num_steps, optimizer_state.capture(self._optimizer, names))

    def resume(self, state: NewbornState, parameters: Mapping[str, nn.Parameter]) -> None:
        """Goes on from where the optimizer of the same seed was.

        Args:
            state: What ``state`` returned there.
            parameters: The model's parameters by name.
        """
        self._num_steps = state.num_steps
        optimizer_state.restore(self._optimizer, state.optimizer, parameters)

    def graduate(self) -> None:
        """Moves parameters and their state into the user's group; this object is then done."""
        group = self._user_optimizer.param_groups[self._group_index]
        group["params"].extend(self._parameters)
        if "param_names" in group:  # an optimizer made from named_parameters()
            group["param_names"].extend(self._names)
        for parameter in self._parameters:
            if parameter in self._optimizer.state:
                self._user_optimizer.state[parameter] = self._optimizer.state[parameter]


def _twin(
    optimizer: Optimizer, group: Mapping[str, object], parameters: list[nn.Parameter]
) -> Optimizer:
    """Returns an optimizer of the same class, with a group's options, over other parameters."""
    kind: Callable[..., Optimizer] = type(optimizer)
    accepted = inspect.signature(kind).parameters
    group = {name: group[name] for name in group if name not in ("params", "param_names")}
    options = {name: value for name, value in group.items() if name in accepted}
    try:
        # As a group too: a class that takes **kwargs does not say what its options are.
        return kind([{**group, "params": parameters}], **options)
    except Exception as error:  # whatever a foreign constructor raises
        raise ValueError(
            f"optimizer is {type(optimizer).__name__}, but newborns need one of their own of this "
            f"class: {error}"
        ) from error
