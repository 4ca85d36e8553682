"""The heuristic policy: when, where and how much to grow, by measured figures alone.

When: early and periodically. The interval between germinations stretches as the gap between
training and held-out loss grows (FRAGrow, AAAI 2024), and the last sixth of the run never grows.
Where: at the chunk whose growth score, the part of the wanted update that the host cannot express
itself (TINY, arXiv 2405.19816; SENN, arXiv 2307.04526), stands out from its own null and buys the
most per operation. How much: the largest kernel that does not more than double the slot.
"""

import hashlib
import math
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Sequence
from dataclasses import asdict
from dataclasses import dataclass
from dataclasses import field

from esper.common.v1 import blueprint_pb2
from esper.common.v1 import kernel_pb2
from esper.common.v1 import lifecycle_pb2
from esper.common.v1 import signal_pb2
from esper.tamiyo.v1 import controller_pb2
from esper.urza.v1 import library_pb2

KernelSource = Callable[[kernel_pb2.KernelSignature], Iterable[library_pb2.KernelRecord]]
"""Returns the kernels of the library that fit a place and may be used."""

_EMPTY = lifecycle_pb2.SEED_STATE_DORMANT
_LIVE = frozenset(
    {
        lifecycle_pb2.SEED_STATE_GERMINATED,
        lifecycle_pb2.SEED_STATE_TRAINING,
        lifecycle_pb2.SEED_STATE_GRAFTING,
        lifecycle_pb2.SEED_STATE_STABILIZATION,
        lifecycle_pb2.SEED_STATE_EVALUATING,
        lifecycle_pb2.SEED_STATE_FINE_TUNING,
    }
)
_GONE = frozenset(
    {
        lifecycle_pb2.SEED_STATE_DORMANT,
        lifecycle_pb2.SEED_STATE_CULLED,
        lifecycle_pb2.SEED_STATE_CANCELLED,
        lifecycle_pb2.SEED_STATE_ROLLED_BACK,
    }
)
_HOLDING = _LIVE | {lifecycle_pb2.SEED_STATE_FOSSILIZED}


@dataclass(frozen=True, kw_only=True, slots=True)
class HeuristicConfig:
    """Constants of the policy.

    Attributes:
        first_epoch: First epoch that may grow; before it the scores mean nothing.
        max_interval_epochs: Longest interval between germinations, in epochs.
        gap_scale: Gap between held-out and training loss, relative to the training loss, is
            multiplied by this before it stretches the interval.
        reserved_share: Share of the run at its end that never grows.
        min_score_ratio: Least growth score over its null; 1 is what noise looks like.
        max_live: Most seeds under way at a time.
        max_slot_growth: Most parameters of a kernel over those of the slot with its grafts.
        rest_epochs: Epochs that a seed rests after its graft was refused, times the number of
            refusals: trials spend the run's significance, so none is repeated in a hurry.
    """

    first_epoch: int = 1
    max_interval_epochs: int = 8
    gap_scale: float = 8.0
    reserved_share: float = 1.0 / 6.0
    min_score_ratio: float = 1.5
    max_live: int = 2
    max_slot_growth: float = 1.0
    rest_epochs: int = 8


@dataclass(slots=True)
class RunState:
    """What the policy remembers of a run between two observations.

    Attributes:
        graph: The host's graph as last sent.
        planted: Parameters of the kernel last germinated in each seed, by (slot, seed).
        refusals: How often a seed's graft was refused, and in which epoch last, by (slot, seed).
        last_germination: Epoch of the last germination, ``None`` before the first.
        num_decisions: Decisions taken so far, for their ids.
    """

    graph: signal_pb2.HostGraph | None = None
    planted: dict[tuple[str, int], int] = field(default_factory=dict)
    refusals: dict[tuple[str, int], tuple[int, int]] = field(default_factory=dict)
    last_germination: int | None = None
    num_decisions: int = 0


@dataclass(frozen=True, slots=True)
class _Site:
    """A dormant chunk with one way to grow."""

    signal: signal_pb2.HealthSignal
    score: signal_pb2.GrowthScore
    signature: kernel_pb2.KernelSignature
    value: float

    @property
    def ratio(self) -> float:
        return self.score.score / max(self.score.null_score, 1e-30)


