"""Every default of Esper, in one place.

``EsperConfig`` is what a run is configured by. It is a frozen dataclass, checked on construction;
an error names the field, the value and the rule.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import field

Hyperparameter = int | float | bool | str


def _require(holds: bool, name: str, value: object, rule: str) -> None:
    if not holds:
        raise ValueError(f"{name} is {value!r}, but {rule}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """A blueprint that growth may choose, with one kernel compiled per rank.

    Attributes:
        blueprint: Name of a starting blueprint, see ``esper.blueprints.names()``.
        ranks: Ranks to compile; the controller picks one per graft. Empty for a blueprint that has
            no rank, such as ``affine``, which gives one kernel.
        hyperparameters: Further hyperparameters of the blueprint, the same for all ranks.
    """

    blueprint: str
    ranks: tuple[int, ...] = (4, 8, 16, 32, 64)
    hyperparameters: Mapping[str, Hyperparameter] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for rank in self.ranks:
            _require(rank >= 1, "ranks", rank, "every rank must be at least 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class GrowthConfig:
    """When and where to grow, and when to stop. The controller carries it out.

    Attributes:
        when: ``periodic``: at an interval that stretches as the gap between training and held-out
            loss grows (FRAGrow, AAAI 2024). ``early``: in every epoch in which there is room.
            ``plateau``: when the training loss has fallen by less than 1 % in an epoch.
        where: ``residual``: where the part of the wanted update that the host cannot express itself
            is largest per operation (TINY, arXiv 2405.19816; SENN, arXiv 2307.04526).
            ``gradient``: where a virtual seed has the largest gradient (SensLI). ``random``: at a
            drawn place, whatever its score; the control of the other two.
        stop: ``pareto``: when the next seed promises less held-out loss per operation than
            ``BudgetConfig.min_gain_per_mflop``, going by the trials so far. ``never``: budgets and
            the accept test alone end growth.
        first_epoch: First epoch that may grow; before it the scores mean nothing.
        max_interval_epochs: Longest interval between germinations of ``periodic``, in epochs.
        reserved_share: Share of the run at its end that never grows; from 0 to below 1.
        min_score_ratio: Least growth score over its null; noise is at 1, give or take 0.1 over the
            few hundred rows of an epoch that probes look at.
        max_live: Most seeds under way at a time.
        max_slot_growth: Most parameters of a kernel over those of the slot with its grafts.
        rest_epochs: Epochs that a seed rests after its graft was refused, times the number of
            refusals: trials spend the run's significance, so none is repeated in a hurry.
        seed: Seed of what is drawn at random.
    """

    when: str = "periodic"
    where: str = "residual"
    stop: str = "pareto"
    first_epoch: int = 1
    max_interval_epochs: int = 8
    reserved_share: float = 1.0 / 6.0
    min_score_ratio: float = 1.2
    max_live: int = 2
    max_slot_growth: float = 1.0
    rest_epochs: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        for name, choices in (
            ("when", ("periodic", "early", "plateau")),
            ("where", ("residual", "gradient", "random")),
            ("stop", ("pareto", "never")),
        ):
            value = getattr(self, name)
            _require(value in choices, name, value, f"it must be one of {', '.join(choices)}")
        for name in ("first_epoch", "rest_epochs"):
            value = getattr(self, name)
            _require(value >= 0, name, value, "it must be at least 0 epochs")
        for name in ("max_interval_epochs", "max_live"):
            value = getattr(self, name)
            _require(value >= 1, name, value, "it must be at least 1")
        for name in ("min_score_ratio", "max_slot_growth"):
            value = getattr(self, name)
            _require(value >= 0, name, value, "it must be at least 0")
        _require(
            0 <= self.reserved_share < 1,
            "reserved_share",
            self.reserved_share,
            "it must be at least 0 and below 1",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class GraftConfig:
    """How a germinated seed is brought in where the controller's decision does not say.

    Attributes:
        fan_in: How the weights that read the source are born. ``blueprint``: as the blueprint says,
            at random. ``singular``: along the leading directions of the source that the wanted
            update asks for, mixed at random, with the blueprint's scale; for low-rank and
            bottleneck kernels. The weights that write are zero at birth either way.
        training_steps: Length of the isolated warm-up, in optimizer steps. 0 skips it.
        ramp_steps: Length of the alpha ramp, in optimizer steps; at least 1.
        ramp: Curve of the ramp: ``linear``, ``cosine``, ``sigmoid`` or ``drift``; ``none`` puts the
            seed in at alpha 1, where it trains with the host for ``ramp_steps``. ``drift`` is
            linear, but waits for the host: see ``drift_tolerance``.
        drift_tolerance: Drift of the host's output in the seed's slot at which a ramp of kind
            ``drift`` moves at half its speed; above 0. The ramp moves by 1 / (1 + drift /
            tolerance) of a step in each step. Drift has no unit: the output's profile (mean and
            root mean square of each feature over the tokens of the step) is held against its
            exponential mean over about ten steps since the ramp began; one minus the cosine between
            the two (0 to 2) and the part of its length that it gained or lost (0 to 1) are added.
            At 0.1 the profile is 10 % longer, or turned by 26 degrees. What the choice of the
            batch alone moves counts as well. The slowest ramp takes 1 + 3 / tolerance times
            ``ramp_steps``.
        stabilization_steps: Steps at alpha 1 with the seed held still before its trial.
        fine_tuning_steps: Steps that seed and host train together between a passed trial and
            fossilisation. 0 fossilises at once.
        probation_steps: Steps that a seed trains on with the host where its first trial has not
            decided: not passed, but the 95 % interval of its gain ends above its price. A second
            trial then decides. 0 culls at the first trial that is not passed.
        learning_rate_scale: Newborn learning rate over that of the host's parameter group.
        warmup_steps: Steps over which the newborn's learning rate rises linearly.
        max_gradient_norm: Most norm that a newborn's gradient may have at a step; a longer one is
            made as short. A loop that clips ``model.parameters()`` clips the host alone, so give
            its own bound here; ``math.inf`` says that newborns shall not be clipped. ``None`` does
            not clip them either, and a session warns of it where the loop clips.
        freeze_fossils: Hold fossilised seeds still instead of training on.
        fold_fossils: Make a seed without an activation (``lora``, ``affine``) part of its module's
            weight as it fossilises, where the algebra allows it (``MorphableModel.fold``): it costs
            no operation any more. A fossil that cannot be folded stays beside its host.
    """

    fan_in: str = "blueprint"
    training_steps: int = 20
    ramp_steps: int = 20
    ramp: str = "cosine"
    drift_tolerance: float = 0.1
    stabilization_steps: int = 10
    fine_tuning_steps: int = 0
    probation_steps: int = 0
    learning_rate_scale: float = 1.0
    warmup_steps: int = 5
    max_gradient_norm: float | None = None
    freeze_fossils: bool = False
    fold_fossils: bool = False

    def __post_init__(self) -> None:
        steps = ("training_steps", "stabilization_steps", "fine_tuning_steps", "probation_steps")
        for name in (*steps, "warmup_steps"):
            value = getattr(self, name)
            _require(value >= 0, name, value, "it must be at least 0 steps")
        _require(self.ramp_steps >= 1, "ramp_steps", self.ramp_steps, "it must be at least 1 step")
        births = ("blueprint", "singular")
        _require(
            self.fan_in in births, "fan_in", self.fan_in, f"it must be one of {', '.join(births)}"
        )
        curves = ("linear", "cosine", "sigmoid", "drift", "none")
        _require(self.ramp in curves, "ramp", self.ramp, f"it must be one of {', '.join(curves)}")
        _require(
            0 < self.drift_tolerance < math.inf,
            "drift_tolerance",
            self.drift_tolerance,
            "it must be finite and above 0",
        )
        _require(
            self.learning_rate_scale > 0,
            "learning_rate_scale",
            self.learning_rate_scale,
            "it must be above 0",
        )
        _require(
            self.max_gradient_norm is None or self.max_gradient_norm > 0,
            "max_gradient_norm",
            self.max_gradient_norm,
            "it must be above 0 or None",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class BudgetConfig:
    """What growth may cost. ``None`` is unlimited.

    Attributes:
        max_parameters: Most trainable elements that the model may have.
        max_flops_per_sample: Most forward floating-point operations of one sample.
        min_gain_per_mflop: Least held-out loss that a million forward operations per sample must
            buy; the accept test charges it.
    """

    max_parameters: int | None = None
    max_flops_per_sample: int | None = None
    min_gain_per_mflop: float = 0.0

    def __post_init__(self) -> None:
        for name in ("max_parameters", "max_flops_per_sample"):
            value = getattr(self, name)
            _require(value is None or value >= 1, name, value, "it must be at least 1 or None")
        _require(
            self.min_gain_per_mflop >= 0,
            "min_gain_per_mflop",
            self.min_gain_per_mflop,
            "it must be at least 0",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class GovernorConfig:
    """How a run is kept from harm: what counts as a fault, and how far it is undone.

    Attributes:
        enabled: Whether faults are looked for at all.
        check_every_steps: Every how many optimizer steps losses and gradients are judged.
        false_alarm_rate: Chance per optimizer step that a sound run is taken for a faulty one;
            what counts as a spike or a collapse follows from it. Above 0 and below 1.
        snapshot_every_steps: Every how many optimizer steps a snapshot is taken, besides one at the
            start of every epoch.
        snapshots: Most good snapshots held, beside one that has yet to prove itself; at least 2.
        max_snapshot_bytes: Most memory that they may take; too little for one means that faults
            can be found but not undone.
        max_rollbacks: Most rollbacks in a row without a good snapshot in between.
        give_up: What follows then, where losses or gradients are not finite: ``raise`` a
            ``TrainingFault``, or ``go_on`` without governor and new growth. A spike that comes back
            as often is taken for the way of the training.
        embargo_steps: Steps that the place of a seed that was rolled back stays empty.
    """

    enabled: bool = True
    check_every_steps: int = 8
    false_alarm_rate: float = 1e-6
    snapshot_every_steps: int = 64
    snapshots: int = 3
    max_snapshot_bytes: int = 4 * 2**30
    max_rollbacks: int = 3
    give_up: str = "raise"
    embargo_steps: int = 256

    def __post_init__(self) -> None:
        for name, least in (
            ("check_every_steps", 1),
            ("snapshot_every_steps", 1),
            ("snapshots", 2),
            ("max_snapshot_bytes", 0),
            ("max_rollbacks", 0),
            ("embargo_steps", 0),
        ):
            value = getattr(self, name)
            _require(value >= least, name, value, f"it must be at least {least}")
        _require(
            0 < self.false_alarm_rate < 1,
            "false_alarm_rate",
            self.false_alarm_rate,
            "it must be above 0 and below 1",
        )
        ways = ("raise", "go_on")
        _require(
            self.give_up in ways, "give_up", self.give_up, f"it must be one of {', '.join(ways)}"
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class EsperConfig:
    """Configuration of a growth session.

    Attributes:
        candidates: Blueprints that growth may choose.
        graft: How a seed is brought in.
        growth: When and where to grow, and when to stop.
        budget: What growth may cost.
        governor: What counts as a fault of the run, and how far it is undone.
        accept: ``paired``: a seed is kept if held-out data shows that it pays. ``always``: whatever
            the trial says; the control of the accept test.
        significance: Level of the held-out accept test over the whole run; each trial gets its
            share. Above 0 and below 1.
        evaluation_interval: Every how many epochs the held-out loss is measured; trials are held
            when they are due, and the last epoch is always measured.
        telemetry_interval: Every how many training forwards a slot is sampled. None leaves it as
            the model has it: as many as it has slots, but at least 8, and stretching within an
            epoch, see ``MorphableModel.telemetry_interval``.
        lockstep_timeout_s: Longest wait for the plane in ``lockstep`` mode, in seconds; a plane
            that is slower, or away for longer, counts as dead.
    """

    candidates: tuple[Candidate, ...] = (
        Candidate(blueprint="widen"),
        Candidate(blueprint="bottleneck"),
    )
    graft: GraftConfig = field(default_factory=GraftConfig)
    growth: GrowthConfig = field(default_factory=GrowthConfig)
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    governor: GovernorConfig = field(default_factory=GovernorConfig)
    accept: str = "paired"
    significance: float = 0.05
    evaluation_interval: int = 1
    telemetry_interval: int | None = None
    lockstep_timeout_s: float = 120.0

    def __post_init__(self) -> None:
        _require(
            0 < self.significance < 1,
            "significance",
            self.significance,
            "it must be above 0 and below 1",
        )
        tests = ("paired", "always")
        _require(
            self.accept in tests, "accept", self.accept, f"it must be one of {', '.join(tests)}"
        )
        _require(
            self.evaluation_interval >= 1,
            "evaluation_interval",
            self.evaluation_interval,
            "it must be at least 1 epoch",
        )
        _require(
            self.telemetry_interval is None or self.telemetry_interval >= 1,
            "telemetry_interval",
            self.telemetry_interval,
            "it must be at least 1 forward or None",
        )
        _require(
            self.lockstep_timeout_s > 0,
            "lockstep_timeout_s",
            self.lockstep_timeout_s,
            "it must be above 0 seconds",
        )
