"""The rows that telemetry looks at, and what is measured of them natively, against plain torch."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from esper import _C
from esper.kasmina.ops import NUM_STATS
from esper.kasmina.rows import MAX_ROWS
from esper.kasmina.rows import SampledStep

COLUMN = {name: index for index, name in enumerate(_C.STATS_COLUMNS)}


@pytest.mark.parametrize("num_rows", [MAX_ROWS + 1, 1000])
def test_rows_are_drawn_one_from_each_stretch_by_the_step_alone(num_rows):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    index = SampledStep(7).rows(torch.zeros(num_rows, 2)).index
    generator = torch.Generator().manual_seed(7)
    within = torch.rand(MAX_ROWS, generator=generator, dtype=torch.float64)
    expected = ((torch.arange(MAX_ROWS) + within) * (num_rows / MAX_ROWS)).long()
    assert torch.equal(index, expected.clamp(max=num_rows - 1))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_rows_are_taken_from_any_layout(dtype):
    planes = torch.randn(5, 3, 8, 9).to(dtype).requires_grad_()
    for tensor in (planes.movedim(1, -1), planes, planes[:, :, ::2], planes.flatten(0, 2)):
        rows = SampledStep(3).rows(tensor)
        flat = tensor.detach().reshape(-1, tensor.shape[-1])
        taken = rows.take(tensor)
        expected = flat if rows.index is None else flat[rows.index]
        assert torch.equal(taken, expected if dtype is torch.float64 else expected.float())
        assert not taken.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("num_rows", "step"), [(64, 1), (128, 2), (7, 1)])
def test_chunks_are_measured(dtype, num_rows, step):
    rows = torch.randn(num_rows, 70, dtype=dtype) + 3
    rows[:, 5] = 0.0
    stats = torch.zeros(4, NUM_STATS, dtype=torch.float64)
    with FlopCounterMode(display=False) as counter:
        torch.ops.esper.measure_chunks(rows, step, [1, 3], [0, 20, 37, 70], stats)
    assert counter.get_total_flops() == 2 * len(rows[::step]) * (20 + 33)
    assert torch.equal(stats[[0, 2]], torch.zeros(2, NUM_STATS, dtype=torch.float64))
    for seed, begin, end in ((1, 0, 20), (3, 37, 70)):
        chunk = rows[::step, begin:end].double()
        found = {name: float(stats[seed, column]) for name, column in COLUMN.items()}
        centred = chunk - chunk.mean()
        assert found["count"] == chunk.numel()
        assert found["mean"] == pytest.approx(float(chunk.mean()), rel=1e-5)
        assert found["m2"] == pytest.approx(float(centred.square().sum()), rel=1e-4)
        assert found["dead"] == (len(chunk) if begin == 0 else 0)
        neighbour = float((centred * centred.roll(-1, dims=1)).sum())
        assert found["neighbour_cov"] == pytest.approx(neighbour, rel=1e-3, abs=1e-2)


def test_what_would_leave_the_memory_is_refused():
    rows, stats = torch.zeros(4, 6), torch.zeros(2, NUM_STATS, dtype=torch.float64)
    for seeds, bounds in (([2], [0, 6]), ([0], [0, 7]), ([0], [3, 3]), ([0, 1], [0, 6])):
        with pytest.raises(ValueError, match="seeds holds|bounds"):
            torch.ops.esper.measure_chunks(rows, 1, seeds, bounds, stats)
    with pytest.raises(ValueError, match="index holds 4 of 4 rows"):
        torch.ops.esper.take_rows(rows, torch.tensor([4]))


def test_the_norm_of_many_tensors_is_that_of_all_their_elements():
    tensors = [torch.randn(5000, 3), torch.randn(7).double(), torch.randn(4, 6).t(), torch.zeros(0)]
    tensors += [torch.randn(9, 8)[:, ::2], torch.randn(3).half()]
    expected = torch.cat([tensor.double().flatten() for tensor in tensors]).norm()
    found = torch.ops.esper.total_norm(tensors)
    assert found.dtype is torch.float32
    assert float(found) == pytest.approx(float(expected), rel=1e-6)
    for value in (float("nan"), float("inf")):
        assert not torch.ops.esper.total_norm([*tensors, torch.tensor([value])]).isfinite()
