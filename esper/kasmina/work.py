"""What the seeds of a slot compute."""

from dataclasses import dataclass
from dataclasses import field

import torch
from torch import Tensor

from esper import _C
from esper.kasmina.grafts import Graft
from esper.kasmina.ops import slot_forward


@dataclass(frozen=True, slots=True)
class _Prepared:
    """A plan that is ready to be run, and the native seeds with the names of their parameters."""

    program: _C.SlotProgram
    owners: list[tuple[Graft, tuple[str, ...]]]


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
    _prepared: _Prepared | None = None

    def replan(self, plan: list[int]) -> None:
        """Takes up another plan; it is made ready by the first call, not while a seed moves."""
        self.plan = plan
        self._prepared = None

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
            if self._prepared is None:
                owners = [(graft, graft.prepared.parameter_names) for graft in self.grafts]
                self._prepared = _Prepared(_C.SlotProgram(self.plan), owners)
            params = _C.collect_parameters(self._prepared.owners)
            result = self._prepared.program.run(h, x, params, scalars, measure, direct)
            if result is not None:
                return result
        params = []
        for graft in self.grafts:
            for name in graft.prepared.parameter_names:
                tensor = graft._parameters[name]
                assert tensor is not None
                fits = tensor.dtype is torch.float32 or tensor.dtype is h.dtype
                params.append(tensor if fits else tensor.to(h.dtype))
        return slot_forward(h, x, params, scalars, self.plan, measure)
