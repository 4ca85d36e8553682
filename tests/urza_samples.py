"""What several tests of Urza share: kernels that no other test has stored, and refusals."""

import itertools
from collections.abc import Callable

import grpc
import pytest

from esper import blueprints
from esper.common.rpc import RpcError
from esper.common.rpc import decode_error
from esper.common.v1 import blueprint_pb2
from esper.common.v1 import kernel_pb2

HASH = "0" * 64
PASSED = kernel_pb2.ValidationReport(passed=True, num_cases=3, tolerance=1e-5)

_widths = itertools.count(108, 8)


def new_kernel(name: str = "bottleneck", width: int | None = None) -> kernel_pb2.Kernel:
    """Returns a kernel that no other test has stored, as its width is its own."""
    width = width or next(_widths)
    place = kernel_pb2.KernelSignature(
        slot_kind=kernel_pb2.SLOT_KIND_LINEAR,
        chunk_width=width,
        source_width=width,
        source=blueprint_pb2.SEED_SOURCE_OUTPUT,
        dtype=kernel_pb2.DATA_TYPE_FLOAT32,
        device_class=kernel_pb2.DEVICE_CLASS_CPU,
    )
    return blueprints.lower(blueprints.get(name), place)


def refusal(call: Callable[[], object]) -> RpcError:
    """Returns the error of a call that must be refused."""
    with pytest.raises((RpcError, grpc.RpcError)) as caught:
        call()
    error = caught.value
    return error if isinstance(error, RpcError) else decode_error(error)
