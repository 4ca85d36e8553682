"""The heuristic grows where the score stands out, when it may, and never beyond the budget."""

from collections.abc import Iterable

import pytest

from esper.common.v1 import blueprint_pb2
from esper.common.v1 import kernel_pb2
from esper.common.v1 import lifecycle_pb2
from esper.common.v1 import signal_pb2
from esper.config import GrowthConfig
from esper.services.tamiyo.heuristic import Heuristic
from esper.services.tamiyo.heuristic import RunState
from esper.tamiyo.v1 import controller_pb2
from esper.tolaria.recipe import to_proto
from esper.urza.v1 import library_pb2

INPUT = blueprint_pb2.SEED_SOURCE_INPUT
OUTPUT = blueprint_pb2.SEED_SOURCE_OUTPUT
DORMANT = lifecycle_pb2.SEED_STATE_DORMANT
TRAINING = lifecycle_pb2.SEED_STATE_TRAINING
FOSSILIZED = lifecycle_pb2.SEED_STATE_FOSSILIZED


def kernels(signature: kernel_pb2.KernelSignature) -> Iterable[library_pb2.KernelRecord]:
    """A library with one bottleneck of every rank for every place."""
    for rank in (1, 2, 4, 8, 16, 32):
        width = signature.source_width + signature.chunk_width
        yield library_pb2.KernelRecord(
            name=f"kernels/{rank:064x}",
            kernel=kernel_pb2.Kernel(
                blueprint_name="widen",
                signature=signature,
                parameter_count=rank * width,
                flops_per_token=2 * rank * width,
            ),
        )


def signal(
    slot: str,
    seed: int = 0,
    state: lifecycle_pb2.SeedState = DORMANT,
    scores: Iterable[tuple[blueprint_pb2.SeedSource, float, float | None]] = (),
    nonfinite: int | None = None,
) -> signal_pb2.HealthSignal:
    health = signal_pb2.HealthSignal(slot=slot, seed=seed, state=state)
    for source, score, null in scores:
        added = health.growth_scores.add(source=source, score=score)
        if null is not None:
            added.null_score = null
    if nonfinite is not None:
        health.num_nonfinite_rows = nonfinite
    return health


def graph(parameters: int = 600) -> signal_pb2.HostGraph:
    built = signal_pb2.HostGraph(digest="d")
    for name in ("a", "b"):
        node = built.nodes.add(name=name, type="Linear", num_parameters=parameters)
        node.slot.kind = kernel_pb2.SLOT_KIND_LINEAR
        node.slot.width = node.slot.source_width = 20
        node.slot.chunk_widths.extend([10, 10])
        node.slot.dtype = kernel_pb2.DATA_TYPE_FLOAT32
        node.slot.device_class = kernel_pb2.DEVICE_CLASS_CPU
    return built


def observation(
    signals: Iterable[signal_pb2.HealthSignal], epoch: int = 3, **fields: object
) -> controller_pb2.Observation:
    built = controller_pb2.Observation(
        run="r", epoch=epoch, num_epochs=30, host_graph_digest="d", host_graph=graph(), **fields
    )
    built.signals.extend(signals)
    return built


def decide(
    observed: controller_pb2.Observation, state: RunState | None = None
) -> controller_pb2.Decision:
    state = state if state is not None else RunState()
    decisions = Heuristic(kernels).decide(observed, state)
    assert len(decisions) == 1
    return decisions[0]


def test_it_germinates_where_the_score_stands_out() -> None:
    decision = decide(
        observation(
            [
                signal("a", 0, scores=[(INPUT, 2.0, 1.0)]),
                signal("b", 0, scores=[(INPUT, 3.0, 1.0)]),
                signal("b", 1, scores=[(INPUT, 9.0, 1.0)]),
            ]
        )
    )
    assert decision.action == controller_pb2.ACTION_GERMINATE
    assert (decision.slot, decision.seed) == ("b", 1)
    assert decision.kernel.startswith("kernels/")
    assert 0 < decision.confidence < 1


