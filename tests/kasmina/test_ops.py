"""The slot operators against a plain float64 oracle, and under torch's machinery."""

import os
import subprocess
import sys
from dataclasses import dataclass
from dataclasses import field

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import esper
from esper import _C
from esper.kasmina import ops
from esper.kasmina.ops import SeedPlan

TRAINING = (0.0, 1.0, 0.0)
GRAFTING = (0.3, 0.3, 0.3)
HELD = (1.0, 0.0, 1.0)
FULL = (1.0, 1.0, 1.0)
STATES = [TRAINING, GRAFTING, HELD, FULL, (0.0, 0.0, 0.0)]
COLUMN = {name: i for i, name in enumerate(_C.STATS_COLUMNS)}

ACT = {
    "identity": lambda v: v,
    "relu": torch.relu,
    "gelu": torch.nn.functional.gelu,
    "silu": torch.nn.functional.silu,
    "tanh": torch.tanh,
}


@dataclass
class Slot:
    """A slot call: the seeds' plans with their tensors, and the tensors that they read."""

    h: Tensor
    x: Tensor
    scalars: Tensor
    seeds: list[SeedPlan] = field(default_factory=list)
    params: list[Tensor] = field(default_factory=list)

    @property
    def plan(self) -> list[int]:
        return [number for seed in self.seeds for number in seed.pack()]

    def add(self, offset: int, width: int, row: int, **kind) -> None:
        seed = SeedPlan(row=row, offset=offset, width=width, first_param=len(self.params), **kind)
        source = self.x.shape[-1] if seed.source == "input" else width
        shapes = []
        if seed.family == "bottleneck":
            shapes = [(source, seed.rank)] + [(seed.rank,)] * seed.hidden_bias
            shapes += [(source, seed.rank)] * seed.gated + [(seed.rank,)] * seed.gate_bias
            shapes.append((seed.rank, width))
        else:
            shapes.append((width,))
        shapes += [(width,)] * seed.output_bias
        self.params += [torch.randn(s, dtype=self.h.dtype) / s[0] ** 0.5 for s in shapes]
        assert len(shapes) == seed.num_params
        self.seeds.append(seed)

    def run(self, telemetry: bool = False) -> tuple[Tensor, Tensor]:
        return ops.slot_forward(self.h, self.x, self.params, self.scalars, self.plan, telemetry)

    def with_grad(self) -> "Slot":
        leaves = [t.detach().clone().requires_grad_() for t in (self.h, self.x, *self.params)]
        return Slot(leaves[0], leaves[1], self.scalars, self.seeds, leaves[2:])


def seed_function(seed: SeedPlan, source: Tensor, params: list[Tensor]) -> Tensor:
    own = iter(params[seed.first_param : seed.first_param + seed.num_params])
    if seed.family == "affine":
        g = next(own) * source
    else:
        before = source @ next(own)
        if seed.hidden_bias:
            before = before + next(own)
        hidden = ACT[seed.activation](before)
        if seed.gated:
            gate = source @ next(own)
            if seed.gate_bias:
                gate = gate + next(own)
            hidden = hidden * gate
        g = hidden @ next(own)
    return g + next(own) if seed.output_bias else g


def oracle(slot: Slot) -> Tensor:
    """y with the gradients that the lifecycle asks for, from nothing but torch."""
    y = slot.h.clone()
    for seed in slot.seeds:
        alpha_fwd, alpha_bwd, gamma = slot.scalars[seed.row].tolist()
        columns = slice(seed.offset, seed.offset + seed.width)
        source = slot.x if seed.source == "input" else slot.h[..., columns]
        to_params = seed_function(seed, source.detach(), slot.params)
        to_source = seed_function(seed, source, [p.detach() for p in slot.params])
        straight = alpha_bwd * (to_params - to_params.detach())
        straight = straight + gamma * (to_source - to_source.detach())
        y[..., columns] = y[..., columns] + alpha_fwd * to_params.detach() + straight
    return y


