"""One large slot on a GPU, against a stacked ``baddbmm`` and against a copy of its output.

A forward pass has to read h and to write y, so a copy of h is the least that it can take.
"""

from collections.abc import Callable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

import esper
from benchmarks.kasmina.problem import ALPHA
from esper.kasmina.ops import SeedPlan
from esper.kasmina.ops import slot_forward

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
    pytest.mark.skipif(
        not esper.build_info().cuda, reason="the native core was built without CUDA"
    ),
]

TOKENS, WIDTH, SEEDS, RANK = 16384, 1024, 16, 16


def works(dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """The alternatives by name, each a forward pass."""
    chunk = WIDTH // SEEDS
    h = torch.randn(TOKENS, WIDTH, device="cuda", dtype=dtype)
    down = torch.randn(SEEDS, chunk, RANK, device="cuda", dtype=dtype) / chunk**0.5
    up = torch.randn(SEEDS, RANK, chunk, device="cuda", dtype=dtype) / RANK**0.5
    params = [tensor for pair in zip(down.unbind(), up.unbind(), strict=True) for tensor in pair]
    plan = [
        number
        for seed in range(SEEDS)
        for number in SeedPlan(
            row=seed,
            offset=seed * chunk,
            width=chunk,
            source="output",
            family="bottleneck",
            first_param=2 * seed,
            activation="relu",
            rank=RANK,
        ).pack()
    ]
    scalars = torch.full((SEEDS, 3), ALPHA)

    def stacked() -> torch.Tensor:
        chunks = h.view(TOKENS, SEEDS, chunk).transpose(0, 1)
        hidden = torch.bmm(chunks, down).relu()
        y = torch.baddbmm(chunks, hidden, up, alpha=ALPHA)
        return y.transpose(0, 1).reshape(TOKENS, WIDTH)

    return {
        "native": lambda: slot_forward(h, None, params, scalars, plan)[0],
        "baddbmm": stacked,
        "copy": h.clone,
    }


@pytest.mark.parametrize("name", ["native", "baddbmm", "copy"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_forward(benchmark: BenchmarkFixture, name: str, dtype: torch.dtype) -> None:
    benchmark.group = f"cuda forward, {TOKENS} tokens of {WIDTH}, {SEEDS} seeds of {RANK}, {dtype}"
    alternatives = works(dtype)
    with torch.no_grad():
        wanted = alternatives["baddbmm"]()
        assert isinstance(wanted, torch.Tensor)
        torch.testing.assert_close(alternatives["native"](), wanted, rtol=2e-2, atol=2e-2)

        def timed() -> None:
            alternatives[name]()
            torch.cuda.synchronize()

        benchmark.pedantic(timed, rounds=50, warmup_rounds=5)
