"""The wrapped model: the user's host, its slots, and everything that may be done to a seed."""

import contextlib
import copy
import difflib
import weakref
from collections import Counter
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast
from typing import overload

import torch
from torch import Tensor
from torch import nn

from esper import _C
from esper.blueprints import check
from esper.blueprints import check_kernel
from esper.blueprints import get
from esper.blueprints import kernel_digest
from esper.blueprints import lower
from esper.common.v1 import blueprint_pb2
from esper.common.v1 import kernel_pb2
from esper.common.v1 import lifecycle_pb2
from esper.common.v1 import signal_pb2
from esper.kasmina.cache import CachedKernel
from esper.kasmina.cache import KernelCache
from esper.kasmina.comparison import Original
from esper.kasmina.grafts import Graft
from esper.kasmina.grafts import check_fit
from esper.kasmina.grafts import check_parameters
from esper.kasmina.host_graph import host_graph
from esper.kasmina.layer import KasminaLayer
from esper.kasmina.lifecycle import SeedLifecycleState
from esper.kasmina.report import drain_signals
from esper.kasmina.report import layer_stats
from esper.kasmina.sampling import Sampler
from esper.kasmina.sites import Site
from esper.kasmina.slots import SlotTable
from esper.kasmina.stats import LayerStats
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


# The wrapped model that each slot's module belongs to.
_OWNERS: weakref.WeakKeyDictionary[nn.Module, weakref.ref["MorphableModel"]]
_OWNERS = weakref.WeakKeyDictionary()


def is_wrapped(module: nn.Module) -> bool:
    """Returns whether a module carries a slot, of a live wrapped model or left hooked by one."""
    owner = _OWNERS.get(module)
    hooked = any(isinstance(hook, KasminaLayer) for hook in module._forward_hooks.values())
    return hooked or (owner is not None and owner() is not None)


@dataclass(frozen=True, slots=True)
class Transition:
    """A lifecycle move that has happened.

    Attributes:
        slot: Name of the slot.
        seed: Index of the seed.
        before: State that it left.
        after: State that it is in.
        kernel: Digest of the kernel that it holds, or held until this move; empty if none.
        reason: Why, as the caller said.
    """

    slot: str
    seed: int
    before: SeedLifecycleState
    after: SeedLifecycleState
    kernel: str
    reason: str


