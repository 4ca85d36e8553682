"""The states of a seed, as Python and the wire name them.

The states and their legal moves are owned by the native lifecycle table (``esper._C.LIFECYCLE``,
``esper._C.legal_move``); the numbers here are read from it, and a state that it does not have fails
on import.

| id | state | alpha_fwd | alpha_bwd | gamma | seed parameters |
|---|---|---|---|---|---|
| 0 | DORMANT | - | - | - | none |
| 1 | GERMINATED | - | - | - | present, idle until the next step boundary |
| 2 | TRAINING | 0 | 1 | 0 | train on the true gradient; the output is the host's, bit for bit |
| 3 | GRAFTING | alpha | alpha | alpha | train with the host while alpha ramps |
| 4 | STABILIZATION | 1 | 0 | 1 | held still while the host settles |
| 5 | EVALUATING | 1 | 0 | 1 | held still; held-out trial against alpha 0 |
| 6 | FINE_TUNING | 1 | 1 | 1 | train with the host |
| 7 | FOSSILIZED | 1 | 1 or 0 | 1 | permanent; trains on or frozen by policy |
| 8 | CULLED | - | - | - | removed on its merits; embargoed, then DORMANT |
| 9 | CANCELLED | - | - | - | stopped by the user or before it trained; then DORMANT |
| 10 | ROLLED_BACK | - | - | - | removed by the governor; embargoed, then DORMANT |
"""

from dataclasses import dataclass
from enum import IntEnum
from typing import Final
from typing import cast

from esper import _C
from esper.common.v1 import lifecycle_pb2

_ID: Final = {name: number for number, name in _C.LIFECYCLE}


_FIRST_COMPUTING: Final = _ID["TRAINING"]
_LAST_COMPUTING: Final = _ID["FOSSILIZED"]


class SeedLifecycleState(IntEnum):
    """Where a seed stands in its life; the value is the native id."""

    DORMANT = _ID["DORMANT"]
    GERMINATED = _ID["GERMINATED"]
    TRAINING = _ID["TRAINING"]
    GRAFTING = _ID["GRAFTING"]
    STABILIZATION = _ID["STABILIZATION"]
    EVALUATING = _ID["EVALUATING"]
    FINE_TUNING = _ID["FINE_TUNING"]
    FOSSILIZED = _ID["FOSSILIZED"]
    CULLED = _ID["CULLED"]
    CANCELLED = _ID["CANCELLED"]
    ROLLED_BACK = _ID["ROLLED_BACK"]

    @property
    def computes(self) -> bool:
        """Whether the seed's function is evaluated in this state."""
        return _FIRST_COMPUTING <= self._value_ <= _LAST_COMPUTING

    @property
    def holds_graft(self) -> bool:
        """Whether the seed holds a kernel and its parameters in this state."""
        return self == SeedLifecycleState.GERMINATED or self.computes

    @classmethod
    def parse(cls, state: "SeedLifecycleState | int | str") -> "SeedLifecycleState":
        """Returns the state that a name or native id stands for.

        Raises:
            ValueError: If there is no such state.
        """
        if isinstance(state, cls):
            return state
        if isinstance(state, str):
            if state in cls.__members__:
                return cls[state]
        elif type(state) is int and state in set(cls):
            return cls(state)
        raise ValueError(f"state is {state!r}, but it must be one of {', '.join(cls.__members__)}")


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


def to_proto(state: SeedLifecycleState) -> lifecycle_pb2.SeedState:
    """Returns the wire's number of a state, found by name."""
    number = lifecycle_pb2.SeedState.Value(f"SEED_STATE_{state.name}")
    return cast(lifecycle_pb2.SeedState, number)


def from_proto(state: lifecycle_pb2.SeedState) -> SeedLifecycleState:
    """Returns the state of a number on the wire, found by name.

    Raises:
        ValueError: If the number is unspecified or unknown.
    """
    if state not in lifecycle_pb2.SeedState.values() or not state:
        raise ValueError(f"state is {state}, but it must be a specified SeedState")
    return SeedLifecycleState[lifecycle_pb2.SeedState.Name(state).removeprefix("SEED_STATE_")]