class Heuristic:
    """The policy. It holds no state of its own; ``RunState`` does.

    Args:
        kernels: The library.
        config: Constants.
    """

    title = "heuristic"
    description = (
        "Germinates the dormant chunk whose growth score stands out most from its null per "
        "operation, periodically, with the largest kernel that does not more than double the slot."
    )

    def __init__(self, kernels: KernelSource, config: HeuristicConfig | None = None) -> None:
        self._kernels = kernels
        self._config = config if config is not None else HeuristicConfig()

    @property
    def digest(self) -> str:
        """SHA-256 over the policy's name and constants."""
        constants = sorted(asdict(self._config).items())
        return hashlib.sha256(repr((self.title, constants)).encode()).hexdigest()

    def decide(
        self, observation: controller_pb2.Observation, state: RunState
    ) -> list[controller_pb2.Decision]:
        """Returns the decisions on one observation and updates the run's state.

        Args:
            observation: What the run looks like; checked by the caller.
            state: The run's memory; changed in place.
        """
        if observation.HasField("host_graph"):
            state.graph = observation.host_graph
        _note_refusals(observation, state)
        decisions = [
            self._decision(
                observation,
                state,
                controller_pb2.ACTION_CULL,
                signal,
                urgency=10.0,
                explanation=f"{signal.num_nonfinite_rows} rows of its output were not finite",
            )
            for signal in observation.signals
            if signal.state in _LIVE and signal.num_nonfinite_rows > 0
        ]
        waiting = self._reason_to_wait(observation, state)
        if waiting is None:
            decisions.append(self._grow(observation, state))
        else:
            decisions.append(
                self._decision(
                    observation, state, controller_pb2.ACTION_WAIT, None, explanation=waiting
                )
            )
        return decisions

    def _reason_to_wait(
        self, observation: controller_pb2.Observation, state: RunState
    ) -> str | None:
        config, epoch = self._config, observation.epoch
        if epoch < config.first_epoch:
            return f"epoch {epoch} is before the first growing epoch {config.first_epoch}"
        last = math.floor(observation.num_epochs * (1.0 - config.reserved_share)) - 1
        if epoch > last:
            return f"epoch {epoch} is in the last part of the run, which never grows"
        num_live = sum(signal.state in _LIVE for signal in observation.signals)
        if num_live >= config.max_live:
            return f"{num_live} seeds are under way, at most {config.max_live} at a time"
        interval = self._interval(observation)
        if state.last_germination is not None and epoch - state.last_germination < interval:
            return f"the last germination was less than {interval} epochs ago"
        return None

    def _interval(self, observation: controller_pb2.Observation) -> int:
        config = self._config
        if not (observation.HasField("train_loss") and observation.HasField("held_out_loss")):
            return config.max_interval_epochs
        scale = max(abs(observation.train_loss), 1e-12)
        gap = config.gap_scale * (observation.held_out_loss - observation.train_loss) / scale
        if not math.isfinite(gap):  # a run that has diverged
            return config.max_interval_epochs
        stretched = config.max_interval_epochs / (1.0 + math.exp(min(4.0 - gap, 500.0)))
        return max(1, math.ceil(stretched))

    def _grow(
        self, observation: controller_pb2.Observation, state: RunState
    ) -> controller_pb2.Decision:
        sites = sorted(
            self._sites(observation, state),
            key=lambda site: (-site.value, site.signal.slot, site.signal.seed, site.score.source),
        )
        if not sites:
            return self._decision(
                observation,
                state,
                controller_pb2.ACTION_WAIT,
                None,
                explanation="no dormant chunk scores above its null",
            )
        for site in sites:
            kernel = self._choose_kernel(observation, state, site)
            if kernel is not None:
                return self._germinate(observation, state, site, kernel)
        return self._decision(
            observation,
            state,
            controller_pb2.ACTION_WAIT,
            None,
            explanation="no kernel of the library fits a scored chunk within the budget",
        )

    def _sites(self, observation: controller_pb2.Observation, state: RunState) -> Iterable[_Site]:
        slots = {
            node.name: node.slot
            for node in (state.graph.nodes if state.graph is not None else ())
            if node.HasField("slot")
        }
        busy = {s.slot for s in observation.signals if s.state in _LIVE}
        for signal in observation.signals:
            if signal.state != _EMPTY or signal.slot in busy or signal.slot not in slots:
                continue
            count, last = state.refusals.get((signal.slot, signal.seed), (0, 0))
            if observation.epoch - last < count * self._config.rest_epochs:
                continue
            for score in signal.growth_scores:
                if not score.HasField("null_score"):
                    continue
                signature = _signature(slots[signal.slot], signal.seed, score.source)
                if signature is None:
                    continue
                excess = score.score**2 - score.null_score**2
                width = signature.source_width + signature.chunk_width
                site = _Site(signal, score, signature, excess / width)
                if site.ratio >= self._config.min_score_ratio:
                    yield site

    def _choose_kernel(
        self, observation: controller_pb2.Observation, state: RunState, site: _Site
    ) -> library_pb2.KernelRecord | None:
        """Returns the largest kernel within the doubling rule and the budget."""
        slot = site.signal.slot
        present = _slot_parameters(state.graph, slot) + sum(
            state.planted.get((signal.slot, signal.seed), 0)
            for signal in observation.signals
            if signal.slot == slot and signal.state in _HOLDING
        )
        limit = self._config.max_slot_growth * present
        budget = observation.budget
        if budget.HasField("max_parameters"):
            limit = min(limit, budget.max_parameters - observation.num_parameters)
        fitting = [
            record
            for record in self._kernels(site.signature)
            if 0 < record.kernel.parameter_count <= limit and self._affordable(observation, record)
        ]
        if not fitting:
            return None
        return max(
            fitting,
            key=lambda record: (
                record.kernel.parameter_count,
                -record.kernel.flops_per_token,
                record.name,
            ),
        )

    def _affordable(
        self, observation: controller_pb2.Observation, record: library_pb2.KernelRecord
    ) -> bool:
        budget = observation.budget
        if not budget.HasField("max_flops_per_sample"):
            return True
        if not observation.HasField("flops_per_sample"):
            return False  # unmeasured is not affordable
        cost = observation.flops_per_sample + record.kernel.flops_per_token
        return bool(cost <= budget.max_flops_per_sample)

    def _germinate(
        self,
        observation: controller_pb2.Observation,
        state: RunState,
        site: _Site,
        record: library_pb2.KernelRecord,
    ) -> controller_pb2.Decision:
        slot, kernel = site.signal.slot, record.kernel
        state.last_germination = observation.epoch
        state.planted[slot, site.signal.seed] = kernel.parameter_count
        decision = self._decision(
            observation,
            state,
            controller_pb2.ACTION_GERMINATE,
            site.signal,
            urgency=site.ratio,
            explanation=(
                f"its growth score is {site.ratio:.1f} times its null; {kernel.blueprint_name} "
                f"with {kernel.parameter_count} parameters"
            ),
        )
        decision.kernel = record.name
        decision.confidence = 1.0 - 1.0 / site.ratio**2
        decision.reasons.add(feature="growth_score", value=site.score.score, weight=site.value)
        decision.reasons.add(feature="null_score", value=site.score.null_score, weight=-1.0)
        return decision

    def _decision(
        self,
        observation: controller_pb2.Observation,
        state: RunState,
        action: controller_pb2.Action,
        signal: signal_pb2.HealthSignal | None,
        *,
        explanation: str,
        urgency: float = 0.0,
    ) -> controller_pb2.Decision:
        decision = controller_pb2.Decision(
            id=f"{observation.run}-{state.num_decisions}",
            action=action,
            urgency=urgency,
            explanation=explanation,
            policy_digest=self.digest,
        )
        if signal is not None:
            decision.slot, decision.seed = signal.slot, signal.seed
        state.num_decisions += 1
        return decision


