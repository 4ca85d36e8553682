"""The CUDA kernels on a GPU: the same slots as on the CPU give the same results."""

import pytest
import torch
from hypothesis import given
from hypothesis import settings
from slot_oracle import GRAFTING
from slot_oracle import Slot
from slot_oracle import close
from slot_oracle import slots
from slot_oracle import small_slot

import esper
from esper.kasmina import ops

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
    pytest.mark.skipif(
        not esper.build_info().cuda, reason="the native core was built without CUDA"
    ),
]


def on_device(slot: Slot, dtype: torch.dtype | None = None) -> Slot:
    h, x, *params = (t.detach().to("cuda", dtype) for t in (slot.h, slot.x, *slot.params))
    leaves = [t.requires_grad_() for t in (h, x, *params)]
    return Slot(leaves[0], leaves[1], slot.scalars, slot.seeds, leaves[2:])


@given(slot=slots())
@settings(deadline=None, max_examples=100)
def test_the_gpu_gives_what_the_cpu_gives(slot):
    here, there = slot.with_grad(), on_device(slot)
    y, stats = here.run(telemetry=True)
    z, counted = there.run(telemetry=True)
    close(z.cpu(), y)
    torch.testing.assert_close(counted.cpu(), stats, rtol=1e-4, atol=1e-3)
    dy = torch.randn_like(y)
    y.backward(dy)
    z.backward(dy.cuda())
    for ours, theirs in zip(
        (here.h, here.x, *here.params), (there.h, there.x, *there.params), strict=True
    ):
        assert (ours.grad is None) == (theirs.grad is None)
        if ours.grad is not None:
            close(theirs.grad.cpu(), ours.grad, scale=4.0)


def near(ours: torch.Tensor, exact: torch.Tensor, tolerance: float) -> None:
    scale = max(1e-3, float(exact.abs().max()))
    assert float((ours.float() - exact.float()).abs().max()) <= tolerance * scale


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.bfloat16, 3e-2), (torch.float16, 4e-3), (torch.float32, 4e-3)]
)
def test_tensor_cores_round_operands_and_accumulate_in_float32(dtype, tolerance, monkeypatch):
    slot = small_slot(GRAFTING, tokens=(700,))
    exact = on_device(slot, torch.float32)
    y, _ = exact.run()
    y.backward(exact.h.detach().sin())
    if dtype == torch.float32:
        monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", True)
    ours = on_device(
        Slot(slot.h.to(dtype), slot.x.to(dtype), slot.scalars, slot.seeds, slot.params)
    )
    z, _ = ours.run()
    assert z.dtype == dtype
    near(z, y, tolerance)
    z.backward(exact.h.detach().sin().to(dtype))
    for mine, theirs in zip(
        (ours.h, ours.x, *ours.params), (exact.h, exact.x, *exact.params), strict=True
    ):
        near(mine.grad, theirs.grad, 2 * tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_repeat_to_the_bit(dtype):
    def everything() -> list[torch.Tensor]:
        slot = on_device(small_slot(GRAFTING, tokens=(700,)), dtype)
        y, stats = slot.run(telemetry=True)
        y.backward(slot.h.detach().sin())
        return [y, stats, slot.h.grad, slot.x.grad, *(p.grad for p in slot.params)]

    first = everything()
    for _ in range(20):
        assert all(torch.equal(a, b) for a, b in zip(everything(), first, strict=True))


def test_the_current_stream_is_used():
    slot = on_device(small_slot())
    wanted, _ = slot.run()
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        y, _ = slot.run()
        torch.cuda.current_stream().synchronize()
    assert torch.equal(y, wanted)


def test_tensors_on_two_devices_are_refused():
    slot = small_slot()
    with pytest.raises(ValueError, match="is on cpu but the host's tensors are on cuda"):
        ops.slot_forward(slot.h.cuda(), slot.x, slot.params, slot.scalars, slot.plan)
