"""The slot operators under torch's machinery, on every instruction set, and with bad arguments."""

import math
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from slot_oracle import FULL
from slot_oracle import GRAFTING
from slot_oracle import HELD
from slot_oracle import TRAINING
from slot_oracle import Slot
from slot_oracle import close
from slot_oracle import oracle
from slot_oracle import small_slot
from slot_oracle import spatial_slot
from torch.utils.flop_counter import FlopCounterMode

import esper
from esper import _C
from esper.kasmina import ops
from esper.kasmina.ops import SeedPlan

NUMERICS = ("ops", "ops_layouts", "ops_telemetry", "ops_containment", "growth")


def with_capability(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "ESPER_CPU_CAPABILITY": name, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )


@pytest.mark.timeout(700)
@pytest.mark.parametrize("name", ["portable", "avx2", "avx512"])
def test_every_instruction_set(name):
    code = "import esper; print(esper.build_info().cpu_capability)"
    probe = with_capability(name, "-c", code)
    if "but this CPU does not support it" in probe.stderr:
        pytest.skip(f"this CPU has no {name}")
    assert probe.stdout.strip() == name
    numerics = [str(Path(__file__).with_name(f"test_{part}.py")) for part in NUMERICS]
    result = with_capability(
        name, "-m", "pytest", "-q", "-p", "no:xdist", "-k", "not repeat", *numerics
    )
    assert result.returncode == 0, result.stdout


def test_unknown_instruction_set_is_refused():
    result = with_capability("sse9", "-c", "import esper; esper.build_info()")
    assert result.returncode != 0
    assert "ESPER_CPU_CAPABILITY is 'sse9' but must be avx512, avx2 or portable" in result.stderr


@pytest.mark.parametrize("make", [partial(small_slot, tokens=(5,)), spatial_slot])
def test_gradcheck(make):
    slot = make(FULL, torch.float64).with_grad()

    def call(h, x, *params):
        return ops.slot_forward(h, x, params, slot.scalars, slot.plan)[0]

    assert torch.autograd.gradcheck(call, (slot.h, slot.x, *slot.params))


@pytest.mark.parametrize(
    ("make", "state"),
    [
        (small_slot, TRAINING),
        (small_slot, GRAFTING),
        (spatial_slot, GRAFTING),
        (partial(spatial_slot, layout="features last"), GRAFTING),
    ],
)
def test_opcheck(make, state):
    slot = make(state).with_grad()
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
    _, _, hidden = torch.ops.esper.slot_forward.default(
        slot.h, slot.x, slot.params, slot.scalars, slot.plan, False, keep=True
    )
    kept = hidden if hidden.numel() and state != TRAINING else None
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
                kept,
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
    kept = down  # the hidden layers are not computed again where forward has computed them
    backward = 2 * (2 * (down + up) + down + affine - kept)
    assert flops(False) == {"esper.slot_forward": 2 * (down + up), "esper.slot_backward": backward}
    slot.scalars[:] = torch.tensor(TRAINING)
    backward = 2 * (2 * (down + up))
    assert flops(False) == {"esper.slot_forward": 0, "esper.slot_backward": backward}
    assert flops(True)["esper.slot_forward"] == 2 * (down + up)
    slot.scalars[:] = torch.tensor(HELD)
    backward = 2 * ((down + up) + down + affine - kept)
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
        ("family", 0, 4),
        ("activation", 0, 5),
        ("activation", 2, 1),  # affine has none
        ("gated", 0, 2),
        ("rank", 0, 0),
        ("rank", 2, 1),
        ("first_param", 1, 3),
        ("biases", 0, 8),
        ("window", 0, 3),  # a bottleneck has none
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
        ({"scalars": torch.full((3, 3), math.nan)}, "alpha_fwd of seed 0 is nan but must be in"),
        ({"scalars": torch.full((3, 3), -0.1)}, "alpha_fwd of seed 0 is -0.1 but must be in"),
        ({"scalars": torch.tensor([FULL, FULL, (1.0, 1.5, 1.0)])}, "alpha_bwd of seed 2 is 1.5"),
        ({"scalars": torch.tensor([FULL, (1, 1, math.inf), FULL])}, "gamma of seed 1 is inf"),
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