def _note_refusals(observation: controller_pb2.Observation, state: RunState) -> None:
    """Notes the seeds that were planted and are empty again."""
    for signal in observation.signals:
        key = (signal.slot, signal.seed)
        if key in state.planted and signal.state in _GONE:
            del state.planted[key]
            count, _ = state.refusals.get(key, (0, 0))
            state.refusals[key] = (count + 1, observation.epoch)


def _signature(
    slot: signal_pb2.SlotInfo, seed: int, source: blueprint_pb2.SeedSource
) -> kernel_pb2.KernelSignature | None:
    """Returns the place that a seed offers, or ``None`` where a width is not known."""
    widths: Sequence[int] = slot.chunk_widths
    if seed >= len(widths):
        return None
    reads_input = source == blueprint_pb2.SEED_SOURCE_INPUT
    if reads_input and not slot.HasField("source_width"):
        return None
    return kernel_pb2.KernelSignature(
        slot_kind=slot.kind,
        chunk_width=widths[seed],
        source_width=slot.source_width if reads_input else widths[seed],
        source=source,
        dtype=slot.dtype,
        device_class=slot.device_class,
    )


def _slot_parameters(graph: signal_pb2.HostGraph | None, slot: str) -> int:
    """Returns the parameters of the slot's module and everything inside it."""
    if graph is None:
        return 0
    inside = f"{slot}." if slot else ""
    return sum(
        node.num_parameters
        for node in graph.nodes
        if node.name == slot or node.name.startswith(inside)
    )
