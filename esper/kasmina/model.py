"""The wrapped model: everything that may be done to a seed."""

import contextlib
from collections import Counter
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor
from torch import nn

from esper import _C
from esper.blueprints import check
from esper.blueprints import check_kernel
from esper.blueprints import get
from esper.blueprints import kernel_digest
from esper.blueprints import lower
from esper.blueprints.init import torch_dtype
from esper.common.v1 import blueprint_pb2
from esper.common.v1 import kernel_pb2
from esper.common.v1 import lifecycle_pb2
from esper.kasmina.cache import KernelCache
from esper.kasmina.checks import check_fraction
from esper.kasmina.checks import check_kind
from esper.kasmina.checks import check_whole
from esper.kasmina.comparison import Original
from esper.kasmina.drift import DEFAULT_TOLERANCE
from esper.kasmina.folding import fold
from esper.kasmina.grafts import Graft
from esper.kasmina.grafts import check_fit
from esper.kasmina.grafts import check_parameters
from esper.kasmina.grafts import check_target
from esper.kasmina.lifecycle import SeedLifecycleState
from esper.kasmina.lifecycle import Transition
from esper.kasmina.places import place_of
from esper.kasmina.places import signature_of
from esper.kasmina.prepared import PreparedKernel
from esper.kasmina.prepared import come_with
from esper.kasmina.restoring import check_restorable
from esper.kasmina.sites import Site
from esper.kasmina.sites import SlotState
from esper.kasmina.slotted import SlottedModel
from esper.kasmina.stats import ModelStats

Hyperparameter = int | float | bool | str

_SCHEDULES = {
    lifecycle_pb2.ALPHA_SCHEDULE_KIND_UNSPECIFIED: "linear",
    lifecycle_pb2.ALPHA_SCHEDULE_KIND_LINEAR: "linear",
    lifecycle_pb2.ALPHA_SCHEDULE_KIND_COSINE: "cosine",
    lifecycle_pb2.ALPHA_SCHEDULE_KIND_SIGMOID: "sigmoid",
    lifecycle_pb2.ALPHA_SCHEDULE_KIND_DRIFT: "drift",
}
_EMPTIED = (
    SeedLifecycleState.CULLED,
    SeedLifecycleState.CANCELLED,
    SeedLifecycleState.ROLLED_BACK,
)


