"""What the seeds of a slot compute."""

from dataclasses import dataclass
from dataclasses import field

import torch
from torch import Tensor

from esper import _C
from esper.kasmina.grafts import Graft
from esper.kasmina.ops import slot_forward


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

    def run(
        self, h: Tensor, x: Tensor | None, scalars: Tensor, measure: bool, direct: bool
    ) -> tuple[Tensor, Tensor]:
        """Runs the native seeds; see ``slot_forward``.

        Args:
            h: The slot's output, features last.
            x: The slot's input where a seed reads it.
            scalars: The bank's scalars.
            measure: Whether to measure the chunks.
            direct: Whether backward accumulates the parameters' gradients itself.
        """
        # Parameters are looked up in each call: functional_call and sharding replace the tensors,
        # and torch.export the dictionary that holds them.
        if not torch.compiler.is_compiling():
            params = _C.collect_parameters(self.owners)
            result = self.program.run(h, x, params, scalars, measure, direct)
            if result is not None:
                return result
        params = []
        for graft, names in self.owners:
            for name in names:
                tensor = graft._parameters[name]
                assert tensor is not None
                fits = tensor.dtype is torch.float32 or tensor.dtype is h.dtype
                params.append(tensor if fits else tensor.to(h.dtype))
        return slot_forward(h, x, params, scalars, self.plan, measure)
