"""Newborns in loops of every make: what is done to gradients between backward and step."""

import math
from collections.abc import Callable
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch import nn
from torch.amp import GradScaler
from torch.optim import LBFGS
from torch.optim import SGD
from torch.optim import Adam
from torch.optim import Optimizer

import esper
from esper.blueprints import get
from esper.blueprints import kernel_digest
from esper.blueprints import lower
from esper.common.v1 import lifecycle_pb2
from esper.config import GraftConfig
from esper.tamiyo.v1 import controller_pb2
from esper.tolaria.protocol import GraftProtocol

Loop = Callable[["Run", Iterator[Tensor]], None]


class Run:
    """A small wrapped model with a newborn in each of its two slots, and a loop's usual parts."""

    def __init__(
        self,
        optimizers: Callable[[nn.Module], list[Optimizer]],
        *,
        scaler: GradScaler | None = None,
        born: bool = True,
        config: GraftConfig | None = None,
    ) -> None:
        torch.manual_seed(0)
        host = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
        self.model = esper.wrap(host, ["0", "2"], seeds_per_layer=1)
        self.optimizers = optimizers(self.model)
        self.scaler = scaler or GradScaler("cpu", enabled=False)
        self.protocol = GraftProtocol(self.model, self.optimizers, config or GraftConfig(), scaler)
        for optimizer in self.optimizers:
            optimizer.register_step_post_hook(lambda user, *_: self.protocol.on_step(user))
        for slot in ("0", "2") if born else ():
            blueprint = get("bottleneck", rank=2)
            signature = self.model.signature(slot, 0, blueprint.graph.inputs[0].source)
            kernel = lower(blueprint, signature)
            plan = controller_pb2.GraftPlan(
                training_steps=3,
                alpha=lifecycle_pb2.AlphaSchedule(steps=4),
                learning_rate_scale=1.0,
            )
            name = f"kernels/{kernel_digest(kernel)}"
            self.protocol.germinate(slot, 0, name, kernel, None, plan, "a test")

    def loss(self, x: Tensor) -> Tensor:
        loss: Tensor = self.model(x).square().sum()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none)

    def step(self) -> None:
        for optimizer in self.optimizers:
            self.scaler.step(optimizer)
        self.scaler.update()

    def newborns(self) -> list[Tensor]:
        return [p.detach().clone() for s in ("0", "2") for p in self.model.seed_parameters(s, 0)]


def _one(model: nn.Module) -> list[Optimizer]:
    return [SGD(model.parameters(), lr=0.02, momentum=0.9)]


def _two(model: nn.Module) -> list[Optimizer]:
    first, last = model.get_submodule("host.0"), model.get_submodule("host.2")
    return [SGD(first.parameters(), lr=0.02), Adam(last.parameters(), lr=0.01)]


def _batches() -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return (torch.randn(5, 6, generator=generator) for _ in range(6))


def _plain(run: Run, batches: Iterator[Tensor]) -> None:
    for x in batches:
        run.zero_grad()
        run.scaler.scale(run.loss(x)).backward()  # type: ignore[no-untyped-call]
        run.step()


def _same(one: Run, two: Run) -> None:
    for (name, a), (_, b) in zip(
        one.model.state_dict().items(), two.model.state_dict().items(), strict=True
    ):
        assert torch.equal(a, b), name


def _trained(loop: Loop, optimizers: Callable[[nn.Module], list[Optimizer]] = _one) -> Run:
    run = Run(optimizers)
    born = run.newborns()
    loop(run, _batches())
    assert not any(map(torch.equal, born, run.newborns())), "every newborn parameter has learnt"
    return run


def test_several_optimizers_train_the_newborns_of_their_own_layers() -> None:
    run = _trained(_plain, _two)
    kinds = [type(graft.optimizer.host_optimizer) for graft in run.protocol.live.values()]  # type: ignore[union-attr]
    assert kinds == [SGD, Adam]
    assert run.model.seed_state("2", 0).name == "GRAFTING", "the first optimizer's steps count"


@pytest.mark.parametrize("optimizers", [_one, _two])
def test_closures_train_as_plain_steps_do(
    optimizers: Callable[[nn.Module], list[Optimizer]],
) -> None:
    def closures(run: Run, batches: Iterator[Tensor]) -> None:
        for x in batches:

            def closure(x: Tensor = x) -> float:
                run.zero_grad()
                loss = run.loss(x)
                loss.backward()  # type: ignore[no-untyped-call]
                return float(loss)

            closure()  # evaluated before the step, as line searches do
            run.optimizers[0].step(closure)
            for optimizer in run.optimizers[1:]:
                optimizer.step()

    _same(_trained(closures, optimizers), _trained(_plain, optimizers))


def test_beside_lbfgs_newborns_are_trained_by_another_optimizer() -> None:
    def with_adam(model: nn.Module) -> list[Optimizer]:
        first, last = model.get_submodule("host.0"), model.get_submodule("host.2")
        return [LBFGS(first.parameters(), lr=0.1, max_iter=3), Adam(last.parameters(), lr=0.01)]

    evaluations = []

    def loop(run: Run, batches: Iterator[Tensor]) -> None:
        for x in batches:

            def closure(x: Tensor = x) -> float:
                run.zero_grad()
                loss = run.loss(x)
                loss.backward()  # type: ignore[no-untyped-call]
                evaluations.append(loss.item())
                return loss.item()

            for optimizer in run.optimizers:
                optimizer.step(closure)

    run = _trained(loop, with_adam)
    assert len(evaluations) > 2 * 6, "a line of several evaluations each"
    homes = [graft.optimizer.host_optimizer for graft in run.protocol.live.values()]  # type: ignore[union-attr]
    assert homes == [run.optimizers[1]] * 2
    assert run.model.seed_state("0", 0).name == "GRAFTING", "the steps of LBFGS count"


