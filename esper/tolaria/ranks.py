"""The processes that train one model together, as a session sees them.

Growth talks over a group of its own on the CPU, so that its messages never mix with those of the
user's training; gradients go over the default group, on the device that they are on. Messages are
JSON and safetensors: nothing that another process sends is ever unpickled.
"""

import hashlib
import json
from collections.abc import Sequence
from typing import TypeVar

import safetensors.torch
import torch
from torch import Tensor
from torch import distributed
from torch import nn

from esper.tolaria.packing import Packed
from esper.tolaria.packing import kept
from esper.tolaria.packing import pack
from esper.tolaria.packing import unpack

T = TypeVar("T")

_LENGTH_BYTES = 8
_DIGEST_BYTES = 32


class RanksDisagreeError(RuntimeError):
    """The processes of a run have come to differ where they must be equal; the run cannot go on."""


class Ranks:
    """All processes of a run.

    Without an initialised process group, or in one of a single process, nothing is ever sent and
    every method returns what it would return if all others had said the same.

    Every method but ``close`` must be called by all ranks in the same order.

    Args:
        alone: Whether to leave the process group aside.

    Attributes:
        rank: Number of this process, from 0.
        size: Number of processes.
        group: Their group on the CPU; None where there is but one.
    """

    def __init__(self, *, alone: bool = False) -> None:
        shared = not alone and distributed.is_available() and distributed.is_initialized()
        self.rank: int = distributed.get_rank() if shared else 0
        self.size: int = distributed.get_world_size() if shared else 1
        self.group: distributed.ProcessGroup | None = None
        if self.size > 1:
            self.group = distributed.new_group(backend="gloo")

    @property
    def leads(self) -> bool:
        """Whether this process talks to the plane and writes files for all."""
        return self.rank == 0

    @property
    def is_shared(self) -> bool:
        """Whether there are others."""
        return self.size > 1

    def broadcast(self, record: T) -> T:
        """Returns rank 0's record.

        Args:
            record: A dataclass; those of other ranks tell the type alone.
        """
        if self.group is None:
            return record
        data = _to_bytes(record) if self.leads else b""
        length = torch.tensor([len(data)])
        distributed.broadcast(length, 0, group=self.group)
        buffer = _buffer(data, int(length))
        distributed.broadcast(buffer, 0, group=self.group)
        return record if self.leads else _from_bytes(buffer.numpy().tobytes(), type(record))

    def gather(self, record: T) -> list[T]:
        """Returns the records of all ranks in their order, on every rank.

        Args:
            record: This rank's; a dataclass.
        """
        if self.group is None:
            return [record]
        message, lengths = self._padded(_to_bytes(record))
        buffers = [torch.zeros_like(message) for _ in range(self.size)]
        distributed.all_gather(buffers, message, group=self.group)
        return _records(buffers, lengths, type(record))

    def collect(self, record: T) -> list[T]:
        """Returns the records of all ranks in their order on rank 0, and none on the others."""
        if self.group is None:
            return [record]
        message, lengths = self._padded(_to_bytes(record))
        buffers = [torch.zeros_like(message) for _ in range(self.size)] if self.leads else []
        distributed.gather(message, buffers or None, group=self.group)
        return _records(buffers, lengths if self.leads else [], type(record))

    def _padded(self, data: bytes) -> tuple[Tensor, list[int]]:
        """Returns a message as long as the longest of all ranks', and the lengths of all."""
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        distributed.all_gather(lengths, torch.tensor([len(data)]), group=self.group)
        sizes = [int(length) for length in lengths]
        return _buffer(data, max(sizes)), sizes

    def sum(self, values: Sequence[float]) -> list[float]:
        """Returns the sums of numbers over all ranks.

        Args:
            values: As many on every rank.
        """
        total = torch.tensor(values, dtype=torch.float64)
        if self.group is not None:
            distributed.all_reduce(total, group=self.group)
        return [float(value) for value in total]

    def add_up(self, tensor: Tensor) -> None:
        """Replaces a tensor by its sum over all ranks, the same bits on each.

        Args:
            tensor: Of the same shape and type on every rank.
        """
        if self.group is not None:
            total = tensor.cpu()
            distributed.all_reduce(total, group=self.group)
            tensor.copy_(total)

    def differ(self, text: str) -> bool:
        """Returns whether any rank says another text than rank 0 does."""
        if self.group is None:
            return False
        mine = _buffer(hashlib.sha256(text.encode()).digest(), _DIGEST_BYTES)
        digests = [torch.zeros_like(mine) for _ in range(self.size)]
        distributed.all_gather(digests, mine, group=self.group)
        return any(not torch.equal(digest, digests[0]) for digest in digests)

    def average_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Replaces gradients by their means over all ranks, in one message for each element type.

        A rank without a gradient counts as one of zeros; where no rank has one, there stays none.

        Args:
            parameters: The same ones on every rank, each whole on every rank.
        """
        if self.group is None:
            return
        buckets: dict[tuple[torch.dtype, torch.device], list[nn.Parameter]] = {}
        for parameter in parameters:
            if parameter.requires_grad:
                buckets.setdefault((parameter.dtype, parameter.device), []).append(parameter)
        for bucket in buckets.values():
            self._average(bucket)

    def _average(self, parameters: Sequence[nn.Parameter]) -> None:
        there = [float(parameter.grad is not None) for parameter in parameters]
        parts = [torch.tensor(there, dtype=parameters[0].dtype, device=parameters[0].device)]
        for parameter in parameters:
            gradient = parameter.grad
            parts.append(
                parameter.new_zeros(parameter.numel()) if gradient is None else gradient.flatten()
            )
        message = torch.cat(parts)
        distributed.all_reduce(message)
        message /= self.size
        shares, *means = message.split([len(there), *(p.numel() for p in parameters)])
        for parameter, share, mean in zip(parameters, shares.tolist(), means, strict=True):
            parameter.grad = mean.view_as(parameter).clone() if share > 0 else None

    def close(self) -> None:
        """Lets go of the group."""
        if self.group is not None and distributed.is_initialized():
            distributed.destroy_process_group(self.group)
        self.group = None
        self.size = 1


ALONE = Ranks(alone=True)
"""A process by itself."""


def _buffer(data: bytes, length: int) -> Tensor:
    buffer = torch.zeros(length, dtype=torch.uint8)
    if data:
        buffer[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    return buffer


def _records(buffers: Sequence[Tensor], lengths: Sequence[int], kind: type[T]) -> list[T]:
    return [
        _from_bytes(buffer[:length].numpy().tobytes(), kind)
        for buffer, length in zip(buffers, lengths, strict=True)
    ]


def _to_bytes(record: object) -> bytes:
    packed = pack(record, "message")
    document = json.dumps(packed.document, allow_nan=False).encode()
    tensors = {name: kept(tensor).contiguous() for name, tensor in packed.tensors.items()}
    return len(document).to_bytes(_LENGTH_BYTES, "big") + document + safetensors.torch.save(tensors)


def _from_bytes(data: bytes, kind: type[T]) -> T:
    start = _LENGTH_BYTES + int.from_bytes(data[:_LENGTH_BYTES], "big")
    document = json.loads(data[_LENGTH_BYTES:start])
    return unpack(kind, Packed(document, safetensors.torch.load(data[start:])), "message")