@st.composite
def slots(draw, dtype=torch.float32, states=None):
    torch.manual_seed(draw(st.integers(0, 2**31)))
    lead = draw(st.sampled_from([(1,), (3,), (0,), (65,), (2, 70), (3, 0, 2)]))
    input_width = draw(st.integers(1, 40))
    count = draw(st.integers(1, 4))
    widths = draw(st.lists(st.integers(1, 70), min_size=count, max_size=count))
    gaps = draw(st.lists(st.integers(0, 3), min_size=count + 1, max_size=count + 1))
    total = sum(widths) + sum(gaps)
    h, x = torch.randn(*lead, total, dtype=dtype), torch.randn(*lead, input_width, dtype=dtype)
    chosen = draw(st.lists(st.sampled_from(states or STATES), min_size=count, max_size=count))
    slot = Slot(h, x, torch.tensor(chosen))
    offset = 0
    for i, width in enumerate(widths):
        offset += gaps[i]
        if draw(st.integers(0, 4)) == 0:
            kind = {"source": "output", "family": "affine"}
        else:
            gated = draw(st.booleans())
            kind = {
                "source": draw(st.sampled_from(ops.SOURCES)),
                "family": "bottleneck",
                "activation": draw(st.sampled_from(ops.ACTIVATIONS)),
                "rank": draw(st.integers(1, 40)),
                "hidden_bias": draw(st.booleans()),
                "gated": gated,
                "gate_bias": gated and draw(st.booleans()),
            }
        slot.add(offset, width, i, output_bias=draw(st.booleans()), **kind)
        offset += width
    return slot


def small_slot(state=FULL, dtype=torch.float32, tokens=(130,)) -> Slot:
    """Three seeds of three kinds, with odd widths."""
    torch.manual_seed(1)
    slot = Slot(
        torch.randn(*tokens, 47, dtype=dtype),
        torch.randn(*tokens, 13, dtype=dtype),
        torch.tensor([state] * 3),
    )
    slot.add(
        0,
        19,
        0,
        source="output",
        family="bottleneck",
        activation="gelu",
        rank=5,
        hidden_bias=True,
        output_bias=True,
    )
    slot.add(
        19,
        17,
        1,
        source="input",
        family="bottleneck",
        activation="silu",
        rank=3,
        gated=True,
        gate_bias=True,
    )
    slot.add(38, 9, 2, source="output", family="affine", output_bias=True)
    return slot


def close(actual: Tensor, expected: Tensor, scale: float = 1.0) -> None:
    tolerance = 1e-10 if actual.dtype == torch.float64 else 2e-5
    size = max(1.0, expected.abs().max().item()) if expected.numel() else 1.0
    torch.testing.assert_close(
        actual.double(), expected.double(), rtol=0, atol=tolerance * size * scale
    )


def doubled(slot: Slot) -> Slot:
    return Slot(
        slot.h.double(),
        slot.x.double(),
        slot.scalars,
        slot.seeds,
        [p.double() for p in slot.params],
    ).with_grad()


def check_against_oracle(slot: Slot) -> None:
    ours, reference = slot.with_grad(), doubled(slot)
    y, _ = ours.run()
    expected = oracle(reference)
    close(y, expected)
    dy = torch.randn_like(y)
    y.backward(dy)
    expected.backward(dy.double())
    for actual, wanted in zip(
        (ours.h, ours.x, *ours.params), (reference.h, reference.x, *reference.params), strict=True
    ):
        expected_grad = torch.zeros_like(wanted) if wanted.grad is None else wanted.grad
        if actual.grad is None:
            assert not expected_grad.any()
        else:
            close(actual.grad, expected_grad, scale=4.0)


@given(slot=slots())
@settings(deadline=None, max_examples=120)
def test_float32_matches_the_oracle(slot):
    check_against_oracle(slot)


@given(slot=slots(dtype=torch.float64))
@settings(deadline=None, max_examples=60)
def test_float64_matches_the_oracle(slot):
    check_against_oracle(slot)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_hosts_accumulate_in_float32(dtype):
    slot = small_slot(GRAFTING)
    ours = Slot(
        slot.h.to(dtype), slot.x.to(dtype), slot.scalars, slot.seeds, slot.params
    ).with_grad()
    exact = Slot(ours.h.float(), ours.x.float(), slot.scalars, slot.seeds, slot.params).with_grad()
    y, _ = ours.run()
    wanted, _ = exact.run()
    assert y.dtype == dtype and torch.equal(y, wanted.to(dtype))
    dy = torch.randn_like(y)
    y.backward(dy)
    wanted.backward(dy.float())
    assert torch.equal(ours.h.grad, exact.h.grad.to(dtype))
    assert torch.equal(ours.x.grad, exact.x.grad.to(dtype))
    for actual, expected in zip(ours.params, exact.params, strict=True):
        assert actual.grad.dtype == torch.float32 and torch.equal(actual.grad, expected.grad)
    own = Slot(ours.h, ours.x, slot.scalars, slot.seeds, [p.to(dtype) for p in slot.params])
    assert own.run()[0].dtype == dtype


