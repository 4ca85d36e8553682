"""What the governor takes for a fault, and what it does not."""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from tolaria.governed import QUICK
from tolaria.governed import STREAM
from tolaria.governed import Loop
from tolaria.governed import batches
from tolaria.governed import momentum
from torch.amp import GradScaler
from torch.optim import SGD
from torch.optim import Adam
from torch.optim import Optimizer

from esper.config import GovernorConfig

pytestmark = pytest.mark.usefixtures("governed_plane")


@pytest.mark.parametrize("tell", [True, False])
@pytest.mark.parametrize("make", [Adam, momentum])
def test_a_step_that_is_far_too_long_is_noticed_and_undone(
    make: Callable[..., Optimizer], tell: bool
) -> None:
    loop = Loop(make, tell=tell, learning_rate=0.02)
    with loop.session:
        stream = batches()
        for _ in range(150):
            loop.step(next(stream))
        usual = sum(loop.losses[-20:]) / 20
        loop.step(next(stream), rate=1000.0)
        for _ in range(4):
            loop.step(next(stream))
        (record,) = loop.session.history.rollbacks
        assert record.to_step <= 150 < record.step <= 155
        assert loop.optimizer.param_groups[0]["lr"] < 0.02
        for _ in range(20):
            loop.step(next(stream))
        assert sum(loop.losses[-20:]) / 20 < 2 * usual
        assert len(loop.session.history.rollbacks) == 1


def test_a_batch_far_out_of_the_usual_is_noticed_and_undone() -> None:
    loop = Loop(momentum)
    with loop.session:
        stream = batches()
        for _ in range(150):
            loop.step(next(stream))
        loop.step(next(stream), scale=1e5)
        (record,) = loop.session.history.rollbacks
        assert record.step == 151 and "usually" in record.reason


def test_a_level_that_comes_back_is_taken_for_usual() -> None:
    loop = Loop(governor=replace(QUICK, max_rollbacks=2))
    with loop.session:
        stream = batches()
        for _ in range(100):
            loop.step(next(stream))
        for _ in range(40):
            loop.step(next(stream), scale=1e4)
        assert len(loop.session.history.rollbacks) == 2
        assert loop.session.step > 120


@pytest.mark.parametrize("seed", range(2))
def test_without_a_fault_nothing_changes(seed: int) -> None:
    runs = [Loop(seed=seed), Loop(seed=seed, governor=GovernorConfig(enabled=False), tell=False)]
    outputs = []
    for loop in runs:
        torch.manual_seed(7)
        with loop.session:
            for batch in STREAM:
                loop.step(batch)
            loop.session.epoch_end()
            for batch in STREAM[:10]:
                loop.step(batch)
            assert not loop.session.history.rollbacks
            outputs.append([*loop.model.parameters(), *loop.model.buffers(), torch.rand(4)])
    for mine, theirs in zip(*outputs, strict=True):
        assert torch.equal(mine, theirs)


def test_an_overflow_that_the_scaler_skips_is_no_fault() -> None:
    loop = Loop(scaler=GradScaler("cpu", init_scale=2.0**10, growth_interval=3))
    with loop.session:
        for batch in [*STREAM, *STREAM]:
            loop.step(batch)
        for _ in range(3):
            loop.step(STREAM[10], scale=math.inf)
        for batch in STREAM[11:20]:
            loop.step(batch)
        assert not loop.session.history.rollbacks
        with torch.no_grad():
            next(loop.model.parameters()).fill_(math.nan)
        assert loop.session.epoch_end().held_out_loss is not None
        assert len(loop.session.history.rollbacks) == 1


def test_sound_runs_are_left_alone() -> None:
    for seed in range(20):
        rate = (0.001, 0.01, 0.05, 0.2)[seed % 4]
        make = (Adam, momentum, SGD, torch.optim.RMSprop)[seed // 4 % 4]
        if rate > 0.05 and make in (Adam, torch.optim.RMSprop):
            rate = 0.02
        loop = Loop(make, seed=seed, learning_rate=rate, epochs=6)
        stream = batches(seed)
        with loop.session:
            for _ in range(5):
                for _ in range(17):
                    loop.step(next(stream))
                loop.session.epoch_end()
            assert not loop.session.history.rollbacks, (seed, loop.session.history.rollbacks)


def test_a_collapse_on_held_out_data_is_undone() -> None:
    loop = Loop(epochs=20, learning_rate=0.003)
    stream = batches()
    with loop.session:
        for _ in range(15):
            for _ in range(17):
                loop.step(next(stream))
            before = loop.session.epoch_end().held_out_loss
        assert before is not None and not loop.session.history.rollbacks
        for _ in range(17):
            loop.step(next(stream))
        with torch.no_grad():  # seen in eval mode alone
            loop.model.host.net[1].running_var.fill_(1e-6)
        after = loop.session.epoch_end().held_out_loss
        assert after is not None and after < 2 * before
        (record,) = loop.session.history.rollbacks
        assert "held-out loss" in record.reason


def test_seeds_that_cannot_come_to_anything_are_removed() -> None:
    loop = Loop(SGD, governor=replace(QUICK, check_every_steps=1000))
    with loop.session:
        for seed in (0, 1):
            loop.plant("widen", seed=seed, training_steps=100)
        for batch in STREAM[:9]:
            loop.step(batch)
        with torch.no_grad():  # its hidden units see nothing, and nothing is seen of them
            for parameter in loop.model.seed_parameters("net", 0):
                parameter.zero_()
            loop.model.seed_parameters("net", 1)[0].fill_(math.nan)
        loop.model.collect_signals(0)
        for batch in STREAM[9:20]:
            loop.step(batch)
        loop.session.epoch_end()
        reasons = {(event.seed, event.after): event.reason for event in loop.session.history.events}
        assert "no gradient has reached it" in reasons[0, "CULLED"]
        assert "not finite" in reasons[1, "ROLLED_BACK"]
        assert not loop.session.history.rollbacks
