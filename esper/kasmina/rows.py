"""Which token rows of a forward are looked at: few, drawn evenly, and the same wherever it matters.

A regular stride would see the same positions of every sequence, so each row is drawn at random from
a stretch of its own. The draw is a function of the step alone and moves no other random state.
"""

from dataclasses import dataclass
from dataclasses import field

import torch
from torch import Tensor

MAX_ROWS = 128
"""Most rows of one call that are looked at; of more, this many are drawn."""


@dataclass(frozen=True, slots=True)
class RowSample:
    """Rows of the outputs of one call.

    Attributes:
        index: Numbers of the rows, int64 [n] on the tensors' device; None for all rows.
        scale: How many rows each sampled one stands for.
    """

    index: Tensor | None
    scale: float

    def take(self, tensor: Tensor) -> Tensor:
        """Returns the sampled rows, [n, D]; on the CPU 16-bit elements become float32.

        They may share memory with ``tensor``, where later layers may write in place: use them at
        once.

        Args:
            tensor: [..., D] in any layout.
        """
        tensor = tensor.detach()
        if tensor.device.type == "cpu":
            rows_ND: Tensor = torch.ops.esper.take_rows.default(tensor, self.index)
            return rows_ND
        if self.index is None:
            return tensor.reshape(-1, tensor.shape[-1])
        if tensor.is_contiguous():
            return tensor.view(-1, tensor.shape[-1]).index_select(0, self.index)
        return tensor[torch.unravel_index(self.index, tensor.shape[:-1])]


@dataclass(slots=True)
class SampledStep:
    """One training forward in which some slots are sampled.

    Attributes:
        number: Number of the forward, so that a module used twice in it counts as one step.
    """

    number: int
    _drawn: dict[tuple[int, torch.device], RowSample] = field(default_factory=dict)

    def rows(self, tensor: Tensor) -> RowSample:
        """Returns the rows to look at in tensors of as many rows, [..., D], on the same device."""
        num_rows = tensor.numel() // tensor.shape[-1]
        if num_rows <= MAX_ROWS:
            return RowSample(None, 1.0)
        key = (num_rows, tensor.device)
        if key not in self._drawn:
            index = torch.ops.esper.draw_rows.default(num_rows, MAX_ROWS, self.number)
            index = index.to(tensor.device, non_blocking=True)
            self._drawn[key] = RowSample(index, num_rows / MAX_ROWS)
        return self._drawn[key]
