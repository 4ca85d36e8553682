"""An arena: one task on which growth meets every control, seed by seed."""

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import field
from dataclasses import replace

from torch import nn

from benchmarks.growth.training import Recipe
from benchmarks.growth.training import Trained
from benchmarks.growth.training import train_grown
from benchmarks.growth.training import train_static
from benchmarks.growth.training import with_births
from esper.config import EsperConfig
from esper.kasmina import MorphableModel
from esper.tolaria.tasks import Split
from esper.tolaria.tasks import Task

GROWN = "grown"
RANDOM_SITE = "grown at random places"
SMALL = "static small"
SMALL_EQUAL = "static small, equal compute"
FINAL = "static final size"
FINAL_EQUAL = "static final size, equal compute"
SAME_INIT = "static final size, same init"
SAME_INIT_EQUAL = "static final size, same init, equal compute"

Measure = Callable[[nn.Module, Split], float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """One trained model.

    Attributes:
        arm: What was done.
        seed: Seed of initial weights and batches.
        figure: What the arena measures, see ``Arena.unit``.
        parameters: Trainable elements of the finished model.
        flops: Floating-point operations of its training, everything included.
        wall_s: Wall-clock time of its training, in seconds.
        kept: Grafts that were kept; 0 for static models.
        refused: Grafts that the accept test refused.
        extra: Further figures by name.
    """

    arm: str
    seed: int
    figure: float
    parameters: int
    flops: int
    wall_s: float
    kept: int = 0
    refused: int = 0
    extra: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """A claim that an arena is there to test.

    Attributes:
        arm: The arm that must do well.
        against: The arm that it meets.
        floor: Least lower end of the paired 95 % interval of the gain; ``None`` for no rule.
        point: Least mean gain; ``None`` for no rule.
        compute: Most compute over that of the other arm; ``None`` for no rule.
    """

    arm: str
    against: str
    floor: float | None = None
    point: float | None = None
    compute: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Arena:
    """What is grown, against what, and how all of it is trained.

    Attributes:
        name: Name of the arena.
        title: What it asks, in a sentence.
        task: The task.
        unit: Unit of the figure.
        higher_is_better: Whether a higher figure is better.
        measure: Returns the figure of a model on a split.
        host: Returns the wrapped host that growth starts from, by seed.
        plain: Returns a plain model by seed and size; ``None`` where no plain size matches, so that
            the control of the final size is the one with the same init.
        size: Returns the size at which ``plain`` has about so many parameters.
        small: Size at which ``plain`` is the host.
        steps: Optimizer steps of the arms that are not bound by compute.
        epochs: Equal parts of the run after which growth may act.
        num_held_out: Validation samples that the accept test uses.
        config: How the grown arm grows.
        grown: How it is trained.
        static: How the static arms are trained, by arm; ``FINAL`` for those that are not named.
        ablations: Configurations with one element of the recipe changed, by name.
        bars: What must be shown.
        num_seeds: Seeds that a full run takes.
        arms: Arms that are trained beside the grown one; ``None`` means all. Arenas that train
            other arms than these train all of them.
    """

    name: str
    title: str
    task: Task
    unit: str
    higher_is_better: bool
    measure: Measure
    host: Callable[[int], MorphableModel]
    plain: Callable[[int, int], nn.Module] | None
    size: Callable[[int], int]
    small: int
    steps: int
    epochs: int
    num_held_out: int
    config: EsperConfig
    grown: Recipe
    static: Mapping[str, Recipe]
    ablations: Mapping[str, EsperConfig] = field(default_factory=dict)
    bars: Sequence[Bar] = ()
    num_seeds: int = 10
    arms: frozenset[str] | None = None

    @property
    def held_out(self) -> Split:
        """Data of the accept test."""
        validation = self.task.validation
        number = self.num_held_out
        return Split(validation.inputs[:number], validation.targets[:number])

    def grow(self, seed: int, plane: str, config: EsperConfig | None = None) -> Trained:
        """Trains the grown arm."""
        return train_grown(
            self.task,
            self.host(seed),
            self.grown,
            config if config is not None else self.config,
            seed,
            plane=plane,
            steps=self.steps,
            epochs=self.epochs,
            held_out=self.held_out,
        )

    def outcome(self, arm: str, seed: int, trained: Trained, split: Split) -> Outcome:
        """Measures a finished model, once."""
        history = trained.history
        moves = [event.after for event in history.events] if history is not None else []
        return Outcome(
            arm=arm,
            seed=seed,
            figure=self.measure(trained.model, split),
            parameters=trained.parameters,
            flops=trained.flops,
            wall_s=trained.wall_s,
            kept=moves.count("FOSSILIZED"),
            refused=moves.count("CULLED"),
            extra={
                f"share of {name}": value / trained.flops
                for name, value in trained.by_category.items()
            },
        )

    def run(self, seed: int, plane: str, split: Split) -> Iterator[Outcome]:
        """Trains all arms of one seed.

        Args:
            seed: Seed of initial weights and batches.
            plane: Address of a plane.
            split: What the finished models are measured on.
        """
        grown = self.grow(seed, plane)
        yield self.outcome(GROWN, seed, grown, split)
        if self.arms is None or RANDOM_SITE in self.arms:
            drawn = replace(self.config.growth, where="random", seed=seed)
            config = replace(self.config, growth=drawn)
            yield self.outcome(RANDOM_SITE, seed, self.grow(seed, plane, config), split)
        for arm, model, budget in self._controls(seed, grown):
            if self.arms is None or arm in self.arms:
                recipe = self.static.get(arm, self.static[FINAL])
                trained = train_static(self.task, model, recipe, seed, **budget)
                yield self.outcome(arm, seed, trained, split)

    def ablate(self, seed: int, plane: str, split: Split) -> Iterator[Outcome]:
        """Trains the grown arm with each element of the recipe turned off in turn."""
        for name, config in self.ablations.items():
            yield self.outcome(name, seed, self.grow(seed, plane, config), split)

    def _controls(
        self, seed: int, grown: Trained
    ) -> Iterator[tuple[str, nn.Module, dict[str, int]]]:
        full, equal = {"steps": self.steps}, {"flops": grown.flops}
        small = (lambda: self.host(seed).host) if self.plain is None else self._small(seed)
        yield SMALL, small(), full
        yield SMALL_EQUAL, small(), equal
        if self.plain is not None:
            size = self.size(grown.parameters)
            yield FINAL, self.plain(seed, size), full
            yield FINAL_EQUAL, self.plain(seed, size), equal
        yield SAME_INIT, with_births(self.task, self.host(seed), grown.births), full
        yield SAME_INIT_EQUAL, with_births(self.task, self.host(seed), grown.births), equal

    def _small(self, seed: int) -> Callable[[], nn.Module]:
        plain = self.plain
        assert plain is not None
        return lambda: plain(seed, self.small)