def test_a_score_that_looks_like_its_null_is_not_acted_on() -> None:
    decision = decide(observation([signal("a", scores=[(INPUT, 5.0, 4.9)])]))
    assert decision.action == controller_pb2.ACTION_WAIT


def test_a_score_without_its_null_is_not_acted_on() -> None:
    decision = decide(observation([signal("a", scores=[(INPUT, 5.0, None)])]))
    assert decision.action == controller_pb2.ACTION_WAIT


def test_the_cheaper_of_two_equal_gains_wins() -> None:
    decision = decide(observation([signal("a", scores=[(INPUT, 4.0, 1.0), (OUTPUT, 4.0, 1.0)])]))
    chosen = int(decision.kernel.removeprefix("kernels/"), 16)
    # Output-sourced: 20 features per hidden unit instead of 30, so a rank more fits than 16.
    assert chosen == 16
    assert decision.action == controller_pb2.ACTION_GERMINATE


def test_a_kernel_never_more_than_doubles_its_slot() -> None:
    decision = decide(observation([signal("a", scores=[(INPUT, 4.0, 1.0)])]))
    assert int(decision.kernel.removeprefix("kernels/"), 16) == 16  # 16 * 30 <= 600 < 32 * 30


def test_grafts_count_as_part_of_the_slot() -> None:
    state = RunState(planted={("a", 0): 480})
    signals = [signal("a", 0, FOSSILIZED), signal("a", 1, scores=[(INPUT, 4.0, 1.0)])]
    decision = decide(observation(signals), state)
    assert int(decision.kernel.removeprefix("kernels/"), 16) == 32  # 32 * 30 <= 600 + 480
    culled = [signal("a", 0), signal("a", 1, scores=[(INPUT, 4.0, 1.0)])]
    decision = decide(observation(culled), RunState(planted={("a", 0): 480}))
    assert int(decision.kernel.removeprefix("kernels/"), 16) == 16


def test_budgets_hold() -> None:
    scored = [signal("a", scores=[(INPUT, 4.0, 1.0)])]
    tight = observation(scored, num_parameters=1000)
    tight.budget.max_parameters = 1070
    assert int(decide(tight).kernel.removeprefix("kernels/"), 16) == 2
    tight.budget.max_parameters = 1010
    assert decide(tight).action == controller_pb2.ACTION_WAIT
    scored[0].tokens_per_sample = 8.0
    dear = observation(scored, flops_per_sample=1000)
    dear.budget.max_flops_per_sample = 1000 + 8 * 2 * 4 * 30
    assert int(decide(dear).kernel.removeprefix("kernels/"), 16) == 4
    dear.budget.max_flops_per_sample -= 1
    assert int(decide(dear).kernel.removeprefix("kernels/"), 16) == 2


@pytest.mark.parametrize("measured", ["flops_per_sample", "tokens_per_sample"])
def test_what_was_not_measured_is_not_affordable(measured: str) -> None:
    unmeasured = observation([signal("a", scores=[(INPUT, 4.0, 1.0)])])
    unmeasured.budget.max_flops_per_sample = 10**9
    setattr(unmeasured if measured == "flops_per_sample" else unmeasured.signals[0], measured, 8)
    assert decide(unmeasured).action == controller_pb2.ACTION_WAIT


@pytest.mark.parametrize(("epoch", "grows"), [(0, False), (1, True), (24, True), (25, False)])
def test_the_first_epoch_and_the_last_sixth_never_grow(epoch: int, grows: bool) -> None:
    decision = decide(observation([signal("a", scores=[(INPUT, 4.0, 1.0)])], epoch=epoch))
    assert (decision.action == controller_pb2.ACTION_GERMINATE) == grows


