"""A host with its slots: how it runs as a module, and everything that can be seen of it."""

import copy
import difflib
import weakref
from collections.abc import Callable
from collections.abc import Sequence
from itertools import accumulate
from typing import Self
from typing import cast
from typing import overload

import torch
from torch import Tensor
from torch import nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils._pytree import tree_leaves

from esper import _C
from esper.common.v1 import blueprint_pb2
from esper.common.v1 import kernel_pb2
from esper.common.v1 import signal_pb2
from esper.kasmina.checks import check_kind
from esper.kasmina.checks import check_whole
from esper.kasmina.comparison import Original
from esper.kasmina.grafts import Graft
from esper.kasmina.host_graph import host_graph
from esper.kasmina.layer import KasminaLayer
from esper.kasmina.lifecycle import SeedLifecycleState
from esper.kasmina.places import signature_of
from esper.kasmina.pooling import pooled
from esper.kasmina.report import drain_signals
from esper.kasmina.report import layer_stats
from esper.kasmina.runtime import ModelRuntime
from esper.kasmina.runtime import check_slots
from esper.kasmina.runtime import resume_slot
from esper.kasmina.runtime import resume_telemetry
from esper.kasmina.runtime import runtime_of
from esper.kasmina.sampling import Meter
from esper.kasmina.sampling import Sampler
from esper.kasmina.sites import Site
from esper.kasmina.slots import SlotTable
from esper.kasmina.stats import LayerStats

# The wrapped model that each slot's module belongs to.
_OWNERS: weakref.WeakKeyDictionary[nn.Module, weakref.ref["SlottedModel"]]
_OWNERS = weakref.WeakKeyDictionary()


def is_wrapped(module: nn.Module) -> bool:
    """Returns whether a module carries a slot, of a live wrapped model or left hooked by one."""
    owner = _OWNERS.get(module)
    hooked = any(isinstance(hook, KasminaLayer) for hook in module._forward_hooks.values())
    return hooked or (owner is not None and owner() is not None)


