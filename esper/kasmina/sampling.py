"""Running the host's forward: when to look, at what, and what to notice if a slot stays silent."""

import contextlib
import warnings
from collections.abc import Callable
from collections.abc import Collection
from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch import nn

from esper.kasmina.checks import check_whole
from esper.kasmina.host_graph import node_names
from esper.kasmina.host_graph import record_execution
from esper.kasmina.layer import KasminaLayer
from esper.kasmina.rows import SampledStep
from esper.kasmina.slots import SlotTable

_LEAST_INTERVAL = 8
_PLAIN_FORWARDS = 32  # of an epoch before the interval stretches, so that short epochs show enough
_STRETCH = 4  # then a round ends when the epoch is so many times as long as at its beginning

Meter = Callable[[tuple[object, ...], Mapping[str, object], float], None]
"""Is told of a training forward: its inputs, and the share of the slots that it samples."""


@dataclass(frozen=True, slots=True)
class SamplerState:
    """Where a sampler stands.

    Attributes:
        interval: Every how many training forwards telemetry is sampled.
        stretching: Whether the interval grows until the telemetry is collected.
        enabled: Whether it is sampled at all.
        training_forwards: Training forwards so far.
        sampled_forwards: Those of them that were sampled.
        uncollected_forwards: Training forwards since the telemetry was collected.
        order: Modules in order of execution; None before the first training forward.
    """

    interval: int
    stretching: bool
    enabled: bool
    training_forwards: int
    sampled_forwards: int
    uncollected_forwards: int
    order: list[str] | None


