"""The heuristic policy: when, where and how much to grow, by measured figures alone.

When, where and when to stop are strategies that the run's recipe names, see ``GrowthConfig``. How
much: the largest kernel that does not more than double the slot.
"""

import hashlib
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
from esper.config import GrowthConfig
from esper.services.tamiyo import strategies
from esper.tamiyo.v1 import controller_pb2
from esper.tolaria import recipe
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


@dataclass(slots=True)
class RunState:
    """What the policy remembers of a run between two observations.

    Attributes:
        graph: The host's graph as last sent.
        planted: Parameters of the kernel last germinated in each seed, by (slot, seed).
        refusals: How often a seed's graft was refused, and in which epoch last, by (slot, seed).
        last_germination: Epoch of the last germination, ``None`` before the first.
        num_decisions: Decisions taken so far, for their ids.
        last_train_loss: Training loss of the epoch before, ``None`` where it was not measured.
        gains: Held-out loss that the trials so far have saved per million operations of a sample.
    """

    graph: signal_pb2.HostGraph | None = None
    planted: dict[tuple[str, int], int] = field(default_factory=dict)
    refusals: dict[tuple[str, int], tuple[int, int]] = field(default_factory=dict)
    last_germination: int | None = None
    num_decisions: int = 0
    last_train_loss: float | None = None
    gains: list[float] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Site:
    """A dormant chunk with one way to grow."""

    signal: signal_pb2.HealthSignal
    signature: kernel_pb2.KernelSignature
    merit: strategies.Merit


class Heuristic:
    """The policy. It holds no state of its own; ``RunState`` does.

    Args:
        kernels: The library.
        config: The recipe of runs that bring none; ``None`` means the defaults.
    """

    title = "heuristic"
    description = (
        "Germinates the dormant chunk whose growth score stands out most from its null per "
        "operation, periodically, with the largest kernel that does not more than double the slot."
    )

    def __init__(self, kernels: KernelSource, config: GrowthConfig | None = None) -> None:
        self._kernels = kernels
        self._config = config if config is not None else GrowthConfig()

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
        config = self._config
        if observation.HasField("recipe"):
            config = recipe.from_proto(observation.recipe)
        _note_refusals(observation, state)
        strategies.note_trials(observation.trials, state.gains)
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
        waiting = strategies.reason_to_wait(
            config,
            observation,
            num_live=sum(signal.state in _LIVE for signal in observation.signals),
            last_germination=state.last_germination,
            last_train_loss=state.last_train_loss,
            gains=state.gains,
        )
        state.last_train_loss = (
            observation.train_loss if observation.HasField("train_loss") else None
        )
        if waiting is None:
            decisions.append(self._grow(config, observation, state))
        else:
            decisions.append(self._wait(observation, state, waiting))
        return decisions

    def _grow(
        self, config: GrowthConfig, observation: controller_pb2.Observation, state: RunState
    ) -> controller_pb2.Decision:
        sites = sorted(
            self._sites(config, observation, state),
            key=lambda s: (-s.merit.value, s.signal.slot, s.signal.seed, s.signature.source),
        )
        if not sites:
            return self._wait(observation, state, "no dormant chunk scores above its null")
        for site in sites:
            kernel = self._choose_kernel(config, observation, state, site)
            if kernel is not None:
                return self._germinate(observation, state, site, kernel)
        return self._wait(
            observation, state, "no kernel of the library fits a scored chunk within the budget"
        )

    def _wait(
        self, observation: controller_pb2.Observation, state: RunState, why: str
    ) -> controller_pb2.Decision:
        return self._decision(observation, state, controller_pb2.ACTION_WAIT, None, explanation=why)

    def _sites(
        self, config: GrowthConfig, observation: controller_pb2.Observation, state: RunState
    ) -> Iterable[_Site]:
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
            if observation.epoch - last < count * config.rest_epochs:
                continue
            for score in signal.growth_scores:
                signature = _signature(slots[signal.slot], signal.seed, score.source)
                if signature is None:
                    continue
                merit = strategies.merit(config, observation.epoch, signal, score, signature)
                if merit is not None:
                    yield _Site(signal, signature, merit)

    def _choose_kernel(
        self,
        config: GrowthConfig,
        observation: controller_pb2.Observation,
        state: RunState,
        site: _Site,
    ) -> library_pb2.KernelRecord | None:
        """Returns the largest kernel within the doubling rule and the budget."""
        slot = site.signal.slot
        present = _slot_parameters(state.graph, slot) + sum(
            state.planted.get((signal.slot, signal.seed), 0)
            for signal in observation.signals
            if _inside(signal.slot, slot) and signal.state in _HOLDING
        )
        # A place where nothing stands yet, such as an identity, is measured by the whole model.
        limit = config.max_slot_growth * (present or observation.num_parameters)
        wanted = frozenset(observation.kernels)
        budget = observation.budget
        if budget.HasField("max_parameters"):
            limit = min(limit, budget.max_parameters - observation.num_parameters)
        fitting = [
            record
            for record in self._kernels(site.signature)
            if (not wanted or record.name in wanted)
            and 0 < record.kernel.parameter_count <= limit
            and self._affordable(observation, site.signal, record)
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
        self,
        observation: controller_pb2.Observation,
        signal: signal_pb2.HealthSignal,
        record: library_pb2.KernelRecord,
    ) -> bool:
        budget = observation.budget
        if not budget.HasField("max_flops_per_sample"):
            return True
        if not (observation.HasField("flops_per_sample") and signal.HasField("tokens_per_sample")):
            return False  # unmeasured is not affordable
        added = record.kernel.flops_per_token * signal.tokens_per_sample
        cost = observation.flops_per_sample + added
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
            urgency=site.merit.ratio,
            explanation=(
                f"{site.merit.why}; {kernel.blueprint_name} with {kernel.parameter_count} "
                "parameters"
            ),
        )
        decision.kernel = record.name
        if site.merit.ratio > 1.0:
            decision.confidence = 1.0 - 1.0 / site.merit.ratio**2
        for feature, (value, weight) in site.merit.reasons.items():
            decision.reasons.add(feature=feature, value=value, weight=weight)
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
    """Returns the parameters of the slot's module, of a bridge's first one, and of all inside."""
    if graph is None:
        return 0
    entries = {node.slot.entry for node in graph.nodes if node.name == slot and node.slot.entry}
    return sum(
        node.num_parameters
        for node in graph.nodes
        if _inside(node.name, slot) or any(_inside(node.name, entry) for entry in entries)
    )


def _inside(name: str, slot: str) -> bool:
    """Whether a module is the slot's own or inside it; all are inside the root."""
    return name == slot or name.startswith(f"{slot}." if slot else "")