class MorphableModel(nn.Module):
    """A host with slots; made by ``esper.wrap``.

    It is called like the host, and attributes that it does not have are looked up in the host.
    Parameters and buffers are those of the host (``host.*``) and of the planted seeds
    (``slots.*``).

    Args:
        host: The user's model.
        sites: Where the slots sit.
        seeds_per_layer: Seeds of each slot.
        cache_bytes: Capacity of the kernel cache.
        telemetry_enabled: Whether telemetry is sampled.
        original: The host as it was, for ``compare_with_original``; None if it is not kept.

    Attributes:
        host: The user's model.
        slots: The slots by the FQN of their module.
        observers: Called after each lifecycle move, in order.
        kernel_cache: The kernels seen so far.
    """

    host: nn.Module
    slots: SlotTable

    def __init__(
        self,
        host: nn.Module,
        sites: Sequence[Site],
        seeds_per_layer: int,
        cache_bytes: int,
        telemetry_enabled: bool,
        original: Original | None,
    ) -> None:
        super().__init__()
        self._bank = _C.SeedBank([seeds_per_layer] * len(sites))
        layers = [
            KasminaLayer(site, seeds_per_layer, position * seeds_per_layer)
            for position, site in enumerate(sites)
        ]
        self.host = host
        self.slots = SlotTable(layers)
        self.kernel_cache = KernelCache(cache_bytes)
        self.observers: list[Callable[[Transition], None]] = []
        self._original = original
        self._slot_index = {name: position for position, name in enumerate(self.slots)}
        self._seeds = [(name, seed) for name in self.slots for seed in range(seeds_per_layer)]
        self._active: dict[str, None] = {}  # slots with seeds that compute, in order of arrival
        self._emptied: dict[tuple[str, int], None] = {}  # seeds on their way back to DORMANT
        self._sampler = Sampler(host, self.slots, telemetry_enabled, interval=8)
        self.training = host.training
        for module in self.slots.modules():
            module.training = host.training
        self._bind()

    # ---------------------------------------------------------------- as a module

    def forward(self, *args: object, **kwargs: object) -> object:
        """Runs the host with its seeds; inputs and outputs are the host's."""
        if torch.compiler.is_compiling():
            return self.host(*args, **kwargs)
        return self._sampler.forward(self.host, self.slots, self._active, args, kwargs)

    def __getattr__(self, name: str) -> Tensor | nn.Module:
        try:
            return super().__getattr__(name)
        except AttributeError:
            host = self.__dict__.get("_modules", {}).get("host")
            if host is None:
                raise
            return cast(Tensor | nn.Module, getattr(host, name))

    def __deepcopy__(self, memo: dict[int, object]) -> "MorphableModel":
        clone = type(self).__new__(type(self))
        memo[id(self)] = clone
        clone.__dict__.update(copy.deepcopy(self.__dict__, memo))
        clone._bind()
        return clone

    def _bind(self) -> None:
        """Points the slots at this model's bank, and notes whose they are."""
        scalars = torch.from_numpy(self._bank.scalars())
        for layer in self.slots.values():
            layer.bind(scalars)
            _OWNERS[layer.module] = weakref.ref(self)

    def release(self) -> nn.Module:
        """Removes every hook and gives up the host, which is returned; ends this model."""
        host = self.host
        for layer in self.slots.values():
            layer.detach()
            del _OWNERS[layer.module]
        del self.host
        return host

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "MorphableModel":
        super()._apply(fn, recurse)
        if self._original is not None:
            self._original.apply(fn)
        return self

    # ---------------------------------------------------------------- looking

    @property
    def bank(self) -> _C.SeedBank:
        """The native seed bank; slots are numbered in the order of ``get_layer_names()``.

        To be read, and saved by ``to_bytes()``; changes go through this class.
        """
        return self._bank

    def get_layer_names(self) -> list[str]:
        """Returns the names of all slots, in order."""
        return list(self.slots)

    def seed_state(self, slot: str, seed: int) -> SeedLifecycleState:
        """Returns the state of a seed."""
        return SeedLifecycleState(self._bank.state(*self._at(slot, seed)))

    def seed_parameters(self, slot: str, seed: int) -> list[nn.Parameter]:
        """Returns the parameters of a seed in the order of its kernel; none if it is empty."""
        graft = self._graft(slot, seed)
        return [] if graft is None else graft.ordered_parameters()

    def kernel_of(self, slot: str, seed: int) -> kernel_pb2.Kernel | None:
        """Returns the kernel that a seed holds."""
        graft = self._graft(slot, seed)
        return None if graft is None else graft.kernel

    def signature(
        self, slot: str, seed: int, source: blueprint_pb2.SeedSource
    ) -> kernel_pb2.KernelSignature:
        """Returns what a kernel must fit to be loaded into a seed.

        Args:
            slot: Name of the slot.
            seed: Index of the seed.
            source: What the kernel reads.

        Raises:
            ValueError: If the slot's width is not known before its first forward, its input can
                feed no seed, or its type or device is not supported.
        """
        self._at(slot, seed)
        return self.slots[slot].signature(seed, source)

    def host_graph(self) -> signal_pb2.HostGraph:
        """Returns modules and slots as a graph; edges follow the first training forward."""
        return host_graph(self.host, self.slots, self._sampler.order)

    @overload
    def get_layer_stats(self, name: str) -> LayerStats: ...

    @overload
    def get_layer_stats(self, name: None = None) -> dict[str, LayerStats]: ...

    def get_layer_stats(self, name: str | None = None) -> LayerStats | dict[str, LayerStats]:
        """Returns what is known of one slot, or of all by name."""
        if name is None:
            return {slot: self.get_layer_stats(slot) for slot in self.slots}
        position, _ = self._at(name, 0)
        return layer_stats(self.slots[name], self._bank, position)

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

    def compare_with_original(self, *inputs: object) -> dict[str, float]:
        """Compares the model with the host as it was when it was wrapped, both in eval mode.

        Returns:
            ``max_abs_difference``, ``max_rel_difference`` and ``cosine`` of the outputs.

        Raises:
            ValueError: If the original was not kept.
        """
        if self._original is None:
            raise ValueError(
                "preserve_original was False when the model was wrapped, so there is no original "
                "to compare with"
            )
        return self._original.compare(self, inputs)

    # ---------------------------------------------------------------- telemetry

    @property
    def telemetry_interval(self) -> int:
        """Every how many training forwards telemetry is sampled; default 8."""
        return self._sampler.interval

    @telemetry_interval.setter
    def telemetry_interval(self, value: int) -> None:
        self._sampler.interval = value

    def enable_telemetry(self, enabled: bool) -> None:
        """Turns sampling on or off."""
        self._sampler.enabled = enabled

    def collect_signals(self, epoch: int) -> list[signal_pb2.HealthSignal]:
        """Returns what every seed has shown since the last call; what was not measured is absent.

        Args:
            epoch: Epoch that the figures cover, from 0.
        """
        return [
            signal
            for position, layer in enumerate(self.slots.values())
            for signal in drain_signals(layer, self._bank, position, epoch)
        ]

    # ---------------------------------------------------------------- changing

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
        check(blueprint)
        signature = self.signature(slot, seed, blueprint.graph.inputs[0].source)
        self.load_kernel(slot, seed, lower(blueprint, signature))

    def load_kernel(
        self,
        slot: str,
        seed: int,
        kernel: kernel_pb2.Kernel,
        weights: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Plants a kernel in a DORMANT seed, which becomes GERMINATED.

        Args:
            slot: Name of the slot.
            seed: Index of the seed.
            kernel: The kernel; copied.
            weights: Tensors by parameter name. None takes those that came with the kernel before,
                else draws them by the kernel's init from a generator private to kernel and seed.

        Raises:
            ValueError: If the seed is not DORMANT, or kernel or weights do not fit; the message
                names field, value and rule, and nothing has changed.
        """
        state = self.seed_state(slot, seed)
        if state != SeedLifecycleState.DORMANT:
            raise ValueError(
                f"slot {slot!r}, seed {seed} is {state.name}, but a kernel can be loaded into a "
                "DORMANT seed only"
            )
        layer = self.slots[slot]
        signature = self.signature(slot, seed, kernel.signature.source)
        digest = kernel_digest(kernel)
        entry = self.kernel_cache.get(digest)
        if entry is None:
            check_kernel(kernel)
            own = kernel_pb2.Kernel()
            own.CopyFrom(kernel)
            # Weights are part of a kernel only where it names their blob.
            entry = CachedKernel(own, weights if kernel.HasField("weights") else None)
        check_fit(kernel, signature, layer.output_axes)
        weights = entry.weights if weights is None else weights
        check_parameters(kernel, weights)
        graft = Graft(entry.kernel, digest, weights, layer.place(seed))
        graft.train(self.training)
        self.kernel_cache.put(digest, entry)
        self.kernel_cache.acquire(digest)
        layer.grafts[str(seed)] = graft
        self._move(slot, seed, SeedLifecycleState.GERMINATED, f"loaded {kernel.blueprint_name}")

    def unload_kernel(self, slot: str, seed: int) -> None:
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
        self.advance(slot, seed, SeedLifecycleState.CANCELLED, "unloaded")

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
            self._bank.set_alpha(*at, alpha)

    def set_schedule(self, slot: str, seed: int, schedule: lifecycle_pb2.AlphaSchedule) -> None:
        """Sets how alpha moves while the seed is GRAFTING; a running ramp starts anew."""
        if schedule.kind not in _SCHEDULES:
            raise ValueError(f"schedule.kind is {schedule.kind}, but it must be a known kind")
        end = schedule.end if schedule.HasField("end") else 1.0
        with self._naming(slot, seed) as at:
            self._bank.set_schedule(
                *at, _SCHEDULES[schedule.kind], schedule.steps, schedule.start, end
            )

    def set_frozen(self, slot: str, seed: int, frozen: bool) -> None:
        """Says whether the seed stays still once it is FOSSILIZED; it trains on by default."""
        self._bank.set_frozen(*self._at(slot, seed), frozen)

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
        completed = [self._seeds[index] for index in self._bank.tick()]
        for slot, seed in list(self._emptied):
            if self._bank.embargo_remaining(*self._at(slot, seed)) == 0:
                self._move(slot, seed, SeedLifecycleState.DORMANT, "embargo over")
        return completed

    def restore_bank(self, data: bytes) -> None:
        """Sets every seed's state, alpha and schedule to what ``bank.to_bytes()`` once returned.

        No observer is called: nothing moved, a past is restored.

        Raises:
            ValueError: If the bytes are of another bank, or a seed's state and the kernels that
                are loaded now contradict each other; nothing has changed.
        """
        bank = _C.SeedBank.from_bytes(data)
        if (bank.num_slots, bank.num_seeds) != (self._bank.num_slots, self._bank.num_seeds):
            raise ValueError(
                f"bank has {bank.num_slots} slots with {bank.num_seeds} seeds, but the model has "
                f"{self._bank.num_slots} with {self._bank.num_seeds}"
            )
        for slot, seed in self._seeds:
            state = SeedLifecycleState(bank.state(self._slot_index[slot], seed))
            if state.holds_graft != (self._graft(slot, seed) is not None):
                raise ValueError(
                    f"slot {slot!r}, seed {seed} is {state.name} in the bank, but the model holds "
                    + ("no kernel" if state.holds_graft else "a kernel")
                    + " there"
                )
        self._bank = bank
        self._bind()
        self._emptied = {at: None for at in self._seeds if self.seed_state(*at) in _EMPTIED}
        for slot in self.slots:
            self._rebuild(slot)

    def _move(self, slot: str, seed: int, after: SeedLifecycleState, reason: str) -> None:
        before = self.seed_state(slot, seed)
        with self._naming(slot, seed) as at:
            self._bank.advance(*at, int(after))
        layer = self.slots[slot]
        graft = layer.graft(seed)
        digest = "" if graft is None else graft.digest
        if after in _EMPTIED:
            self._emptied[slot, seed] = None
            layer.remove(seed)
            self.kernel_cache.release(digest)
        elif after == SeedLifecycleState.DORMANT:
            del self._emptied[slot, seed]
        self._rebuild(slot)
        transition = Transition(slot, seed, before, after, digest, reason)
        for observer in list(self.observers):
            observer(transition)

    def _rebuild(self, slot: str) -> None:
        layer = self.slots[slot]
        layer.rebuild([self.seed_state(slot, seed) for seed in range(layer.num_seeds)])
        if layer.computes:
            self._active[slot] = None
        else:
            self._active.pop(slot, None)

    def _graft(self, slot: str, seed: int) -> Graft | None:
        self._at(slot, seed)
        return self.slots[slot].graft(seed)

    def _at(self, slot: str, seed: int) -> tuple[int, int]:
        """The bank's numbers of a seed, checked."""
        if slot not in self._slot_index:
            near = difflib.get_close_matches(slot, self._slot_index, n=3, cutoff=0.4)
            hint = f"; near names: {', '.join(near)}" if near else ""
            raise ValueError(f"slot is {slot!r}, but the model has no such slot{hint}")
        num_seeds = self.slots[slot].num_seeds
        if not 0 <= seed < num_seeds:
            raise ValueError(f"seed is {seed}, but slot {slot!r} has seeds 0 to {num_seeds - 1}")
        return self._slot_index[slot], seed

    @contextlib.contextmanager
    def _naming(self, slot: str, seed: int) -> Iterator[tuple[int, int]]:
        """Adds the seed's name to what the bank has to say."""
        at = self._at(slot, seed)
        try:
            yield at
        except ValueError as error:
            raise ValueError(f"slot {slot!r}, seed {seed}: {error}") from error
