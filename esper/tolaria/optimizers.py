"""Newborn optimizers: train a seed's parameters without touching the user's optimizer.

A newborn's parameters live in an optimizer of their own, of the user's own class, with their own
step count: Adam moments padded with zeros under the host's step count would shrink their updates.
Its learning rate follows the host's parameter group, schedulers included. At fossilisation the
parameters join the user's group together with their state; adding a *group* after a scheduler was
made breaks most schedulers of torch, extending an existing group breaks none.

All options of the group are followed, so that schedules of momentum or weight decay count too. A
seed belongs to the group that holds its host's parameters; where that optimizer cannot train it
(``Muon`` takes matrices only, ``SparseAdam`` sparse gradients) the next one that can takes it.
"""

import inspect
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import compress

import torch
from torch import Tensor
from torch import nn
from torch.amp import GradScaler
from torch.optim import LBFGS
from torch.optim import Optimizer
from torch.optim import SparseAdam

from esper.tolaria import optimizer_state
from esper.tolaria.gradients import GradientsAside
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


def find_home(
    optimizers: Sequence[Optimizer],
    host_parameters: Iterable[nn.Parameter],
    newborns: Sequence[nn.Parameter],
) -> tuple[Optimizer, int]:
    """Returns the optimizer and the index of its group that a seed's parameters shall join.

    Args:
        optimizers: The user's optimizers.
        host_parameters: Parameters of the module that the slot sits on; may be empty.
        newborns: The seed's parameters.

    Raises:
        ValueError: If no optimizer takes them.
    """
    held = list(host_parameters)
    wanted = {id(parameter) for parameter in held}

    def is_away(optimizer: Optimizer) -> bool:
        groups = optimizer.param_groups
        return not any(id(parameter) in wanted for group in groups for parameter in group["params"])

    refusal: ValueError | None = None
    for optimizer in sorted(optimizers, key=is_away):
        index = host_group_index(optimizer, held)
        try:
            check_class(optimizer)
            _twin(optimizer, optimizer.param_groups[index], list(newborns))
        except ValueError as error:
            refusal = refusal or error
            continue
        return optimizer, index
    assert refusal is not None, "there is at least one optimizer"
    raise refusal


def check_all(optimizers: Sequence[Optimizer]) -> None:
    """Refuses optimizers of which none can train newborns.

    Raises:
        ValueError: As ``check_supported``, for the first one; or if there is no optimizer.
    """
    if not optimizers:
        raise ValueError("optimizer is an empty sequence, but a session needs at least one")
    refusals: list[ValueError] = []
    for optimizer in optimizers:
        try:
            check_supported(optimizer)
        except ValueError as error:
            refusals.append(error)
    if len(refusals) == len(optimizers):
        raise refusals[0]


def check_class(optimizer: Optimizer) -> None:
    """Refuses the classes of optimizers that no newborn can be trained by.

    Raises:
        ValueError: For LBFGS, whose state is one vector over all parameters, and SparseAdam, which
            takes sparse gradients only.
    """
    if isinstance(optimizer, LBFGS):
        raise ValueError(
            "optimizer is LBFGS, but its state is one vector over all parameters, which cannot "
            "grow; use any other torch.optim optimizer"
        )
    if isinstance(optimizer, SparseAdam):
        raise ValueError(
            "optimizer is SparseAdam, but the gradients of newborns are dense; give the session a "
            "second optimizer that trains the other parameters"
        )


def check_supported(optimizer: Optimizer) -> None:
    """Refuses an optimizer that newborns cannot be trained beside.

    Raises:
        ValueError: For a class that ``check_class`` refuses, and for one that cannot be made anew
            from a parameter group.
    """
    check_class(optimizer)
    for group in optimizer.param_groups:
        # Two axes: some optimizers take matrices only, and what they refuse is known per seed.
        _twin(optimizer, group, [nn.Parameter(torch.zeros(1, 1))])


