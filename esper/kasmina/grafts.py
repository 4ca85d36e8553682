"""Kernels that live in a seed: the checks before one is planted, and its parameters."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch import nn

from esper.blueprints import BlueprintError
from esper.blueprints import ReferenceModule
from esper.blueprints import init_parameters
from esper.blueprints import reference_module
from esper.blueprints.init import check_weights
from esper.blueprints.kernels import CHANNEL_KINDS
from esper.blueprints.kernels import source_axes
from esper.common.v1 import blueprint_pb2
from esper.common.v1 import kernel_pb2
from esper.kasmina.ops import SeedPlan

_ACTIVATIONS = {
    kernel_pb2.ACTIVATION_IDENTITY: "identity",
    kernel_pb2.ACTIVATION_RELU: "relu",
    kernel_pb2.ACTIVATION_GELU: "gelu",
    kernel_pb2.ACTIVATION_SILU: "silu",
    kernel_pb2.ACTIVATION_TANH: "tanh",
}


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
    _check_equal(
        "dtype", kernel_pb2.DataType.Name(given.dtype), kernel_pb2.DataType.Name(wanted.dtype)
    )
    _check_equal(
        "device_class",
        kernel_pb2.DeviceClass.Name(given.device_class),
        kernel_pb2.DeviceClass.Name(wanted.device_class),
    )
    num_axes = source_axes(kernel)
    if num_axes is not None and num_axes != output_axes:
        seen = "never seen; run a forward first" if output_axes is None else f"{output_axes} axes"
        raise BlueprintError(
            f"kernel.{kernel.WhichOneof('lowering')}",
            f"made for {num_axes} axes",
            f"must fit the slot's output: {seen}",
        )


def _check_equal(field: str, given: int | str, wanted: int | str) -> None:
    if given != wanted:
        raise BlueprintError(f"signature.{field}", given, f"must be the seed's {wanted}")


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
        kernel: A kernel that fits the place.
        digest: Its digest.
        weights: Its tensors; None draws them from a generator of the place's own, so that the same
            kernel in the same place is born equal and no other random state moves.
        place: Where it goes.
    """

    def __init__(
        self,
        kernel: kernel_pb2.Kernel,
        digest: str,
        weights: Mapping[str, Tensor] | None,
        place: Place,
    ) -> None:
        super().__init__()
        self.kernel = kernel
        self.digest = digest
        self.draw_seed = _draw_seed(digest, place)
        if weights is None:
            generator = torch.Generator().manual_seed(self.draw_seed)
            weights = init_parameters(kernel, generator)
        tensors = {name: w.detach().to(place.device, place.dtype) for name, w in weights.items()}
        self.network: ReferenceModule | None = None
        if kernel.HasField("graph"):
            self.network = reference_module(kernel, tensors)
        else:
            for spec in kernel.parameters:
                self.register_parameter(spec.name, nn.Parameter(tensors[spec.name].clone()))

    @property
    def is_noop(self) -> bool:
        """Whether the kernel adds nothing, so that nothing has to run for it."""
        return self.kernel.HasField("noop")

    def ordered_parameters(self) -> list[nn.Parameter]:
        """Returns the parameters in the order of the kernel."""
        owner = self if self.network is None else self.network
        return [owner.get_parameter(spec.name) for spec in self.kernel.parameters]

    def take_weights(self, other: "Graft") -> None:
        """Copies the weights of a graft of the same kernel into this one's parameters."""
        with torch.no_grad():
            for mine, theirs in zip(
                self.ordered_parameters(), other.ordered_parameters(), strict=True
            ):
                mine.copy_(theirs)

    def plan(self, row: int, begin: int, end: int, first_param: int) -> SeedPlan:
        """Returns the native plan of the graft, for kernels of a native family.

        Args:
            row: Row of the seed in the bank's scalars.
            begin: First feature of its chunk.
            end: One past its last feature.
            first_param: Index of its first tensor in the call's parameters.
        """
        plan = partial(
            SeedPlan,
            row=row,
            offset=begin,
            width=end - begin,
            source="input" if self.reads_input else "output",
            first_param=first_param,
        )
        kernel = self.kernel
        match kernel.WhichOneof("lowering"):
            case "affine":
                return plan(family="affine", output_bias=kernel.affine.bias)
            case "squeeze_excite":
                return plan(
                    family="squeeze_excite",
                    activation=_ACTIVATIONS[kernel.squeeze_excite.activation],
                    rank=kernel.squeeze_excite.rank,
                    hidden_bias=kernel.squeeze_excite.bias_in,
                    output_bias=kernel.squeeze_excite.bias_out,
                )
            case "depthwise":
                return plan(
                    family="depthwise",
                    activation=_ACTIVATIONS[kernel.depthwise.activation],
                    rank=kernel.signature.source_width,
                    hidden_bias=kernel.depthwise.bias_in,
                    output_bias=kernel.depthwise.bias_out,
                    window=kernel.depthwise.window,
                )
            case lowering:
                assert lowering == "bottleneck", lowering
                return plan(
                    family="bottleneck",
                    activation=_ACTIVATIONS[kernel.bottleneck.activation],
                    rank=kernel.bottleneck.rank,
                    gated=kernel.bottleneck.gated,
                    hidden_bias=kernel.bottleneck.bias_in,
                    gate_bias=kernel.bottleneck.bias_gate,
                    output_bias=kernel.bottleneck.bias_out,
                )

    @property
    def reads_input(self) -> bool:
        """Whether the kernel reads the slot's input instead of its own chunk of the output."""
        source: blueprint_pb2.SeedSource = self.kernel.signature.source
        return source == blueprint_pb2.SEED_SOURCE_INPUT


def _draw_seed(digest: str, place: Place) -> int:
    text = f"{digest}/{place.slot}/{place.seed}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")