class SlottedModel(nn.Module):
    """A host with slots: how it runs, and what can be seen of it.

    It is called like the host, and attributes that it does not have are looked up in the host.
    Parameters and buffers are those of the host (``host.*``) and of the planted seeds
    (``slots.*``).

    Args:
        host: The user's model.
        sites: Where the slots sit.
        num_seeds: Number of seeds of each slot.
        telemetry_enabled: Whether telemetry is sampled.
        original: The host as it was, for ``compare_with_original``; None if it is not kept.

    Attributes:
        host: The user's model.
        slots: The slots by the FQN of their module.
        revision: Grows whenever a seed moves from state to state, or is restored.
        meters: Called before each training forward with its inputs and the share of the slots that
            it samples.
    """

    host: nn.Module
    slots: SlotTable

    def __init__(
        self,
        host: nn.Module,
        sites: Sequence[Site],
        num_seeds: Sequence[int],
        telemetry_enabled: bool,
        original: Original | None,
    ) -> None:
        super().__init__()
        first_rows = accumulate(num_seeds, initial=0)
        layers = [
            KasminaLayer(site, seeds, first_row)
            for site, seeds, first_row in zip(sites, num_seeds, first_rows, strict=False)
        ]
        self._bank = _C.SeedBank(list(num_seeds))
        self.host = host
        self.slots = SlotTable(layers)
        self.revision = 0
        self.meters: list[Meter] = []
        self._original = original
        self._layers = tuple(layers)  # by position; `slots` finds them by name
        self._slot_index = {layer.name: position for position, layer in enumerate(layers)}
        self._seeds = [
            (layer.name, seed) for layer in self.slots.values() for seed in range(layer.num_seeds)
        ]
        self._structure = ""  # which seeds compute, and what
        self._active: dict[str, str] = {}  # structure of the slots with seeds that compute
        self._sampler = Sampler(host, self.slots, telemetry_enabled)
        self.training = host.training
        for module in self.slots.modules():
            module.training = host.training
        self._bind()

    # ---------------------------------------------------------------- as a module

    def forward(self, *args: object, **kwargs: object) -> object:
        """Runs the host with its seeds; inputs and outputs are the host's."""
        if torch.compiler.is_exporting() and self._active:
            return self._exported(args, kwargs)
        if torch.compiler.is_compiling():
            # A compiled graph is not guarded on hooks, but on what it reads: other seeds at work
            # are another structure, and that is another graph.
            assert self._structure == self._structure.strip()
            return self.host(*args, **kwargs)
        return self._sampler.forward(self.host, self.slots, self._active, self.meters, args, kwargs)

    def _exported(self, args: tuple[object, ...], kwargs: dict[str, object]) -> object:
        """Runs the host under torch.export, with the seeds as they are now."""
        if torch.compiler.is_dynamo_compiling():
            raise ValueError(
                "seeds of the model are at work, and strict export does not find their parameters "
                "where they act: pass strict=False, or export esper.harden(model)"
            )
        # The program keeps the scalars as a constant, which must not be the bank's living memory.
        with unset_fake_temporarily():
            constant = torch.from_numpy(self._bank.scalars().copy())
        slots = [self.slots[name] for name in self._active]
        for layer in slots:
            layer.bind(constant)
        try:
            return self.host(*args, **kwargs)
        finally:
            for layer in slots:
                layer.bind(self._scalars)

    def __getattr__(self, name: str) -> Tensor | nn.Module:
        try:
            return super().__getattr__(name)
        except AttributeError:
            host = self.__dict__.get("_modules", {}).get("host")
            if host is None:
                raise
            return cast(Tensor | nn.Module, getattr(host, name))

    def __deepcopy__(self, memo: dict[int, object]) -> Self:
        clone = type(self).__new__(type(self))
        memo[id(self)] = clone
        memo[id(self.meters)] = []  # they measure this model, not its copies
        # What a module keeps of its last forward is no leaf, and torch copies leaves alone.
        for module in self.host.modules():
            for value in tree_leaves(vars(module)):
                if isinstance(value, Tensor) and not value.is_leaf:
                    memo[id(value)] = value.detach()
        clone.__dict__.update(copy.deepcopy(self.__dict__, memo))
        clone._bind()
        return clone

    def _bind(self) -> None:
        """Points the slots at this model's bank, and notes whose they are."""
        self._scalars = torch.from_numpy(self._bank.scalars())
        for layer in self.slots.values():
            layer.bind(self._scalars)
            _OWNERS[layer.module] = weakref.ref(self)

    def release(self) -> nn.Module:
        """Removes every hook and gives up the host, which is returned; ends this model."""
        host = self.host
        for layer in self.slots.values():
            layer.detach()
            del _OWNERS[layer.module]
        del self.host
        return host

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Resets all gradients; slots without a kernel, mostly all of them, are not looked through.

        Args:
            set_to_none: Whether gradients become None instead of zeros.
        """
        self.host.zero_grad(set_to_none)
        for layer in self._layers:
            if layer.planted:
                layer.zero_grad(set_to_none)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        nn.Module._apply(self, fn, recurse)
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
        return signature_of(self.slots[slot], seed, source)

    def alpha(self, slot: str, seed: int) -> float:
        """Returns the blend factor of a seed; 0 where it holds no kernel."""
        return self._bank.alpha(*self._at(slot, seed))

    def occupied_seeds(self) -> list[tuple[str, int]]:
        """Returns (slot, seed) of every seed that holds a kernel, in order."""
        return [(layer.name, seed) for layer in self._layers for seed in sorted(layer.planted)]

    def host_parameters(self, slot: str) -> list[nn.Parameter]:
        """Returns the parameters of the module that a slot sits on, its children's included."""
        self._at(slot, 0)
        return list(self.slots[slot].module.parameters())

    def num_parameters(self) -> int:
        """Returns the number of trainable elements of host and seeds; tied ones count once."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad)

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

    @property
    def direct_gradients(self) -> bool:
        """Whether ``backward`` adds to the ``.grad`` of seeds' parameters itself. Default: False.

        Torch's engine takes about 2 us for each parameter, which is most of a training step where
        batches are small and seeds many. The gradients are the same to the bit, and parameters with
        hooks (as data parallelism sets them) take the usual way. It is for loops that call
        ``loss.backward()`` and nothing else: ``torch.autograd.grad`` does not find the seeds'
        parameters, ``backward(inputs=...)`` leaves them alone, and ``create_graph`` is refused.
        """
        return self._layers[0].direct_gradients if self._layers else False

    @direct_gradients.setter
    def direct_gradients(self, value: bool) -> None:
        for layer in self._layers:
            layer.direct_gradients = value

    # ---------------------------------------------------------------- telemetry

    @property
    def telemetry_interval(self) -> int:
        """Every how many training forwards a slot is sampled; the slots take turns.

        Default: as many forwards as there are slots, but at least 8, so that no forward samples
        more than one slot. It stretches until ``collect_signals`` is called: after the rounds of
        the first 32 forwards comes one that is three times as long as all of them, and each further
        one is four times as long as the one before. An interval that is set stays as it is.
        """
        return self._sampler.interval

    @telemetry_interval.setter
    def telemetry_interval(self, value: int) -> None:
        self._sampler.interval = value

    @property
    def telemetry_enabled(self) -> bool:
        """Whether telemetry is sampled."""
        return self._sampler.enabled

    def enable_telemetry(self, enabled: bool) -> None:
        """Turns sampling on or off."""
        self._sampler.enabled = enabled

    def collect_signals(self, epoch: int) -> list[signal_pb2.HealthSignal]:
        """Returns what every seed has shown since the last call; what was not measured is absent.

        Args:
            epoch: Epoch that the figures cover, from 0.
        """
        check_whole("epoch", epoch, 0, 2**63 - 1)
        self._sampler.collected()
        return [
            signal
            for position, layer in enumerate(self.slots.values())
            for signal in drain_signals(layer, self._bank, position, epoch)
        ]

    def growth_directions(
        self, slot: str, seed: int, source: blueprint_pb2.SeedSource
    ) -> Tensor | None:
        """Returns the directions of a seed's source that the wanted update asks for most.

        They belong to the epoch that ``collect_signals`` was last called for.

        Args:
            slot: Name of the slot.
            seed: A seed that was dormant then.
            source: What it would read.

        Returns:
            Directions, each scaled by how much of the update it carries, float32
            [source width, k]; None where nothing was measured.
        """
        self._at(slot, seed)
        telemetry = self.slots[slot].telemetry
        if telemetry is None or telemetry.last_growth is None:
            return None
        return telemetry.last_growth.directions(seed, source)

    def drift_sums(self) -> list[Tensor]:
        """Returns what drift-controlled ramps go by in the coming ``tick``, float64 vectors.

        Processes that train on parts of one batch add theirs up in place before it, so that their
        ramps stay equal; a session does.
        """
        return [layer.drift.sums for layer in self._layers if layer.drift is not None]

    def runtime(self) -> ModelRuntime:
        """Returns what the model has lived through; call it between steps."""
        slots = {name: runtime_of(layer) for name, layer in self.slots.items()}
        return ModelRuntime(self._sampler.state(), slots)

    def resume(self, runtime: ModelRuntime) -> None:
        """Lets the model, its seeds restored, go on from what another had lived through.

        Raises:
            ValueError: If it is the runtime of a model with other slots; nothing has changed.
        """
        check_kind("runtime", runtime, ModelRuntime)
        check_slots(runtime.slots, self.slots)
        self._sampler.resume(runtime.sampler)
        for name, slot in runtime.slots.items():
            resume_slot(self.slots[name], slot)

    def pool(self, runtimes: Sequence[ModelRuntime]) -> None:
        """Takes what all processes of a run have measured for what this model has.

        Args:
            runtimes: What the models of all processes have lived through, this one's included;
                they train on parts of the same batches and hold the same seeds.
        """
        for name, layer in self.slots.items():
            states = [runtime.slots[name].telemetry for runtime in runtimes]
            seen = [state for state in states if state is not None]
            if len(seen) == len(runtimes) > 1:
                resume_telemetry(layer, pooled(seen))

    # ---------------------------------------------------------------- helpers

    def _watch_drift(self, layer: KasminaLayer) -> None:
        """Lets a slot measure its drift while a ramp there is controlled by it."""
        layer.watch_drift(bool(self._bank.drift_ramps(self._slot_index[layer.name])))

    def _measure_drift(self) -> None:
        """Tells the bank how far outputs have drifted; a step without any keeps the last figure."""
        for position, layer in enumerate(self._layers):
            if layer.drift is None:
                continue
            drift = layer.drift.measure()
            for seed in self._bank.drift_ramps(position):
                if drift is not None:
                    self._bank.set_drift(position, seed, *drift)

    def _switch(self, layer: KasminaLayer) -> None:
        """Lets a slot compute what the bank says from the next forward on."""
        position = self._slot_index[layer.name]
        layer.switch(self._bank.plan(position))
        if layer.computes:
            self._active[layer.name] = layer.structure
        else:
            self._active.pop(layer.name, None)
        self._structure = "; ".join(self._active.values())

    def _graft(self, slot: str, seed: int) -> Graft | None:
        position, _ = self._at(slot, seed)
        return self._layers[position].graft(seed)

    def _at(self, slot: str, seed: int) -> tuple[int, int]:
        """The bank's numbers of a seed, checked."""
        position = self._slot_index.get(slot) if isinstance(slot, str) else None
        if position is None:
            near = difflib.get_close_matches(str(slot), self._slot_index, n=3, cutoff=0.4)
            hint = f"; near names: {', '.join(near)}" if near else ""
            raise ValueError(f"slot is {slot!r}, but the model has no such slot{hint}")
        num_seeds = self._layers[position].num_seeds
        if type(seed) is not int or not 0 <= seed < num_seeds:
            raise ValueError(f"seed is {seed!r}, but slot {slot!r} has seeds 0 to {num_seeds - 1}")
        return position, seed
