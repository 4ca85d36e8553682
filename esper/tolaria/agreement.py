"""What all processes of a run must have in common, and how a run sees that they do.

The first process alone talks to the plane. What it is told is sent to the others once all are known
to be at the same step; each carries it out on its own copy of the model, and then they compare what
they have.
"""

import uuid
from collections.abc import Iterable
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor
from torch import distributed

from esper.kasmina import MorphableModel
from esper.tolaria.checkpoint import Checkpoint
from esper.tolaria.link import Advice
from esper.tolaria.ranks import Ranks
from esper.tolaria.ranks import RanksDisagreeError
from esper.tolaria.state import AdviceState

_PARAMETER = "parameter "


@dataclass(frozen=True, slots=True)
class _Step:
    value: int


@dataclass(frozen=True, slots=True)
class _Decided:
    failure: str | None
    advice: list[AdviceState]


@dataclass(frozen=True, slots=True)
class _Text:
    value: str


@dataclass(frozen=True, slots=True)
class _Structure:
    step: int
    lines: list[str]


def check_steps(step: int, ranks: Ranks) -> None:
    """Refuses ranks that are at different steps, so that what is decided belongs to one step.

    Args:
        step: Optimizer steps that this rank has taken.
        ranks: All processes.

    Raises:
        RanksDisagreeError: On every rank.
    """
    if not ranks.is_shared:
        return
    steps = [taken.value for taken in ranks.gather(_Step(step))]
    if len(set(steps)) > 1:
        raise RanksDisagreeError(
            f"the ranks have taken {steps} optimizer steps, but all must take as many in every "
            "epoch: give each the same number of batches"
        )


def shared_advice(
    advice: Sequence[Advice], failure: str | None, epoch: int, ranks: Ranks
) -> tuple[list[Advice], str | None]:
    """Returns the advice that rank 0 has taken, and why its plane is gone, on every rank.

    Args:
        advice: What rank 0 has taken; of others, nothing.
        failure: Why rank 0's plane is gone; None while it is there.
        epoch: The epoch that ends.
        ranks: All processes.
    """
    if not ranks.is_shared:
        return list(advice), failure
    mine = _Decided(failure, [AdviceState.of(item, epoch) for item in advice])
    decided = ranks.broadcast(mine)
    return [state.advice() for state in decided.advice], decided.failure


def shared_run(checkpoint: Checkpoint | None, ranks: Ranks) -> str:
    """Returns the id of the run, the same on every rank.

    Args:
        checkpoint: What the run goes on from; None for a new run.
        ranks: All processes.

    Raises:
        RanksDisagreeError: If the ranks go on from different checkpoints.
    """
    start = "the beginning"
    if checkpoint is not None:
        start = f"step {checkpoint.training.step} of run {checkpoint.record.run}"
    if ranks.differ(start):
        starts = [text.value for text in ranks.gather(_Text(start))]
        raise RanksDisagreeError(
            f"the ranks start from {', '.join(starts)}, but a run goes on from one checkpoint on "
            "all of them"
        )
    run = uuid.uuid4().hex if checkpoint is None else checkpoint.record.run
    return ranks.broadcast(_Text(run)).value


def mean(value: float | None, ranks: Ranks) -> float | None:
    """Returns the mean of a figure over the ranks; None unless all of them have measured it."""
    if not ranks.is_shared:
        return value
    total, count = ranks.sum([0.0 if value is None else value, float(value is not None)])
    return total / count if count == ranks.size else None


def share(tensors: Iterable[Tensor], ranks: Ranks) -> None:
    """Gives every rank the values that rank 0 has in some floating-point tensors.

    Args:
        tensors: The same ones on every rank, none of them sharded; others than floating-point ones
            are left out.
        ranks: All processes.
    """
    if ranks.is_shared:
        for tensor in tensors:
            if tensor.is_floating_point():
                distributed.broadcast(tensor.detach(), 0)


def check_structure(model: MorphableModel, step: int, ranks: Ranks) -> None:
    """Refuses models that have grown apart.

    Args:
        model: This rank's.
        step: Optimizer steps that this rank has taken.
        ranks: All processes.

    Raises:
        RanksDisagreeError: On every rank, naming the first parameter or seed that differs.
    """
    mine = _structure(model)
    if not ranks.differ("\n".join(mine)):
        return
    first, *others = ranks.gather(_Structure(step, mine))
    for rank, other in enumerate(others, start=1):
        apart = [line for line in first.lines if line not in other.lines]
        apart += [line for line in other.lines if line not in first.lines]
        for line in sorted(apart, key=lambda line: not line.startswith(_PARAMETER)):
            has, lacks = (0, rank) if line in first.lines else (rank, 0)
            raise RanksDisagreeError(
                f"after step {step} rank {has} has {line}, but rank {lacks} has not: the ranks do "
                "not hold the same model any more"
            )
    raise RanksDisagreeError(f"after step {step} the ranks hold their parameters in other orders")


def _structure(model: MorphableModel) -> list[str]:
    parameters = [
        f"{_PARAMETER}{name} {list(parameter.shape)} {str(parameter.dtype).removeprefix('torch.')}"
        for name, parameter in model.named_parameters()
    ]
    seeds = [
        f"{slot}[{seed}] in {model.seed_state(slot, seed).name}"
        for slot, layer in model.slots.items()
        for seed in range(layer.num_seeds)
    ]
    return parameters + seeds