def test_under_autocast_the_host_does_not_notice_a_newborn() -> None:
    def autocast(run: Run, batches: Iterator[Tensor]) -> None:
        for x in list(batches)[:4]:  # up to the ramp
            run.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = run.loss(x)
            loss.backward()  # type: ignore[no-untyped-call]
            run.step()

    grown, bare = _trained(autocast), Run(_one, born=False)
    autocast(bare, _batches())
    for name, value in bare.model.host.state_dict().items():
        assert torch.equal(grown.model.host.state_dict()[name], value), name


@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_batch_that_is_given_up_after_its_backward_leaves_no_trace(set_to_none: bool) -> None:
    def giving_up(run: Run, batches: Iterator[Tensor]) -> None:
        for x in batches:
            loss = run.loss(x * 100.0)
            run.zero_grad(set_to_none)
            loss.backward()  # type: ignore[no-untyped-call]
            loss = run.loss(x)
            run.zero_grad(set_to_none)
            loss.backward()  # type: ignore[no-untyped-call]
            run.step()

    _same(_trained(giving_up), _trained(_plain))


@pytest.mark.parametrize("set_to_none", [True, False])
def test_gradients_are_accumulated(set_to_none: bool) -> None:
    def parts(run: Run, batches: Iterator[Tensor]) -> None:
        for x in batches:
            run.zero_grad(set_to_none)
            for part in (x[:2], x[2:]):
                run.loss(part).backward()  # type: ignore[no-untyped-call]
            run.step()

    one, two = _trained(parts), _trained(_plain)
    for a, b in zip(one.newborns(), two.newborns(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("of", ["model", "optimizer"])
def test_clipping_means_the_host_alone(of: str) -> None:
    def clipping(run: Run, batches: Iterator[Tensor]) -> None:
        for x in batches:
            run.zero_grad()
            run.loss(x).backward()  # type: ignore[no-untyped-call]
            clipped = [p for group in run.optimizers[0].param_groups for p in group["params"]]
            clipped = list(run.model.parameters()) if of == "model" else clipped
            assert nn.utils.clip_grad_norm_(clipped, 0.1) > 0.1, "there is much to clip"
            run.step()
            if run.model.occupied_seeds() and run.model.seed_state("0", 0).name == "GRAFTING":
                break  # up to here the host must not notice

    grown, bare = Run(_one), Run(_one, born=False)
    clipping(grown, _batches())
    clipping(bare, iter(list(_batches())[:4]))
    for name, value in bare.model.host.state_dict().items():
        assert torch.equal(grown.model.host.state_dict()[name], value), name


def _clipping_the_host(run: Run, batches: Iterator[Tensor]) -> None:
    for x in batches:
        run.zero_grad()
        run.scaler.scale(run.loss(x)).backward()  # type: ignore[no-untyped-call]
        for optimizer in run.optimizers:
            run.scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(run.model.parameters(), 0.1)
        run.step()


def _steepest(model: nn.Module) -> list[Optimizer]:
    return [SGD(model.parameters(), lr=0.02)]


def test_newborns_have_a_clip_of_their_own() -> None:
    config = GraftConfig(max_gradient_norm=0.1, warmup_steps=0)
    run = Run(_steepest, config=config)
    _plain(run, iter([next(_batches())]))  # the first step lets them begin
    for x in list(_batches())[:3]:
        seeds = [run.model.seed_parameters(slot, 0) for slot in ("0", "2")]
        before = [[p.detach().clone() for p in seed] for seed in seeds]
        _plain(run, iter([x * 10.0]))
        for seed, values in zip(seeds, before, strict=True):
            moved = [p.detach() - value for p, value in zip(seed, values, strict=True)]
            assert float(nn.utils.get_total_norm(moved)) == pytest.approx(0.02 * 0.1, rel=1e-3)
    scaled = Run(_steepest, config=config, scaler=GradScaler("cpu", init_scale=2.0**12))
    plain = Run(_steepest, config=config)
    _clipping_the_host(scaled, _batches())
    _clipping_the_host(plain, _batches())
    for a, b in zip(scaled.newborns(), plain.newborns(), strict=True):
        assert torch.allclose(a, b, atol=1e-7)


@pytest.mark.parametrize(
    ("loop", "bound", "told"),
    [
        (_clipping_the_host, None, 1),
        (_clipping_the_host, 1.0, 0),
        (_clipping_the_host, math.inf, 0),
        (_plain, None, 0),
    ],
)
def test_a_loop_that_clips_is_told_that_newborns_are_not(
    loop: Loop, bound: float | None, told: int, caplog: pytest.LogCaptureFixture
) -> None:
    run = Run(_two, config=GraftConfig(max_gradient_norm=bound))
    loop(run, _batches())
    assert caplog.text.count("set GraftConfig.max_gradient_norm") == told


def test_a_grad_scaler_changes_nothing_but_the_batches_that_overflow() -> None:
    def overflowing(run: Run, batches: Iterator[Tensor]) -> None:
        for number, x in enumerate(batches):
            run.zero_grad()
            loss = run.loss(x) * (float("inf") if number == 2 else 1.0)
            run.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            if number % 2:
                run.scaler.unscale_(run.optimizers[0])
            run.step()

    def without(run: Run, batches: Iterator[Tensor]) -> None:
        _plain(run, (x for number, x in enumerate(batches) if number != 2))

    scaled = Run(_one, scaler=GradScaler("cpu", init_scale=2.0**16))
    overflowing(scaled, _batches())
    assert scaled.scaler.get_scale() == 2.0**15
    _same(scaled, _trained(without))
