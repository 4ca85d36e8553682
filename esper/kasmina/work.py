"""What the seeds of a slot compute."""

from dataclasses import dataclass
from dataclasses import field

from esper import _C
from esper.kasmina.grafts import Graft


@dataclass(slots=True)
class SlotWork:
    """What the seeds of a slot compute; made anew on lifecycle events only.

    Attributes:
        plan: Plan of the seeds that the operator computes.
        native: Those seeds.
        graphs: Seeds that the interpreter computes.
        program: The same plan, ready to be run.
        owners: What the native seeds hold, each with the names of its parameters.
        reads_input: Whether a seed reads the slot's input.
    """

    plan: list[int] = field(default_factory=list)
    native: list[int] = field(default_factory=list)
    graphs: list[int] = field(default_factory=list)
    program: _C.SlotProgram = field(default_factory=lambda: _C.SlotProgram([]))
    owners: list[tuple[Graft, tuple[str, ...]]] = field(default_factory=list)
    reads_input: bool = False
