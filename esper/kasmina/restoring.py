"""Whether the parts of a saved model fit each other and the model that they are put into."""

from collections.abc import Collection
from collections.abc import Mapping

from esper import _C
from esper.kasmina.layer import KasminaLayer
from esper.kasmina.lifecycle import SeedLifecycleState
from esper.kasmina.sites import SlotState


def check_restorable(
    saved: _C.SeedBank,
    states: Mapping[str, SlotState],
    planted: Collection[tuple[str, int]],
    slots: Mapping[str, KasminaLayer],
    bank: _C.SeedBank,
) -> None:
    """Refuses parts that do not fit.

    Args:
        saved: The saved bank.
        states: What each slot had learnt.
        planted: Slot and index of the seeds whose kernels were saved.
        slots: The model's slots, in the order of its bank.
        bank: The model's bank.

    Raises:
        ValueError: With what does not fit.
    """
    if (saved.num_slots, saved.num_seeds) != (bank.num_slots, bank.num_seeds):
        raise ValueError(
            f"bank has {saved.num_slots} slots with {saved.num_seeds} seeds, but the model has "
            f"{bank.num_slots} with {bank.num_seeds}"
        )
    if states.keys() != slots.keys():
        raise ValueError(f"slots are {list(states)}, but the model has {list(slots)}")
    for name, state in states.items():
        width, entry = slots[name].width, slots[name].inlet.name
        if width is not None and width != state.width:
            raise ValueError(f"slots[{name!r}].width is {state.width}, but the model has {width}")
        if entry != state.entry:
            raise ValueError(
                f"slots[{name!r}].entry is {state.entry!r}, but the model has {entry!r}"
            )
    seeds = [
        (position, name, seed)
        for position, (name, layer) in enumerate(slots.items())
        for seed in range(layer.num_seeds)
    ]
    for position, name, seed in seeds:
        stage = SeedLifecycleState(saved.state(position, seed))
        if stage.holds_graft != ((name, seed) in planted):
            raise ValueError(
                f"slot {name!r}, seed {seed} is {stage.name} in the bank, but grafts hold "
                + ("no kernel for it" if stage.holds_graft else "a kernel for it")
            )
    strangers = set(planted) - {(name, seed) for _, name, seed in seeds}
    if strangers:
        raise ValueError(f"grafts hold kernels for {sorted(strangers)}, but no slot has such seeds")
