"""Results are the same to the bit in every run, and to rounding at any number of threads."""

import pytest
import torch
from slot_oracle import FULL
from slot_oracle import GRAFTING
from slot_oracle import Slot
from slot_oracle import close
from slot_oracle import small_slot
from slot_oracle import spatial_slot
from torch import Tensor

REPEATS = 100


def blas_slot() -> Slot:
    """A seed whose products the BLAS computes, beside a small one."""
    torch.manual_seed(5)
    slot = Slot(torch.randn(90, 280), torch.randn(90, 4), torch.tensor([GRAFTING, FULL]))
    kind = {"family": "bottleneck", "source": "output", "activation": "gelu", "output_bias": True}
    slot.add(0, 256, 0, rank=520, hidden_bias=True, **kind)
    slot.add(256, 24, 1, rank=4, **kind)
    return slot


def streamed_slot() -> Slot:
    """A result that is stored past the cache."""
    torch.manual_seed(6)
    slot = Slot(torch.randn(2080, 512), torch.randn(2080, 1), torch.tensor([FULL, GRAFTING]))
    kind = {"family": "bottleneck", "source": "output", "activation": "gelu", "output_bias": True}
    for seed in range(2):
        slot.add(256 * seed, 256, seed, rank=2, hidden_bias=True, **kind)
    return slot


SLOTS = {
    "bottleneck and affine": lambda: small_slot(GRAFTING, tokens=(700,)),
    "planes": lambda: spatial_slot(GRAFTING),
    "features last": lambda: spatial_slot(GRAFTING, layout="features last"),
    "blas": blas_slot,
    "past the cache": streamed_slot,
}


def everything(slot: Slot) -> list[Tensor]:
    slot = slot.with_grad()
    y, stats = slot.run(telemetry=True)
    y.backward(slot.h.detach().sin())
    return [y, stats, slot.h.grad, slot.x.grad, *(p.grad for p in slot.params)]


@pytest.mark.parametrize("kind", SLOTS)
def test_results_repeat_to_the_bit(kind):
    slot = SLOTS[kind]()
    threads = torch.get_num_threads()
    at_threads = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            first = everything(slot)
            for _ in range(REPEATS):
                for a, b in zip(everything(slot), first, strict=True):
                    assert a is b is None or torch.equal(a, b)
            at_threads.append(first)
    finally:
        torch.set_num_threads(threads)
    for one, two in zip(*at_threads, strict=True):
        if one is not None:
            close(one, two.double())