def test_no_more_seeds_at_a_time_than_allowed_and_one_per_slot() -> None:
    one = [signal("a", 0, TRAINING), signal("a", 1, scores=[(INPUT, 9.0, 1.0)])]
    assert decide(observation(one)).action == controller_pb2.ACTION_WAIT
    other = [*one, signal("b", 0, scores=[(INPUT, 2.0, 1.0)])]
    assert decide(observation(other)).slot == "b"
    full = [
        signal("a", 0, TRAINING),
        signal("b", 0, TRAINING),
        signal("b", 1, scores=[(INPUT, 9.0, 1.0)]),
    ]
    assert decide(observation(full)).action == controller_pb2.ACTION_WAIT


def test_the_interval_stretches_as_the_gap_grows() -> None:
    scored = [signal("a", scores=[(INPUT, 4.0, 1.0)])]

    def waits(held_out: float) -> int:
        state = RunState()
        policy = Heuristic(kernels)
        policy.decide(observation(scored, 3, train_loss=1.0, held_out_loss=held_out), state)
        for epoch in range(4, 24):
            others = [signal("a", 0, FOSSILIZED), signal("b", scores=[(INPUT, 4.0, 1.0)])]
            seen = observation(others, epoch, train_loss=1.0, held_out_loss=held_out)
            if policy.decide(seen, state)[0].action == controller_pb2.ACTION_GERMINATE:
                return epoch - 3
        return 99

    assert waits(float("nan")) == waits(float("inf")) == GrowthConfig().max_interval_epochs
    intervals = [waits(held_out) for held_out in (1.0, 1.4, 1.5, 1.8, 3.0)]
    assert intervals[0] == 1
    assert intervals == sorted(intervals)
    assert intervals[-1] == GrowthConfig().max_interval_epochs


def test_a_refused_seed_rests_and_rests_longer_each_time() -> None:
    state, policy = RunState(), Heuristic(kernels)
    scored = [signal("a", scores=[(INPUT, 9.0, 1.0)])]
    germinated = [
        epoch
        for epoch in range(1, 60)
        for decision in policy.decide(
            controller_pb2.Observation(
                run="r",
                epoch=epoch,
                num_epochs=90,
                host_graph=graph(),
                signals=scored,
                train_loss=1.0,
                held_out_loss=1.0,
            ),
            state,
        )
        if decision.action == controller_pb2.ACTION_GERMINATE
    ]
    # Seen empty an epoch after it was planted, it rests 8 epochs, then 16, then 24.
    assert germinated == [1, 10, 27, 52]


def test_a_seed_that_is_not_finite_is_culled() -> None:
    sick = observation([signal("a", 0, TRAINING, nonfinite=3), signal("b", 0, TRAINING)])
    decisions = Heuristic(kernels).decide(sick, RunState())
    assert [(d.action, d.slot) for d in decisions] == [
        (controller_pb2.ACTION_CULL, "a"),
        (controller_pb2.ACTION_WAIT, ""),
    ]


def test_the_graph_is_remembered_and_ids_are_unique() -> None:
    state = RunState()
    scored = [signal("a", scores=[(INPUT, 4.0, 1.0)])]
    policy = Heuristic(kernels)
    first = policy.decide(observation([], epoch=2), state)[0]
    later = observation(scored, epoch=3)
    later.ClearField("host_graph")
    second = policy.decide(later, state)[0]
    assert second.action == controller_pb2.ACTION_GERMINATE
    assert first.id != second.id


def test_the_digest_names_the_constants() -> None:
    assert Heuristic(kernels).digest == Heuristic(kernels).digest
    changed = Heuristic(kernels, GrowthConfig(max_live=3))
    assert changed.digest != Heuristic(kernels).digest


SCORED = [
    signal("a", 0, scores=[(INPUT, 2.0, 1.0)]),
    signal("b", 0, scores=[(INPUT, 3.0, 1.0)]),
    signal("b", 1, scores=[(INPUT, 1.2, 1.0)]),
]


def recipe(**choices: object) -> controller_pb2.Recipe:
    return to_proto(GrowthConfig(**choices))