class MorphableModel(SlottedModel):
    """A model that can grow; made by ``esper.wrap``.

    It is called like the host, and attributes that it does not have are looked up in the host.
    Parameters and buffers are those of the host (``host.*``) and of the planted seeds
    (``slots.*``).

    Args:
        host: The user's model.
        sites: Where the slots sit.
        num_seeds: Number of seeds of each slot.
        telemetry_enabled: Whether telemetry is sampled.
        original: The host as it was, for ``compare_with_original``; None if it is not kept.
        cache_bytes: Capacity of the kernel cache.

    Attributes:
        host: The user's model.
        slots: The slots by the FQN of their module.
        observers: Called after each lifecycle move, in order.
        kernel_cache: The kernels seen so far.
    """

    def __init__(
        self,
        host: nn.Module,
        sites: Sequence[Site],
        num_seeds: Sequence[int],
        telemetry_enabled: bool,
        original: Original | None,
        cache_bytes: int,
    ) -> None:
        super().__init__(host, sites, num_seeds, telemetry_enabled, original)
        self.kernel_cache = KernelCache(cache_bytes)
        self.observers: list[Callable[[Transition], None]] = []
        self._emptied: dict[tuple[str, int], None] = {}  # seeds on their way back to DORMANT
        self._resting: int | None = None  # the revision in which a step changes no seed

    def __deepcopy__(self, memo: dict[int, object]) -> Self:
        memo[id(self.observers)] = []  # they watch this model, not its copies
        return super().__deepcopy__(memo)

    @property
    def archive(self) -> tuple[object, ...]:
        """What the model keeps and computes nothing with: the original, and kernels seen so far."""
        return self._original, self.kernel_cache

    def get_model_stats(self) -> ModelStats:
        """Returns what is known of the whole model."""
        states = Counter(SeedLifecycleState(int(state)) for state in self._bank.states())
        return ModelStats(
            num_slots=len(self.slots),
            num_seeds=self._bank.num_seeds,
            seeds_by_state=dict(sorted(states.items())),
            host_parameters=sum(p.numel() for p in self.host.parameters()),
            seed_parameters=sum(p.numel() for p in self.slots.parameters()),
            training_forwards=self._sampler.training_forwards,
            sampled_forwards=self._sampler.sampled_forwards,
            cache=self.kernel_cache.stats(),
        )

    def germinate(
        self,
        slot: str,
        seed: int,
        blueprint: str | blueprint_pb2.Blueprint,
        **hyperparameters: Hyperparameter,
    ) -> None:
        """Lowers a blueprint for a seed and loads it; needs no plane.

        Args:
            slot: Name of the slot.
            seed: Index of a DORMANT seed.
            blueprint: Name of a starting blueprint, or any blueprint.
            **hyperparameters: Hyperparameters of the starting blueprint.

        Raises:
            ValueError: If slot, seed, blueprint or hyperparameters do not exist or do not fit.
        """
        if isinstance(blueprint, str):
            blueprint = get(blueprint, **hyperparameters)
        elif hyperparameters:
            raise ValueError(
                f"hyperparameters are {sorted(hyperparameters)}, but they can be given with the "
                "name of a blueprint only"
            )
        check_kind("blueprint", blueprint, blueprint_pb2.Blueprint)
        check(blueprint)
        signature = self.signature(slot, seed, blueprint.graph.inputs[0].source)
        self.load_kernel(slot, seed, lower(blueprint, signature))

    def load_kernel(
        self,
        slot: str,
        seed: int,
        kernel: kernel_pb2.Kernel,
        weights: Mapping[str, Tensor] | None = None,
        reason: str = "",
    ) -> None:
        """Plants a kernel in a DORMANT seed, which becomes GERMINATED.

        Args:
            slot: Name of the slot.
            seed: Index of the seed.
            kernel: The kernel; copied.
            weights: Tensors by parameter name. None takes those that came with the kernel before,
                else draws them by the kernel's init from a generator private to kernel and seed.
            reason: Why; handed to the observers.

        Raises:
            ValueError: If the seed is not DORMANT, or kernel or weights do not fit; the message
                names field, value and rule, and nothing has changed.
        """
        position, _ = self._at(slot, seed)
        check_kind("kernel", kernel, kernel_pb2.Kernel)
        state = self.seed_state(slot, seed)
        if state != SeedLifecycleState.DORMANT:
            raise ValueError(
                f"slot {slot!r}, seed {seed} is {state.name}, but a kernel can be loaded into a "
                "DORMANT seed only"
            )
        layer = self._layers[position]
        signature = self.signature(slot, seed, kernel.signature.source)
        digest = self.kernel_cache.digest(kernel)
        prepared = self.kernel_cache.get(digest)
        if prepared is None:
            own = weights if come_with(weights, kernel) else None
            prepared = PreparedKernel.of(kernel, digest, own)
        check_fit(kernel, signature)
        check_target(kernel, signature, layer.output_axes)
        if weights is None:
            weights = prepared.weights
        if weights is not prepared.weights or weights is None:  # the kernel's own are checked once
            check_parameters(kernel, weights)
        graft = Graft(prepared, weights, place_of(layer, seed))
        graft.train(self.training)
        self._plant(position, seed, graft)
        self._move(slot, seed, SeedLifecycleState.GERMINATED, reason)

    def unload_kernel(self, slot: str, seed: int, reason: str = "") -> None:
        """Takes back a kernel that is GERMINATED or TRAINING; the seed becomes CANCELLED.

        Raises:
            ValueError: If the seed is in another state.
        """
        state = self.seed_state(slot, seed)
        if state not in (SeedLifecycleState.GERMINATED, SeedLifecycleState.TRAINING):
            raise ValueError(
                f"slot {slot!r}, seed {seed} is {state.name}, but a kernel can be unloaded from a "
                "GERMINATED or TRAINING seed only; a seed that has acted on the host is culled"
            )
        self.advance(slot, seed, SeedLifecycleState.CANCELLED, reason)

    def cull(self, slot: str, seed: int, reason: str = "") -> None:
        """Removes a seed and its parameters; it becomes CULLED.

        Raises:
            ValueError: If its state does not allow it.
        """
        self.advance(slot, seed, SeedLifecycleState.CULLED, reason)

    def advance(
        self, slot: str, seed: int, state: SeedLifecycleState | int | str, reason: str = ""
    ) -> None:
        """Moves a seed to another state.

        Args:
            slot: Name of the slot.
            seed: Index of the seed.
            state: The state to enter, by name or number. CULLED, CANCELLED and ROLLED_BACK remove
                the seed's parameters.
            reason: Why; handed to the observers.

        Raises:
            ValueError: If the move is not legal; nothing has changed.
        """
        after = SeedLifecycleState.parse(state)
        if after == SeedLifecycleState.GERMINATED:
            raise ValueError(
                f"state is GERMINATED, but slot {slot!r}, seed {seed} enters it by load_kernel or "
                "germinate only"
            )
        self._move(slot, seed, after, reason)

    def set_seed_alpha(self, slot: str, seed: int, alpha: float) -> None:
        """Holds the alpha of a GRAFTING seed at a value in [0, 1]; its schedule stands still."""
        with self._naming(slot, seed) as at:
            check_fraction("alpha", alpha)
            self._bank.set_alpha(*at, float(alpha))

    def set_schedule(self, slot: str, seed: int, schedule: lifecycle_pb2.AlphaSchedule) -> None:
        """Sets how alpha moves while the seed is GRAFTING; a running ramp starts anew."""
        check_kind("schedule", schedule, lifecycle_pb2.AlphaSchedule)
        kind = _SCHEDULES.get(schedule.kind)
        if kind is None:
            raise ValueError(f"schedule.kind is {schedule.kind}, but it must be a known kind")
        end = schedule.end if schedule.HasField("end") else 1.0
        given = schedule.HasField("drift_tolerance")
        tolerance = schedule.drift_tolerance if given else DEFAULT_TOLERANCE
        with self._naming(slot, seed) as at:
            self._bank.set_schedule(*at, kind, schedule.steps, schedule.start, end, tolerance)
        self._watch_drift(self._layers[at[0]])

    def fold(self, slot: str, seed: int, reason: str = "") -> list[nn.Parameter]:
        """Makes a fossil part of the weight of its slot's module, where it costs nothing any more.

        The module computes what it did with the seed, to rounding; its parameters stay the same
        objects, optimizer state and all. The seed stays FOSSILIZED and holds the kernel ``noop``.
        Observers are told of it as a move from FOSSILIZED to FOSSILIZED.

        Args:
            slot: Name of the slot, on a Linear or convolution.
            seed: Index of a FOSSILIZED seed whose kernel has no activation, such as ``lora``.
            reason: Why; handed to the observers.

        Returns:
            The seed's parameters, which the model has no more: an optimizer that trains them has to
            give them up (``esper.tolaria.optimizers.forget``).

        Raises:
            ValueError: If the weight cannot stand for the seed (see ``esper.kasmina.folding``): the
                message says why, and nothing has changed.
        """
        at, state, graft = (
            self._at(slot, seed),
            self.seed_state(slot, seed),
            self._graft(slot, seed),
        )
        if state != SeedLifecycleState.FOSSILIZED or graft is None or self._bank.muted(*at):
            what = "muted" if self._bank.muted(*at) else state.name
            raise ValueError(
                f"slot {slot!r}, seed {seed} is {what}, but only a FOSSILIZED seed that acts can "
                "be folded"
            )
        layer = self.slots[slot]
        kernel = lower(get("noop"), self.signature(slot, seed, blueprint_pb2.SEED_SOURCE_OUTPUT))
        empty = Graft(PreparedKernel.of(kernel), {}, place_of(layer, seed))
        try:
            fold(self.host, layer, seed, trains=not self._bank.frozen(*at))
        except ValueError as error:
            raise ValueError(f"slot {slot!r}, seed {seed} cannot be folded: {error}") from error
        layer.remove(seed)
        self.kernel_cache.release(graft.digest)
        self._plant(at[0], seed, empty.train(self.training))
        self.revision += 1
        self._switch(layer)
        reason = reason or f"folded into the weight of {slot}"
        self._tell(Transition(slot, seed, state, state, graft.digest, reason))
        return graft.ordered_parameters()

    def freeze_fossil(self, slot: str, seed: int, frozen: bool) -> None:
        """Says whether the seed stays still once it is FOSSILIZED; it trains on by default."""
        check_kind("frozen", frozen, bool)
        self._bank.set_frozen(*self._at(slot, seed), frozen)

    def set_embargo(self, slot: str, seed: int, steps: int) -> None:
        """Keeps a CULLED, CANCELLED or ROLLED_BACK seed from becoming DORMANT for so many steps."""
        with self._naming(slot, seed) as at:
            check_whole("embargo", steps, 0, 2**52)
            self._bank.set_embargo(*at, steps)

    @contextlib.contextmanager
    def muted(self, slot: str, seed: int) -> Iterator[None]:
        """Holds the seed's forward contribution at 0 while the context is open."""
        at = self._at(slot, seed)
        before = self._bank.muted(*at)
        self._bank.set_muted(*at, True)
        try:
            yield
        finally:
            self._bank.set_muted(*at, before)

    def tick(self) -> list[tuple[str, int]]:
        """Ends a step: schedules and embargoes advance, and seeds whose embargo is over rest.

        Returns:
            (slot, seed) of each seed whose alpha schedule came to its end in this step.
        """
        if self._resting == self.revision:
            return []
        self._measure_drift()
        completed = [self._seeds[index] for index in self._bank.tick()]
        for slot, seed in list(self._emptied):
            if self._bank.embargo_remaining(*self._at(slot, seed)) == 0:
                self._move(slot, seed, SeedLifecycleState.DORMANT, "embargo over")
        if not (self._emptied or SeedLifecycleState.GRAFTING in self._bank.states()):
            self._resting = self.revision
        return completed

    def restore(
        self,
        bank: bytes,
        slots: Mapping[str, SlotState],
        grafts: Mapping[tuple[str, int], tuple[kernel_pb2.Kernel, Mapping[str, Tensor]]],
        *,
        over: bool = False,
    ) -> None:
        """Puts the seeds of a saved model into one of the same slots.

        No observer is called: nothing moves, a past is restored.

        Args:
            bank: What ``bank.to_bytes()`` returned.
            slots: What each slot had learnt from its forwards.
            grafts: Kernel and weights of each seed that held one.
            over: Whether seeds in use give way; all must be DORMANT otherwise. A seed that holds
                the same kernel keeps its parameters, which take the weights.

        Raises:
            ValueError: If the parts do not fit each other or the model; nothing has changed.
        """
        check_kind("bank", bank, bytes)
        restored = _C.SeedBank.from_bytes(bank)
        if not over:
            self._check_dormant()
        check_restorable(restored, slots, grafts, self.slots, self._bank)
        before = {name: layer.slot_state() for name, layer in self.slots.items()}
        try:
            for name, slot_state in slots.items():
                if slot_state != before[name]:
                    self.slots[name].adopt(slot_state)
            planted = {at: self._revived(*at, *graft) for at, graft in grafts.items()}
        except ValueError:
            for name, slot_state in before.items():
                if slot_state != slots[name]:
                    self.slots[name].adopt(slot_state)
            raise
        self._bank = restored
        self._bind()
        for slot, seed in self.occupied_seeds():
            held, graft = self._graft(slot, seed), planted.get((slot, seed))
            assert held is not None
            if graft is not None and graft.digest == held.digest:
                held.take_weights(graft)
                self._set_plan(self._slot_index[slot], seed, held)
                del planted[slot, seed]
            else:
                self.slots[slot].remove(seed)
                self.kernel_cache.release(held.digest)
        for (slot, seed), graft in planted.items():
            self._plant(self._slot_index[slot], seed, graft)
        self._emptied = {at: None for at in self._seeds if self.seed_state(*at) in _EMPTIED}
        for slot, seed in self._seeds:
            self.slots[slot].note(seed, self.seed_state(slot, seed))
        self.revision += 1
        for layer in self._layers:
            self._switch(layer)
            layer.watch_drift(False)  # what it has measured belongs to another past
            self._watch_drift(layer)

    def _check_dormant(self) -> None:
        for slot, seed in self._seeds:
            state = self.seed_state(slot, seed)
            if state != SeedLifecycleState.DORMANT:
                raise ValueError(
                    f"slot {slot!r}, seed {seed} is {state.name}, but it must be DORMANT"
                )

    def _revived(
        self, slot: str, seed: int, kernel: kernel_pb2.Kernel, weights: Mapping[str, Tensor]
    ) -> Graft:
        """A graft with trained weights, whatever type and device they were trained in."""
        check_kernel(kernel)
        layer = self.slots[slot]
        dtype = torch_dtype(kernel.signature.dtype)
        layer.assume(dtype, next((p.device for p in self.host.parameters()), torch.device("cpu")))
        check_fit(kernel, signature_of(layer, seed, kernel.signature.source))
        # A broken seed is contained, and restored as broken as it was: nothing may be lost by it.
        finite = {name: torch.nan_to_num(tensor.to(dtype)) for name, tensor in weights.items()}
        check_parameters(kernel, finite)
        prepared = self.kernel_cache.get(kernel_digest(kernel)) or PreparedKernel.of(kernel)
        graft = Graft(prepared, weights, place_of(layer, seed))
        return graft.train(self.training)

    def _plant(self, position: int, seed: int, graft: Graft) -> None:
        """Puts a graft into an empty seed."""
        self._layers[position].plant(seed, graft)
        self.kernel_cache.put(graft.prepared, in_use=True)
        self._set_plan(position, seed, graft)

    def _set_plan(self, position: int, seed: int, graft: Graft) -> None:
        """Tells the bank what the seed's native kernel computes."""
        begin, _ = self._layers[position].bounds[seed]
        self._bank.set_plan(position, seed, graft.prepared.record(begin) or [])

    def _move(self, slot: str, seed: int, after: SeedLifecycleState, reason: str) -> None:
        at = self._at(slot, seed)
        before = SeedLifecycleState(self._bank.state(*at))
        try:
            self._bank.advance(*at, after)
        except ValueError as error:
            raise ValueError(f"slot {slot!r}, seed {seed}: {error}") from error
        layer = self._layers[at[0]]
        graft = layer.graft(seed)
        digest = "" if graft is None else graft.digest
        if after in _EMPTIED:
            self._emptied[slot, seed] = None
            layer.remove(seed)
            self.kernel_cache.release(digest)
        elif after == SeedLifecycleState.DORMANT:
            del self._emptied[slot, seed]
        layer.note(seed, after)
        self.revision += 1
        if before.computes != after.computes:
            self._switch(layer)
        if SeedLifecycleState.GRAFTING in (before, after):
            self._watch_drift(layer)
        self._tell(Transition(slot, seed, before, after, digest, reason))

    def _tell(self, transition: Transition) -> None:
        for observer in list(self.observers):
            observer(transition)

    @contextlib.contextmanager
    def _naming(self, slot: str, seed: int) -> Iterator[tuple[int, int]]:
        """Adds the seed's name to what the bank has to say."""
        at = self._at(slot, seed)
        try:
            yield at
        except ValueError as error:
            raise ValueError(f"slot {slot!r}, seed {seed}: {error}") from error
