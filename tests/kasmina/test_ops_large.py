"""Seeds and tensors so large that other code paths carry them, against the same oracle."""

import pytest
import torch
from slot_oracle import COLUMN
from slot_oracle import FULL
from slot_oracle import GRAFTING
from slot_oracle import HELD
from slot_oracle import TRAINING
from slot_oracle import Slot
from slot_oracle import check_against_oracle
from slot_oracle import close
from slot_oracle import laid_out
from slot_oracle import seed_function

from esper import _C

WIDTH, RANK = 310, 420  # two matrices of more than half a megabyte in float32


def large_slot(
    tokens=(40,), state=FULL, dtype=torch.float32, layout="features last", **kind
) -> Slot:
    """A seed whose weights outgrow the cache, beside two small ones."""
    torch.manual_seed(3)
    h, x = (laid_out(torch.randn(*tokens, w, dtype=dtype), layout) for w in (WIDTH + 25, 17))
    slot = Slot(h, x, torch.tensor([state] * 3))
    small = {"family": "bottleneck", "rank": 3, "activation": "gelu", "hidden_bias": True}
    slot.add(0, 9, 0, source="input", **small)
    given = {"source": "output", "activation": "gelu", "hidden_bias": True, "output_bias": True}
    slot.add(10, WIDTH, 1, family="bottleneck", **({"rank": RANK} | given | kind))
    slot.add(WIDTH + 11, 14, 2, source="output", **small)
    return slot


@pytest.mark.parametrize("state", [TRAINING, GRAFTING, HELD, FULL])
@pytest.mark.parametrize(
    "kind",
    [
        {},
        {"activation": "silu", "gated": True, "gate_bias": True},
        {"activation": "relu", "hidden_bias": False, "output_bias": False},
        {"activation": "tanh", "source": "input", "rank": 900},
        {"activation": "identity", "gated": True},
    ],
    ids=["gelu", "gated", "plain", "input", "bilinear"],
)
def test_large_seeds_match_the_oracle(state, kind):
    check_against_oracle(large_slot(state=state, **kind))