def test_a_random_place_is_drawn_anew_each_epoch_and_by_the_recipes_seed() -> None:
    def places(seed: int) -> list[tuple[str, int]]:
        made = [
            decide(observation(SCORED, epoch, recipe=recipe(where="random", seed=seed)))
            for epoch in range(1, 20)
        ]
        return [(decision.slot, decision.seed) for decision in made]

    assert places(0) == places(0)
    assert places(0) != places(1)
    assert set(places(0)) == {("a", 0), ("b", 0), ("b", 1)}  # the weak score and all


def test_the_gradient_may_choose_another_place_than_the_residual() -> None:
    signals = [
        signal("a", 0, scores=[(INPUT, 2.0, 1.0)]),
        signal("b", 0, scores=[(INPUT, 3.0, 1.0)]),
    ]
    signals[0].growth_scores[0].gradient_score = 9.0
    signals[0].growth_scores[0].gradient_null_score = 1.0
    signals[1].growth_scores[0].gradient_score = 4.0
    signals[1].growth_scores[0].gradient_null_score = 1.0
    assert decide(observation(signals)).slot == "b"
    assert decide(observation(signals, recipe=recipe(where="gradient"))).slot == "a"


def test_early_growth_does_not_wait_and_a_plateau_is_waited_for() -> None:
    def grown(when: str, losses: list[float]) -> list[int]:
        state, epochs = RunState(), []
        for epoch, loss in enumerate(losses):
            seen = observation(
                (
                    [SCORED[0]]
                    if not epochs
                    else [signal("a", 0), signal("b", 0, scores=[(INPUT, 3, 1)])]
                ),
                epoch,
                train_loss=loss,
                held_out_loss=10.0,
                recipe=recipe(when=when, first_epoch=0, rest_epochs=0),
            )
            if decide(seen, state).action == controller_pb2.ACTION_GERMINATE:
                epochs.append(epoch)
        return epochs

    falling = [1.0, 0.9, 0.8, 0.799, 0.7]
    assert grown("early", falling) == [0, 1, 2, 3, 4]
    assert grown("plateau", falling) == [3]
    assert grown("periodic", falling) == [0]  # the gap stretches the interval beyond the run


@pytest.mark.parametrize(
    ("gain", "stop", "grows"), [(3.0, "pareto", True), (1.0, "pareto", False), (1.0, "never", True)]
)
def test_growth_stops_where_the_next_seed_promises_less_than_its_price(
    gain: float, stop: str, grows: bool
) -> None:
    seen = observation(
        SCORED,
        recipe=recipe(stop=stop),
        budget=controller_pb2.Budget(min_gain_per_mflop=2.0),
        trials=[
            controller_pb2.TrialOutcome(gain=100.0, flops_per_sample=1e6),  # long ago
            controller_pb2.TrialOutcome(gain=gain, flops_per_sample=1e6, accepted=True),
            controller_pb2.TrialOutcome(gain=gain, flops_per_sample=1e6, accepted=True),
        ],
    )
    assert (decide(seen).action == controller_pb2.ACTION_GERMINATE) is grows


def test_only_kernels_of_the_run_are_chosen() -> None:
    seen = observation(SCORED, kernels=[f"kernels/{4:064x}", f"kernels/{1:064x}"])
    assert decide(seen).kernel == f"kernels/{4:064x}"


def test_grafts_of_slots_inside_count_as_part_of_the_slot() -> None:
    def chosen(planted: dict[tuple[str, int], int]) -> int:
        nested = observation(
            [signal("a", scores=[(INPUT, 9.0, 1.0)]), signal("a.0", state=FOSSILIZED)]
        )
        return int(decide(nested, RunState(planted=planted)).kernel.removeprefix("kernels/"), 16)

    assert (chosen({}), chosen({("a.0", 0): 600})) == (16, 32)


def test_an_empty_place_is_measured_by_the_whole_model() -> None:
    def chosen(parameters: int) -> str:
        seen = observation([signal("a", scores=[(INPUT, 9.0, 1.0)])], num_parameters=parameters)
        seen.host_graph.nodes[0].num_parameters = 0
        return decide(seen).kernel

    assert chosen(130) == f"kernels/{4:064x}"
    assert chosen(29) == ""
