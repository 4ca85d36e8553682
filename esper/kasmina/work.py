"""What the seeds of a slot compute."""

from dataclasses import dataclass
from dataclasses import field

from esper.kasmina.grafts import Graft


@dataclass(slots=True)
class SlotWork:
    """What the seeds of a slot compute; made anew on lifecycle events only.

    Attributes:
        plan: Plan of the seeds that the operator computes.
        native: Those seeds.
        graphs: Seeds that the interpreter computes.
        grafts: What the native seeds hold.
        reads_input: Whether a seed reads the slot's input.
    """

    plan: list[int] = field(default_factory=list)
    native: list[int] = field(default_factory=list)
    graphs: list[int] = field(default_factory=list)
    grafts: list[Graft] = field(default_factory=list)
    reads_input: bool = False
