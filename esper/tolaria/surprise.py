"""Whether a figure of training is still one of those that came before it.

One number is chosen, the rate of false alarms; everything else follows from the figures themselves.
A figure is compared with a slowly moving level, its *rise* over that with earlier rises: within
what has been seen by its rank (a conformal p-value, exact for exchangeable rises), beyond it by an
exponential tail whose scale is the mean excess of the highest eighth. Of logarithms that is a
Pareto tail of the figures (Weissman, JASA 73, 1978), and the bound allows for how few excesses the
scale was taken from: with little data nothing is surprising. p-values of figures in a row add up to
evidence as in a CUSUM of e-values (Shin, Ramdas and Rinaldo, 2024), which bounds how often sound
figures raise an alarm.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import field

_LEVEL = 15  # figures whose median is the level
_WINDOW = 256  # rises that a new one is compared with
_TAIL = 8  # one in so many of them tells how the tail falls off
_PATIENCE = 32  # so many suspicious figures without an alarm are a new level
_CALIBRATION = 0.2  # kappa of the e-value kappa * p ** (kappa - 1); any in (0, 1) is sound
_TINY = 1e-30  # stands for zero where logarithms are taken


@dataclass(frozen=True, slots=True)
class SurpriseState:
    """Where a ``Surprise`` stands.

    Attributes:
        level: The figures that make the level, oldest first.
        rises: The rises seen, oldest first.
        pending: Suspicious figures that have not been taken in.
        evidence: Logarithm of the evidence; 0 for none.
        plain: Whether figures are compared as they are, without logarithms.
        highest: The highest figure taken in, as it is compared; ``None`` for none yet.
    """

    level: list[float] = field(default_factory=list)
    rises: list[float] = field(default_factory=list)
    pending: list[float] = field(default_factory=list)
    evidence: float = 0.0
    plain: bool = False
    highest: float | None = None


class Surprise:
    """Watches one figure, such as the loss, for a rise that chance does not explain.

    Args:
        rate: Share of the figures of a sound run that may raise an alarm.
        forgives_return: Whether a figure below twice the highest that the run has had is never
            surprising. For gradients: their norm falls as a run converges, rises again by far
            with a new seed or a rare batch, and does no harm at a height that did none before.
    """

    def __init__(self, rate: float, *, forgives_return: bool = False) -> None:
        self._forgives_return = forgives_return
        self._highest: float | None = None
        self._limit = -math.log(rate)
        self._level: list[float] = []
        self._rises: list[float] = []
        self._pending: list[float] = []
        self._evidence = self._middle = 0.0
        self._plain = False

    @property
    def suspicious(self) -> bool:
        """Whether the last figures are unlikely, though not enough for an alarm."""
        return bool(self._pending)

    @property
    def usual(self) -> float | None:
        """The level in the figure's own units; ``None`` before the first."""
        if not self._level:
            return None
        return self._middle if self._plain else math.exp(self._middle)

    def observe(self, figure: float) -> bool:
        """Takes in a finite figure.

        Returns:
            Whether it raises the alarm; neither it nor what led up to it is taken in then.
        """
        if figure < 0 and not self._plain:
            self.resume(SurpriseState(plain=True))
        value = figure if self._plain else math.log(max(figure, _TINY))
        p_value = self._p_value(value - self._middle) if self._matters(value) else 1.0
        gain = math.log(_CALIBRATION) + (_CALIBRATION - 1) * math.log(p_value)
        self._evidence = max(0.0, self._evidence + gain)
        if self._evidence >= self._limit:
            self._pending, self._evidence = [], 0.0
            return True
        self._pending.append(value)
        if self._evidence == 0.0 or len(self._pending) >= _PATIENCE:
            self._take_in()
        return False

    def state(self) -> SurpriseState:
        """Returns where it stands."""
        return SurpriseState(
            list(self._level),
            list(self._rises),
            list(self._pending),
            self._evidence,
            self._plain,
            self._highest,
        )

    def resume(self, state: SurpriseState) -> None:
        """Goes on from where another stood."""
        self._level, self._rises = list(state.level), list(state.rises)
        self._pending, self._evidence = list(state.pending), state.evidence
        self._plain, self._highest = state.plain, state.highest
        self._middle = _median(self._level) if self._level else 0.0

    def _matters(self, value: float) -> bool:
        """Whether it is at least twice the usual: less harms nobody, however unlikely."""
        if self._highest is None:
            return False
        usual = self._highest if self._forgives_return else self._middle
        return value - usual >= (abs(usual) if self._plain else math.log(2.0))

    def _p_value(self, rise: float) -> float:
        ordered = sorted(self._rises)
        num_tail = len(ordered) // _TAIL
        if num_tail > 0:
            threshold = ordered[-num_tail - 1]
            p_value = num_tail / len(ordered)
            excesses = sum(ordered[-num_tail:]) - num_tail * threshold
            if rise > threshold and excesses > 0:
                return max(_TINY, p_value * beyond(rise - threshold, num_tail, excesses))
        return (1 + sum(other >= rise for other in ordered)) / (len(ordered) + 1)

    def _take_in(self) -> None:
        for value in self._pending:
            if self._level:
                self._rises.append(value - self._middle)
            self._level.append(value)
            if self._highest is None or value > self._highest:
                self._highest = value
            del self._level[:-_LEVEL]
            self._middle = _median(self._level)
        del self._rises[:-_WINDOW]
        self._pending, self._evidence = [], 0.0


def beyond(excess: float, num_seen: int, total: float) -> float:
    """Returns the probability that the next exponential excess is larger than a given one.

    Args:
        excess: The given one; at least 0.
        num_seen: Excesses of unknown scale that were seen.
        total: Their sum; above 0.
    """
    return math.exp(-num_seen * math.log1p(excess / total))


def collapsed(losses: Sequence[float], rate: float) -> bool:
    """Returns whether the last of an epoch's held-out losses is a collapse.

    The changes of the logarithm from one measurement to the next are taken as exponential in size.

    Args:
        losses: Mean held-out losses in order; the last is judged.
        rate: Share of sound measurements that may be taken for a collapse.
    """
    if len(losses) < 3 or losses[-1] < losses[-2] + abs(losses[-2]):
        return False
    recent = losses[-_LEVEL - 2 :]
    if min(recent) > 0:
        recent = [math.log(loss) for loss in recent]
    changes = [abs(after - before) for before, after in zip(recent, recent[1:], strict=False)]
    total = sum(changes[:-1])
    return total > 0 and beyond(changes[-1], len(changes) - 1, total) < rate


def _median(values: Sequence[float]) -> float:
    ordered = sorted(values)
    middle = len(ordered) // 2
    if len(ordered) % 2:
        return ordered[middle]
    return (ordered[middle - 1] + ordered[middle]) / 2
