"""The graft protocol without a plane: plans, refusals and what stays behind."""

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

import esper
from esper.blueprints import get
from esper.blueprints import kernel_digest
from esper.blueprints import lower
from esper.common.v1 import lifecycle_pb2
from esper.common.v1.blueprint_pb2 import SEED_SOURCE_OUTPUT
from esper.config import GraftConfig
from esper.tamiyo.v1 import controller_pb2
from esper.tolaria.evaluation import Trial
from esper.tolaria.evaluation import paired_trial
from esper.tolaria.protocol import GraftProtocol


def _host() -> esper.MorphableModel:
    torch.manual_seed(0)
    host = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    return esper.wrap(host, target_layers=["0"], seeds_per_layer=2)


def _plan(**changes: object) -> controller_pb2.GraftPlan:
    plan = controller_pb2.GraftPlan(
        training_steps=2,
        alpha=lifecycle_pb2.AlphaSchedule(steps=4),
        stabilization_steps=1,
        learning_rate_scale=1.0,
    )
    plan.MergeFrom(controller_pb2.GraftPlan(**changes))  # type: ignore[arg-type]
    return plan


def _germinate(
    model: esper.MorphableModel, protocol: GraftProtocol, plan: controller_pb2.GraftPlan
) -> None:
    blueprint = get("bottleneck", rank=2)
    kernel = lower(blueprint, model.signature("0", 0, blueprint.graph.inputs[0].source))
    protocol.germinate("0", 0, f"kernels/{kernel_digest(kernel)}", kernel, None, plan, "a test")


def _sgd(model: nn.Module) -> Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


def test_a_seed_keeps_to_its_plan_to_the_step() -> None:
    model = _host()
    protocol = GraftProtocol(model, _sgd(model), GraftConfig())
    _germinate(model, protocol, _plan())
    seen = []
    for _ in range(8):
        protocol.on_step()
        seen.append((model.seed_state("0", 0).name, model.alpha("0", 0)))
    assert seen == [
        ("TRAINING", 0.0),
        ("TRAINING", 0.0),
        ("GRAFTING", 0.0),
        ("GRAFTING", 0.25),
        ("GRAFTING", 0.5),
        ("GRAFTING", 0.75),
        ("STABILIZATION", 1.0),
        ("EVALUATING", 1.0),
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"training_steps": -1}, "training_steps is -1"),
        ({"stabilization_steps": -3}, "stabilization_steps is -3"),
        ({"learning_rate_scale": -1.0}, "learning_rate_scale is -1.0"),
        ({"learning_rate_scale": float("nan")}, "learning_rate_scale is nan"),
        ({"alpha": lifecycle_pb2.AlphaSchedule(steps=-5)}, "steps is -5"),
        ({"alpha": lifecycle_pb2.AlphaSchedule(start=2.0)}, "start is 2"),
        ({"alpha": lifecycle_pb2.AlphaSchedule(kind=17)}, "schedule.kind is 17"),  # type: ignore[arg-type]
    ],
)
def test_a_plan_that_cannot_be_carried_out_is_refused_at_once(
    changes: dict[str, object], message: str
) -> None:
    model = _host()
    protocol = GraftProtocol(model, _sgd(model), GraftConfig())
    with pytest.raises(ValueError, match=message):
        _germinate(model, protocol, _plan(**changes))
    assert model.occupied_seeds() == [] and protocol.live == {}


@pytest.mark.parametrize("make", [_sgd, lambda m: torch.optim.Muon([next(m.parameters())])])
def test_no_seed_stays_behind_that_the_optimizer_cannot_train(
    make: Callable[[nn.Module], Optimizer],
) -> None:
    model = _host()
    optimizer = make(model)
    protocol = GraftProtocol(model, optimizer, GraftConfig())
    if isinstance(optimizer, torch.optim.SGD):
        _germinate(model, protocol, _plan())
        assert list(protocol.live) == model.occupied_seeds() == [("0", 0)]
        return
    with pytest.raises(ValueError, match="only supports 2D parameters"):
        _germinate(model, protocol, _plan())
    assert model.occupied_seeds() == [] and protocol.live == {}


def test_a_newborn_changes_no_bit_of_a_host_that_clips_and_accumulates() -> None:
    def train(model: nn.Module, optimizer: Optimizer, steps: int) -> None:
        generator = torch.Generator().manual_seed(3)
        for _ in range(steps):
            optimizer.zero_grad()
            for _ in range(2):
                model(torch.randn(5, 6, generator=generator)).square().sum().backward()
            norm = nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            assert float(norm) > 0.1, "there is much to clip"
            optimizer.step()

    bare = _host().host
    train(bare, _sgd(bare), steps=5)
    model = _host()
    optimizer = _sgd(model)
    protocol = GraftProtocol(model, optimizer, GraftConfig())
    _germinate(model, protocol, _plan(training_steps=10))
    optimizer.register_step_post_hook(lambda *_: protocol.on_step())
    born = [p.detach().clone() for p in model.seed_parameters("0", 0)]
    train(model, optimizer, steps=5)
    for name, value in bare.state_dict().items():
        assert torch.equal(model.host.state_dict()[name], value), name
    assert not all(map(torch.equal, born, model.seed_parameters("0", 0)))


