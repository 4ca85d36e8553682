"""How parameters are born and travel."""

import math

import pytest
import safetensors.torch
import torch

from esper.blueprints.errors import BlueprintError
from esper.blueprints.init import init_parameters
from esper.blueprints.init import weights_from_bytes
from esper.blueprints.init import weights_to_bytes
from esper.blueprints.library import get
from esper.blueprints.lowering import lower
from esper.common.v1 import blueprint_pb2
from esper.common.v1 import kernel_pb2


def kernel_of(
    name: str, dtype: kernel_pb2.DataType = kernel_pb2.DATA_TYPE_FLOAT32, width: int = 8
) -> kernel_pb2.Kernel:
    return lower(
        get(name),
        kernel_pb2.KernelSignature(
            slot_kind=kernel_pb2.SLOT_KIND_LINEAR,
            chunk_width=width,
            source_width=width,
            source=blueprint_pb2.SEED_SOURCE_OUTPUT,
            dtype=dtype,
            device_class=kernel_pb2.DEVICE_CLASS_CPU,
        ),
    )


def test_kaiming_bound_and_spread() -> None:
    kernel = kernel_of("bottleneck", width=2000)
    weights = init_parameters(kernel, torch.Generator().manual_seed(0))
    bound = math.sqrt(2) * math.sqrt(3 / 2000)
    assert weights["A"].abs().max() <= bound
    assert weights["A"].abs().max() > 0.999 * bound
    assert float(weights["A"].std()) == pytest.approx(math.sqrt(2 / 2000), rel=0.02)
    assert all(torch.count_nonzero(weights[name]) == 0 for name in ("a", "B", "b"))


def test_ones_and_normal() -> None:
    kernel = kernel_of("affine", width=4000)
    kernel.parameters[0].init = kernel_pb2.INIT_KIND_ONES
    kernel.parameters[1].init = kernel_pb2.INIT_KIND_NORMAL
    kernel.parameters[1].gain = 0.5
    weights = init_parameters(kernel, torch.Generator().manual_seed(0))
    assert bool((weights["w"] == 1).all())
    assert float(weights["b"].std()) == pytest.approx(0.5, rel=0.05)


def test_one_seed_gives_one_set_of_numbers_in_every_dtype_and_leaves_the_global_state() -> None:
    before = torch.get_rng_state()
    wide, narrow = (
        init_parameters(kernel_of("glu", dtype), torch.Generator().manual_seed(4))
        for dtype in (kernel_pb2.DATA_TYPE_FLOAT64, kernel_pb2.DATA_TYPE_BFLOAT16)
    )
    again = init_parameters(kernel_of("glu"), torch.Generator().manual_seed(4), torch.float64)
    other = init_parameters(kernel_of("glu"), torch.Generator().manual_seed(5))
    assert torch.equal(torch.get_rng_state(), before)
    assert list(wide) == ["A", "G", "B"]
    for name in wide:
        assert narrow[name].dtype == torch.bfloat16
        assert torch.equal(wide[name], again[name])
        assert torch.equal(narrow[name], wide[name].to(torch.bfloat16))
    assert not torch.equal(other["A"], wide["A"].float())


def test_weights_survive_the_journey() -> None:
    kernel = kernel_of("bottleneck", kernel_pb2.DATA_TYPE_BFLOAT16)
    weights = init_parameters(kernel, torch.Generator().manual_seed(0))
    data = weights_to_bytes(weights)
    assert data == weights_to_bytes(dict(reversed(weights.items())))
    back = weights_from_bytes(data, kernel)
    assert list(back) == ["A", "a", "B", "b"]
    for name, tensor in weights.items():
        assert back[name].dtype == torch.bfloat16
        assert torch.equal(back[name], tensor)


@pytest.mark.parametrize(
    ("changes", "field", "rule"),
    [
        ({"A": None}, "weights", "must be named A, a, B, b"),
        ({"C": torch.zeros(1)}, "weights", "must be named A, a, B, b"),
        ({"a": torch.zeros(15)}, "weights.a", r"must have the shape \[16\]"),
        ({"a": torch.zeros(16, 1)}, "weights.a", r"must have the shape \[16\]"),
        ({"a": torch.zeros(16).double()}, "weights.a", "must be torch.float32"),
        ({"a": torch.full((16,), math.nan)}, "weights.a", "must be finite"),
        ({"a": torch.full((16,), math.inf)}, "weights.a", "must be finite"),
    ],
)
def test_weights_must_be_exactly_the_kernels(
    changes: dict[str, torch.Tensor | None], field: str, rule: str
) -> None:
    kernel = kernel_of("bottleneck")
    weights = init_parameters(kernel, torch.Generator().manual_seed(0))
    changed = {k: v for k, v in {**weights, **changes}.items() if v is not None}
    with pytest.raises(BlueprintError, match=rule) as caught:
        weights_from_bytes(safetensors.torch.save(changed), kernel)
    assert caught.value.field == field


@pytest.mark.parametrize("keep", [0, 4, 60, -1])
def test_truncated_blobs_are_refused(keep: int) -> None:
    kernel = kernel_of("lora")
    data = weights_to_bytes(init_parameters(kernel, torch.Generator().manual_seed(0)))
    with pytest.raises(BlueprintError, match="must be safetensors"):
        weights_from_bytes(data[:keep], kernel)


def test_non_finite_weights_do_not_leave() -> None:
    with pytest.raises(BlueprintError, match="weights.w is '1 non-finite numbers'"):
        weights_to_bytes({"w": torch.tensor([1.0, math.nan])})
