"""Held-out evaluation: per-sample losses and the paired accept test.

A graft is kept only if held-out data says that the model is better with it than without it. Both
losses come from the same model, the same samples and the same moment; only the seed's alpha
differs. The samples are paired, so the variance between samples cancels.
"""

import math
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest

import torch
from torch import Tensor
from torch import nn

from esper.common.sharding import reshard
from esper.kasmina.modes import evaluating
from esper.tolaria.randomness import forked
from esper.tolaria.ranks import ALONE
from esper.tolaria.ranks import Ranks

Batch = object
SampleLoss = Callable[[nn.Module, Batch], Tensor]
"""Maps (model, batch) to the losses of the batch's samples, shape [samples]."""


@dataclass(frozen=True, slots=True)
class _Part:
    """What one rank has measured: the losses of every so-manieth batch."""

    num_batches: int  # of all ranks
    losses: list[Tensor]  # [measurements, samples] each


def sample_losses(
    model: nn.Module, batches: Iterable[Batch], loss: SampleLoss, ranks: Ranks = ALONE
) -> Tensor:
    """Returns the loss of every held-out sample, without a trace in the model.

    Runs in eval mode without gradients; training mode and the global random states (which a
    DataLoader draws from even when it does not shuffle) are restored.

    Args:
        model: Any module that ``loss`` can call.
        batches: Held-out batches; iterated once.
        loss: Per-sample loss.
        ranks: Who shares the work: the ranks take turns with the batches, which must be the same
            on all of them. Every rank returns all losses.

    Returns:
        Losses in the order of the samples, float64, shape [samples].

    Raises:
        ValueError: If ``loss`` does not return one loss per sample, there is no sample, or the
            ranks have different numbers of batches.
    """

    def measure(batch: Batch) -> Tensor:
        return batch_losses(model, batch, loss)[None]

    return measured_in_turns(model, batches, measure, ranks)[0]


def measured_in_turns(
    model: nn.Module,
    batches: Iterable[Batch],
    measure: Callable[[Batch], Tensor],
    ranks: Ranks = ALONE,
) -> Tensor:
    """Returns what is measured of every held-out sample, without a trace in the model.

    Args:
        model: The module that is measured, in eval mode and without gradients.
        batches: Held-out batches; iterated once.
        measure: Maps a batch to figures of its samples, shape [measurements, samples].
        ranks: See ``sample_losses``.

    Returns:
        The figures in the order of the samples, shape [measurements, samples], on every rank.

    Raises:
        ValueError: As ``sample_losses``.
    """
    number, batch = -1, None
    figures: list[Tensor] = []
    with forked(), evaluating(model):
        for number, batch in enumerate(batches):
            if number % ranks.size == ranks.rank:
                figures.append(measure(batch))
        idle = -(number + 1) % ranks.size  # ranks that have no batch in the last round
        if ranks.rank >= ranks.size - idle:
            measure(batch)  # a sharded model computes on all ranks or on none
    reshard(model)
    figures = _in_turns(ranks.gather(_Part(number + 1, figures)))
    if sum(values.shape[1] for values in figures) == 0:
        raise ValueError("held_out has 0 samples, but the accept test needs at least 2")
    return torch.cat(figures, dim=1)


def batch_losses(model: nn.Module, batch: Batch, loss: SampleLoss) -> Tensor:
    """Returns the losses of a batch's samples, float64 on the CPU, shape [samples].

    Raises:
        ValueError: If ``loss`` does not return one loss per sample.
    """
    values = loss(model, batch)
    if values.dim() != 1:
        raise ValueError(
            f"loss returned shape {tuple(values.shape)}, but it must return one loss "
            "per sample, shape [samples] (use reduction='none')"
        )
    return values.double().cpu()


