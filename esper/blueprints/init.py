"""How a kernel's parameters are born, and how they travel as safetensors."""

import math
from collections.abc import Mapping

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from esper.blueprints.errors import BlueprintError
from esper.blueprints.kernels import check_kernel
from esper.common.v1 import kernel_pb2

_DTYPES = {
    kernel_pb2.DATA_TYPE_FLOAT32: torch.float32,
    kernel_pb2.DATA_TYPE_FLOAT64: torch.float64,
    kernel_pb2.DATA_TYPE_BFLOAT16: torch.bfloat16,
    kernel_pb2.DATA_TYPE_FLOAT16: torch.float16,
}


def torch_dtype(dtype: kernel_pb2.DataType) -> torch.dtype:
    """Returns the torch dtype of a kernel's element type.

    Raises:
        BlueprintError: Where it is unspecified or unknown.
    """
    if dtype not in _DTYPES:
        raise BlueprintError("signature.dtype", dtype, "must be a known value, not 0")
    return _DTYPES[dtype]


def init_parameters(
    kernel: kernel_pb2.Kernel,
    generator: torch.Generator,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> dict[str, Tensor]:
    """Returns a kernel's parameters as they are born, by name in the kernel's order.

    The numbers are drawn on the generator's device in float32, so one seed gives the same
    parameters for every dtype and device up to rounding; the global generator is not touched.

    Args:
        kernel: The kernel.
        generator: Where the numbers come from.
        dtype: Element type; None means the kernel's.
        device: Where the tensors live; None means the generator's device.

    Raises:
        BlueprintError: Where the kernel's fields do not agree.
    """
    check_kernel(kernel)
    dtype = dtype or torch_dtype(kernel.signature.dtype)
    return {
        spec.name: draw(spec, generator).to(device=device or generator.device, dtype=dtype)
        for spec in kernel.parameters
    }


def draw(spec: kernel_pb2.ParameterSpec, generator: torch.Generator) -> Tensor:
    """Returns one float32 tensor born by its init.

    The Kaiming bound is gain * sqrt(3 / fan_in), after He et al., arXiv 1502.01852.
    """
    shape, device = tuple(spec.shape), generator.device
    match spec.init:
        case kernel_pb2.INIT_KIND_ZEROS:
            return torch.zeros(shape, device=device)
        case kernel_pb2.INIT_KIND_ONES:
            return torch.ones(shape, device=device)
    gain = spec.gain or 1.0
    tensor = torch.empty(shape, device=device)
    if spec.init == kernel_pb2.INIT_KIND_NORMAL:
        return tensor.normal_(0.0, gain, generator=generator)
    assert spec.init == kernel_pb2.INIT_KIND_KAIMING_UNIFORM
    bound = gain * math.sqrt(3.0 / spec.fan_in)
    return tensor.uniform_(-bound, bound, generator=generator)


def weights_to_bytes(weights: Mapping[str, Tensor]) -> bytes:
    """Returns tensors as a safetensors blob; equal tensors give equal bytes.

    Raises:
        BlueprintError: Where a number is not finite.
    """
    for name, tensor in weights.items():
        _refuse_non_finite(name, tensor)
    return safetensors.torch.save(
        {name: tensor.detach().cpu().contiguous() for name, tensor in sorted(weights.items())}
    )


def weights_from_bytes(data: bytes, kernel: kernel_pb2.Kernel) -> dict[str, Tensor]:
    """Returns a kernel's weights from a safetensors blob, in the kernel's order.

    Raises:
        BlueprintError: Where the blob is not one, or names, shapes, dtypes or numbers are not
            exactly those of the kernel, or a number is not finite.
    """
    try:
        given = safetensors.torch.load(data)
    except (safetensors.SafetensorError, ValueError, KeyError) as error:
        raise BlueprintError(
            "weights", f"{len(data)} bytes", f"must be safetensors: {error}"
        ) from error
    check_weights(given, kernel)
    return {spec.name: given[spec.name] for spec in kernel.parameters}


def check_weights(weights: Mapping[str, Tensor], kernel: kernel_pb2.Kernel) -> None:
    """Raises BlueprintError unless weights have exactly a kernel's names, shapes and dtype."""
    expected = {spec.name: tuple(spec.shape) for spec in kernel.parameters}
    if weights.keys() != expected.keys():
        raise BlueprintError(
            "weights", ", ".join(sorted(weights)), f"must be named {', '.join(expected)}"
        )
    dtype = torch_dtype(kernel.signature.dtype)
    for name, shape in expected.items():
        tensor = weights[name]
        if tuple(tensor.shape) != shape:
            raise BlueprintError(
                f"weights.{name}", list(tensor.shape), f"must have the shape {list(shape)}"
            )
        if tensor.dtype != dtype:
            raise BlueprintError(f"weights.{name}", tensor.dtype, f"must be {dtype}")
        if tensor.is_meta:
            raise BlueprintError(f"weights.{name}", "on meta", "must hold numbers")
        _refuse_non_finite(name, tensor)


def _refuse_non_finite(name: str, tensor: Tensor) -> None:
    bad = tensor.numel() - int(torch.isfinite(tensor).sum())
    if bad:
        raise BlueprintError(f"weights.{name}", f"{bad} non-finite numbers", "must be finite")
