"""What a wrapped model has lived through, beside its weights, its seeds and their lifecycle.

With this a model that goes on from a checkpoint samples at the same steps, has measured the same
and draws the same numbers as the one that was not interrupted. The tensors in it are the model's
own: they are copied before the next step, or change.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from esper.kasmina.drift import DriftState
from esper.kasmina.layer import KasminaLayer
from esper.kasmina.sampling import SamplerState
from esper.kasmina.telemetry import TelemetryState


@dataclass(frozen=True, slots=True)
class SlotRuntime:
    """What a slot has lived through.

    Attributes:
        output_axes: Number of axes of its output; None until a forward has told it.
        calls: How often it ran; the random draws of its seeds count from it.
        missed_steps: Training forwards in which seeds should have computed and did not.
        tokens_per_sample: Rows of its output for each sample; None before the first forward.
        first_input_feeds: Whether seeds read the module's very first input.
        telemetry: What it has shown; None until the width is known.
        drift: How far its drift-controlled ramps have measured; None where none is under way.
    """

    output_axes: int | None
    calls: int
    missed_steps: int
    tokens_per_sample: float | None
    first_input_feeds: bool
    telemetry: TelemetryState | None
    drift: DriftState | None


@dataclass(frozen=True, slots=True)
class ModelRuntime:
    """What a model has lived through.

    Attributes:
        sampler: When its telemetry is sampled.
        slots: Its slots by name.
    """

    sampler: SamplerState
    slots: dict[str, SlotRuntime]


def runtime_of(layer: KasminaLayer) -> SlotRuntime:
    """Returns what a slot has lived through."""
    return SlotRuntime(
        layer.output_axes,
        layer.calls,
        layer.missed_steps,
        layer.tokens_per_sample,
        layer.inlet.reads_first,
        None if layer.telemetry is None else layer.telemetry.state(),
        None if layer.drift is None else layer.drift.state(),
    )


def check_slots(given: Mapping[str, SlotRuntime], slots: Mapping[str, KasminaLayer]) -> None:
    """Refuses the runtime of another model.

    Raises:
        ValueError: If it is of other slots.
    """
    if given.keys() != slots.keys():
        raise ValueError(f"runtime is of slots {list(given)}, but the model has {list(slots)}")


def resume_slot(layer: KasminaLayer, runtime: SlotRuntime) -> None:
    """Lets a slot go on from what one of the same place and state had lived through."""
    layer.output_axes = runtime.output_axes
    layer.calls, layer.missed_steps = runtime.calls, runtime.missed_steps
    layer.tokens_per_sample = runtime.tokens_per_sample
    layer.inlet.reads_first = runtime.first_input_feeds
    if layer.drift is not None:
        layer.drift.resume(runtime.drift)
    if runtime.telemetry is not None:
        resume_telemetry(layer, runtime.telemetry)


def resume_telemetry(layer: KasminaLayer, state: TelemetryState) -> None:
    """Lets a slot go on from what one of the same place and state had measured."""
    if layer.telemetry is None:
        return
    device = torch.device("cpu") if layer.device is None else layer.device
    probe = None if state.growth is None else layer.new_probe(state.growth.dormant, device)
    layer.telemetry.resume(state, probe)
