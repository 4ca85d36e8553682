"""Bad input to operators, seed bank and kernel cache: named, and nothing changed."""

import math

import pytest
import torch

from esper import _C
from esper.kasmina.cache import KernelCache
from esper.kasmina.growth import NUM_FEATURES
from esper.kasmina.ops import SeedPlan
from esper.kasmina.ops import slot_forward

NAN, INF = math.nan, math.inf
WHOLE = "must be a whole number"
SHAPES = [(4, 2), (2, 4), (6, 2), (2, 4)]
PLAN = (
    SeedPlan(0, 0, 4, "output", "bottleneck", 0, rank=2).pack()
    + SeedPlan(1, 4, 4, "input", "bottleneck", 2, rank=2).pack()
)


def plan_with(seed, field, value):
    plan = list(PLAN)
    plan[seed * len(_C.PLAN_FIELDS) + _C.PLAN_FIELDS.index(field)] = value
    return plan


def scalars_with(seed, column, value):
    scalars = torch.full((2, 3), 0.5)
    scalars[seed, column] = value
    return scalars


def params_with(index, tensor):
    params = [torch.ones(shape) for shape in SHAPES]
    params[index] = tensor
    return params


META = {"device": "meta"}
BAD_CALLS = [
    *[
        (
            {"scalars": scalars_with(seed, column, value)},
            f"{name} of seed {seed} is {value:g} but must",
        )
        for seed in (0, 1)
        for column, name in enumerate(("alpha_fwd", "alpha_bwd", "gamma"))
        for value in (NAN, INF, -INF, -0.5, 1.5)
    ],
    ({"scalars": torch.ones(2, 3).half()}, "scalars is Half .* must be a contiguous float32"),
    ({"scalars": torch.ones(2, 4)[:, :3]}, "scalars is Float .* must be a contiguous float32"),
    ({"scalars": torch.ones(2, 3, **META)}, "scalars is on meta, but must be on cpu"),
    ({"scalars": torch.ones(1, 3)}, r"row of seed 1 is 1 but must be in \[0, 1\)"),
    ({"x": torch.ones(5, 6, dtype=torch.int32)}, "x is of type Int but must be float32"),
    ({"x": torch.ones(5, 6, **META)}, "x is on meta, but must be on cpu"),
    (
        {"x": torch.ones(5, 7)},
        r"params\[2\] \(A of seed 1\) has shape \[6, 2\] but must be \[7, 2\]",
    ),
    ({"x": torch.ones(4, 6)}, "x has 4 tokens .* has 5"),
    ({"x": None}, "x is missing but seed 1 reads the slot's input"),
    ({"params": params_with(0, torch.ones(4, 2).half())}, r"params\[0\] .* type Half but must be"),
    (
        {"params": params_with(1, torch.ones(2, 4, **META))},
        r"params\[1\] is on meta, but must be on",
    ),
    (
        {"params": params_with(3, torch.ones(2, 5))},
        r"params\[3\] .* has shape \[2, 5\] but must be",
    ),
    ({"params": params_with(0, torch.ones(4, 2))[:3]}, "params has 3 tensors but seed 1 needs"),
    ({"plan": plan_with(0, "rank", 0)}, "rank of seed 0 is 0 but must be in"),
    ({"plan": plan_with(0, "rank", -3)}, "rank of seed 0 is -3 but must be in"),
    ({"plan": plan_with(1, "rank", 2**40)}, "rank of seed 1 is 1099511627776 but must be in"),
    ({"plan": plan_with(1, "width", 5)}, "width of seed 1 is 5 but must be in"),
    ({"plan": plan_with(0, "width", 0)}, "width of seed 0 is 0 but must be in"),
    ({"plan": plan_with(1, "offset", 3)}, "offset of seed 1 is 3 but must be in"),
    ({"plan": plan_with(1, "offset", 8)}, "offset of seed 1 is 8 but must be in"),
    ({"plan": PLAN[:-1]}, "plan has 21 integers but must have 11 for each seed"),
]
HOSTS = [
    (torch.ones(5, 8, dtype=torch.int64), "is of type Long but must be float32"),
    (torch.ones(5, 8, dtype=torch.complex64), "is of type ComplexFloat but must be float32"),
    (torch.ones(5, 8, **META), "on cpu, but must be on meta as"),
    (torch.ones(5, 7), "width of seed 1 is 4 but must be in"),
    (torch.ones(5, 0), "has no features"),
    (torch.tensor(1.0), "is a scalar but must be"),
]


