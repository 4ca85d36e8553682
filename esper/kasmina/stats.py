"""What a wrapped model says of itself, as plain typed records."""

from dataclasses import dataclass

from esper.kasmina.cache import CacheStats
from esper.kasmina.lifecycle import SeedLifecycleState


@dataclass(frozen=True, slots=True)
class SeedStats:
    """One seed.

    Attributes:
        seed: Index in its slot.
        state: Where it stands.
        chunk: Half-open range of the features that it owns; None until the width is known.
        alpha: Blend factor in force.
        muted: Whether its forward contribution is held at 0.
        frozen: Whether it stays still once fossilized.
        embargo_remaining: Steps until an emptied seed may be used again.
        kernel: Digest of its kernel; empty where it holds none.
        blueprint: Name of the blueprint, for people; empty where it holds no kernel.
        num_parameters: Elements of its parameters.
    """

    seed: int
    state: SeedLifecycleState
    chunk: tuple[int, int] | None
    alpha: float
    muted: bool
    frozen: bool
    embargo_remaining: int
    kernel: str
    blueprint: str
    num_parameters: int


@dataclass(frozen=True, slots=True)
class LayerStats:
    """One slot.

    Attributes:
        name: FQN of the module that it sits on.
        kind: Sort of slot, such as ``LINEAR``.
        width: Features of its output; None until a forward has told it.
        source_width: Features of its input; None where no seed can read it, or not told yet.
        seeds: Its seeds in order.
        num_parameters: Elements of all seeds' parameters.
        hooked: Whether the host's module runs the slot at all.
        calls: How often it ran since it was wrapped.
        missed_steps: Training forwards in which it should have run and did not.
    """

    name: str
    kind: str
    width: int | None
    source_width: int | None
    seeds: tuple[SeedStats, ...]
    num_parameters: int
    hooked: bool
    calls: int
    missed_steps: int


@dataclass(frozen=True, slots=True)
class ModelStats:
    """A wrapped model.

    Attributes:
        num_slots: Slots.
        num_seeds: Seeds of all slots.
        seeds_by_state: Number of seeds in each state that occurs.
        host_parameters: Elements of the host's parameters.
        seed_parameters: Elements of all seeds' parameters.
        training_forwards: Training forwards so far.
        sampled_forwards: Those of them in which telemetry was sampled.
        cache: The kernel cache.
    """

    num_slots: int
    num_seeds: int
    seeds_by_state: dict[SeedLifecycleState, int]
    host_parameters: int
    seed_parameters: int
    training_forwards: int
    sampled_forwards: int
    cache: CacheStats
