"""Nothing to learn: with shuffled labels the accept test must refuse what grows."""

from collections.abc import Iterator
from dataclasses import dataclass
from dataclasses import replace

import torch

from benchmarks.growth.arena import GROWN
from benchmarks.growth.arena import Arena
from benchmarks.growth.arena import Outcome
from benchmarks.growth.arenas import width
from esper.tolaria.tasks import Split


@dataclass(frozen=True, slots=True, kw_only=True)
class Shuffled(Arena):
    """The width arena on labels that say nothing; its figure is whether a seed was kept."""

    def run(self, seed: int, plane: str, split: Split) -> Iterator[Outcome]:
        """Grows one model on labels shuffled by the seed; ``split`` is not looked at."""
        task = self.task
        parts = (task.train, task.validation)
        train, validation = (shuffle(part, 2 * seed + i) for i, part in enumerate(parts))
        arena = replace(self, task=replace(task, train=train, validation=validation))
        outcome = arena.outcome(GROWN, seed, arena.grow(seed, plane), validation)
        yield replace(outcome, figure=float(outcome.kept > 0))


def shuffle(split: Split, seed: int) -> Split:
    """Returns the split with its targets in another order."""
    order = torch.randperm(len(split), generator=torch.Generator().manual_seed(seed))
    return Split(split.inputs, split.targets[order])


def shuffled(seed: int) -> Arena:
    """Digits with shuffled labels."""
    base = width(seed)
    fields = {name: getattr(base, name) for name in base.__dataclass_fields__}
    return Shuffled(
        **{
            **fields,
            "name": "shuffled",
            "title": "How often is a seed kept where there is nothing to learn? At most 5 % of the "
            "runs should (the level of the accept test over a run).",
            "unit": "share of runs",
            "higher_is_better": False,
            "num_seeds": 40,
            "bars": (),
            "ablations": {},
        }
    )
