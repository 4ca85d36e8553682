"""What the operators measure, against float64, over random shapes, families, layouts and types."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
from slot_oracle import COLUMN
from slot_oracle import Slot
from slot_oracle import seed_function
from slot_oracle import slots

from esper import _C


def reference(slot, seed):
    """The columns of one seed, from the values that the operator was given, in float64."""
    h = slot.h.double()[..., seed.offset : seed.offset + seed.width].reshape(-1, seed.width)
    source = slot.x if seed.source == "input" else slot.h[..., seed.offset :][..., : seed.width]
    g = seed_function(seed, source.double(), [p.double() for p in slot.params])
    g = g.reshape(-1, seed.width)
    finite = torch.isfinite(g).all(dim=1)
    mean = float(h.mean()) if h.numel() else 0.0
    centred = h - mean
    return {
        "count": h.numel(),
        "mean": mean,
        "m2": float(centred.square().sum()),
        "dead": int((h.abs() < 1e-12).sum()),
        "neighbour_cov": float((centred * centred.roll(-1, dims=1)).sum()),
        "nonfinite_rows": int((~finite).sum()),
        "g_energy": float(g[finite].square().sum()),
        "h_energy": float(h.square().sum()),
    }


def assert_measured(row, expected, *, exact):
    """Counts are exact; the rest is as good as the arithmetic of the type."""
    found = dict(zip(_C.STATS_COLUMNS, row.tolist(), strict=True))
    for name in ("count", "dead", "nonfinite_rows"):
        assert found[name] == expected[name], name
    size = math.sqrt(expected["h_energy"] / expected["count"]) if expected["count"] else 0.0
    assert found["mean"] == pytest.approx(expected["mean"], abs=1e-6 * size + 1e-12)
    spread = expected["m2"] + expected["count"] * (1e-6 * size) ** 2
    assert found["m2"] == pytest.approx(expected["m2"], rel=1e-4, abs=1e-4 * spread)
    assert found["neighbour_cov"] == pytest.approx(expected["neighbour_cov"], abs=2e-4 * spread)
    assert found["h_energy"] == pytest.approx(expected["h_energy"], rel=1e-5)
    assert found["g_energy"] == pytest.approx(
        expected["g_energy"], rel=1e-4 if exact else 5e-3, abs=1e-6
    )


@st.composite
def cases(draw):
    """Slots with features at rest, far from 0, of any element type, and with broken inputs."""
    slot = draw(slots())
    dtype = draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]))
    shift = draw(st.sampled_from([0.0, 0.0, 30.0, -300.0]))
    h = torch.where(slot.h.abs() < 0.1, 0.0, slot.h + shift)
    x = slot.x.clone()
    if draw(st.booleans()) and x.numel():
        x[(0,) * x.dim()] = math.nan  # breaks what reads it, not the host
    h, x = h.to(dtype), x.to(dtype)
    shrink = 1.0 / max(1.0, abs(shift))  # else float16 overflows where float64 does not
    params = [(p * shrink).to(dtype) for p in slot.params]
    return Slot(h, x, slot.scalars, slot.seeds, params)


@settings(max_examples=60, deadline=None)
@given(cases())
def test_statistics_are_those_of_the_values(slot):
    y, stats = slot.run(telemetry=True)
    assert stats.dtype == torch.float64 and stats.shape == (len(slot.seeds), len(COLUMN))
    for seed, row in zip(slot.seeds, stats, strict=True):
        assert_measured(row, reference(slot, seed), exact=slot.h.dtype in WIDE)
    plain, _ = slot.run()
    assert torch.equal(y.nan_to_num(), plain.nan_to_num()), "measuring changes no result"


WIDE = (torch.float32, torch.float64)


@settings(max_examples=30, deadline=None)
@given(cases(), st.data())
def test_statistics_of_parts_merge_to_those_of_the_whole(slot, data):
    """By Chan's formula, in any number of calls, empty ones included."""
    if slot.h.dim() < 3:  # a spatial seed sees the whole sample: those are cut between samples
        slot = Slot(slot.h[:, None], slot.x[:, None], slot.scalars, slot.seeds, slot.params)
    samples = len(slot.h)
    cuts = sorted(data.draw(st.lists(st.integers(0, samples), max_size=4)))
    acc = np.zeros((len(slot.seeds), len(COLUMN)))
    for begin, end in zip([0, *cuts], [*cuts, samples], strict=True):
        if any(s.family in ("depthwise", "squeeze_excite") for s in slot.seeds) and begin == end:
            continue
        part = Slot(slot.h[begin:end], slot.x[begin:end], slot.scalars, slot.seeds, slot.params)
        _C.merge_stats(acc, part.run(telemetry=True)[1].numpy())
    for seed, row in zip(slot.seeds, acc, strict=True):
        assert_measured(row, reference(slot, seed), exact=slot.h.dtype in WIDE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("order", [1, -1])
def test_calls_far_apart_do_not_cancel(order, dtype):
    """Mean 1e6 and standard deviation 1, in calls whose means differ a little and a lot."""
    torch.manual_seed(0)
    parts = [torch.randn(50, 8, dtype=dtype) + mean for mean in (1e6, 1e6 + 3, 1e6 - 1, 0.0)]
    chosen = parts[:3][::order]
    acc = np.zeros((1, len(COLUMN)))

    def merge(h):
        slot = Slot(h, h[:, :1], torch.zeros(1, 3))
        slot.add(0, 8, 0, source="output", family="affine")
        _C.merge_stats(acc, slot.run(telemetry=True)[1].numpy())

    for h in chosen:
        merge(h)
    whole = torch.cat(chosen).double()
    variance = acc[0, COLUMN["m2"]] / acc[0, COLUMN["count"]]
    assert variance == pytest.approx(float(whole.var(correction=0)), rel=1e-3)
    merge(parts[3])
    whole = torch.cat([whole, parts[3].double()])
    variance = acc[0, COLUMN["m2"]] / acc[0, COLUMN["count"]]
    assert variance == pytest.approx(float(whole.var(correction=0)), rel=1e-9)
