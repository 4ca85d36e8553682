"""How a graft's weights are born where its blueprint does not decide alone."""

import hashlib

import torch
from torch import Tensor

from esper.blueprints import init_parameters
from esper.blueprints import kernel_digest
from esper.common.v1 import kernel_pb2


def singular_weights(
    kernel: kernel_pb2.Kernel, directions: Tensor | None, place: str
) -> dict[str, Tensor] | None:
    """Returns weights whose fan-in lies in the span of what the wanted update asks for.

    Every column of A is a random mix of the directions, each by its weight (after GradMax, ICLR
    2022, and TINY, arXiv 2405.19816, which take singular vectors as they are), and is as long as
    the column that the blueprint would have drawn. All else is born as the blueprint says.

    Args:
        kernel: The kernel.
        directions: Weighted directions of the source, [source width, k]; ``None`` where they are
            not known.
        place: Names the seed, so that equal kernels in two places differ.

    Returns:
        Weights by parameter name; ``None`` where the kernel has no such A, or directions are
        missing or zero: the blueprint then decides.
    """
    if directions is None or not kernel.HasField("bottleneck") or not bool(directions.any()):
        return None
    digest = hashlib.sha256(f"{kernel_digest(kernel)}/{place}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    weights = init_parameters(kernel, generator)
    drawn_Zr = weights["A"]
    mix_kr = torch.randn(directions.shape[1], drawn_Zr.shape[1], generator=generator)
    mixed_Zr = directions.cpu() @ mix_kr
    mixed_Zr *= drawn_Zr.norm(dim=0) / mixed_Zr.norm(dim=0).clamp_min(1e-30)
    return {**weights, "A": mixed_Zr.to(drawn_Zr.dtype)}