def call_with(change, backward, host=None):
    given = {
        "h": torch.ones(5, 8),
        "x": torch.ones(5, 6),
        "params": [torch.ones(shape) for shape in SHAPES],
        "scalars": torch.full((2, 3), 0.5),
        "plan": list(PLAN),
    } | change
    if host is not None:
        given["h"] = host
    kept = [t.clone() for t in (given["h"], *given["params"], given["scalars"])]
    dy = given["h"]
    try:
        if backward:
            need = given.pop("need", [1] * (2 + len(given["params"])))
            torch.ops.esper.slot_backward(dy, *given.values(), need)
        else:
            slot_forward(*given.values())
    finally:
        for tensor, before in zip(
            (given["h"], *given["params"], given["scalars"]), kept, strict=True
        ):
            assert tensor.is_meta or torch.equal(tensor.nan_to_num(), before.nan_to_num())


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize(("change", "message"), BAD_CALLS)
def test_operators_refuse(change, message, backward):
    with pytest.raises(ValueError, match=message):
        call_with(change, backward)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize(("host", "message"), HOSTS)
def test_operators_refuse_hosts(host, message, backward):
    with pytest.raises(ValueError, match=message):
        call_with({}, backward, host)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"need": [1, 1]}, "need has 2 flags but must have 6"),
        ({"h": None}, "h is missing but a seed reads the slot's output"),
        ({"h": torch.ones(5, 8).half()}, r"h is Half \[5, 8\] but dy is Float \[5, 8\]"),
        ({"h": torch.ones(4, 8)}, r"h is Float \[4, 8\] but dy is Float \[5, 8\]"),
        ({"h": torch.ones(5, 8, **META)}, "h is on meta, but must be on cpu as dy is"),
        ({"hidden": torch.ones(7)}, r"hidden is Float \[7\] on cpu but must be .* Float \[\d+\]"),
        ({"hidden": torch.ones(7, **META)}, "hidden is on meta, but must be on cpu as dy is"),
    ],
)
def test_the_backward_operator_refuses_what_forward_does_not_take(change, message):
    params, scalars = [torch.ones(shape) for shape in SHAPES], torch.full((2, 3), 0.5)
    given = {"h": torch.ones(5, 8), "x": torch.ones(5, 6)} | change
    need = given.pop("need", [1] * 6)
    with pytest.raises(ValueError, match=message):
        torch.ops.esper.slot_backward(
            torch.ones(5, 8),
            given["h"],
            given["x"],
            params,
            scalars,
            list(PLAN),
            need,
            given.get("hidden"),
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"h": torch.ones(5)}, "h must have 2 axes"),
        ({"h": torch.ones(5, 8).double()}, "h is .* must be contiguous, of type float32"),
        ({"h": torch.ones(8, 5).T}, "h is .* must be contiguous"),
        ({"x": torch.ones(5, 6)}, "x and input_omega must come together"),
        ({"bounds": []}, "bounds must hold pairs"),
        ({"bounds": [0, 4, 4, 9]}, "bounds are .* must be ranges within the width 8"),
        ({"bounds": [4, 4, 4, 8]}, "bounds are"),
        ({"output_omega": torch.ones(2, 4, 3)}, "output_omega is"),
    ],
)
def test_growth_probes_refuse(change, message):
    given = {
        "h": torch.ones(5, 8),
        "x": None,
        "input_omega": None,
        "output_omega": torch.ones(2, 4, NUM_FEATURES),
        "offset": torch.ones(2, 1, NUM_FEATURES),
        "bounds": [0, 4, 4, 8],
        "linear": False,
    } | change
    with pytest.raises(ValueError, match=message):
        torch.ops.esper.growth_basis(*given.values())


