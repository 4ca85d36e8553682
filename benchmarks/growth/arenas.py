"""The four arenas of plain growth: width, depth, convolution and text.

Every arena is made for a seed: the digits are split anew with each, so that intervals over seeds
speak of digits at large and not of one fifth of them. The configurations were chosen on validation
data with seeds from 1000 on; see docs/results.
"""

import math
from collections.abc import Callable
from collections.abc import Iterator
from dataclasses import dataclass
from dataclasses import replace

import torch
from torch import nn

import esper
from benchmarks.growth.arena import FINAL
from benchmarks.growth.arena import FINAL_EQUAL
from benchmarks.growth.arena import GROWN
from benchmarks.growth.arena import SMALL
from benchmarks.growth.arena import SMALL_EQUAL
from benchmarks.growth.arena import Arena
from benchmarks.growth.arena import Bar
from benchmarks.growth.arena import Outcome
from benchmarks.growth.hosts import DeepMLP
from benchmarks.growth.hosts import nest
from benchmarks.growth.hosts import nested_names
from benchmarks.growth.training import Recipe
from benchmarks.growth.training import train_static
from benchmarks.growth.training import with_births
from esper.config import BudgetConfig
from esper.config import Candidate
from esper.config import EsperConfig
from esper.config import GraftConfig
from esper.config import GrowthConfig
from esper.kasmina import MorphableModel
from esper.tolaria import tasks
from esper.tolaria.tasks import Split
from esper.tolaria.tasks import Task
from esper.tolaria.tasks.digits import digits
from esper.tolaria.tasks.digits import digits_cnn
from esper.tolaria.tasks.text import CharTransformer

DIRECT = GraftConfig(training_steps=0, ramp="none", ramp_steps=10, stabilization_steps=0)
"""Seeds enter at full strength and train with the host until their trial."""

EARLY = GrowthConfig(when="early", first_epoch=0, max_live=3, min_score_ratio=1.0)


