"""Kernels that live in a seed: the checks before one is planted, and its parameters."""

import hashlib
from collections.abc import Callable
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch import nn

from esper.blueprints import BlueprintError
from esper.blueprints import ReferenceModule
from esper.blueprints.init import check_weights
from esper.blueprints.init import draw
from esper.blueprints.kernels import CHANNEL_KINDS
from esper.blueprints.kernels import source_axes
from esper.common.v1 import kernel_pb2
from esper.kasmina.prepared import PreparedKernel


def check_fit(kernel: kernel_pb2.Kernel, wanted: kernel_pb2.KernelSignature) -> None:
    """Checks that a kernel has the widths and the layout of a place.

    Args:
        kernel: A sound kernel.
        wanted: Signature of the place for the kernel's source.

    Raises:
        BlueprintError: If it does not fit; names field, value and rule.
    """
    given = kernel.signature
    for field in ("chunk_width", "source_width"):
        _check_equal(field, getattr(given, field), getattr(wanted, field))
    # A native family that knows tokens alone takes features wherever they are.
    laid_out = kernel.HasField("graph") or source_axes(kernel) is not None
    if laid_out and (given.slot_kind in CHANNEL_KINDS) != (wanted.slot_kind in CHANNEL_KINDS):
        raise BlueprintError(
            "signature.slot_kind",
            kernel_pb2.SlotKind.Name(given.slot_kind),
            f"must lay features out as the slot's {kernel_pb2.SlotKind.Name(wanted.slot_kind)}",
        )


def check_target(
    kernel: kernel_pb2.Kernel, wanted: kernel_pb2.KernelSignature, output_axes: int | None
) -> None:
    """Checks that a kernel was made for what a place computes with.

    Args:
        kernel: A sound kernel.
        wanted: Signature of the place for the kernel's source.
        output_axes: Number of axes of the slot's output; None where none has been seen.

    Raises:
        BlueprintError: If it was not; names field, value and rule.
    """
    given = kernel.signature
    _check_equal("dtype", given.dtype, wanted.dtype, kernel_pb2.DataType.Name)
    _check_equal(
        "device_class", given.device_class, wanted.device_class, kernel_pb2.DeviceClass.Name
    )
    num_axes = source_axes(kernel)
    if num_axes is not None and num_axes != output_axes:
        seen = "never seen; run a forward first" if output_axes is None else f"{output_axes} axes"
        raise BlueprintError(
            f"kernel.{kernel.WhichOneof('lowering')}",
            f"made for {num_axes} axes",
            f"must fit the slot's output: {seen}",
        )


def _check_equal(
    field: str, given: int, wanted: int, name: Callable[[int], int | str] = int
) -> None:
    if given != wanted:
        raise BlueprintError(
            f"signature.{field}", name(given), f"must be the seed's {name(wanted)}"
        )


def check_parameters(kernel: kernel_pb2.Kernel, weights: Mapping[str, Tensor] | None) -> None:
    """Checks that tensors are those that a kernel takes.

    Args:
        kernel: The kernel.
        weights: Tensors by parameter name; None for parameters born by their init.

    Raises:
        BlueprintError: If names, shapes, types or values do not fit, or are missing.
    """
    if weights is not None:
        check_weights(weights, kernel)
    elif kernel.HasField("weights"):
        raise BlueprintError(
            "weights", "absent", f"must be the tensors of this kernel's blob {kernel.weights.hash}"
        )


@dataclass(frozen=True, slots=True)
class Place:
    """Where a graft goes.

    Attributes:
        slot: Name of the slot.
        seed: Index of the seed.
        dtype: Element type of the parameters.
        device: Device of the parameters.
    """

    slot: str
    seed: int
    dtype: torch.dtype
    device: torch.device


class Graft(nn.Module):
    """A kernel live in a seed; its parameters are registered under the kernel's own names.

    Args:
        prepared: A kernel that fits the place.
        weights: Its tensors; None draws them from a generator of the place's own, so that the same
            kernel in the same place is born equal and no other random state moves.
        place: Where it goes.

    Attributes:
        prepared: The kernel with all that was made ready for it.
        draw_seed: What its random draws count from.
        network: What interprets its graph; None for a native family and a noop.
    """

    def __init__(
        self, prepared: PreparedKernel, weights: Mapping[str, Tensor] | None, place: Place
    ) -> None:
        super().__init__()
        kernel = prepared.kernel
        self.prepared = prepared
        self.draw_seed = _draw_seed(prepared.digest, place)
        self.network: ReferenceModule | None = None
        names = prepared.parameter_names
        if weights is None:
            generator = torch.Generator().manual_seed(self.draw_seed)
            born = [draw(spec, generator) for spec in kernel.parameters]
            tensors = [tensor.to(place.device, place.dtype) for tensor in born]
        else:
            given = [weights[name].detach() for name in names]
            tensors = [tensor.to(place.device, place.dtype, copy=True) for tensor in given]
        if kernel.HasField("graph"):
            self.network = ReferenceModule(
                prepared.computation, dict(zip(names, tensors, strict=True))
            )
            return
        for name, tensor in zip(names, tensors, strict=True):
            self.register_parameter(name, nn.Parameter(tensor))

    @property
    def kernel(self) -> kernel_pb2.Kernel:
        """The kernel."""
        return self.prepared.kernel

    @property
    def digest(self) -> str:
        """Its digest."""
        return self.prepared.digest

    @property
    def is_noop(self) -> bool:
        """Whether the kernel adds nothing, so that nothing has to run for it."""
        return self.kernel.HasField("noop")

    @property
    def reads_input(self) -> bool:
        """Whether the kernel reads the slot's input instead of its own chunk of the output."""
        return self.prepared.reads_input

    def ordered_parameters(self) -> list[nn.Parameter]:
        """Returns the parameters in the order of the kernel."""
        owner = self if self.network is None else self.network
        return [owner.get_parameter(name) for name in self.prepared.parameter_names]

    def take_weights(self, other: "Graft") -> None:
        """Copies the weights of a graft of the same kernel into this one's parameters."""
        with torch.no_grad():
            for mine, theirs in zip(
                self.ordered_parameters(), other.ordered_parameters(), strict=True
            ):
                mine.copy_(theirs)


def _draw_seed(digest: str, place: Place) -> int:
    text = f"{digest}/{place.slot}/{place.seed}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")
