"""Nobody knows the right size: growth against a sweep of sizes and successive halving."""

from collections.abc import Iterator
from dataclasses import dataclass
from dataclasses import replace

from torch import nn

import esper
from benchmarks.growth.arena import FINAL
from benchmarks.growth.arena import GROWN
from benchmarks.growth.arena import Arena
from benchmarks.growth.arena import Bar
from benchmarks.growth.arena import Outcome
from benchmarks.growth.arenas import DIRECT
from benchmarks.growth.arenas import EARLY
from benchmarks.growth.arenas import ablations
from benchmarks.growth.arenas import accuracy
from benchmarks.growth.arenas import size_by_parameters
from benchmarks.growth.arenas import text
from benchmarks.growth.arenas import transformers
from benchmarks.growth.arenas import width
from benchmarks.growth.hosts import nest
from benchmarks.growth.hosts import nested_names
from benchmarks.growth.training import Recipe
from benchmarks.growth.training import Trained
from benchmarks.growth.training import train_static
from esper.config import BudgetConfig
from esper.config import Candidate
from esper.config import EsperConfig
from esper.kasmina import MorphableModel
from esper.tolaria import tasks
from esper.tolaria.tasks import Split
from esper.tolaria.tasks import Task
from esper.tolaria.tasks.digits import digits

SWEEP = "best of a sweep of sizes"
HALVING = "successive halving"
LEVELS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizing(Arena):
    """The figure is that of what each way of finding a size ends with.

    Attributes:
        sizes: The sizes that are searched.
        grown_steps: Optimizer steps of the grown model: who needs no search can train longer.
    """

    sizes: tuple[int, ...]
    grown_steps: int

    def grow(self, seed: int, plane: str, config: EsperConfig | None = None) -> Trained:
        """Trains the grown arm."""
        return Arena.grow(replace(self, steps=self.grown_steps), seed, plane, config)

    def run(self, seed: int, plane: str, split: Split) -> Iterator[Outcome]:
        """Grows one model; then trains a model of every size and halves the field."""
        yield self.outcome(GROWN, seed, self.grow(seed, plane), split)
        sweep = {size: self._train(seed, size, self.steps) for size in self.sizes}
        yield self._found(SWEEP, seed, sweep, sum(t.flops for t in sweep.values()), split)
        # A rung is trained anew with its own schedule: a decayed run cannot go on.
        field, spent, steps = list(self.sizes), 0, self.steps // 4
        while True:
            rung = {size: self._train(seed, size, steps) for size in field}
            spent += sum(trained.flops for trained in rung.values())
            if len(field) == 1 or steps >= self.steps:
                break
            field.sort(key=lambda size: -self._score(rung[size].model))
            field, steps = field[: max(1, len(field) // 2)], min(self.steps, 2 * steps)
        yield self._found(HALVING, seed, rung, spent, split)

    def _train(self, seed: int, size: int, steps: int) -> Trained:
        assert self.plain is not None
        model = self.plain(seed, size)
        return train_static(self.task, model, self.static[FINAL], seed, steps=steps)

    def _score(self, model: nn.Module) -> float:
        figure = self.measure(model, self.task.validation)
        return figure if self.higher_is_better else -figure

    def _found(
        self, arm: str, seed: int, field: dict[int, Trained], flops: int, split: Split
    ) -> Outcome:
        best = max(field, key=lambda size: self._score(field[size].model))
        found = self.outcome(arm, seed, field[best], split)
        walls = sum(trained.wall_s for trained in field.values())
        return replace(found, flops=flops, wall_s=walls, extra={"size": float(best)})


def sizing_digits(seed: int) -> Arena:
    """A hidden layer of unknown width, on digits."""
    return _hidden_layer(seed, digits(seed), steps=170, static_rate=0.05)


def sizing_table(seed: int) -> Arena:
    """A hidden layer of unknown width, on a table.

    What grows late does not catch up here, so a host of 32 units meets one large seed at once.
    """
    task, host_size, rate = tasks.get("table"), 32, Recipe(learning_rate=0.03)
    base = _hidden_layer(seed, task, steps=470, static_rate=rate.learning_rate)

    def host(seed: int) -> MorphableModel:
        return esper.wrap(task.host(seed, host_size), target_layers=["net"], seeds_per_layer=1)

    config = replace(
        base.config,
        candidates=(Candidate(blueprint="widen", ranks=(128,)),),
        graft=replace(DIRECT, ramp_steps=30),
        growth=replace(base.config.growth, max_slot_growth=20.0, max_live=1),
        telemetry_interval=4,
    )
    return replace(
        base,
        host=host,
        small=host_size,
        epochs=56,
        config=config,
        ablations=ablations(config),
        grown=rate,
        grown_steps=460,
    )


def sizing_text(seed: int) -> Arena:
    """Feed-forward blocks of unknown width, in a small language model."""
    plain, host = transformers(8)
    config = EsperConfig(
        candidates=(Candidate(blueprint="widen", ranks=(128,)),),
        graft=replace(DIRECT, ramp_steps=70),
        growth=replace(EARLY, first_epoch=3, max_slot_growth=20.0, max_live=4),
        telemetry_interval=50,
        evaluation_interval=100,
    )
    rate = Recipe(learning_rate=0.01)
    base = replace(
        text(seed),
        host=host,
        plain=plain,
        small=8,
        epochs=16,
        num_held_out=128,
        config=config,
        grown=rate,
        static={FINAL: rate},
        ablations=ablations(config),
    )
    return _sizing(base, "text", (4, 16, 64, 256), steps=600, grown_steps=520)


def _hidden_layer(seed: int, task: Task, steps: int, static_rate: float) -> Sizing:
    base, host_size = width(seed), 4

    def host(seed: int) -> MorphableModel:
        model = task.host(seed, host_size)
        model.net = nest(model.net, LEVELS - 1)
        return esper.wrap(model, target_layers=nested_names("net", LEVELS), seeds_per_layer=1)

    config = replace(
        base.config,
        candidates=(Candidate(blueprint="widen", ranks=(16, 32)),),
        graft=DIRECT,
        growth=replace(base.config.growth, max_slot_growth=8.0, max_live=LEVELS),
        budget=BudgetConfig(),
    )
    return _sizing(
        replace(
            base,
            task=task,
            measure=accuracy(task),
            host=host,
            plain=task.host,
            size=size_by_parameters(task.host),
            small=host_size,
            config=config,
            grown=Recipe(learning_rate=0.02),
            static={FINAL: Recipe(learning_rate=static_rate)},
        ),
        task.name,
        (4, 8, 16, 32, 64, 128, 256),
        steps=steps,
        grown_steps=steps * 13 // 10,
    )


def _sizing(
    base: Arena, name: str, sizes: tuple[int, ...], *, steps: int, grown_steps: int
) -> Sizing:
    fields = {field: getattr(base, field) for field in base.__dataclass_fields__}
    return Sizing(
        **{
            **fields,
            "name": f"sizing-{name}",
            "title": f"Growth finds a size on {name} while others search for it.",
            "sizes": sizes,
            "steps": steps,
            "grown_steps": grown_steps,
            "num_seeds": 10,
            "ablations": ablations(base.config),
            "bars": (
                Bar(arm=GROWN, against=SWEEP, point=-0.2, compute=1 / 3),
                Bar(arm=GROWN, against=HALVING, compute=2 / 3),
            ),
        }
    )