def test_training_seeds_leave_the_host_untouched():
    slot = small_slot(TRAINING).with_grad()
    y, _ = slot.run(telemetry=True)
    assert torch.equal(y, slot.h)
    dy = torch.randn_like(y)
    y.backward(dy)
    assert torch.equal(slot.h.grad, dy)
    assert slot.x.grad is None
    assert all(p.grad is not None and p.grad.any() for p in slot.params)


def test_held_seeds_get_no_gradient():
    slot = small_slot(HELD).with_grad()
    slot.run()[0].sum().backward()
    assert all(p.grad is None for p in slot.params)
    assert slot.x.grad is not None and not torch.equal(slot.h.grad, torch.ones_like(slot.h))


def test_backward_uses_the_scalars_of_its_forward():
    bank = _C.SeedBank([3])
    for seed in range(3):
        for state in (1, 2):
            bank.advance(0, seed, state)
    slot = small_slot().with_grad()
    slot.scalars = torch.from_numpy(bank.scalars())
    y, _ = slot.run()
    for seed in range(3):
        bank.advance(0, seed, 3)
        bank.set_alpha(0, seed, 1.0)
    dy = torch.randn_like(y)
    y.backward(dy)
    assert torch.equal(slot.h.grad, dy)  # gamma was 0
    assert not torch.equal(slot.run()[0], y)


@pytest.mark.parametrize("state", [TRAINING, GRAFTING, FULL])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["all parameters", "one weight", "three tokens"])
def test_containment(state, bad, where):
    slot = small_slot(state)
    rows = slice(None)
    if where == "all parameters":
        for p in slot.params:
            p.fill_(bad)
    elif where == "one weight":
        for seed in slot.seeds:
            slot.params[seed.first_param + seed.num_params - 1].view(-1)[3] = bad
    else:
        rows = [1, 64, 129]
        slot.x[rows] = bad  # seed 1 alone reads x
    slot = slot.with_grad()
    y, stats = slot.run(telemetry=True)
    dy = torch.randn_like(y)
    y.backward(dy)
    columns = slice(19, 36) if where == "three tokens" else slice(None)
    assert torch.equal(y[rows, columns], slot.h[rows, columns])
    assert torch.equal(slot.h.grad[rows, columns], dy[rows, columns])
    for tensor in (y, slot.h.grad, slot.x.grad, *(p.grad for p in slot.params), stats):
        assert tensor is None or torch.isfinite(tensor).all()
    counted = stats[:, COLUMN["nonfinite_rows"]].tolist()
    assert counted == ([0, 3, 0] if where == "three tokens" else [130, 130, 130])
    if where != "three tokens":
        assert all(not p.grad.any() for p in slot.params)
        return
    # The other tokens train as if the contained ones were not there.
    kept = [i for i in range(130) if i not in rows]
    alone = Slot(slot.h[kept], slot.x[kept], slot.scalars, slot.seeds, slot.params).with_grad()
    alone.run()[0].backward(dy[kept])
    seed = slot.seeds[1]
    for p in range(seed.first_param, seed.first_param + seed.num_params):
        close(slot.params[p].grad, alone.params[p].grad)
    if slot.x.grad is not None:
        assert not slot.x.grad[rows].any()


def test_overflow_is_contained_where_inputs_are_finite():
    slot = Slot(torch.full((4, 8), 1e30), torch.zeros(4, 1), torch.tensor([FULL]))
    slot.add(0, 8, 0, source="output", family="bottleneck", rank=2)
    slot.params = [torch.full((8, 2), 1e4), torch.full((2, 8), 1e4)]
    slot.h[2] = 1.0
    slot = slot.with_grad()
    y, stats = slot.run(telemetry=True)
    y.sum().backward()
    assert torch.equal(y[[0, 1, 3]], slot.h[[0, 1, 3]])
    assert torch.equal(y[2], torch.full((8,), 1.0 + 8 * 1e4 * 2 * 1e4))
    assert stats[0, COLUMN["nonfinite_rows"]] == 3
    assert all(torch.isfinite(p.grad).all() and p.grad.any() for p in slot.params)


