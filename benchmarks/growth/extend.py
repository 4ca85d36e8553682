"""A trained host meets a new domain: what is learnt of the new, and what is left of the old.

The old domain is the digits, the new one the digits turned by 90 degrees. No old sample is shown
again. Growth and LoRA leave the host's weights as they are and train what they add.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from dataclasses import replace

import torch
from torch import nn

import esper
from benchmarks.growth.arena import FINAL
from benchmarks.growth.arena import GROWN
from benchmarks.growth.arena import Arena
from benchmarks.growth.arena import Bar
from benchmarks.growth.arena import Outcome
from benchmarks.growth.arenas import DIRECT
from benchmarks.growth.arenas import width
from benchmarks.growth.hosts import nest
from benchmarks.growth.hosts import nested_names
from benchmarks.growth.training import Recipe
from benchmarks.growth.training import Trained
from benchmarks.growth.training import train_grown
from benchmarks.growth.training import train_static
from esper.config import Candidate
from esper.tolaria.tasks import Split
from esper.tolaria.tasks import Task

FULL = "full fine-tuning"
LORA = "LoRA of equal size"
HOST_SIZE = 32


class LoRALinear(nn.Module):
    """A frozen Linear with a trained map of low rank beside it (Hu et al., arXiv 2106.09685)."""

    def __init__(self, linear: nn.Linear, rank: int) -> None:
        super().__init__()
        self.linear = linear.requires_grad_(False)
        self.down = nn.Parameter(torch.randn(rank, linear.in_features) / linear.in_features**0.5)
        self.up = nn.Parameter(torch.zeros(linear.out_features, rank))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        added: torch.Tensor = self.linear(inputs) + inputs @ self.down.T @ self.up.T
        return added


def turned(split: Split) -> Split:
    """Returns the split with its images turned by 90 degrees."""
    return Split(split.inputs.rot90(1, (1, 2)).contiguous(), split.targets)


@dataclass(frozen=True, slots=True, kw_only=True)
class Extend(Arena):
    """The figure is accuracy on the new domain; ``extra`` holds what is left of the old."""

    def run(self, seed: int, plane: str, split: Split) -> Iterator[Outcome]:
        """Trains the host on the old domain, then every arm from there on the new one."""
        old = self.task
        new = replace(
            old,
            train=turned(old.train),
            validation=turned(old.validation),
            test=turned(old.test),
        )
        trained = train_static(
            old, old.host(seed, HOST_SIZE), self.static[FINAL], seed, steps=self.steps
        )
        weights = trained.model.state_dict()
        before = old.accuracy(trained.model, split)
        fresh = old.host(seed, HOST_SIZE)
        fresh.load_state_dict(weights)
        fresh.requires_grad_(False)
        fresh.net[2].bias.requires_grad_(True)  # or there is no gradient to score places by
        fresh.net = nest(fresh.net, 2)
        model = esper.wrap(fresh, target_layers=nested_names("net", 3), seeds_per_layer=1)
        grown = train_grown(
            new,
            model,
            self.grown,
            self.config,
            seed,
            plane=plane,
            steps=self.steps,
            epochs=self.epochs,
            held_out=_both(old.validation, new.validation, self.num_held_out),
        )
        yield self._measured(GROWN, seed, grown, new, split, before)
        full = old.host(seed, HOST_SIZE)
        full.load_state_dict(weights)
        yield self._measured(
            FULL,
            seed,
            train_static(new, full, self.static[FULL], seed, steps=self.steps),
            new,
            split,
            before,
        )
        size = grown.parameters - sum(p.numel() for p in fresh.parameters())
        lora = old.host(seed, HOST_SIZE)
        lora.load_state_dict(weights)
        rank = max(1, round(size / (64 + HOST_SIZE + HOST_SIZE + 10)))
        lora.net[0], lora.net[2] = LoRALinear(lora.net[0], rank), LoRALinear(lora.net[2], rank)
        yield self._measured(
            LORA,
            seed,
            train_static(new, lora, self.static[LORA], seed, steps=self.steps),
            new,
            split,
            before,
        )

    def _measured(
        self, arm: str, seed: int, trained: Trained, new: Task, split: Split, before: float
    ) -> Outcome:
        outcome = self.outcome(arm, seed, trained, turned(split))
        after = new.accuracy(trained.model, split)
        left = {"old accuracy": 100.0 * after, "forgotten": 100.0 * (before - after)}
        return replace(outcome, extra={**outcome.extra, **left})


def _both(old: Split, new: Split, number: int) -> Split:
    half = number // 2
    return Split(
        torch.cat([old.inputs[:half], new.inputs[:half]]),
        torch.cat([old.targets[:half], new.targets[:half]]),
    )


def extend(seed: int) -> Arena:
    """Digits, then digits turned by 90 degrees."""
    base = width(seed)
    fields = {name: getattr(base, name) for name in base.__dataclass_fields__}
    candidates = (Candidate(blueprint="widen", ranks=(8, 16, 32)),)
    config = replace(base.config, candidates=candidates, graft=DIRECT)
    return Extend(
        **{
            **fields,
            "name": "extend",
            "title": "Can a trained host learn a new domain without losing the old one?",
            "unit": "% accuracy on the new domain",
            "config": config,
            "grown": Recipe(learning_rate=0.05),
            "static": {
                FINAL: Recipe(learning_rate=0.05),
                FULL: Recipe(learning_rate=0.03),
                LORA: Recipe(learning_rate=0.003),
            },
            "num_seeds": 10,
            "bars": (
                Bar(arm=GROWN, against=FULL, point=-0.5),
                Bar(arm=GROWN, against=LORA, point=0.0),
            ),
            "ablations": {},
        }
    )
