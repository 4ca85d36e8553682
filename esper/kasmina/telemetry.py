"""What one slot has shown on sampled steps since it was last asked.

Seeds that compute are measured by the operator's own pass over every row; everything else looks at
a bounded sample of rows, so that its cost does not grow with the batch. Statistics merge natively
without cancellation; sums over gradients stay on the device until the epoch ends, so that sampling
costs no synchronisation.
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
from esper.kasmina.growth import PendingScores
from esper.kasmina.growth import ProbeState
from esper.kasmina.ops import NUM_STATS
from esper.kasmina.ops import SeedPlan
from esper.kasmina.ops import slot_forward
from esper.kasmina.outputs import features_last
from esper.kasmina.reference import Energy
from esper.kasmina.rows import RowSample
from esper.kasmina.rows import SampledStep

Bounds = tuple[int, int]

_COLUMN = {name: index for index, name in enumerate(_C.STATS_COLUMNS)}
_OF_THE_SEED = slice(_COLUMN["nonfinite_rows"], _COLUMN["g_energy"] + 1)
_MAX_IDLE_ROWS = 64  # rows of a call whose statistics are taken where no seed computes
_NO_ALPHA = torch.zeros(1, 3)
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
        gradient_squares_D: Sum of squares of dL/dy by feature; None where it was not seen.
        num_gradient_rows: Rows in that sum.
        weight_gradient: Sum of squares (float64, shape []) and count of the seeds' own parameters'
            gradients, by seed; None for no sum.
        computed: Whether each seed took part in a sampled forward.
        growth: What its growth probe has gathered; None where there is none.
    """

    stats: Tensor
    gradient_squares_D: Tensor | None
    num_gradient_rows: int
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
        self.last_growth: GrowthProbe | None = None  # as it was drained last
        self._idle: tuple[int, ...] = ()
        self._idle_plan: list[int] = []
        self._idle_params: list[Tensor] = []
        self._reset()

    def __deepcopy__(self, memo: dict[int, object]) -> "SlotTelemetry":
        # A copied model has shown nothing yet.
        return SlotTelemetry(self._bounds)

    def _reset(self) -> None:
        num_seeds = len(self._bounds)
        self._stats = np.zeros((num_seeds, NUM_STATS))
        self._pending: list[tuple[tuple[int, ...], Tensor]] = []
        self.growth: GrowthProbe | None = None
        self._gradient_squares_D: Tensor | None = None
        self._num_gradient_rows = 0
        self._weight_gradient = [_SquareSum() for _ in range(num_seeds)]
        self._watches: list[dict[int, RemovableHandle]] = [{} for _ in range(num_seeds)]
        self._computed = [False] * num_seeds

    def state(self) -> TelemetryState:
        """Returns what was measured; call it between steps, when no gradient is awaited."""
        self._merge_pending()
        return TelemetryState(
            torch.from_numpy(self._stats.copy()),
            self._gradient_squares_D,
            self._num_gradient_rows,
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
        if state.gradient_squares_D is not None:
            self._gradient_squares_D = state.gradient_squares_D.clone()
        self._num_gradient_rows = state.num_gradient_rows
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

    def observe(
        self, step: SampledStep, h: Tensor, x: Tensor | None, idle: tuple[int, ...]
    ) -> "Observation | None":
        """Takes in one sampled forward; looks at a sample of its rows and changes no tensor.

        Args:
            step: The forward.
            h: The slot's own output, features last, [..., D].
            x: Its input, [..., X] with the rows of h; None where no seed can read it.
            idle: Seeds that the operator did not compute, in ascending order.

        Returns:
            What takes in the gradient; None where there are no rows.
        """
        if h.numel() == 0:
            return None
        rows = step.rows(h)
        if h.device.type == "cpu":  # native operators know of neither gradients nor autocast
            pending = self._look(rows, h, x, idle)
        else:
            with torch.no_grad(), torch.autocast(h.device.type, enabled=False):
                pending = self._look(rows, h, x, idle)
        return Observation(self, rows, step.number, self.growth, pending)

    def _look(
        self, rows: RowSample, h: Tensor, x: Tensor | None, idle: tuple[int, ...]
    ) -> PendingScores | None:
        h_ND = rows.take(h)
        self._add_idle(idle, h_ND)
        if self.growth is None:
            return None
        x_NX = None if x is None else rows.take(x).float()
        return self.growth.observe(h_ND.float(), x_NX, rows)

    def _add_idle(self, seeds: tuple[int, ...], h_ND: Tensor) -> None:
        """Measures the chunks of seeds that the operator did not compute."""
        if not seeds:
            return
        every = -(-len(h_ND) // _MAX_IDLE_ROWS)
        if h_ND.device.type == "cpu":
            bounds = [bound for seed in seeds for bound in self._bounds[seed]]
            stats = torch.from_numpy(self._stats)
            torch.ops.esper.measure_chunks.default(h_ND, every, seeds, bounds, stats)
            return
        h_ND = h_ND[::every]
        zeros = self._idle_params
        if seeds != self._idle or zeros[0].dtype != h_ND.dtype or zeros[0].device != h_ND.device:
            # Seeds whose function is zero: the operator's statistics have one definition.
            self._idle, self._idle_plan = seeds, []
            for number, seed in enumerate(seeds):
                begin, end = self._bounds[seed]
                stand_in = SeedPlan(0, begin, end - begin, "output", "affine", number)
                self._idle_plan += stand_in.pack()
            zeros = [
                h_ND.new_zeros(end - begin) for begin, end in map(self._bounds.__getitem__, seeds)
            ]
            self._idle_params = zeros
        _, rows = slot_forward(h_ND, None, zeros, _NO_ALPHA, self._idle_plan, True)
        rows[:, _OF_THE_SEED] = 0.0  # the stand-in's
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

    def add_gradient(self, observation: "Observation", dy: Tensor) -> None:
        """Takes in dL/dy of an observed forward, features last, [..., D]."""
        if dy.device.type == "cpu":
            self._add_gradient(observation, dy)
        else:
            with torch.no_grad(), torch.autocast(dy.device.type, enabled=False):
                self._add_gradient(observation, dy)

    def _add_gradient(self, observation: "Observation", dy: Tensor) -> None:
        dy_ND = observation.rows.take(dy).float()
        squares_D = dy_ND.square().sum(dim=0)
        if self._gradient_squares_D is not None:
            squares_D += self._gradient_squares_D
        self._gradient_squares_D = squares_D
        self._num_gradient_rows += len(dy_ND)
        if observation.probe is not None and observation.pending is not None:
            observation.probe.complete(observation.pending, dy_ND, observation.step)

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
        _set(signal, "output_gradient_norm", self._output_gradient_norm(*self._bounds[seed]))
        _set(signal, "weight_gradient_norm", self._weight_gradient[seed].root_mean())
        return signal

    def _output_gradient_norm(self, begin: int, end: int) -> float | None:
        """Root mean square of dL/dy over a chunk; None where it was not seen or is not finite."""
        if self._gradient_squares_D is None:
            return None
        total = float(self._gradient_squares_D[begin:end].double().sum())
        return _finite(math.sqrt(total / (self._num_gradient_rows * (end - begin))))


@dataclass(frozen=True, slots=True)
class Observation:
    """A sampled forward that waits for its backward.

    Attributes:
        telemetry: What it belongs to.
        rows: The rows that were looked at.
        step: Number of the forward.
        probe: Scores the chunks that were dormant then; None where there was none.
        pending: What the probe wants of the gradient; None where it wants nothing.
    """

    telemetry: SlotTelemetry
    rows: RowSample
    step: int
    probe: GrowthProbe | None
    pending: PendingScores | None

    def take_gradient(self, channel_axis: int | None, dy: Tensor | None) -> None:
        """Tensor hook: takes in dL/dy in the host's own layout and leaves it as it is."""
        if dy is None:  # torch's undefined gradient: the output did not matter
            return
        self.telemetry.add_gradient(self, features_last(dy, channel_axis))


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _set(
    message: signal_pb2.HealthSignal | signal_pb2.GrowthScore, field: str, value: float | None
) -> None:
    """Sets an optional field; what was not measured, or cannot be told, stays absent."""
    if value is not None:
        setattr(message, field, value)