def welford(h: Tensor) -> list[float]:
    """count, mean, m2, dead, neighbour_cov and h_energy of [N, d], in float64."""
    h = h.double()
    centred = h - h.mean()
    return [
        h.numel(),
        h.mean().item(),
        (centred**2).sum().item(),
        (h.abs() < 1e-12).sum().item(),
        (centred * centred.roll(-1, dims=1)).sum().item(),
        (h**2).sum().item(),
    ]


@pytest.mark.parametrize("width", [1, 2, 16, 17, 64, 70])
@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (1e4, 1.0), (-3e5, 0.5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_telemetry(width, mean, std, dtype):
    torch.manual_seed(0)
    h = (torch.randn(200, width + 2, dtype=dtype) * std + mean).cumsum(1) / (width + 2)
    h[3, 1:3] = 0.0
    slot = Slot(h, h[:, :1], torch.tensor([GRAFTING]))
    slot.add(1, width, 0, source="output", family="bottleneck", activation="tanh", rank=3)
    _, stats = slot.run(telemetry=True)
    assert stats.dtype == torch.float64 and stats.shape == (1, len(_C.STATS_COLUMNS))
    names = ("count", "mean", "m2", "dead", "neighbour_cov", "h_energy")
    measured = [stats[0, COLUMN[name]].item() for name in names]
    np.testing.assert_allclose(measured, welford(h[:, 1:-1]), rtol=1e-5, atol=1e-3)
    g = seed_function(slot.seeds[0], h[:, 1:-1].double(), [p.double() for p in slot.params])
    energy = stats[0, COLUMN["g_energy"]].item()
    np.testing.assert_allclose(energy, (g**2).sum().item(), rtol=1e-4)
    assert slot.run(telemetry=False)[1].shape == (0, len(_C.STATS_COLUMNS))


def test_merged_telemetry_equals_telemetry_of_the_whole():
    slot = small_slot(tokens=(200,))
    slot.h[:70] += 100.0
    _, whole = slot.run(telemetry=True)
    acc = np.zeros_like(whole.numpy())
    for part in (slice(0, 70), slice(70, 71), slice(71, 71), slice(71, 200)):
        piece = Slot(slot.h[part], slot.x[part], slot.scalars, slot.seeds, slot.params)
        _C.merge_stats(acc, piece.run(telemetry=True)[1].numpy())
    np.testing.assert_allclose(acc, whole.numpy(), rtol=1e-6)
    with pytest.raises(ValueError, match="same number of rows"):
        _C.merge_stats(acc, acc[:2].copy())
    with pytest.raises(TypeError):
        _C.merge_stats(acc.astype(np.float32), acc)


def everything(slot: Slot) -> list[Tensor]:
    slot = slot.with_grad()
    y, stats = slot.run(telemetry=True)
    y.backward(slot.h.detach().sin())
    return [y, stats, slot.h.grad, slot.x.grad, *(p.grad for p in slot.params)]


def test_results_repeat_to_the_bit():
    slot = small_slot(GRAFTING, tokens=(700,))
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            first = everything(slot)
            for _ in range(100):
                assert all(torch.equal(a, b) for a, b in zip(everything(slot), first, strict=True))
    finally:
        torch.set_num_threads(threads)


def test_non_contiguous_and_overlapping_inputs():
    slot = small_slot(tokens=(6, 5))
    wanted, _ = slot.run()
    h = slot.h.transpose(0, 1).contiguous().transpose(0, 1)
    x = torch.stack([slot.x, slot.x], -1)[..., 0]
    params = [p.t().contiguous().t() if p.dim() == 2 else p for p in slot.params]
    assert not h.is_contiguous() and not x.is_contiguous()
    y, _ = Slot(h, x, slot.scalars, slot.seeds, params).run()
    assert torch.equal(y, wanted) and y.is_contiguous()
    expanded = Slot(
        slot.h[:1, :1].expand(6, 5, 47),
        slot.x[:1, :1].expand(6, 5, 13),
        slot.scalars,
        slot.seeds,
        params,
    )
    assert torch.equal(expanded.run()[0][5, 4], wanted[0, 0])


SCRIPT = """
import sys, torch, esper
sys.path.insert(0, sys.argv[1])
import test_ops
assert esper.build_info().cpu_capability == sys.argv[2]
slot = test_ops.small_slot(test_ops.GRAFTING)
test_ops.check_against_oracle(slot)
test_ops.check_against_oracle(test_ops.small_slot(test_ops.FULL, torch.float64))
test_ops.test_telemetry(17, 1e4, 1.0, torch.float32)
test_ops.test_containment(test_ops.FULL, float("nan"), "three tokens")
"""


def run_script(script: str, capability: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", script, os.path.dirname(__file__), capability],
        env={**os.environ, "ESPER_CPU_CAPABILITY": capability, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )


@pytest.mark.parametrize("capability", ["portable", "avx2", "avx512"])
def test_every_instruction_set(capability):
    if (
        capability != "portable"
        and capability not in torch.backends.cpu.get_cpu_capability().lower()
    ):
        have = torch.backends.cpu.get_cpu_capability()
        if not (capability == "avx2" and have == "AVX512"):
            pytest.skip(f"this CPU has {have}")
    result = run_script(SCRIPT, capability)
    assert result.returncode == 0, result.stderr


def test_unknown_instruction_set_is_refused():
    result = run_script("import esper\nesper.build_info()", "sse9")
    assert result.returncode != 0
    assert "ESPER_CPU_CAPABILITY is 'sse9' but must be avx512, avx2 or portable" in result.stderr


def test_gradcheck():
    slot = small_slot(FULL, torch.float64, tokens=(5,)).with_grad()

    def call(h, x, *params):
        return ops.slot_forward(h, x, params, slot.scalars, slot.plan)[0]

    assert torch.autograd.gradcheck(call, (slot.h, slot.x, *slot.params))


@pytest.mark.parametrize("state", [TRAINING, GRAFTING])
def test_opcheck(state):
    slot = small_slot(state).with_grad()
    checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
    if state == GRAFTING:
        # Elsewhere a traced graph returns zeros where eager sends no gradient, which this check
        # refuses; test_compiled_graphs_follow_the_scalars covers those states.
        checks.append("test_aot_dispatch_dynamic")
    for telemetry in (False, True):
        torch.library.opcheck(
            torch.ops.esper.slot_forward.default,
            (slot.h, slot.x, slot.params, slot.scalars, slot.plan, telemetry),
            test_utils=checks,
        )
    params = [p.detach() for p in slot.params]
    for need in ([1] * (2 + len(params)), [0, 1, *[i % 2 for i in range(len(params))]]):
        torch.library.opcheck(
            torch.ops.esper.slot_backward.default,
            (
                slot.h.detach(),
                slot.h.detach(),
                slot.x.detach(),
                params,
                slot.scalars,
                slot.plan,
                need,
            ),
        )


@pytest.mark.slow
def test_compiled_graphs_follow_the_scalars():
    slot = small_slot(TRAINING).with_grad()
    compiled = torch.compile(lambda: slot.run()[0].sin(), fullgraph=True, backend="aot_eager")
    for state in (TRAINING, GRAFTING, FULL):
        slot.scalars.copy_(torch.tensor([state] * 3))
        grads = []
        for function in (compiled, lambda: slot.run()[0].sin()):
            for tensor in (slot.h, slot.x, *slot.params):
                tensor.grad = None
            function().sum().backward()
            grads.append([slot.h.grad, *(p.grad for p in slot.params)])
        assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_second_derivatives_are_refused():
    slot = small_slot().with_grad()
    (grad,) = torch.autograd.grad(slot.run()[0].sin().sum(), slot.h, create_graph=True)
    with pytest.raises(RuntimeError, match="not implemented"):
        grad.sum().backward()


def test_autocast_and_functional_call():
    slot = small_slot(GRAFTING)
    linear = torch.nn.Linear(13, 47)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        h = linear(slot.x)
        y, _ = ops.slot_forward(h, slot.x, slot.params, slot.scalars, slot.plan)
    assert y.dtype == torch.bfloat16
    close(y.float(), oracle(Slot(h.float(), slot.x, slot.scalars, slot.seeds, slot.params)), 500)


def test_flops_count_what_is_computed():
    slot = small_slot(FULL).with_grad()
    down, up = 130 * (19 * 5 + 2 * 13 * 3), 130 * (5 * 19 + 3 * 17 + 9)

    def flops(telemetry: bool) -> dict[str, int]:
        with FlopCounterMode(display=False) as counter:
            y, _ = slot.run(telemetry)
            torch.autograd.backward(y, torch.ones_like(y))
        return {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}

    affine = 130 * 9  # sends through its weight, not through a product with A
    backward = 2 * (2 * (down + up) + down + affine)
    assert flops(False) == {"esper.slot_forward": 2 * (down + up), "esper.slot_backward": backward}
    slot.scalars[:] = torch.tensor(TRAINING)
    backward = 2 * (2 * (down + up))
    assert flops(False) == {"esper.slot_forward": 0, "esper.slot_backward": backward}
    assert flops(True)["esper.slot_forward"] == 2 * (down + up)
    slot.scalars[:] = torch.tensor(HELD)
    backward = 2 * ((down + up) + down + affine)
    assert flops(False)["esper.slot_backward"] == backward


def test_scale_grad():
    t = torch.randn(4, requires_grad=True)
    ops.scale_grad(t, 0.25).sum().backward()
    assert torch.equal(t.grad, torch.full((4,), 0.25))
    t.grad = None
    ops.scale_grad(t, 0.0).sum().backward()
    assert t.grad is None
    assert ops.scale_grad(t, 0.5).data_ptr() == t.data_ptr()


def replaced(plan: list[int], seed: int, name: str, value: int) -> list[int]:
    plan = list(plan)
    plan[seed * ops.PLAN_WIDTH + _C.PLAN_FIELDS.index(name)] = value
    return plan


@pytest.mark.parametrize(
    ("name", "seed", "value"),
    [
        ("row", 0, 3),
        ("row", 0, -1),
        ("offset", 1, 18),  # overlaps the seed before
        ("width", 2, 10),  # beyond the last feature
        ("width", 0, 0),
        ("source", 0, 2),
        ("family", 0, 2),
        ("activation", 0, 5),
        ("activation", 2, 1),  # affine has none
        ("gated", 0, 2),
        ("rank", 0, 0),
        ("rank", 2, 1),
        ("first_param", 1, 3),
        ("biases", 0, 8),
    ],
)
def test_a_bad_plan_names_the_field(name, seed, value):
    slot = small_slot()
    with pytest.raises(ValueError, match=f"{name} of seed {seed} is {value} but must be in"):
        ops.slot_forward(
            slot.h, slot.x, slot.params, slot.scalars, replaced(slot.plan, seed, name, value)
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"h": torch.tensor(1.0)}, "h is a scalar"),
        ({"h": torch.ones(130, 47, dtype=torch.int32)}, "h is of type Int"),
        ({"x": None}, "x is missing but seed 1"),
        ({"x": torch.zeros(129, 13)}, "x has 129 tokens .* but h has 130"),
        ({"x": torch.zeros(130, 12)}, r"\(A of seed 1\) has shape \[13, 3\] but must be \[12, 3\]"),
        ({"scalars": torch.zeros(3, 2)}, r"scalars .* must be a contiguous float32 \[rows, 3\]"),
        ({"scalars": torch.zeros(3, 3).double()}, "scalars is Double"),
        ({"plan": [1, 2, 3]}, "plan has 3 integers"),
        ({"params": []}, "params has 0 tensors"),
    ],
)
def test_bad_arguments_are_named(change, message):
    slot = small_slot()
    arguments = {
        "h": slot.h,
        "x": slot.x,
        "params": slot.params,
        "scalars": slot.scalars,
        "plan": slot.plan,
    }
    with pytest.raises(ValueError, match=message):
        ops.slot_forward(**(arguments | change))


def test_bad_parameter_types_are_named():
    slot = small_slot()
    with pytest.raises(ValueError, match="params has 11 tensors but the plan names 10"):
        ops.slot_forward(slot.h, slot.x, [*slot.params, torch.zeros(1)], slot.scalars, slot.plan)
    slot.params[2] = slot.params[2].bfloat16()
    with pytest.raises(ValueError, match=r"params\[2\] \(B of seed 0\) is of type BFloat16"):
        slot.run()
    with pytest.raises(ValueError, match="source is 'side' but must be one of output, input"):
        SeedPlan(row=0, offset=0, width=1, source="side", family="affine", first_param=0).pack()


def test_cuda_kernels_are_registered_where_they_were_built():
    for name in ("slot_forward", "slot_backward"):
        registered = torch._C._dispatch_has_kernel_for_dispatch_key(f"esper::{name}", "CUDA")
        assert registered == esper.build_info().cuda
