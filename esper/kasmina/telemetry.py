"""What one slot has shown on sampled steps since it was last asked.

Chunk statistics come from the operator's own pass and merge natively without cancellation; sums of
squared gradients stay on the device until the epoch ends, so that sampling costs no
synchronisation.
"""

import math
from collections.abc import Iterable
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch import nn
from torch.utils.hooks import RemovableHandle

from esper import _C
from esper.common.v1 import signal_pb2
from esper.kasmina.growth import GrowthProbe
from esper.kasmina.growth import ProbeState
from esper.kasmina.ops import NUM_STATS
from esper.kasmina.ops import SeedPlan
from esper.kasmina.ops import slot_forward
from esper.kasmina.reference import Energy

Bounds = tuple[int, int]

_COLUMN = {name: index for index, name in enumerate(_C.STATS_COLUMNS)}
_MAX_PENDING = 64  # small tensors kept on the device before they are merged


@dataclass(slots=True)
class _SquareSum:
    """A running sum of squares over sampled steps, on the device."""

    total: Tensor | None = None
    count: int = 0

    def add(self, value: Tensor, count: int) -> None:
        self.total = value if self.total is None else self.total + value
        self.count += count

    def root_mean(self) -> float | None:
        """Root of the mean square; None where nothing was added or it is not finite."""
        if self.total is None or self.count == 0:
            return None
        return _finite(math.sqrt(float(self.total) / self.count))


@dataclass(frozen=True, slots=True)
class TelemetryState:
    """What a slot has shown since it was last asked.

    Attributes:
        stats: Statistics of the chunks, float64 [seeds, len(STATS_COLUMNS)].
        output_gradient: Sum of squares (float64, shape []) and count by seed; None for no sum.
        weight_gradient: The same of the seeds' own parameters.
        computed: Whether each seed took part in a sampled forward.
        growth: What its growth probe has gathered; None where there is none.
    """

    stats: Tensor
    output_gradient: list[tuple[Tensor | None, int]]
    weight_gradient: list[tuple[Tensor | None, int]]
    computed: list[bool]
    growth: ProbeState | None


