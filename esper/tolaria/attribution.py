"""Leave-one-out attribution: what each live seed is worth in the model as it stands.

A held-out trial asks once whether a seed pays, in the model of that moment. Later seeds may have
made an earlier one superfluous, or lean on it; so attribution mutes every live seed by itself and
compares the same samples with and without it.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from esper.kasmina import MorphableModel
from esper.kasmina import SeedLifecycleState
from esper.tolaria import randomness
from esper.tolaria.evaluation import Batch
from esper.tolaria.evaluation import SampleLoss
from esper.tolaria.evaluation import batch_losses
from esper.tolaria.evaluation import measured_in_turns
from esper.tolaria.evaluation import paired_trial
from esper.tolaria.history import SeedAttribution
from esper.tolaria.ranks import ALONE
from esper.tolaria.ranks import Ranks


def attribution(
    model: MorphableModel, batches: Iterable[Batch], loss: SampleLoss, ranks: Ranks = ALONE
) -> list[SeedAttribution]:
    """Measures what every seed that acts on the host is worth, in one pass over held-out data.

    Each batch is drawn once and run 1 + n times for n live seeds: as the model is, and with each
    seed muted. All runs of a batch draw the same random numbers. Runs in eval mode without
    gradients and leaves no trace in the model or the global random states.

    Args:
        model: The wrapped model.
        batches: Held-out batches; iterated once.
        loss: Per-sample loss.
        ranks: Who shares the work: the ranks take turns with the batches, which must be the same
            on all of them. Every rank returns all records.

    Returns:
        One record a live seed (GRAFTING to FOSSILIZED), in the order of the slots.

    Raises:
        ValueError: If ``loss`` does not return one loss per sample, there are fewer than 2 samples,
            or the ranks have different numbers of batches.
    """
    live = live_seeds(model)
    if not live:
        return []

    def measure(batch: Batch) -> Tensor:
        before = randomness.capture()
        losses = [batch_losses(model, batch, loss)]
        after = randomness.capture()
        for key in live:
            randomness.restore(before)
            with model.muted(*key):
                losses.append(batch_losses(model, batch, loss))
        randomness.restore(after)
        return torch.stack(losses)

    present, *muted = measured_in_turns(model, batches, measure, ranks)
    return [_record(model, key, present, without) for key, without in zip(live, muted, strict=True)]


def live_seeds(model: MorphableModel) -> list[tuple[str, int]]:
    """Returns (slot, seed) of every seed that acts on the host's output, in order.

    A fossil that was folded into its host's weight is no seed any more.
    """
    return [
        (slot, seed)
        for slot, seed in model.occupied_seeds()
        if SeedLifecycleState.GRAFTING
        <= model.seed_state(slot, seed)
        <= SeedLifecycleState.FOSSILIZED
        and model.seed_parameters(slot, seed)
    ]


def _record(
    model: MorphableModel, key: tuple[str, int], with_all: Tensor, without: Tensor
) -> SeedAttribution:
    slot, seed = key
    outcome = paired_trial(with_all, without, level=0.05)
    kernel = model.slots[slot].graft(seed)
    assert kernel is not None, "a live seed holds a kernel"
    return SeedAttribution(
        slot=slot,
        seed=seed,
        state=model.seed_state(slot, seed).name,
        kernel=kernel.digest,
        gain=outcome.gain,
        low=outcome.low,
        high=outcome.high,
        num_samples=outcome.num_samples,
    )
