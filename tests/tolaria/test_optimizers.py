"""Newborn optimizers equal a reference run and hand their state over."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import pytest
import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim import lr_scheduler
from torch.optim import swa_utils

import esper
from esper.tolaria.optimizer_state import OptimizerState
from esper.tolaria.optimizer_state import capture
from esper.tolaria.optimizer_state import restore
from esper.tolaria.optimizers import NewbornOptimizer
from esper.tolaria.optimizers import NewbornState
from esper.tolaria.optimizers import check_all
from esper.tolaria.optimizers import check_supported
from esper.tolaria.optimizers import find_home
from esper.tolaria.optimizers import forget
from esper.tolaria.optimizers import host_group_index
from esper.tolaria.packing import Packed
from esper.tolaria.packing import pack
from esper.tolaria.packing import unpack

OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01, nesterov=True),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01, betas=(0.8, 0.95)),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, amsgrad=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05),
    "Adadelta": lambda p: torch.optim.Adadelta(p, lr=1.0),
    "Adamax": lambda p: torch.optim.Adamax(p, lr=0.01),
    "ASGD": lambda p: torch.optim.ASGD(p, lr=0.01),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=0.01),
    "RAdam": lambda p: torch.optim.RAdam(p, lr=0.01),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5),
    "Rprop": lambda p: torch.optim.Rprop(p, lr=0.01),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01),
    "Muon": lambda p: torch.optim.Muon(p, lr=0.01),
    "SGD foreach": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, foreach=True),
    "SGD fused": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True),
    "Adam foreach": lambda p: torch.optim.Adam(p, lr=0.01, foreach=True),
    "Adam fused": lambda p: torch.optim.Adam(p, lr=0.01, fused=True),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True, fused=True),
    "Adagrad fused": lambda p: torch.optim.Adagrad(p, lr=0.05, fused=True),
    "Adam maximize": lambda p: torch.optim.Adam(p, lr=0.01, maximize=True),
    "Adam by tensor": lambda p: torch.optim.Adam(p, lr=torch.tensor(0.01), foreach=False),
}
REFUSED = {"LBFGS", "SparseAdam"}


@dataclass(frozen=True)
class _Written:
    user: OptimizerState
    twin: NewbornState
    weights: dict[str, torch.Tensor]


def _parameter(seed: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(5, 3, generator=torch.Generator().manual_seed(seed)))


def _gradient(step: int) -> torch.Tensor:
    return torch.randn(5, 3, generator=torch.Generator().manual_seed(100 + step))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_newborn_that_graduates_trains_as_if_it_had_been_there_all_along(name: str) -> None:
    host, newborn, reference = _parameter(0), _parameter(1), _parameter(1)
    optimizer = OPTIMIZERS[name]([host])
    alone = OPTIMIZERS[name]([reference])
    twin = NewbornOptimizer([newborn], optimizer, 0)
    for step in range(8):
        host.grad = _gradient(-step)
        newborn.grad, reference.grad = _gradient(step), _gradient(step)
        if step < 4:
            optimizer.step()
            twin.step()
            assert newborn.grad is None
        else:
            if step == 4:
                twin.graduate()
            optimizer.step()
        alone.step()
    assert torch.equal(newborn, reference)
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_clipping_of_the_host_is_told_from_what_the_optimizer_itself_does(name: str) -> None:
    host, newborn = _parameter(0), _parameter(1)
    optimizer = OPTIMIZERS[name]([host])
    twin = NewbornOptimizer([newborn], optimizer, 0, witnesses=[host])
    seen = []
    for clips in (False, True, False):
        optimizer.zero_grad()
        ((host + newborn) * _gradient(1)).square().sum().backward()
        if clips:
            nn.utils.clip_grad_norm_([host], 0.1)
        optimizer.step()
        seen.append(twin.misses_clipping())
        twin.step()
    assert seen == [False, True, False]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_users_and_newborns_go_on_from_what_was_written_of_them(name: str) -> None:
    class Pair:
        """A host and a newborn with their optimizers."""

        def __init__(self) -> None:
            self.parameters = {"host": _parameter(0), "newborn": _parameter(1)}
            self.names = {parameter: name for name, parameter in self.parameters.items()}
            self.user = OPTIMIZERS[name]([self.parameters["host"]])
            self.twin = NewbornOptimizer([self.parameters["newborn"]], self.user, 0, warmup_steps=5)

        def train(self, steps: range) -> None:
            for step in steps:
                self.parameters["host"].grad = _gradient(step)
                self.parameters["newborn"].grad = _gradient(-step)
                self.user.step()
                self.twin.step()

        def write(self) -> Packed:
            weights = {name: parameter.detach() for name, parameter in self.parameters.items()}
            state = _Written(capture(self.user, self.names), self.twin.state(self.names), weights)
            packed = pack(state, "state")
            tensors = {name: tensor.clone() for name, tensor in packed.tensors.items()}
            return Packed(json.loads(json.dumps(packed.document)), tensors)

        def read(self, packed: Packed) -> None:
            state = unpack(_Written, packed, "state")
            with torch.no_grad():
                for name, parameter in self.parameters.items():
                    parameter.copy_(state.weights[name])
            restore(self.user, state.user, self.parameters)
            self.twin.resume(state.twin, self.parameters)

    whole, resumed = Pair(), Pair()
    whole.train(range(3))
    resumed.read(whole.write())
    for pair in (whole, resumed):
        pair.train(range(3, 8))
    for mine, theirs in zip(whole.names, resumed.names, strict=True):
        assert torch.equal(mine, theirs)


def test_the_host_never_notices_a_newborn() -> None:
    host, twin_host = _parameter(0), _parameter(0)
    optimizer, bare = OPTIMIZERS["Adam"]([host]), OPTIMIZERS["Adam"]([twin_host])
    newborn = NewbornOptimizer([_parameter(1)], optimizer, 0)
    for step in range(5):
        host.grad, twin_host.grad = _gradient(step), _gradient(step)
        optimizer.step()
        newborn.step()
        bare.step()
    newborn.graduate()
    host.grad, twin_host.grad = _gradient(9), _gradient(9)
    optimizer.step()
    bare.step()
    assert torch.equal(host, twin_host)


SCHEDULERS: dict[str, Callable[[Optimizer], lr_scheduler.LRScheduler]] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 0.9**epoch),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2),
    "LinearLR": lr_scheduler.LinearLR,
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 10),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 4),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=20),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda epoch: 0.95),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 4]),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.5, total_iters=3),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, total_iters=5),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=2),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o, 0.1), lr_scheduler.ExponentialLR(o, 0.9)], milestones=[2]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.1), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1),
    "SWALR": lambda o: swa_utils.SWALR(o, swa_lr=0.01, anneal_epochs=3),
}


def test_every_optimizer_and_scheduler_of_torch_is_tried() -> None:
    def of(module: ModuleType, base: type) -> set[str]:
        kinds = [kind for kind in vars(module).values() if isinstance(kind, type)]
        return {kind.__name__ for kind in kinds if issubclass(kind, base)} - {base.__name__}

    tried = {name.split()[0] for name in OPTIMIZERS}
    assert of(torch.optim, Optimizer) == tried | REFUSED
    schedulers = of(lr_scheduler, lr_scheduler.LRScheduler) | of(
        swa_utils, lr_scheduler.LRScheduler
    )
    assert schedulers - {"_LRScheduler"} == set(SCHEDULERS)  # an old name of the base class


@pytest.mark.parametrize("name", SCHEDULERS)
def test_newborns_follow_the_schedule_and_graduation_breaks_none(name: str) -> None:
    host, newborn = _parameter(0), _parameter(1)
    optimizer, bare = OPTIMIZERS["SGD"]([host]), OPTIMIZERS["SGD"]([_parameter(0)])
    scheduler, reference = SCHEDULERS[name](optimizer), SCHEDULERS[name](bare)
    twin = NewbornOptimizer([newborn], optimizer, 0, learning_rate_scale=2.0)
    for step in range(6):
        host.grad, newborn.grad = _gradient(step), _gradient(step)
        optimizer.step()
        bare.step()
        assert twin.learning_rate == 2.0 * optimizer.param_groups[0]["lr"]
        twin.step()
        if step == 3:
            twin.graduate()
        for each in (scheduler, reference):
            each.step(*([1.0] if isinstance(each, lr_scheduler.ReduceLROnPlateau) else []))
        assert optimizer.param_groups[0]["lr"] == bare.param_groups[0]["lr"]


def test_schedules_of_momentum_are_followed_too() -> None:
    newborn, reference = _parameter(1), _parameter(1)
    optimizer, alone = OPTIMIZERS["SGD"]([_parameter(0)]), OPTIMIZERS["SGD"]([reference])
    schedulers = [
        lr_scheduler.OneCycleLR(o, 0.1, total_steps=9, cycle_momentum=True)
        for o in (optimizer, alone)
    ]
    twin = NewbornOptimizer([newborn], optimizer, 0)
    for step in range(6):
        newborn.grad, reference.grad = _gradient(step), _gradient(step)
        optimizer.step()
        alone.step()
        twin.step()
        for scheduler in schedulers:
            scheduler.step()
    assert torch.equal(newborn, reference)


def test_a_seed_goes_where_its_host_is_trained_or_to_who_can_train_it() -> None:
    matrix, bias, embedding = _parameter(0), nn.Parameter(torch.zeros(5)), _parameter(2)
    muon = torch.optim.Muon([matrix], lr=0.01)
    adam = torch.optim.AdamW([{"params": [_parameter(3)]}, {"params": [bias]}], lr=0.01)
    sparse = torch.optim.SparseAdam([embedding], lr=0.01)
    users = [sparse, muon, adam]
    check_all(users)
    assert find_home(users, [matrix, bias], [_parameter(4)]) == (muon, 0)
    assert find_home(users, [bias], [_parameter(4)]) == (adam, 1)
    assert find_home(users, [matrix], [_parameter(4), nn.Parameter(torch.zeros(2))]) == (adam, 0)
    assert find_home(users, [embedding], [_parameter(4)]) == (muon, 0)
    with pytest.raises(ValueError, match="SparseAdam, but the gradients of newborns are dense"):
        check_all([sparse])
    with pytest.raises(ValueError, match="at least one"):
        check_all([])


def test_the_learning_rate_warms_up() -> None:
    newborn = _parameter(1)
    optimizer = torch.optim.SGD([_parameter(0)], lr=1.0)
    twin = NewbornOptimizer([newborn], optimizer, 0, warmup_steps=3)
    moves = []
    for _ in range(5):
        before = newborn.detach().clone()
        newborn.grad = torch.ones(5, 3)
        twin.step()
        moves.append(float((before - newborn.detach())[0, 0]))
    assert moves == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0], abs=1e-6)


def test_a_step_without_gradients_does_not_count() -> None:
    newborn = _parameter(1)
    twin = NewbornOptimizer([newborn], torch.optim.SGD([_parameter(0)], lr=1.0), 0, warmup_steps=3)
    for _ in range(10):
        twin.step()
    assert twin.learning_rate == 0.25


def test_the_host_group_is_the_one_that_holds_the_slots_parameters() -> None:
    first, second, elsewhere = _parameter(0), _parameter(1), _parameter(2)
    optimizer = torch.optim.SGD(
        [{"params": [first], "lr": 0.1}, {"params": [second], "lr": 0.5}], lr=0.1
    )
    assert host_group_index(optimizer, [second]) == 1
    assert host_group_index(optimizer, [elsewhere]) == 0
    twin = NewbornOptimizer([_parameter(3)], optimizer, 1)
    assert twin.learning_rate == 0.5


def test_lbfgs_is_refused() -> None:
    with pytest.raises(ValueError, match="LBFGS"):
        check_supported(torch.optim.LBFGS([_parameter(0)]))


def test_an_optimizer_that_cannot_be_made_anew_is_refused_beforehand() -> None:
    class Lookahead(torch.optim.SGD):
        def __init__(self, inner: Optimizer) -> None:
            super().__init__(inner.param_groups[0]["params"], lr=0.1)

    with pytest.raises(ValueError, match="optimizer is Lookahead"):
        check_supported(Lookahead(torch.optim.SGD([_parameter(0)], lr=0.1)))


def test_options_reach_the_twin_of_a_class_that_does_not_name_them() -> None:
    class Mine(torch.optim.SGD):
        def __init__(self, *args: object, **kwargs: object) -> None:
            super().__init__(*args, **kwargs)  # type: ignore[arg-type]

    newborn, reference = _parameter(1), _parameter(1)
    twin = NewbornOptimizer([newborn], Mine([_parameter(0)], lr=0.1, momentum=0.9), 0)
    alone = torch.optim.SGD([reference], lr=0.1, momentum=0.9)
    for step in range(3):
        newborn.grad, reference.grad = _gradient(step), _gradient(step)
        twin.step()
        alone.step()
    assert torch.equal(newborn, reference)


def test_a_graduate_of_named_parameters_has_its_name() -> None:
    optimizer = torch.optim.Adam([("host", _parameter(0))], lr=0.1)
    newborn = NewbornOptimizer([_parameter(1)], optimizer, 0, names=["seed"])
    newborn.graduate()
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == ["host", "seed"]


@pytest.mark.parametrize("named", [False, True])
def test_an_optimizer_forgets_a_folded_fossil_and_trains_on(named: bool) -> None:
    torch.manual_seed(0)
    model = esper.wrap(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)))
    x = torch.randn(5, 6)
    model(x)
    model.germinate("0", 1, "lora", rank=1)
    for state in ("TRAINING", "GRAFTING", "STABILIZATION", "EVALUATING", "FOSSILIZED"):
        model.advance("0", 1, state)
    optimizer = torch.optim.Adam(list(model.named_parameters() if named else model.parameters()))

    def step() -> None:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()

    step()
    host = list(model.host.parameters())
    moments = [optimizer.state[p]["exp_avg"] for p in host]
    seed = model.seed_parameters("0", 1)
    assert set(forget(optimizer, model.fold("0", 1))) == set(seed)
    (group,) = optimizer.param_groups
    assert list(map(id, group["params"])) == list(map(id, host))
    if named:
        assert group["param_names"] == [name for name, _ in model.named_parameters()]
    assert list(map(id, optimizer.state)) == list(map(id, host))
    assert [optimizer.state[p]["exp_avg"] for p in host] == moments, "the same objects"
    before = [p.detach().clone() for p in host]
    step()
    assert not any(torch.equal(*pair) for pair in zip(before, host, strict=True))
    assert forget(optimizer, seed) == {}
