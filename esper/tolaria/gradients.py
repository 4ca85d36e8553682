"""Keeps the gradients of a newborn seed apart from those of the host between backward and step.

What a user does to gradients in between (``clip_grad_norm_(model.parameters(), ...)``,
``GradScaler.unscale_``, looking at norms) must mean the host alone: a newborn in the sum would
shrink the host's update. So at the end of each backward the newborn's gradients are laid aside,
``parameter.grad`` is ``None`` again, and right before the newborn's own step they are put back.

A batch that is given up after its backward (an overflow that a ``GradScaler`` skips, a closure that
is evaluated again) must be forgotten. What says so is the host: in a backward the parameters of the
slot's own module get their gradients after its seeds do, so where they have none as the seed's
gradient arrives, the user has cleared them since the last backward.

What the user does to the host's gradients is not done to the newborn's. That it was done is seen by
torch's count of changes in place, so that nobody has to find out by a newborn that explodes.
"""

from collections.abc import Iterable
from collections.abc import Sequence

import torch
from torch import Tensor
from torch import nn
from torch.autograd import Variable


class GradientsAside:
    """The gradients of one newborn seed.

    Args:
        parameters: The newborn's parameters.
        witnesses: Parameters of the module that its slot sits on. Without a trainable one, batches
            that are given up cannot be told from accumulation.
    """

    def __init__(
        self, parameters: Sequence[nn.Parameter], witnesses: Iterable[nn.Parameter]
    ) -> None:
        self._parameters = parameters
        self._witnesses = [parameter for parameter in witnesses if parameter.requires_grad]
        self._aside: dict[nn.Parameter, Tensor] = {}
        self._arriving = False
        self._arrived: tuple[int, int] | None = None  # a witness's gradient: which, and its version
        self._hooks = [parameter.register_hook(self._arrive) for parameter in parameters]

    def host_was_changed(self) -> bool:
        """Returns whether the host's gradients were changed in place since the last backward."""
        now = self._version()
        if now is None or self._arrived is None:
            return False
        return now[0] == self._arrived[0] and now[1] != self._arrived[1]

    def put_back(self) -> bool:
        """Makes the gradients so far those of the parameters.

        Returns:
            Whether there is any.
        """
        self._lay_aside()
        for parameter, gradient in self._aside.items():
            parameter.grad = gradient
        self._aside = {}
        return any(parameter.grad is not None for parameter in self._parameters)

    def drop(self) -> None:
        """Forgets the gradients."""
        self._aside = {}
        for parameter in self._parameters:
            parameter.grad = None

    def close(self) -> None:
        """Leaves the gradients of further backwards to the parameters."""
        for hook in self._hooks:
            hook.remove()

    def _arrive(self, gradient: Tensor) -> None:
        if self._arriving:
            return
        self._arriving = True
        if self._aside and self._witnesses and not any(map(_has_gradient, self._witnesses)):
            self._aside = {}
        # Twice: after what others, such as DistributedDataParallel, do at the end of the backward.
        engine = Variable._execution_engine
        engine.queue_callback(lambda: engine.queue_callback(self._end_backward))

    def _end_backward(self) -> None:
        self._lay_aside()
        self._arrived = self._version()

    def _version(self) -> tuple[int, int] | None:
        for witness in self._witnesses:
            if witness.grad is not None:
                return id(witness.grad), witness.grad._version
        return None

    def _lay_aside(self) -> None:
        self._arriving = False
        for parameter in self._parameters:
            if parameter.grad is None:
                continue
            before = self._aside.get(parameter)
            with torch.no_grad():
                total = parameter.grad if before is None else before.add_(parameter.grad)
            self._aside[parameter] = total
            parameter.grad = None


def _has_gradient(parameter: nn.Parameter) -> bool:
    """Whether a parameter has a gradient that was not cleared, by ``None`` or by zeros."""
    return parameter.grad is not None and bool(parameter.grad.any())
