"""How far a host's output moves while a seed is brought in on a drift-controlled ramp.

A step is told by its profile: the mean and the root mean square of each feature over its tokens.
The reference is the profile of the ramp's first step, and from then on an exponential mean of all
of them, so that a host that has moved and rests is at rest. Drift is how far a step's profile is
from the reference, in direction and in length; both are 0 for a host that stands still, whatever
the seeds do, as it is the host's own output that is looked at.

Only the forward of a ramp pays for it: a pass over at most 511 tokens a call, without a wait for
the device; the numbers are read when the step ends.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

DEFAULT_TOLERANCE = 0.1
"""Drift, cosine and norm together, at which a ramp takes half a step in each step."""

_FOLLOW = 0.1  # share of each step's profile in the reference: a memory of about ten steps
_MANY_ROWS = 256  # calls of twice as many and more are thinned out

Profile = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class DriftState:
    """Where a meter stands.

    Attributes:
        sums: What was taken since the last step, float64 [2 width + 1].
        reference: The reference profile, float64 [2 width]; None before the first step.
    """

    sums: Tensor
    reference: Tensor | None


class DriftMeter:
    """Measures the drift of one slot.

    Args:
        width: Features of the slot's output.
        device: Where the slot computes.

    Attributes:
        sums: Sum and sum of squares of each feature and the number of tokens since the last step,
            float64 [2 width + 1]. Processes that train on parts of one batch add them up before
            they measure, and find the same drift.
    """

    def __init__(self, width: int, device: torch.device | None) -> None:
        self.sums = torch.zeros(2 * width + 1, dtype=torch.float64, device=device)
        self._reference: Profile | None = None

    def take(self, h: Tensor) -> None:
        """Takes in the host's output in one call; tokens without a finite length are left out.

        An exported program keeps nothing of it.

        Args:
            h: Features last, [..., width]; only read.
        """
        if torch.compiler.is_exporting():
            return
        if self.sums.device != h.device:
            self.sums = self.sums.to(h.device)
        with torch.no_grad():
            rows = (_thinned(h) if h.dim() > 1 else h[None]).detach().float()
            finite = torch.linalg.vector_norm(rows, dim=-1, keepdim=True).isfinite()
            rows = torch.where(finite, rows, 0.0)
            tokens = tuple(range(rows.dim() - 1))
            parts = (rows.sum(tokens), rows.square().sum(tokens), finite.sum()[None])
            self.sums.add_(torch.cat([part.double() for part in parts]))

    def measure(self) -> tuple[float, float] | None:
        """Ends a step.

        Returns:
            Drift in cosine, 0 to 2, and in norm, 0 to 1; None where the step had no finite output.
        """
        sums = self.sums.cpu().numpy().copy()
        self.sums.zero_()
        if sums[-1] == 0 or not np.isfinite(sums).all():
            return None
        means, squares = np.split(sums[:-1] / sums[-1], 2)
        profile = np.concatenate([means, np.sqrt(squares)])
        if self._reference is None:
            self._reference = profile
        drift = drift_between(profile, self._reference)
        self._reference = self._reference + _FOLLOW * (profile - self._reference)
        return drift

    def state(self) -> DriftState:
        """Returns where the meter stands; the sums are its own."""
        reference = self._reference
        return DriftState(self.sums, None if reference is None else torch.from_numpy(reference))

    def resume(self, state: DriftState | None) -> None:
        """Goes on from where a meter of the same slot stood; None starts anew."""
        self._reference = None
        if state is None:
            self.sums.zero_()
            return
        self.sums.copy_(state.sums)
        if state.reference is not None:
            self._reference = state.reference.numpy().copy()


def drift_between(profile: Profile, reference: Profile) -> tuple[float, float]:
    """Returns how far a profile is from the reference.

    Args:
        profile: [2 width].
        reference: [2 width].

    Returns:
        One minus the cosine of the angle between them, 0 to 2, as half the squared distance of the
        two at length 1, which is exact where they are equal; and how much shorter the shorter one
        is, as a share of the longer one's length, 0 to 1. A length of 0 has no direction.
    """
    lengths = [float(np.sqrt(np.square(vector).sum())) for vector in (profile, reference)]
    shorter, longer = sorted(lengths)
    if shorter == 0.0:
        return 0.0, 0.0 if longer == 0.0 else 1.0
    turned = profile / lengths[0] - reference / lengths[1]
    return 0.5 * float(np.square(turned).sum()), 1.0 - shorter / longer


def _thinned(h: Tensor) -> Tensor:
    """The tokens that are looked at: evenly spaced ones where there are many."""
    num_rows = h.numel() // h.shape[-1]
    stride = num_rows // _MANY_ROWS
    if stride < 2:
        return h
    if h.is_contiguous():
        return h.view(num_rows, -1)[::stride]
    index = torch.arange(0, num_rows, stride, device=h.device)
    return h[torch.unravel_index(index, h.shape[:-1])]