class SlotTelemetry:
    """Accumulators of one slot.

    Args:
        bounds: Half-open column range of each seed's chunk.
    """

    def __init__(self, bounds: Sequence[Bounds]) -> None:
        self._bounds = tuple(bounds)
        self.growth: GrowthProbe | None = None
        self.last_growth: GrowthProbe | None = None  # as it was drained last
        self._reset()

    def __deepcopy__(self, memo: dict[int, object]) -> "SlotTelemetry":
        # A copied model has shown nothing yet.
        return SlotTelemetry(self._bounds)

    def _reset(self) -> None:
        num_seeds = len(self._bounds)
        self._stats = np.zeros((num_seeds, NUM_STATS))
        self._pending: list[tuple[tuple[int, ...], Tensor]] = []
        self._output_gradient = [_SquareSum() for _ in range(num_seeds)]
        self._weight_gradient = [_SquareSum() for _ in range(num_seeds)]
        self._watches: list[dict[int, RemovableHandle]] = [{} for _ in range(num_seeds)]
        self._computed = [False] * num_seeds

    def state(self) -> TelemetryState:
        """Returns what was measured; call it between steps, when no gradient is awaited."""
        self._merge_pending()
        return TelemetryState(
            torch.from_numpy(self._stats.copy()),
            [(total.total, total.count) for total in self._output_gradient],
            [(total.total, total.count) for total in self._weight_gradient],
            list(self._computed),
            None if self.growth is None else self.growth.state(),
        )

    def resume(self, state: TelemetryState, growth: GrowthProbe | None) -> None:
        """Goes on from what a slot of the same place had measured.

        Args:
            state: What ``state`` returned there.
            growth: A probe for the chunks of its probe; None where it had none.
        """
        self._reset()
        self._stats[:] = state.stats.numpy()
        self._output_gradient = [_SquareSum(*total) for total in state.output_gradient]
        self._weight_gradient = [_SquareSum(*total) for total in state.weight_gradient]
        self._computed = list(state.computed)
        self.growth = growth
        if growth is not None and state.growth is not None:
            growth.resume(state.growth)

    def forget(self, seed: int) -> None:
        """Drops what belongs to a kernel that has left its seed."""
        self._merge_pending()
        for name in ("nonfinite_rows", "g_energy"):
            self._stats[seed, _COLUMN[name]] = 0.0
        self._weight_gradient[seed] = _SquareSum()
        self._computed[seed] = False

    def add_stats(self, seeds: Sequence[int], rows: Tensor) -> None:
        """Takes in the operator's statistics of seeds that computed.

        Args:
            seeds: Seeds in the order of the rows.
            rows: [len(seeds), len(STATS_COLUMNS)] in float64.
        """
        self._add_rows(seeds, rows)

    def mark_computed(self, seed: int) -> None:
        """Notes that a seed took part in a sampled forward."""
        self._computed[seed] = True

    def add_energy(self, seed: int, energy: Energy) -> None:
        """Takes in what a seed of the reference path measured of itself."""
        rows = torch.zeros(1, NUM_STATS, dtype=torch.float64, device=energy.g_energy.device)
        rows[0, _COLUMN["nonfinite_rows"]] = energy.nonfinite_rows
        rows[0, _COLUMN["g_energy"]] = energy.g_energy
        self._add_rows([seed], rows)

    def add_idle(self, seeds: Sequence[int], h: Tensor) -> None:
        """Measures the chunks of seeds that the operator did not compute.

        Args:
            seeds: Their indices, in ascending order.
            h: The slot's own output, features last, [..., D].
        """
        if not seeds or h.numel() == 0:
            return
        # A seed whose function is zero: the operator's statistics have one definition.
        plan: list[int] = []
        params: list[Tensor] = []
        for seed in seeds:
            begin, end = self._bounds[seed]
            plan += SeedPlan(0, begin, end - begin, "output", "affine", len(params)).pack()
            params.append(torch.zeros(end - begin, dtype=h.dtype, device=h.device))
        with torch.no_grad():
            _, rows = slot_forward(h.detach(), None, params, torch.zeros(1, 3), plan, True)
        for name in ("nonfinite_rows", "g_energy"):  # of the stand-in, not of the seed
            rows[:, _COLUMN[name]] = 0.0
        self._add_rows(seeds, rows)

    def _add_rows(self, seeds: Sequence[int], rows: Tensor) -> None:
        self._pending.append((tuple(seeds), rows))
        if len(self._pending) >= _MAX_PENDING or rows.device.type == "cpu":
            self._merge_pending()

    def _merge_pending(self) -> None:
        for seeds, rows in self._pending:
            measured = np.zeros_like(self._stats)
            measured[list(seeds)] = rows.cpu().numpy()
            _C.merge_stats(self._stats, measured)
        self._pending.clear()

    def add_output_gradient(self, dy: Tensor) -> None:
        """Takes in dL/dy of one sampled forward, features last, [..., D]."""
        rows = dy.detach().reshape(-1, dy.shape[-1])
        if len(rows) == 0:
            return
        squares_D = rows.square().sum(dim=0, dtype=torch.float64)
        for (begin, end), total in zip(self._bounds, self._output_gradient, strict=True):
            total.add(squares_D[begin:end].sum(), len(rows) * (end - begin))

    def watch_weights(self, seed: int, parameters: Iterable[nn.Parameter]) -> None:
        """Measures the parameters' gradients once, as soon as the coming backward has them."""
        watches = self._watches[seed]
        for handle in watches.values():  # of a sampled forward that was never differentiated
            handle.remove()
        watches.clear()
        total = self._weight_gradient[seed]
        steps = 1

        def measure(parameter: Tensor) -> None:
            nonlocal steps
            watches.pop(id(parameter)).remove()
            if parameter.grad is not None:
                total.add(parameter.grad.detach().double().square().sum(), steps)
                steps = 0

        for parameter in parameters:
            if parameter.requires_grad:
                watches[id(parameter)] = parameter.register_post_accumulate_grad_hook(measure)

    def drain(self) -> list[signal_pb2.HealthSignal]:
        """Returns what was measured of each chunk, and starts anew.

        Returns:
            One message a seed with the measured fields alone.
        """
        self._merge_pending()
        scores = {} if self.growth is None else self.growth.scores()
        signals = [self._measured(seed) for seed in range(len(self._bounds))]
        for seed, found in scores.items():
            for score in found:
                if not math.isfinite(score.score):
                    continue
                message = signals[seed].growth_scores.add(source=score.source, score=score.score)
                _set(message, "null_score", _finite(score.null_score))
                _set(message, "gradient_score", _finite(score.gradient_score))
                _set(message, "gradient_null_score", _finite(score.gradient_null_score))
        self.last_growth = self.growth
        self.growth = None
        self._reset()
        return signals

    def _measured(self, seed: int) -> signal_pb2.HealthSignal:
        row = dict(zip(_C.STATS_COLUMNS, self._stats[seed].tolist(), strict=True))
        signal = signal_pb2.HealthSignal()
        if row["count"] > 0:
            signal.num_samples = int(row["count"])
            _set(signal, "mean", _finite(row["mean"]))
            _set(signal, "variance", _finite(row["m2"] / row["count"]))
            signal.dead_ratio = row["dead"] / row["count"]
            if row["m2"] > 0:
                _set(signal, "correlation", _finite(row["neighbour_cov"] / row["m2"]))
        if self._computed[seed]:
            signal.num_nonfinite_rows = int(row["nonfinite_rows"])
            if row["h_energy"] > 0:
                _set(signal, "relative_energy", _finite(row["g_energy"] / row["h_energy"]))
        _set(signal, "output_gradient_norm", self._output_gradient[seed].root_mean())
        _set(signal, "weight_gradient_norm", self._weight_gradient[seed].root_mean())
        return signal


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _set(
    message: signal_pb2.HealthSignal | signal_pb2.GrowthScore, field: str, value: float | None
) -> None:
    """Sets an optional field; what was not measured, or cannot be told, stays absent."""
    if value is not None:
        setattr(message, field, value)