def ablations(config: EsperConfig) -> dict[str, EsperConfig]:
    """Returns the configuration with each element of the recipe changed in turn."""
    graft, growth = config.graft, config.growth
    steps = max(1, graft.ramp_steps // 2)
    isolated = replace(graft, training_steps=steps, ramp="cosine", ramp_steps=steps)
    soon = replace(graft, ramp_steps=max(1, graft.ramp_steps // 3))
    once = {"accept: no probation": replace(config, graft=replace(graft, probation_steps=0))}
    usual = tuple(
        replace(c, hyperparameters={k: v for k, v in c.hyperparameters.items() if k != "gain"})
        for c in config.candidates
    )
    scale = {"how: fan-in at the usual scale": replace(config, candidates=usual)}
    return {
        **(scale if usual != config.candidates else {}),
        "how: fan-in along the wanted update": replace(
            config, graft=replace(graft, fan_in="singular")
        ),
        "when: periodic": replace(config, growth=replace(growth, when="periodic")),
        "when: on a plateau": replace(config, growth=replace(growth, when="plateau")),
        "where: gradient of a virtual seed": replace(
            config, growth=replace(growth, where="gradient")
        ),
        "isolation: warm-up and ramp": replace(config, graft=isolated),
        "learning rate: no warm-up of newborns": replace(
            config, graft=replace(graft, warmup_steps=0)
        ),
        "accept: a trial after a third of the steps": replace(config, graft=soon),
        **(once if graft.probation_steps else {}),
        "accept: always": replace(config, accept="always"),
    }


def accuracy(task: Task) -> Callable[[nn.Module, Split], float]:
    """Returns the measure of accuracy in percent."""
    return lambda model, split: 100.0 * task.accuracy(model, split)


def bits(task: Task) -> Callable[[nn.Module, Split], float]:
    """Returns the measure of the mean loss in bits per target."""
    return lambda model, split: task.mean_loss(model, split) / math.log(2)


def size_by_parameters(build: Callable[[int, int], nn.Module]) -> Callable[[int], int]:
    """Returns the size at which a plain host has nearest to so many parameters."""

    def size(parameters: int) -> int:
        one, two = (sum(p.numel() for p in build(0, n).parameters()) for n in (1, 2))
        return max(1, round(1 + (parameters - one) / (two - one)))

    return size


def width(seed: int) -> Arena:
    """Digits, a hidden layer of 8 units that grows towards 64.

    Units are born with a fan-in of 2.8 times the scale of He's rule: gain 4 in place of sqrt(2).
    """
    task = digits(seed)

    def host(seed: int) -> MorphableModel:
        model = task.host(seed)
        model.net = nest(model.net, 2)
        return esper.wrap(model, target_layers=nested_names("net", 3), seeds_per_layer=1)

    config = EsperConfig(
        candidates=(
            Candidate(blueprint="widen", ranks=(8, 16, 24, 32), hyperparameters={"gain": 4.0}),
        ),
        graft=replace(DIRECT, ramp_steps=30, probation_steps=30),
        growth=replace(EARLY, max_slot_growth=4.0),
        budget=BudgetConfig(max_parameters=4850),
        telemetry_interval=24,
        evaluation_interval=100,
    )
    return Arena(
        name="width",
        title="Does a layer that grows from 8 to 64 units match one that had 64 from the start?",
        task=task,
        unit="% accuracy",
        higher_is_better=True,
        measure=accuracy(task),
        host=host,
        plain=task.host,
        size=size_by_parameters(task.host),
        small=8,
        steps=170,
        epochs=28,
        num_held_out=359,
        config=config,
        grown=Recipe(learning_rate=0.03),
        static={
            FINAL: Recipe(learning_rate=0.05),
            SMALL: Recipe(learning_rate=0.05),
            SMALL_EQUAL: Recipe(learning_rate=0.01),
        },
        ablations=ablations(config),
        bars=(Bar(arm=GROWN, against=FINAL_EQUAL, floor=-0.2, point=0.0),),
        num_seeds=100,
    )


GROWN_ALL = "grown to 24 layers, without an accept test"
ALL_LAYERS = "static 24 layers, same init"
ALL_LAYERS_EQUAL = "static 24 layers, same init, equal compute"


@dataclass(frozen=True, slots=True, kw_only=True)
class Depth(Arena):
    """Adds the arm that fills every place, and the static network of as many layers."""

    def run(self, seed: int, plane: str, split: Split) -> Iterator[Outcome]:
        """Trains all arms of one seed."""
        yield from Arena.run(self, seed, plane, split)
        everywhere = replace(self.config.growth, where="random", seed=seed)
        grown = self.grow(seed, plane, replace(self.config, growth=everywhere, accept="always"))
        yield self.outcome(GROWN_ALL, seed, grown, split)
        budgets = {ALL_LAYERS: {"steps": self.steps}, ALL_LAYERS_EQUAL: {"flops": grown.flops}}
        for arm, budget in budgets.items():
            model = with_births(self.task, self.host(seed), grown.births)
            trained = train_static(self.task, model, self.static[FINAL], seed, **budget)
            yield self.outcome(arm, seed, trained, split)


def depth(seed: int) -> Arena:
    """Digits, a network of 2 layers that grows towards 24."""
    task = digits(seed)
    places = 11

    def plain(seed: int) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return DeepMLP(24, places)

    def host(seed: int) -> MorphableModel:
        names = [f"places.{i}" for i in range(places)]
        return esper.wrap(plain(seed), target_layers=names, seeds_per_layer=1)

    config = EsperConfig(
        candidates=(
            Candidate(blueprint="bottleneck", ranks=(24,), hyperparameters={"activation": "relu"}),
        ),
        graft=replace(DIRECT, ramp_steps=30),
        growth=replace(EARLY, max_live=11, first_epoch=3),
        telemetry_interval=30,
        evaluation_interval=100,
    )
    return Depth(
        name="depth",
        title="Does a network that grows from 2 to 24 layers match one that had 24 from the start?",
        task=task,
        unit="% accuracy",
        higher_is_better=True,
        measure=accuracy(task),
        host=host,
        plain=None,
        size=lambda parameters: 24,
        small=24,
        steps=510,
        epochs=17,
        num_held_out=128,
        config=config,
        grown=Recipe(learning_rate=0.01),
        static={FINAL: Recipe(learning_rate=0.01)},
        ablations=ablations(config),
        bars=(
            Bar(arm=GROWN, against=ALL_LAYERS, point=-0.3, compute=0.65),
            Bar(arm=GROWN_ALL, against=ALL_LAYERS, point=-0.3, compute=0.65),
        ),
    )


def conv(seed: int) -> Arena:
    """Digits, a convolutional network whose blocks grow from 4 hidden channels."""
    task = digits_cnn(seed)
    levels = 2

    def host(seed: int) -> MorphableModel:
        model = task.host(seed)
        for block in model.blocks:
            block.mlp = nest(block.mlp, levels - 1)
        names = [n for i in range(2) for n in nested_names(f"blocks.{i}.mlp", levels)]
        return esper.wrap(model, target_layers=names, seeds_per_layer=1)

    config = EsperConfig(
        candidates=(Candidate(blueprint="widen", ranks=(8, 16, 32)),),
        graft=replace(DIRECT, ramp_steps=14),
        growth=replace(EARLY, max_slot_growth=4.0, max_live=4),
        telemetry_interval=8,
        evaluation_interval=100,
    )
    return Arena(
        name="conv",
        title="Does a small convolutional network pay for growing?",
        task=task,
        unit="% accuracy",
        higher_is_better=True,
        measure=accuracy(task),
        host=host,
        plain=task.host,
        size=size_by_parameters(task.host),
        small=4,
        steps=136,
        epochs=17,
        num_held_out=359,
        config=config,
        grown=Recipe(learning_rate=0.01),
        static={FINAL: Recipe(learning_rate=0.01)},
        ablations=ablations(config),
        bars=(
            Bar(arm=GROWN, against=SMALL_EQUAL, floor=0.0),
            Bar(arm=GROWN, against=FINAL, floor=-0.2, compute=0.75),
        ),
    )


def transformers(
    host_size: int,
) -> tuple[Callable[[int, int], nn.Module], Callable[[int], MorphableModel]]:
    """Makes language models of any size, and ones whose feed-forward blocks grow.

    Args:
        host_size: Hidden units of a feed-forward block before it grows.
    """
    levels, layers, features = 2, 2, 32

    def plain(seed: int, size: int) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return CharTransformer(size, width=features, layers=layers)

    def host(seed: int) -> MorphableModel:
        model = plain(seed, host_size)
        for block in model.blocks:
            block.mlp = nest(block.mlp, levels - 1)
        names = [n for i in range(layers) for n in nested_names(f"blocks.{i}.mlp", levels)]
        return esper.wrap(model, target_layers=names, seeds_per_layer=1)

    return plain, host


def text(seed: int) -> Arena:
    """Characters of the standard library, a transformer whose feed-forward blocks grow from 32.

    Every place is filled at about a third of the run, a seed an epoch: what is cheap is the time
    before. Trials come 300 steps later; after 70 a seed that pays may still look useless.
    """
    task = tasks.get("text")
    host_size = 32
    plain, host = transformers(host_size)
    config = EsperConfig(
        candidates=(Candidate(blueprint="widen", ranks=(256,)),),
        graft=replace(DIRECT, ramp_steps=300),
        growth=replace(EARLY, first_epoch=19, max_slot_growth=10.0, max_live=4),
        telemetry_interval=12,
        evaluation_interval=100,
    )
    recipe = Recipe(learning_rate=0.01, hold=0.65)
    return Arena(
        name="text",
        title="Does a small language model pay for growing?",
        task=task,
        unit="bits per character",
        higher_is_better=False,
        measure=bits(task),
        host=host,
        plain=plain,
        size=size_by_parameters(plain),
        small=host_size,
        steps=1600,
        epochs=64,
        num_held_out=256,
        config=config,
        grown=recipe,
        static={FINAL: recipe},
        ablations=ablations(config),
        bars=(
            Bar(arm=GROWN, against=SMALL_EQUAL, floor=0.0),
            Bar(arm=GROWN, against=FINAL, floor=-0.02, compute=0.75),
        ),
    )
