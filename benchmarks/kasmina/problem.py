"""One slot with many bottleneck seeds, and what a user would otherwise write for it.

Alternatives: an eager loop over the seeds, a stacked ``torch.baddbmm``, ``torch.vmap``, and what
``torch.compile`` makes of the first two. All compute the same function with the same alphas.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn.functional import gelu

from benchmarks.timing import Work
from esper import _C
from esper.kasmina.ops import SeedPlan

ALPHA = 0.7
T = TypeVar("T")


@dataclass
class Problem:
    """One slot's tensors, once stacked and once per seed.

    Attributes:
        h: The slot's output, [N, D].
        dy: Gradient of the result, [N, D].
        stacked: A [S, d, r], a [S, 1, r], B [S, r, d], b [S, 1, d].
        single: The same as a flat list of four tensors per seed.
        program: The native core's plan, as a slot makes it when a seed moves.
        scalars: alpha_fwd, alpha_bwd, gamma, [S, 3].
    """

    h: Tensor
    dy: Tensor
    stacked: list[Tensor]
    single: list[Tensor]
    program: _C.SlotProgram
    scalars: Tensor

    @classmethod
    def make(cls, tokens: int, width: int, seeds: int, rank: int) -> "Problem":
        """Returns a problem with fixed random content."""
        generator = torch.Generator().manual_seed(0)
        chunk = width // seeds

        def draw(*shape: int, scale: float = 1.0) -> Tensor:
            return (scale * torch.randn(*shape, generator=generator)).requires_grad_()

        stacked = [
            draw(seeds, chunk, rank, scale=chunk**-0.5),
            draw(seeds, 1, rank),
            draw(seeds, rank, chunk, scale=rank**-0.5),
            draw(seeds, 1, chunk),
        ]
        single = [
            part.detach().clone().requires_grad_()
            for down, down_bias, up, up_bias in zip(*stacked, strict=True)
            for part in (down, down_bias[0], up, up_bias[0])
        ]
        plan = [
            field
            for seed in range(seeds)
            for field in SeedPlan(
                row=seed,
                offset=seed * chunk,
                width=chunk,
                source="output",
                family="bottleneck",
                first_param=4 * seed,
                activation="gelu",
                rank=rank,
                hidden_bias=True,
                output_bias=True,
            ).pack()
        ]
        return cls(
            h=draw(tokens, seeds * chunk),
            dy=torch.randn(tokens, seeds * chunk, generator=generator),
            stacked=stacked,
            single=single,
            program=_C.SlotProgram(plan),
            scalars=torch.full((seeds, 3), ALPHA),
        )

    def ours(self, telemetry: bool = False, direct: bool = False) -> Tensor:
        """The native core, called as a slot calls it."""
        result = self.program.run(self.h, None, self.single, self.scalars, telemetry, direct)
        assert result is not None
        return result[0]

    def loop(self) -> Tensor:
        """One seed after the other."""
        seeds = len(self.single) // 4
        parts = []
        for seed, chunk in enumerate(self.h.chunk(seeds, dim=1)):
            down, down_bias, up, up_bias = self.single[4 * seed : 4 * seed + 4]
            g = torch.addmm(up_bias, gelu(torch.addmm(down_bias, chunk, down)), up)
            parts.append(chunk + ALPHA * g)
        return torch.cat(parts, dim=1)

    def bmm(self) -> Tensor:
        """All seeds in two batched products."""
        down, down_bias, up, up_bias = self.stacked
        seeds = len(down)
        chunks = self.h.unflatten(1, (seeds, -1)).transpose(0, 1)
        g = torch.baddbmm(up_bias, gelu(torch.baddbmm(down_bias, chunks, down)), up)
        return self.h + ALPHA * g.transpose(0, 1).flatten(1)

    def vmap(self) -> Tensor:
        """One seed, mapped over all."""

        def seed(chunk: Tensor, a: Tensor, a_bias: Tensor, b: Tensor, b_bias: Tensor) -> Tensor:
            return chunk + ALPHA * (gelu(chunk @ a + a_bias) @ b + b_bias)

        chunks = self.h.unflatten(1, (len(self.stacked[0]), -1))
        mapped: Tensor = torch.vmap(seed, in_dims=(1, 0, 0, 0, 0), out_dims=1)(
            chunks, *self.stacked
        )
        return mapped.flatten(1)

    def measured(self, forward: Callable[[], Tensor]) -> Callable[[], tuple[Tensor, ...]]:
        """The forward, and the telemetry that ours measures in the same pass."""
        seeds = len(self.stacked[0])

        def run() -> tuple[Tensor, ...]:
            y = forward()
            h = self.h.detach()
            chunks = h.unflatten(1, (seeds, -1))
            centred = chunks - chunks.mean((0, 2), keepdim=True)
            return (
                y,
                centred.square().sum((0, 2)),
                (chunks.abs() < 1e-12).sum((0, 2)),
                chunks.square().sum((0, 2)),
                (centred * centred.roll(1, dims=2)).sum((0, 2)),
                (y.detach() - h).unflatten(1, (seeds, -1)).square().sum((0, 2)),
            )

        return run

    def trained(self, forward: Callable[[], Tensor]) -> Callable[[], object]:
        """Forward and backward."""
        leaves = [self.h, *self.stacked, *self.single]

        def run() -> None:
            forward().backward(self.dy)
            for leaf in leaves:
                leaf.grad = None

        return run

    def forwards(self) -> dict[str, Callable[[], Tensor]]:
        """The eager alternatives by name."""
        return {"loop": self.loop, "bmm": self.bmm, "vmap": self.vmap}

    @property
    def forward_work(self) -> Work:
        """Two products; h read and y written."""
        return Work(4.0 * self.h.numel() * self.rank, 2.0 * 4 * self.h.numel())

    @property
    def training_work(self) -> Work:
        """Two products forward, four backward; h, y, then h, dy, dh; the hidden layer twice."""
        hidden = self.h.shape[0] * len(self.stacked[0]) * self.rank
        return Work(12.0 * self.h.numel() * self.rank, 4.0 * (5 * self.h.numel() + 2 * hidden))

    @property
    def rank(self) -> int:
        """Rank of every seed."""
        return self.stacked[0].shape[2]


def with_compiled(calls: dict[str, Callable[[], T]]) -> dict[str, Callable[[], T]]:
    """Returns the calls, and what ``torch.compile`` makes of the loop and of the stacked form.

    They are compiled when they run for the first time.
    """
    torch.compiler.reset()
    return calls | {
        f"compiled {name}": torch.compile(calls[name], dynamic=False) for name in ("loop", "bmm")
    }


def first_of(call: Callable[[], tuple[Tensor, ...]]) -> Callable[[], Tensor]:
    """Returns a call that gives the first of what `call` gives."""
    return lambda: call()[0]


def agreeing(tokens: int, width: int, seeds: int, rank: int) -> Problem:
    """Returns a problem on which all alternatives compute the same."""
    problem = Problem.make(tokens, width, seeds, rank)
    with torch.no_grad():
        for name, forward in problem.forwards().items():
            torch.testing.assert_close(
                problem.ours(), forward(), rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
            )
    return problem
