"""What slots and seeds say of themselves, from the layers and the bank."""

from esper import _C
from esper.common.v1 import kernel_pb2
from esper.common.v1 import signal_pb2
from esper.kasmina.layer import KasminaLayer
from esper.kasmina.lifecycle import SeedLifecycleState
from esper.kasmina.lifecycle import to_proto
from esper.kasmina.sites import host_flops_per_token
from esper.kasmina.stats import LayerStats
from esper.kasmina.stats import SeedStats


def layer_stats(layer: KasminaLayer, bank: _C.SeedBank, slot: int) -> LayerStats:
    """Returns the record of a slot.

    Args:
        layer: The slot.
        bank: The model's bank.
        slot: Number of the slot in the bank.
    """
    seeds = tuple(_seed_stats(layer, bank, slot, seed) for seed in range(layer.num_seeds))
    return LayerStats(
        name=layer.name,
        kind=kernel_pb2.SlotKind.Name(layer.kind).removeprefix("SLOT_KIND_"),
        width=layer.width,
        source_width=layer.source_width,
        seeds=seeds,
        num_parameters=sum(seed.num_parameters for seed in seeds),
        hooked=layer.hooked,
        calls=layer.calls,
        missed_steps=layer.missed_steps,
    )


def _seed_stats(layer: KasminaLayer, bank: _C.SeedBank, slot: int, seed: int) -> SeedStats:
    graft = layer.graft(seed)
    return SeedStats(
        seed=seed,
        state=SeedLifecycleState(bank.state(slot, seed)),
        chunk=layer.bounds[seed] if layer.bounds else None,
        alpha=bank.alpha(slot, seed),
        muted=bank.muted(slot, seed),
        frozen=bank.frozen(slot, seed),
        embargo_remaining=bank.embargo_remaining(slot, seed),
        kernel="" if graft is None else graft.digest,
        blueprint="" if graft is None else graft.kernel.blueprint_name,
        num_parameters=0 if graft is None else graft.kernel.parameter_count,
    )


def drain_signals(
    layer: KasminaLayer, bank: _C.SeedBank, slot: int, epoch: int
) -> list[signal_pb2.HealthSignal]:
    """Returns one signal for each seed of a slot, and starts its accumulators anew.

    Args:
        layer: The slot.
        bank: The model's bank.
        slot: Number of the slot in the bank.
        epoch: Epoch that the figures cover.
    """
    flops = host_flops_per_token(layer.module)
    if layer.telemetry is None:  # never seen
        signals = [signal_pb2.HealthSignal() for _ in range(layer.num_seeds)]
    else:
        signals = layer.telemetry.drain()
    for seed, signal in enumerate(signals):
        state = SeedLifecycleState(bank.state(slot, seed))
        signal.slot, signal.seed, signal.epoch = layer.name, seed, epoch
        signal.state = to_proto(state)
        graft = layer.graft(seed)
        if graft is not None:
            signal.kernel = graft.digest
            signal.alpha = bank.alpha(slot, seed)
        if flops is not None:
            signal.host_flops_per_token = flops
        if layer.tokens_per_sample is not None:
            signal.tokens_per_sample = layer.tokens_per_sample
        # Only the ramp's length is known here; the session plans the other stages.
        ramp_done = bool(bank.progress()[bank.index(slot, seed)] >= 1.0)
        signal.ready_for_transition = state == SeedLifecycleState.GRAFTING and ramp_done
    return signals