@pytest.mark.parametrize("gated", [False, True])
def test_a_kept_hidden_layer_of_a_large_seed_is_the_one_that_backward_computes(gated):
    slot = large_slot((600,), gated=gated)
    need = [1] * (2 + len(slot.params))
    call = (slot.h, slot.x, slot.params, slot.scalars, slot.plan)
    _, _, hidden = torch.ops.esper.slot_forward.default(*call, False, keep=True)
    runs = [
        torch.ops.esper.slot_backward.default(torch.ones_like(slot.h), *call, need, kept)
        for kept in (hidden, None)
    ]
    for one, other in zip(*([dh, *dparams] for dh, _, dparams in runs), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("tokens", [(0,), (1,), (3, 4, 5), (1100,)])
def test_large_seeds_at_any_number_of_tokens(tokens, dtype):
    layout = "channels first" if len(tokens) == 3 else "features last"
    check_against_oracle(large_slot(tokens, dtype=dtype, layout=layout))


@pytest.mark.parametrize("source", ["output", "input"])
def test_large_seeds_in_a_half_host(source):
    slot = large_slot(source=source, rank=900)
    ours = Slot(slot.h.bfloat16(), slot.x.bfloat16(), slot.scalars, slot.seeds, slot.params)
    ours = ours.with_grad()
    exact = Slot(ours.h.float(), ours.x.float(), slot.scalars, slot.seeds, slot.params).with_grad()
    y, _ = ours.run()
    wanted, _ = exact.run()
    dy = torch.randn_like(y)
    y.backward(dy)
    wanted.backward(dy.float())
    near = {"rtol": 2**-7, "atol": 2**-7}
    torch.testing.assert_close(y.float(), wanted, **near)
    torch.testing.assert_close(ours.h.grad.float(), exact.h.grad, **near)
    torch.testing.assert_close(ours.x.grad.float(), exact.x.grad, **near)
    for actual, expected in zip(ours.params, exact.params, strict=True):
        close(actual.grad, expected.grad)


def test_telemetry_of_a_large_seed():
    slot = large_slot((600,), state=TRAINING)
    y, stats = slot.run(telemetry=True)
    assert torch.equal(y, slot.h)
    seed = slot.seeds[1]
    params = [p.double() for p in slot.params]
    g = seed_function(seed, slot.h[:, 10 : 10 + WIDTH].double(), params)
    row = stats[1]
    assert row[COLUMN["g_energy"]].item() == pytest.approx(g.square().sum().item(), rel=1e-4)
    chunk = slot.h[:, 10 : 10 + WIDTH].double()
    assert row[COLUMN["count"]] == chunk.numel()
    assert row[COLUMN["h_energy"]].item() == pytest.approx(chunk.square().sum().item(), rel=1e-5)


@pytest.mark.parametrize("state", [TRAINING, GRAFTING, FULL])
@pytest.mark.parametrize("where", ["a weight", "two tokens", "overflow"])
def test_containment_of_a_large_seed(state, where):
    slot = large_slot((600,), state=state)
    rows = slice(None)
    if where == "a weight":
        slot.params[slot.seeds[1].first_param][3, 3] = float("nan")
    else:
        rows = [5, 550]
        slot.h[rows, 12] = float("inf") if where == "two tokens" else 1e37
        slot.params[slot.seeds[1].first_param + 2] *= 1e5
    slot = slot.with_grad()
    y, stats = slot.run(telemetry=True)
    dy = torch.randn_like(y)
    y.backward(dy)
    own = slice(10, 10 + WIDTH)
    assert torch.equal(y[rows, own], slot.h[rows, own])
    assert torch.equal(slot.h.grad[rows, own], dy[rows, own])
    assert stats[1, COLUMN["nonfinite_rows"]] == (600 if where == "a weight" else 2)
    assert torch.isfinite(stats[1, COLUMN["g_energy"]])
    assert all(torch.isfinite(p.grad).all() for p in slot.params)
    large = slice(slot.seeds[1].first_param, slot.seeds[2].first_param)
    trained = slot.params[large][0].grad
    assert trained.any() == (where != "a weight")
    if where != "a weight":  # the other tokens train as if the contained ones were not there
        kept = [i for i in range(600) if i not in rows]
        alone = Slot(slot.h[kept], slot.x[kept], slot.scalars, slot.seeds, slot.params).with_grad()
        alone.run()[0].backward(dy[kept])
        for actual, wanted in zip(slot.params[large], alone.params[large], strict=True):
            close(actual.grad, wanted.grad)


def test_tensors_beyond_the_cache_match_the_oracle():
    torch.manual_seed(0)
    h = torch.randn(2050, 576)  # more than four megabytes, some blocks of tokens not whole
    slot = Slot(h, h[:, :32].contiguous(), torch.tensor([FULL, GRAFTING, HELD, FULL]))
    kind = {"family": "bottleneck", "activation": "gelu", "hidden_bias": True, "output_bias": True}
    slot.add(0, 64, 0, source="output", rank=5, **kind)  # whole lines of the cache
    slot.add(64, 72, 1, source="output", rank=5, **kind)  # not whole ones
    slot.add(256, 128, 2, source="output", rank=7, gated=True, gate_bias=True, **kind)
    slot.add(384, 160, 3, source="input", rank=4, **kind)
    check_against_oracle(slot)


def test_results_have_memory_of_their_own_until_they_are_freed():
    slot = large_slot((4000,))
    first, _ = slot.run()
    copy = first.clone()
    second, _ = slot.run()
    assert first.data_ptr() != second.data_ptr()
    second.fill_(0.0)
    assert torch.equal(first, copy)
    place = second.data_ptr()
    del second
    third, _ = slot.run()
    assert third.data_ptr() == place and torch.equal(third, first)
    third.resize_(3, 5)
    assert third.shape == (3, 5)
    first.untyped_storage().resize_(first.nbytes * 2)
    assert torch.equal(first, copy)
    del third
    _C.release_memory()
    assert torch.equal(slot.run()[0], copy)
