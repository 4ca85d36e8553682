"""Kernels ready to be planted: whatever costs time is done once for each."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Self

from torch import Tensor

from esper import _C
from esper.blueprints import check_kernel
from esper.blueprints import kernel_digest
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


def _native_record(kernel: kernel_pb2.Kernel) -> tuple[int, ...] | None:
    signature = kernel.signature
    plan = partial(
        SeedPlan,
        row=0,
        offset=0,
        width=signature.chunk_width,
        source="input" if signature.source == blueprint_pb2.SEED_SOURCE_INPUT else "output",
        first_param=0,
    )
    match kernel.WhichOneof("lowering"):
        case "affine":
            record = plan(family="affine", output_bias=kernel.affine.bias)
        case "squeeze_excite":
            record = plan(
                family="squeeze_excite",
                activation=_ACTIVATIONS[kernel.squeeze_excite.activation],
                rank=kernel.squeeze_excite.rank,
                hidden_bias=kernel.squeeze_excite.bias_in,
                output_bias=kernel.squeeze_excite.bias_out,
            )
        case "depthwise":
            record = plan(
                family="depthwise",
                activation=_ACTIVATIONS[kernel.depthwise.activation],
                rank=signature.source_width,
                hidden_bias=kernel.depthwise.bias_in,
                output_bias=kernel.depthwise.bias_out,
                window=kernel.depthwise.window,
            )
        case "bottleneck":
            record = plan(
                family="bottleneck",
                activation=_ACTIVATIONS[kernel.bottleneck.activation],
                rank=kernel.bottleneck.rank,
                gated=kernel.bottleneck.gated,
                hidden_bias=kernel.bottleneck.bias_in,
                gate_bias=kernel.bottleneck.bias_gate,
                output_bias=kernel.bottleneck.bias_out,
            )
        case _:  # a graph, or nothing to compute
            return None
    return tuple(int(field) for field in record.pack())