class Sampler:
    """Decides for each forward what is observed; with nothing to observe it only calls the host.

    Every slot is sampled in one training forward of each interval. The slots take turns, so that no
    single step is dear. Unless the interval was set, it stretches within an epoch: after the rounds
    of the first 32 forwards the next one ends when the epoch is four times as long, the one after
    it at sixteen times, and so on. So the first figures of an epoch come soon, and long epochs pay
    little.

    Args:
        host: The user's model.
        slots: Its slots.
        enabled: Whether telemetry is sampled at all.

    Attributes:
        training_forwards: Forwards in training mode with gradients so far.
        sampled_forwards: Those of them in which slots were sampled.
        order: Modules in the order of execution of the first training forward; None before it.
    """

    def __init__(self, host: nn.Module, slots: SlotTable, enabled: bool) -> None:
        self.enabled = enabled
        self._names = tuple(slots)
        self._interval = max(_LEAST_INTERVAL, len(slots))  # mostly one slot a step, never more
        self._stretching = True
        self.training_forwards = 0
        self.sampled_forwards = 0
        self._uncollected_forwards = 0
        self.order: list[str] | None = None
        self._unknown = {layer.name for layer in slots.values() if layer.width is None}
        # torch fuses a whole encoder layer in inference, past the modules inside it.
        self._fused = {
            name: encoder
            for encoder in host.modules()
            if isinstance(encoder, nn.TransformerEncoderLayer)
            for name, layer in slots.items()
            if any(module is layer.module for module in encoder.modules())
        }
        self._warned: set[str] = set()

    def state(self) -> SamplerState:
        """Returns where the sampler stands."""
        return SamplerState(
            self._interval,
            self._stretching,
            self.enabled,
            self.training_forwards,
            self.sampled_forwards,
            self._uncollected_forwards,
            self.order,
        )

    def resume(self, state: SamplerState) -> None:
        """Goes on from where another stood."""
        self.interval, self.enabled = state.interval, state.enabled
        self._stretching = state.stretching
        self.training_forwards = state.training_forwards
        self.sampled_forwards = state.sampled_forwards
        self._uncollected_forwards = state.uncollected_forwards
        self.order = state.order

    @property
    def interval(self) -> int:
        """Every how many training forwards a slot is sampled."""
        return self._interval

    @interval.setter
    def interval(self, value: int) -> None:
        check_whole("telemetry_interval", value, 1)
        self._interval, self._stretching = value, False

    def collected(self) -> None:
        """Notes that what was sampled has been taken away; a stretched interval is short again."""
        if self._uncollected_forwards >= self._interval:  # else slots wait for their first turn
            self._uncollected_forwards = 0

    def forward(
        self,
        host: nn.Module,
        slots: SlotTable,
        active: Collection[str],
        meters: Iterable[Meter],
        args: tuple[object, ...],
        kwargs: Mapping[str, object],
    ) -> object:
        """Calls the host.

        Args:
            host: The user's model.
            slots: Its slots.
            active: Names of the slots with seeds that compute.
            meters: Told of the forward if it is one in training mode with gradients.
            args: Positional inputs.
            kwargs: Keyword inputs.
        """
        trains = host.training and torch.is_grad_enabled()
        # Inside functorch transforms tensors have no values to look at.
        training = trains and torch._C._functorch.peek_interpreter_stack() is None
        sampled = self._turn() if training and self.enabled else ()
        if trains:
            for meter in meters:
                meter(args, kwargs, len(sampled) / len(self._names))
        number = self.training_forwards
        self.training_forwards += training
        self._uncollected_forwards += training
        record = training and self.order is None
        if not (sampled or record or active or self._unknown):
            return host(*args, **kwargs)
        step = SampledStep(number)
        num_samples = _num_samples(args, kwargs)
        calls = {name: slots[name].calls for name in active}
        with contextlib.ExitStack() as stack:
            self.sampled_forwards += bool(sampled)
            looked_at = self._names if record else {*sampled, *self._unknown}
            for name in filter(looked_at.__contains__, self._names):
                encoder = self._fused.get(name)
                # A hook would take the fused path from an encoder layer that runs in eval mode.
                plain = name in active or encoder is None or encoder.training
                look = name in sampled and plain
                if look or name in self._unknown or (record and plain):
                    seen = _observed(slots[name], step if look else None, num_samples)
                    stack.enter_context(seen)
            if any(name in self._fused for name in (*active, *self._unknown)):
                stack.enter_context(_fused_path_off())
            if record:
                self.order = stack.enter_context(record_execution(host, node_names(host, slots)))
            output = host(*args, **kwargs)
        self._unknown = {name for name in self._unknown if slots[name].width is None}
        if training:
            for name, before in calls.items():
                if slots[name].calls == before:
                    self._report_missed(slots[name])
        return output

    def _turn(self) -> tuple[str, ...]:
        """Names of the slots that the coming forward samples."""
        length, position = self._interval, self.training_forwards % self._interval
        if self._stretching:  # counted from where the telemetry was collected
            forwards = self._uncollected_forwards
            position = forwards % length
            end = -(-_PLAIN_FORWARDS // length) * length  # of the plain rounds
            while forwards >= end:
                position, length = forwards - end, (_STRETCH - 1) * end
                end += length
        num_slots = len(self._names)  # slot n has its turn at position n * length // num_slots
        first = -(-position * num_slots // length)
        return self._names[first : -(-(position + 1) * num_slots // length)]

    def _report_missed(self, layer: KasminaLayer) -> None:
        layer.missed_steps += 1
        if layer.name not in self._warned:
            self._warned.add(layer.name)
            warnings.warn(
                f"slot {layer.name!r} has a seed that should compute, but its module did not run "
                "in this training forward; such forwards are counted as missed_steps",
                stacklevel=5,
            )


@contextlib.contextmanager
def _observed(
    layer: KasminaLayer, step: SampledStep | None, num_samples: int | None
) -> Iterator[None]:
    layer.begin_observation(step)
    try:
        yield
    finally:
        layer.end_observation(num_samples)


def _num_samples(args: tuple[object, ...], kwargs: Mapping[str, object]) -> int | None:
    """Size of the batch: the first axis of the first tensor."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor) and value.dim() > 0:
            return len(value)
    return None


@contextlib.contextmanager
def _fused_path_off() -> Iterator[None]:
    """Keeps encoders from packing their inputs into nested tensors, which no slot can work on."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)
