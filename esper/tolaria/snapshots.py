"""The last good states of a run, in the memory of the host.

A snapshot holds weights, seeds and the training state as they are between two steps. Its tensors go
into buffers that are made once and used again, pinned where they come from a GPU, so that a copy
needs no allocation and the training thread does not wait for it. Sharded tensors stay where
they are.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch import nn

from esper.common.v1 import kernel_pb2
from esper.kasmina import MorphableModel
from esper.kasmina import SlotState
from esper.tolaria.packing import copied
from esper.tolaria.state import TrainingState

_Layout = tuple[torch.Size, torch.dtype, bool]
_Buffer = tuple[_Layout, Tensor]
_PLAIN = (Tensor, nn.Parameter)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A run between two steps.

    Attributes:
        host: The host's parameters and buffers by name.
        bank: The lifecycle of all seeds.
        slots: What each slot has learnt from its forwards.
        grafts: Kernel and weights of each seed that holds one.
        training: Everything else that the next step follows from.
        drawn: Batches that the epoch had drawn, see ``Session.batches``.
        buffers: The memory that its tensors take.
    """

    host: dict[str, Tensor]
    bank: bytes
    slots: dict[str, SlotState]
    grafts: dict[tuple[str, int], tuple[kernel_pb2.Kernel, dict[str, Tensor]]]
    training: TrainingState
    drawn: int
    buffers: list[_Buffer]

    @property
    def step(self) -> int:
        """Optimizer steps taken by then."""
        return self.training.step

    def restore(self, model: MorphableModel, training: Callable[[TrainingState], None]) -> None:
        """Puts everything back, to the bit; the snapshot can be used again.

        Args:
            model: The model that it was taken of.
            training: Puts the training state back once the model's weights and seeds are.
        """
        if any(from_gpu for (_, _, from_gpu), _ in self.buffers):
            torch.cuda.synchronize()  # the last copies into them may still be under way
        model.restore(self.bank, self.slots, self.grafts, over=True)
        with torch.no_grad():
            for name, tensor in host_tensors(model.host).items():
                tensor.copy_(self.host[name])
        for parameter in model.parameters():
            parameter.grad = None
        training(copied(self.training, torch.clone))


class SnapshotRing:
    """The newest good snapshots, and one that has yet to prove itself.

    What a step has done shows in the next one, so a snapshot is good only once a later look found
    nothing wrong. The first good one of an epoch is kept to its end, beside the newest.

    Args:
        capacity: Most good snapshots held; at least 2.
        max_bytes: Most memory held; fewer snapshots are held where they are large.
    """

    def __init__(self, capacity: int, max_bytes: int) -> None:
        self._capacity = capacity
        self._max_bytes = max_bytes
        self._good: list[Snapshot] = []
        self._candidate: Snapshot | None = None
        self._free: dict[_Layout, list[Tensor]] = {}
        self._num_bytes = 0

    @property
    def num_bytes(self) -> int:
        """Memory held, buffers that wait to be used again included."""
        return self._num_bytes

    @property
    def newest(self) -> Snapshot | None:
        """The newest good snapshot; ``None`` where there is none."""
        return self._good[-1] if self._good else None

    def take(
        self, model: MorphableModel, training: TrainingState, drawn: int, *, good: bool = False
    ) -> None:
        """Takes a snapshot; the one that has not proved itself gives way.

        Args:
            model: The model between two steps.
            training: Its training state; copied.
            drawn: Batches drawn in the epoch.
            good: Whether it needs no proof.
        """
        self.distrust()
        buffers: list[_Buffer] = []
        sources: list[Tensor] = []
        targets: list[Tensor] = []

        def keep(tensor: Tensor) -> Tensor:
            layout = (tensor.shape, tensor.dtype, tensor.is_cuda)
            if _is_sharded(tensor):
                buffer = self._new_buffer(tensor).copy_(tensor.detach(), non_blocking=True)
            else:
                spare = self._free.get(layout)
                buffer = spare.pop() if spare else self._new_buffer(tensor)
                sources.append(tensor)
                targets.append(buffer)
            buffers.append((layout, buffer))
            return buffer

        grafts: dict[tuple[str, int], tuple[kernel_pb2.Kernel, dict[str, Tensor]]] = {}
        for slot, seed in model.occupied_seeds():
            kernel = model.kernel_of(slot, seed)
            assert kernel is not None, "an occupied seed holds a kernel"
            parameters = zip(kernel.parameters, model.seed_parameters(slot, seed), strict=True)
            grafts[slot, seed] = kernel, {spec.name: keep(value) for spec, value in parameters}
        with torch.no_grad():
            self._candidate = Snapshot(
                {name: keep(tensor) for name, tensor in host_tensors(model.host).items()},
                model.bank.to_bytes(),
                {name: layer.slot_state() for name, layer in model.slots.items()},
                grafts,
                copied(training, keep),
                drawn,
                buffers,
            )
            if sources:  # all in one call, as each has its price
                torch._foreach_copy_(targets, sources, non_blocking=True)
        self._prune()
        if good:
            self.trust(training.step + 1)

    def trust(self, step: int) -> bool:
        """Says that all was well after a step.

        Returns:
            Whether there is a newer good snapshot by that.
        """
        if self._candidate is None or self._candidate.step >= step:
            return False
        self._good.append(self._candidate)
        self._candidate = None
        while len(self._good) > self._capacity:
            self._drop(self._good.pop(1))
        return True

    def distrust(self) -> None:
        """Drops the snapshot that has not proved itself."""
        if self._candidate is not None:
            self._drop(self._candidate)
            self._candidate = None

    def step_back(self) -> None:
        """Drops the newest good snapshot where there is an older one."""
        if len(self._good) > 1:
            self._drop(self._good.pop())

    def clear(self) -> None:
        """Drops all snapshots."""
        self.distrust()
        while self._good:
            self._drop(self._good.pop())

    def _prune(self) -> None:
        """Keeps the memory within its bound."""
        if self._num_bytes > self._max_bytes:
            for spare in self._free.values():
                self._num_bytes -= sum(map(_size, spare))
            self._free.clear()
        while self._num_bytes > self._max_bytes and self._good:
            self._forget(self._good.pop(1 if len(self._good) > 1 else 0))
        if self._num_bytes > self._max_bytes and self._candidate is not None:
            self._forget(self._candidate)
            self._candidate = None

    def _drop(self, snapshot: Snapshot) -> None:
        for layout, buffer in snapshot.buffers:
            if _is_sharded(buffer):
                self._num_bytes -= _size(buffer)
            else:
                self._free.setdefault(layout, []).append(buffer)

    def _forget(self, snapshot: Snapshot) -> None:
        self._num_bytes -= sum(_size(buffer) for _, buffer in snapshot.buffers)

    def _new_buffer(self, tensor: Tensor) -> Tensor:
        self._num_bytes += _size(tensor)
        if _is_sharded(tensor):
            return torch.empty_like(tensor)
        return torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)


def host_tensors(host: nn.Module) -> dict[str, Tensor]:
    """Returns a host's parameters and buffers by name, those of no state dict included."""
    return {**dict(host.named_parameters()), **dict(host.named_buffers())}


def _is_sharded(tensor: Tensor) -> bool:
    return type(tensor) not in _PLAIN and hasattr(tensor, "to_local")  # a DTensor: slow to load


def _size(tensor: Tensor) -> int:
    local = getattr(tensor, "to_local", lambda: tensor)()
    return int(local.numel() * local.element_size())
