"""Kernels ready to be planted: whatever costs time is done once for each."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import replace
from functools import partial
from typing import Self

from torch import Tensor

from esper import _C
from esper.blueprints import check_kernel
from esper.blueprints import kernel_digest
from esper.blueprints import weights_to_bytes
from esper.blueprints.kernels import Computation
from esper.common.v1 import blueprint_pb2
from esper.common.v1 import kernel_pb2
from esper.kasmina.ops import SeedPlan

_OFFSET = _C.PLAN_FIELDS.index("offset")

_ACTIVATIONS = {
    kernel_pb2.ACTIVATION_IDENTITY: "identity",
    kernel_pb2.ACTIVATION_RELU: "relu",
    kernel_pb2.ACTIVATION_GELU: "gelu",
    kernel_pb2.ACTIVATION_SILU: "silu",
    kernel_pb2.ACTIVATION_TANH: "tanh",
}

_WithHidden = (
    kernel_pb2.BottleneckLowering | kernel_pb2.SqueezeExciteLowering | kernel_pb2.DepthwiseLowering
)


@dataclass(frozen=True, slots=True)
class PreparedKernel:
    """A checked kernel with what planting it needs.

    Attributes:
        kernel: The kernel.
        digest: Its digest.
        weights: Its tensors by parameter name; None where its parameters are born by their init.
        encoded: The kernel as bytes; kernels of equal bytes have equal digests.
        num_bytes: Memory that it is charged with in the cache, in bytes.
        computation: What it computes, as a checked graph.
        parameter_names: Names of its parameters, in its order.
        reads_input: Whether it reads the slot's input instead of its own chunk of the output.
    """

    kernel: kernel_pb2.Kernel
    digest: str
    weights: Mapping[str, Tensor] | None
    encoded: bytes
    num_bytes: int
    computation: Computation
    parameter_names: tuple[str, ...]
    reads_input: bool
    _record: tuple[int, ...] | None  # of the plan, for a chunk at 0; None: no native family

    @classmethod
    def of(
        cls,
        kernel: kernel_pb2.Kernel,
        digest: str = "",
        weights: Mapping[str, Tensor] | None = None,
    ) -> Self:
        """Checks and prepares a kernel.

        Args:
            kernel: The kernel; copied.
            digest: Its digest where it is known.
            weights: Tensors that come with it.

        Raises:
            BlueprintError: Where the kernel's fields do not agree.
        """
        computation = check_kernel(kernel)
        own = kernel_pb2.Kernel()
        own.CopyFrom(kernel)
        encoded = encode(own)
        tensors = () if weights is None else weights.values()
        return cls(
            kernel=own,
            digest=digest or kernel_digest(own),
            weights=weights,
            encoded=encoded,
            num_bytes=len(encoded) + sum(t.numel() * t.element_size() for t in tensors),
            computation=computation,
            parameter_names=tuple(spec.name for spec in own.parameters),
            reads_input=own.signature.source == blueprint_pb2.SEED_SOURCE_INPUT,
            _record=_native_record(own),
        )

    def __deepcopy__(self, memo: dict[int, object]) -> Self:
        return self  # nothing in it ever changes

    def record(self, offset: int) -> list[int] | None:
        """Returns its record of a slot's plan; None where no native kernel computes it.

        Args:
            offset: First feature of the chunk that it is planted in.
        """
        if self._record is None:
            return None
        record = list(self._record)
        record[_OFFSET] = offset
        return record


def encode(kernel: kernel_pb2.Kernel) -> bytes:
    """Returns a kernel as bytes, equal for equal kernels."""
    return kernel.SerializeToString(deterministic=True)


def come_with(weights: Mapping[str, Tensor] | None, kernel: kernel_pb2.Kernel) -> bool:
    """Whether weights are those that a kernel names, and not those of one of its grafts."""
    if weights is None or not kernel.HasField("weights"):
        return False
    return hashlib.sha256(weights_to_bytes(weights)).hexdigest() == kernel.weights.hash


def _native_record(kernel: kernel_pb2.Kernel) -> tuple[int, ...] | None:
    signature, family = kernel.signature, kernel.WhichOneof("lowering")
    plan = partial(
        SeedPlan,
        row=0,
        offset=0,
        width=signature.chunk_width,
        source="input" if signature.source == blueprint_pb2.SEED_SOURCE_INPUT else "output",
        first_param=0,
        family=str(family),
    )

    def with_hidden(lowering: _WithHidden, rank: int) -> SeedPlan:
        return plan(
            activation=_ACTIVATIONS[lowering.activation],
            rank=rank,
            hidden_bias=lowering.bias_in,
            output_bias=lowering.bias_out,
        )

    match family:
        case "affine":
            record = plan(output_bias=kernel.affine.bias)
        case "squeeze_excite":
            record = with_hidden(kernel.squeeze_excite, kernel.squeeze_excite.rank)
        case "depthwise":
            record = with_hidden(kernel.depthwise, signature.source_width)
            record = replace(record, window=kernel.depthwise.window)
        case "bottleneck":
            own = kernel.bottleneck
            record = with_hidden(own, own.rank)
            record = replace(record, gated=own.gated, gate_bias=own.bias_gate)
        case _:  # a graph, or nothing to compute
            return None
    return tuple(int(field) for field in record.pack())
