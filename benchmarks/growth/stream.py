"""A stream whose labels are permuted again and again: does a host stay able to learn?

The setting of loss of plasticity in continual learning (Dohare et al., Nature 632, 2024), small.
"""

import time
from collections.abc import Collection
from collections.abc import Iterator
from dataclasses import dataclass
from dataclasses import replace

import torch
from torch import Tensor
from torch import nn

import esper
from benchmarks.growth.arena import FINAL
from benchmarks.growth.arena import GROWN
from benchmarks.growth.arena import SMALL
from benchmarks.growth.arena import Arena
from benchmarks.growth.arena import Bar
from benchmarks.growth.arena import Outcome
from benchmarks.growth.arenas import DIRECT
from benchmarks.growth.arenas import ablations
from benchmarks.growth.arenas import width
from benchmarks.growth.training import train_step
from esper.config import Candidate
from esper.config import EsperConfig
from esper.tolaria.cost import TrainingCost
from esper.tolaria.tasks import LabelledBatch
from esper.tolaria.tasks import Split

PERMUTATIONS = 30
STEPS_EACH = 40
LEARNING_RATE = 0.005


class _Permuted(Collection[LabelledBatch]):
    """Batches whose labels are renamed by what stands in ``names`` at the moment."""

    def __init__(self, batches: list[LabelledBatch]) -> None:
        self.names = torch.arange(10)
        self._batches = batches

    def __iter__(self) -> Iterator[LabelledBatch]:
        return ((inputs, self.names[targets]) for inputs, targets in self._batches)

    def __len__(self) -> int:
        return len(self._batches)

    def __contains__(self, item: object) -> bool:
        return item in self._batches


@dataclass(frozen=True, slots=True, kw_only=True)
class Stream(Arena):
    """The figure is the accuracy on each batch before it is trained on, in the last third."""

    def run(self, seed: int, plane: str, split: Split) -> Iterator[Outcome]:
        """Runs the stream with growth, without, and with a host of the final size."""
        model = self.host(seed)
        yield (grown := self._live(GROWN, model, seed, split, plane, self.config))
        yield self._live(SMALL, self._plain(seed, self.small), seed, split)
        size = self.size(grown.parameters)
        yield self._live(FINAL, self._plain(seed, size), seed, split)

    def ablate(self, seed: int, plane: str, split: Split) -> Iterator[Outcome]:
        """Runs the stream with each element of the recipe turned off in turn."""
        for name, config in self.ablations.items():
            yield self._live(name, self.host(seed), seed, split, plane, config)

    def _plain(self, seed: int, size: int) -> nn.Module:
        assert self.plain is not None
        return self.plain(seed, size)

    def _live(
        self,
        arm: str,
        model: nn.Module,
        seed: int,
        split: Split,
        plane: str = "",
        config: EsperConfig | None = None,
    ) -> Outcome:
        task, rate = self.task, LEARNING_RATE
        started = time.perf_counter()
        generator = torch.Generator().manual_seed(seed)
        held_out = _Permuted(self.held_out.batches(task.batch_size))
        optimizer = torch.optim.Adam(model.parameters(), lr=rate)
        session = cost = None
        if config is None:
            cost = TrainingCost(model, task.loss, held_out)
        else:
            session = esper.session(
                model,
                optimizer,
                epochs=PERMUTATIONS,
                held_out=held_out,
                loss=task.loss,
                plane=plane,
                mode="lockstep",
                config=config,
            )
        right: list[float] = []
        for _ in range(PERMUTATIONS):
            held_out.names = torch.randperm(10, generator=generator)
            losses = []
            for _ in range(STEPS_EACH):
                rows = torch.randint(len(split), (task.batch_size,), generator=generator)
                batch = split.inputs[rows], held_out.names[split.targets[rows]]
                right.append(_accuracy(model, batch))
                losses.append(train_step(task, model, optimizer, batch, rate))
            if session is not None:
                session.epoch_end(train_loss=sum(losses) / len(losses))
        moves: list[str] = []
        if session is not None:
            session.close()
            moves = [event.after for event in session.history.events]
        total = cost.total if cost is not None else session.cost.total if session else 0
        thirds = [right[len(right) * i // 3 : len(right) * (i + 1) // 3] for i in range(3)]
        shares = [100.0 * sum(third) / len(third) for third in thirds]
        return Outcome(
            arm=arm,
            seed=seed,
            figure=shares[-1],
            parameters=sum(p.numel() for p in model.parameters()),
            flops=total,
            wall_s=time.perf_counter() - started,
            kept=moves.count("FOSSILIZED"),
            refused=moves.count("CULLED"),
            extra={"first third": shares[0], "second third": shares[1]},
        )


def _accuracy(model: nn.Module, batch: LabelledBatch) -> float:
    inputs, targets = batch
    model.eval()
    with torch.no_grad():
        scores: Tensor = model(inputs)
    return float((scores.argmax(dim=-1) == targets).float().mean())


def stream(seed: int) -> Arena:
    """Digits with label permutations."""
    base = width(seed)
    fields = {name: getattr(base, name) for name in base.__dataclass_fields__}
    candidate = Candidate(blueprint="widen", ranks=(8, 16, 24, 32))
    config = replace(base.config, candidates=(candidate,), graft=DIRECT)
    return Stream(
        **{
            **fields,
            "name": "stream",
            "title": "Does growth keep a host able to learn when its labels are permuted "
            f"{PERMUTATIONS} times?",
            "unit": "% accuracy before training, last third",
            "config": config,
            "ablations": ablations(config),
            "num_seeds": 10,
            "bars": (Bar(arm=GROWN, against=SMALL, floor=0.0),),
        }
    )