def forget(
    optimizer: Optimizer, parameters: Iterable[nn.Parameter]
) -> dict[nn.Parameter, dict[str, object]]:
    """Takes parameters out of an optimizer, such as those of a seed that was folded.

    Args:
        optimizer: Any optimizer that keeps its state by parameter.
        parameters: The parameters; those that it does not train are passed over.

    Returns:
        What it kept for each of them.
    """
    gone = {id(parameter): parameter for parameter in parameters}
    for group in optimizer.param_groups:
        stay = [id(parameter) not in gone for parameter in group["params"]]
        for key in ("params", "param_names"):
            if key in group:
                group[key] = list(compress(group[key], stay))
    kept = [parameter for parameter in gone.values() if parameter in optimizer.state]
    return {parameter: optimizer.state.pop(parameter) for parameter in kept}


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
    """Optimizer of one seed between germination and fossilisation, or for good, see ``settle``.

    Args:
        parameters: The seed's parameters; at least one.
        optimizer: The user's optimizer, whose class and options are copied.
        group_index: Index of the user's group to follow.
        learning_rate_scale: Newborn learning rate over the group's present one.
        warmup_steps: Steps over which the learning rate rises linearly to its full value.
        names: Names of the parameters, for an optimizer that was made from named parameters.
        witnesses: Parameters of the slot's module, see ``GradientsAside``.
        scaler: The scaler of the user's loss; the newborn is stepped through it, as the user's
            optimizers are.
        max_gradient_norm: Most norm of the parameters' gradient at a step; ``None`` does not clip.

    Attributes:
        host_optimizer: The user's optimizer.

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
        witnesses: Iterable[nn.Parameter] = (),
        scaler: GradScaler | None = None,
        max_gradient_norm: float | None = None,
    ) -> None:
        self.host_optimizer = optimizer
        self._group_index = group_index
        self._learning_rate_scale = learning_rate_scale
        self._warmup_steps = warmup_steps
        self._num_steps = 0
        self._parameters = list(parameters)
        self._names = list(names)
        group = optimizer.param_groups[group_index]
        self._optimizer = _twin(optimizer, group, self._parameters)
        self._scaler = scaler
        self._max_gradient_norm = max_gradient_norm
        self._gradients = GradientsAside(self._parameters, witnesses)

    @property
    def learning_rate(self) -> float:
        """Learning rate that the next step will use."""
        group = self.host_optimizer.param_groups[self._group_index]
        progress = (self._num_steps + 1) / (self._warmup_steps + 1)
        return float(group["lr"]) * self._learning_rate_scale * min(1.0, progress)

    def misses_clipping(self) -> bool:
        """Returns whether the loop changes the host's gradients before its step, but not these.

        A scaler changes them too, so that beside one nothing can be said.
        """
        return (
            self._max_gradient_norm is None
            and self._scaler is None
            and self._gradients.host_was_changed()
        )

    def collect(self) -> list[nn.Parameter]:
        """Makes the gradients since the last step those of the parameters, which are returned."""
        self._gradients.put_back()
        return self._parameters

    def step(self) -> None:
        """Updates the parameters that have gradients, then clears all gradients."""
        if self._gradients.put_back():
            followed = _options(self.host_optimizer.param_groups[self._group_index])
            rate, theirs = self.learning_rate, followed["lr"]
            own = torch.full_like(theirs, rate) if isinstance(theirs, Tensor) else rate
            for group in self._optimizer.param_groups:
                group.update(followed, lr=own)
            if self._max_gradient_norm is not None:
                if self._scaler is not None:
                    self._scaler.unscale_(self._optimizer)
                nn.utils.clip_grad_norm_(self._parameters, self._max_gradient_norm)
            if self._scaler is None:
                self._optimizer.step()
            else:  # it unscales, and skips what has overflowed
                self._scaler.step(self._optimizer)
            self._num_steps += 1
        self._gradients.drop()

    def close(self) -> None:
        """Lets go of the parameters and their gradients."""
        self._gradients.drop()
        self._gradients.close()

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

    def settle(self) -> None:
        """Lets the parameters train on as members of the user's group would, but stay here.

        Where several processes train, the user's means of averaging gradients knows nothing of
        these parameters, and clipping by a norm that differs between ranks would tear the ranks
        apart; so they never join the user's optimizer.
        """
        self._learning_rate_scale = 1.0
        self._warmup_steps = 0

    def enter(self, state: OptimizerState, names: Mapping[nn.Parameter, str]) -> None:
        """Adds the parameters to a captured state of the user's optimizer, as if they graduated.

        Args:
            state: What was captured; changed.
            names: Names of the model's parameters.
        """
        own = optimizer_state.capture(self._optimizer, names)
        group = state.groups[self._group_index]
        group.parameters.extend(own.groups[0].parameters)
        if group.labels is not None:
            group.labels.extend(self._names)
        state.state.update(own.state)

    def take_out(self) -> None:
        """Takes the parameters, with what is kept for them, out of the user's optimizer."""
        for parameter, state in forget(self.host_optimizer, self._parameters).items():
            self._optimizer.state[parameter] = state

    def graduate(self) -> None:
        """Moves parameters and their state into the user's group; this object is then done."""
        self._gradients.put_back()
        self._gradients.close()
        group = self.host_optimizer.param_groups[self._group_index]
        group["params"].extend(self._parameters)
        if "param_names" in group:  # an optimizer made from named_parameters()
            group["param_names"].extend(self._names)
        for parameter in self._parameters:
            if parameter in self._optimizer.state:
                self.host_optimizer.state[parameter] = self._optimizer.state[parameter]


def _options(group: Mapping[str, object]) -> dict[str, object]:
    """What a parameter group says of how it is trained."""
    return {name: group[name] for name in group if name not in ("params", "param_names")}


def _twin(
    optimizer: Optimizer, group: Mapping[str, object], parameters: list[nn.Parameter]
) -> Optimizer:
    """Returns an optimizer of the same class, with a group's options, over other parameters."""
    kind: Callable[..., Optimizer] = type(optimizer)
    accepted = inspect.signature(kind).parameters
    group = _options(group)
    options = {name: value for name, value in group.items() if name in accepted}
    try:
        # As a group too: a class that takes **kwargs does not say what its options are.
        return kind([{**group, "params": parameters}], **options)
    except Exception as error:  # whatever a foreign constructor raises
        raise ValueError(
            f"optimizer is {type(optimizer).__name__}, but newborns need one of their own of this "
            f"class: {error}"
        ) from error