def _in_turns(parts: Sequence[_Part]) -> list[Tensor]:
    """Puts the losses of all batches back into the order of the batches."""
    counts = [part.num_batches for part in parts]
    if len(set(counts)) > 1:
        raise ValueError(
            f"held_out has {counts} batches on the ranks, but it must be the same on all of them: "
            "the session shares the work out itself"
        )
    turns = zip_longest(*(part.losses for part in parts))
    return [losses for turn in turns for losses in turn if losses is not None]


@dataclass(frozen=True, slots=True)
class Trial:
    """Outcome of one held-out accept test.

    Attributes:
        accepted: Whether the seed is kept.
        gain: Mean loss without the seed minus mean loss with it.
        low: Lower end of the gain's 95 percent confidence interval.
        high: Upper end of it.
        p_value: One-sided p value of the paired t test that the gain exceeds the price.
        level: Level that the p value was compared with.
        price: Loss that the seed's cost had to buy.
        num_samples: Number of held-out samples.
    """

    accepted: bool
    gain: float
    low: float
    high: float
    p_value: float
    level: float
    price: float
    num_samples: int

    def describe(self) -> str:
        """Returns the verdict as a sentence."""
        verdict = "kept" if self.accepted else "refused"
        return (
            f"{verdict}: held-out gain {self.gain:+.4f} [{self.low:+.4f}, {self.high:+.4f}] on "
            f"{self.num_samples} samples, p {self.p_value:.2g} against level {self.level:.2g}"
        )


def trial_level(significance: float, trial_number: int) -> float:
    """Returns the level of a trial, so that all levels of a run add up to ``significance``.

    One held-out set serves all trials of a run. The levels fall as 1/k^2 (a Bonferroni
    correction over an endless sequence: the sum of 6 / (pi k)^2 is 1), so the chance of keeping
    even one useless seed stays below ``significance``, however many trials there are. A trial that
    is passed hands its level on to the next one (the fallback procedure of Wiens, Pharmaceutical
    Statistics 2, 2003, which keeps that chance), so only those that are not passed are counted.

    Args:
        significance: Level over the whole run, above 0 and below 1.
        trial_number: k: one more than the trials of the run that were not passed.
    """
    return significance * 6.0 / (math.pi * trial_number) ** 2


def paired_trial(
    with_seed: Tensor, without_seed: Tensor, *, level: float, price: float = 0.0
) -> Trial:
    """Tests whether a seed lowers the held-out loss by more than its price.

    Args:
        with_seed: Losses with the seed at work, shape [samples].
        without_seed: Losses of the same samples with the seed's alpha at 0, shape [samples].
        level: Level of the one-sided paired t test.
        price: Loss that the seed must save to pay for its cost.

    Returns:
        The outcome. A trial with a non-finite loss, or without any difference between the two,
        is refused: what is not measured is not healthy.

    Raises:
        ValueError: If the shapes differ or there are fewer than 2 samples.
    """
    from scipy import stats  # imported late: it takes longer than a small training run

    num_samples = len(with_seed)
    if with_seed.shape != without_seed.shape or with_seed.dim() != 1:
        raise ValueError(
            f"with_seed has shape {tuple(with_seed.shape)} and without_seed "
            f"{tuple(without_seed.shape)}, but both must be [samples]"
        )
    if num_samples < 2:
        raise ValueError(f"num_samples is {num_samples}, but a paired test needs at least 2")
    saved = without_seed.double() - with_seed.double()
    gain = float(saved.mean())
    if not bool(torch.isfinite(saved).all()) or bool((saved == saved[0]).all()):
        return Trial(False, gain, gain, gain, 1.0, level, price, num_samples)
    error = float(saved.std(correction=1)) / math.sqrt(num_samples)
    freedom = num_samples - 1
    half_width = float(stats.t.ppf(0.975, freedom)) * error
    p_value = float(stats.t.sf((gain - price) / error, freedom))
    return Trial(
        p_value < level,
        gain,
        gain - half_width,
        gain + half_width,
        p_value,
        level,
        price,
        num_samples,
    )