BANK = [
    *[(lambda b, a=a: b.state(*a), m) for a, m in (((1, 0), "slot is 1"), ((0, 2), "seed is 2"))],
    (lambda b: b.state(0, -1), r"seed is -1 but slot 0 has seeds in \[0, 2\)"),
    (lambda b: b.plan(7), r"slot is 7 but must be in \[0, 1\)"),
    (lambda b: b.drift_ramps(-1), r"slot is -1 but must be in \[0, 1\)"),
    *[
        (lambda b, v=v: b.set_alpha(0, 0, v), r"alpha is \S+ but must be in \[0, 1\]")
        for v in (NAN, INF, -1e-9, 1.5)
    ],
    (lambda b: b.set_alpha(0, 1, 0.5), "GRAFTING only; the seed is DORMANT"),
    (lambda b: b.advance(0, 0, 11), r"to_state is 11 but must be in \[0, 11\)"),
    (lambda b: b.advance(0, 0, 0), "cannot go from GRAFTING to DORMANT"),
    (lambda b: b.set_schedule(0, 0, "wild", 3), "kind is 'wild' but must be one of"),
    (lambda b: b.set_schedule(0, 0, "drift", 3, tolerance=NAN), "tolerance is nan but must be"),
    (lambda b: b.set_schedule(0, 0, "linear", 3, start=NAN), "start is nan but must be"),
    (lambda b: b.set_drift(0, 0, NAN, 0.0), "cosine is nan but must be finite"),
    (lambda b: b.set_drift(0, 0, 0.0, INF), "norm is inf but must be finite"),
    (lambda b: b.set_embargo(0, 1, -1), "embargo is -1 steps but must be in"),
    (lambda b: b.set_embargo(0, 0, 1), "GRAFTING cannot be put under embargo"),
    (lambda b: b.set_plan(0, 0, [1, 2]), "record has 2 fields but must have 11"),
    (lambda b: b.set_plan(0, 0, [0] * 11), "chunk of width 0 but must name at least 1"),
]


@pytest.mark.parametrize(("do", "message"), BANK)
def test_a_seed_bank_refuses_and_stays_as_it_is(do, message):
    bank = _C.SeedBank([2])
    for state in (1, 2, 3):
        bank.advance(0, 0, state)
    bank.set_alpha(0, 0, 0.25)
    before = (bank.to_bytes(), bank.scalars().tobytes(), bank.plans().tobytes())
    with pytest.raises(ValueError, match=message):
        do(bank)
    assert before == (bank.to_bytes(), bank.scalars().tobytes(), bank.plans().tobytes())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([],), "seeds_per_slot is empty but must name"),
        (([1, 0],), r"seeds_per_slot\[1\] is 0 but must be in \[1, 2\*\*24\]"),
        (([2**40],), r"seeds_per_slot\[0\] is 1099511627776 but must be in"),
        (([2**24, 1],), r"seeds_per_slot names more than 2\*\*24 seeds in all"),
        (([1], -1), r"embargo_steps is -1 but must be in \[0, 2\*\*52\]"),
    ],
)
def test_a_seed_bank_without_sense_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        _C.SeedBank(*arguments)


@pytest.mark.parametrize("capacity", [-1, 0.5, NAN, "1", None])
def test_a_cache_refuses_capacities(capacity):
    with pytest.raises(ValueError, match=f"capacity_bytes is {capacity!r}, but it {WHOLE}"):
        KernelCache(capacity)


def test_a_cache_refuses_to_release_what_is_not_in_use():
    cache = KernelCache(100)
    with pytest.raises(ValueError, match="digest is 'x', but it must be that of a kernel in use"):
        cache.release("x")
    assert cache.get("x") is None and cache.stats().num_kernels == 0
