"""What processes that train on parts of the same batches have measured, as one measurement.

The loss of the whole batch is the mean of the processes' losses, so each process sees gradients
that are as many times too large as there are processes. Statistics of values are merged natively
without cancellation.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from esper import _C
from esper.kasmina.growth import ProbeState
from esper.kasmina.telemetry import TelemetryState


def pooled(states: Sequence[TelemetryState]) -> TelemetryState:
    """Merges what one slot has shown in several processes.

    The squares of a seed's own gradients are averaged: theirs is the gradient of each process's
    part, which is at least as large as that of the whole batch.

    Args:
        states: One for each process; at least one.
    """
    num_parts = len(states)
    stats = states[0].stats.clone().numpy()
    for state in states[1:]:
        _C.merge_stats(stats, state.stats.numpy())
    squares = [s.gradient_squares_D for s in states if s.gradient_squares_D is not None]
    weight_gradient: list[tuple[Tensor | None, int]] = []
    for seed in range(len(states[0].weight_gradient)):
        parts = [state.weight_gradient[seed] for state in states]
        totals = [total for total, _ in parts if total is not None]
        count = sum(count for _, count in parts)
        weight_gradient.append((_sum(totals) if totals else None, count))
    return TelemetryState(
        torch.from_numpy(stats),
        _sum(squares) / num_parts**2 if squares else None,
        sum(state.num_gradient_rows for state in states),
        weight_gradient,
        [any(seen) for seen in zip(*(state.computed for state in states), strict=True)],
        _pooled_probe([state.growth for state in states if state.growth is not None], num_parts),
    )


def _pooled_probe(states: Sequence[ProbeState], num_parts: int) -> ProbeState | None:
    if not states:
        return None
    states = [state for state in states if state.dormant == states[0].dormant]
    return ProbeState(
        states[0].dormant,
        _sum([state.gram_GBB for state in states]),
        _sum([state.input_DB for state in states]) / num_parts,
        _sum([state.output_GWB for state in states]) / num_parts,
        _sum([state.energy_D for state in states]) / num_parts**2,
        torch.stack([state.num_steps for state in states]).amax(dim=0),
        max(state.last_step for state in states),
    )


def _sum(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(tensors)).sum(dim=0)