@pytest.mark.parametrize("blueprint", ["lora", "bottleneck"])
def test_fossils_are_folded_where_that_is_asked_for_and_possible(blueprint: str) -> None:
    model = _host()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    protocol = GraftProtocol(model, optimizer, GraftConfig(fold_fossils=True))
    kernel = lower(get(blueprint, rank=2), model.signature("0", 0, SEED_SOURCE_OUTPUT))
    protocol.germinate("0", 0, f"kernels/{kernel_digest(kernel)}", kernel, None, _plan(), "a test")
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(1))
    weight = model.host[0].weight
    groups = [list(group["params"]) for group in optimizer.param_groups]
    while not protocol.due_for_trial():
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        protocol.on_step()
    expected, moment = model(x), optimizer.state[weight]["exp_avg"].clone()
    protocol.keep(protocol.due_for_trial()[0], "a test")
    assert model.seed_state("0", 0).name == "FOSSILIZED"
    torch.testing.assert_close(model(x), expected, rtol=1e-6, atol=1e-6)
    assert model.host[0].weight is weight
    assert torch.equal(optimizer.state[weight]["exp_avg"], moment)
    trained = [list(group["params"]) for group in optimizer.param_groups]
    if blueprint == "lora":
        assert model.seed_parameters("0", 0) == [] and not model.slots["0"].hooked
        assert list(map(id, trained[0])) == list(map(id, groups[0]))
    else:  # it has an activation, and stays beside its host
        assert len(trained[0]) == len(groups[0]) + len(model.seed_parameters("0", 0))
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()
    protocol.on_step()
    assert not torch.equal(model(x), expected)


def _trial(gain: float) -> Trial:
    """A trial of 8 samples whose gain has a standard error of 1; level 0.05."""
    noise = torch.tensor([1.0, -1.0] * 4, dtype=torch.float64) * (7.0**0.5)
    return paired_trial(torch.zeros(8, dtype=torch.float64), noise + gain, level=0.05)


def _at_trial(config: GraftConfig) -> tuple[esper.MorphableModel, GraftProtocol]:
    model = _host()
    protocol = GraftProtocol(model, _sgd(model), config)
    _germinate(model, protocol, _plan(training_steps=0, stabilization_steps=0))
    while not protocol.due_for_trial():
        protocol.on_step()
    return model, protocol


@pytest.mark.parametrize(("gain", "state"), [(5.0, "FOSSILIZED"), (1.0, "CULLED")])
def test_a_seed_whose_trial_is_undecided_trains_on_until_a_second_decides(
    gain: float, state: str
) -> None:
    model, protocol = _at_trial(GraftConfig(probation_steps=3))
    [graft] = protocol.due_for_trial()
    protocol.conclude(graft, _trial(1.0))
    assert model.seed_state("0", 0).name == "FINE_TUNING"
    assert protocol.due_for_trial() == [] and protocol.due_for_trial(last=True) == [graft]
    for _ in range(2):
        protocol.on_step()
        assert protocol.due_for_trial() == []
    protocol.on_step()
    assert protocol.due_for_trial() == [graft]
    protocol.conclude(graft, _trial(gain))
    assert model.seed_state("0", 0).name == state and protocol.live == {}


@pytest.mark.parametrize(("gain", "probation_steps"), [(-5.0, 3), (1.0, 0)])
def test_a_seed_is_culled_where_the_trial_decides_or_there_is_no_probation(
    gain: float, probation_steps: int
) -> None:
    model, protocol = _at_trial(GraftConfig(probation_steps=probation_steps))
    protocol.conclude(protocol.due_for_trial()[0], _trial(gain))
    assert model.seed_state("0", 0).name == "CULLED" and protocol.live == {}


def test_who_is_on_probation_when_the_run_ends_has_not_passed() -> None:
    model, protocol = _at_trial(GraftConfig(probation_steps=3))
    protocol.conclude(protocol.due_for_trial()[0], _trial(1.0))
    for _ in range(4):
        protocol.on_step()
    protocol.finish()
    assert model.seed_state("0", 0).name == "CULLED"


def test_probation_leaves_out_no_fine_tuning_of_a_seed_that_passes_at_once() -> None:
    model, protocol = _at_trial(GraftConfig(probation_steps=3, fine_tuning_steps=2))
    protocol.conclude(protocol.due_for_trial()[0], _trial(5.0))
    assert model.seed_state("0", 0).name == "FINE_TUNING"
    assert protocol.due_for_trial(last=True) == []
    protocol.on_step()
    protocol.on_step()
    assert model.seed_state("0", 0).name == "FOSSILIZED"
