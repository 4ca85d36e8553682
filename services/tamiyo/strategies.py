"""The named strategies of the growth recipe: when, where and when to stop."""

import hashlib
import math
from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import MutableSequence
from collections.abc import Sequence
from dataclasses import dataclass

from esper.common.v1 import kernel_pb2
from esper.common.v1 import signal_pb2
from esper.config import GrowthConfig
from esper.tamiyo.v1 import controller_pb2

_GAP_SCALE = 8.0
"""The gap between held-out and training loss, relative to the training loss, is multiplied by this
before it stretches the interval."""

_PLATEAU = 0.01
"""An epoch whose training loss falls by less than this share of it is on a plateau."""

_PARETO_TRIALS = 2
"""Trials, from the last one back, whose mean gain is what the next one promises."""


@dataclass(frozen=True, slots=True)
class Merit:
    """What speaks for a place.

    Attributes:
        value: What places are ordered by, higher first.
        ratio: Its score over the score's null.
        why: The same in words.
        reasons: Value and weight of every feature that counted, by name.
    """

    value: float
    ratio: float
    why: str
    reasons: Mapping[str, tuple[float, float]]


def note_trials(
    trials: Iterable[controller_pb2.TrialOutcome], gains: MutableSequence[float]
) -> None:
    """Appends what trials saved per million operations of a sample; a loss counts as nothing."""
    for trial in trials:
        if trial.flops_per_sample > 0:
            gains.append(max(0.0, trial.gain) / (trial.flops_per_sample / 1e6))


def reason_to_wait(
    config: GrowthConfig,
    observation: controller_pb2.Observation,
    *,
    num_live: int,
    last_germination: int | None,
    last_train_loss: float | None,
    gains: Sequence[float],
) -> str | None:
    """Returns why nothing may germinate after this epoch, or ``None`` where it may.

    Args:
        config: The recipe.
        observation: The epoch that has ended.
        num_live: Seeds under way.
        last_germination: Epoch of the last germination; ``None`` before the first.
        last_train_loss: Training loss of the epoch before; ``None`` where it was not measured.
        gains: Held-out loss saved per million operations of a sample, by trial.
    """
    epoch = observation.epoch
    if epoch < config.first_epoch:
        return f"epoch {epoch} is before the first growing epoch {config.first_epoch}"
    last = math.floor(observation.num_epochs * (1.0 - config.reserved_share)) - 1
    if epoch > last:
        return f"epoch {epoch} is in the last part of the run, which never grows"
    if num_live >= config.max_live:
        return f"{num_live} seeds are under way, at most {config.max_live} at a time"
    price = observation.budget.min_gain_per_mflop
    if config.stop == "pareto" and gains and price > 0:
        promise = sum(gains[-_PARETO_TRIALS:]) / len(gains[-_PARETO_TRIALS:])
        if promise < price:
            return (
                f"the next seed promises {promise:.3g} of held-out loss per million operations, "
                f"and the price is {price:.3g}"
            )
    if config.when == "plateau":
        if not (observation.HasField("train_loss") and last_train_loss is not None):
            return "the training loss of two epochs is not known, so neither is a plateau"
        if observation.train_loss < last_train_loss - _PLATEAU * abs(last_train_loss):
            return "the training loss still falls"
    if config.when == "periodic":
        interval = _interval(config, observation)
        if last_germination is not None and epoch - last_germination < interval:
            return f"the last germination was less than {interval} epochs ago"
    return None


def _interval(config: GrowthConfig, observation: controller_pb2.Observation) -> int:
    if not (observation.HasField("train_loss") and observation.HasField("held_out_loss")):
        return config.max_interval_epochs
    scale = max(abs(observation.train_loss), 1e-12)
    gap = _GAP_SCALE * (observation.held_out_loss - observation.train_loss) / scale
    if not math.isfinite(gap):  # a run that has diverged
        return config.max_interval_epochs
    stretched = config.max_interval_epochs / (1.0 + math.exp(min(4.0 - gap, 500.0)))
    return max(1, math.ceil(stretched))


def merit(
    config: GrowthConfig,
    epoch: int,
    signal: signal_pb2.HealthSignal,
    score: signal_pb2.GrowthScore,
    signature: kernel_pb2.KernelSignature,
) -> Merit | None:
    """Returns what speaks for a dormant chunk, or ``None`` where nothing does.

    Args:
        config: The recipe.
        epoch: The epoch that has ended.
        signal: The chunk.
        score: Its growth score for one source.
        signature: The place that it offers.
    """
    if config.where == "random":
        text = f"{config.seed}/{epoch}/{signal.slot}/{signal.seed}/{score.source}"
        digest = hashlib.sha256(text.encode()).digest()
        return Merit(int.from_bytes(digest[:7], "big") / 2**56, 1.0, "it was drawn", {})
    null = "null_score" if config.where == "residual" else "gradient_null_score"
    figure = "score" if config.where == "residual" else "gradient_score"
    if not score.HasField(null):  # a score without its null is not comparable
        return None
    value, null_value = getattr(score, figure), getattr(score, null)
    ratio = value / max(null_value, 1e-30)
    if ratio < config.min_score_ratio:
        return None
    excess = value**2 - null_value**2
    per_operation = excess / (signature.source_width + signature.chunk_width)
    return Merit(
        per_operation,
        ratio,
        f"its growth score is {ratio:.1f} times its null",
        {"growth_score": (value, per_operation), "null_score": (null_value, -1.0)},
    )
