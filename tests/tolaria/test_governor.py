"""A run that went back goes on as one that never had the fault, bit for bit."""

import math
from collections.abc import Callable
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch import nn
from torch.amp import GradScaler
from torch.optim import SGD
from torch.optim import Adam
from torch.optim import Optimizer
from torch.optim import lr_scheduler

import esper
from esper.blueprints import get
from esper.blueprints import kernel_digest
from esper.blueprints import lower
from esper.common.v1 import blueprint_pb2
from esper.common.v1 import lifecycle_pb2
from esper.config import Candidate
from esper.config import EsperConfig
from esper.config import GovernorConfig
from esper.oona.v1 import event_pb2
from esper.plane import connect
from esper.tamiyo.v1 import controller_pb2
from esper.tolaria import Session
from esper.tolaria import Trainer
from esper.tolaria import tasks
from esper.tolaria.checkpoint import read_checkpoint
from esper.tolaria.governor import TrainingFault
from esper.urza.v1 import library_pb2

TASK = tasks.get("digits")
QUICK = GovernorConfig(check_every_steps=1, snapshot_every_steps=4)

CONFIG = EsperConfig(
    candidates=(Candidate(blueprint="widen", ranks=(2,)),), telemetry_interval=3, governor=QUICK
)
PLANE: list[str] = []

Batch = tuple[Tensor, Tensor]


@pytest.fixture(scope="module", autouse=True)
def running(plane: str) -> Iterator[None]:
    """Lets every session of the module find the plane."""
    PLANE.append(plane)
    yield
    PLANE.clear()


class Host(nn.Module):
    """Draws from the random state, and has buffers that every training forward moves."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(64, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, 10)
        )
        self.drop = nn.Dropout(0.2)
        self.register_buffer("seen", torch.zeros(()), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        if self.training:
            self.seen += 1
        scores: Tensor = self.net(self.drop(images.flatten(1)))
        return scores


class Loop:
    """A user's own loop with everything in it that a rollback has to take back."""

    def __init__(
        self,
        make: Callable[..., Optimizer] = Adam,
        *,
        governor: GovernorConfig = QUICK,
        scaler: GradScaler | None = None,
        learning_rate: float = 0.01,
        tell: bool = True,
        seed: int = 0,
        epochs: int = 2,
        resume: Path | None = None,
    ) -> None:
        torch.manual_seed(seed)
        self.model = esper.wrap(Host(), ["net"], seeds_per_layer=2)
        self.model(TASK.train.inputs[:8])
        self.optimizer = make(self.model.parameters(), lr=learning_rate)
        self.schedule = lr_scheduler.ExponentialLR(self.optimizer, 0.99)
        self.scaler = scaler
        self.tell = tell
        self.losses: list[float] = []
        stateful: dict[str, object] = {"schedule": self.schedule}
        if scaler is not None:
            stateful["scaler"] = scaler
        self.session = Session(
            self.model,
            self.optimizer,
            epochs=epochs,
            held_out=TASK.held_out_batches(),
            loss=TASK.loss,
            plane=PLANE[0],
            config=replace(CONFIG, governor=governor),
            scaler=scaler,
            stateful=stateful,  # type: ignore[arg-type]
            resume=resume,
        )

    def plant(
        self, blueprint_name: str = "bottleneck", *, seed: int = 0, training_steps: int = 3
    ) -> str:
        slot = "net"
        blueprint = get(blueprint_name, rank=3)
        signature = self.model.signature(slot, seed, blueprint.graph.inputs[0].source)
        kernel = lower(blueprint, signature)
        plan = controller_pb2.GraftPlan(
            training_steps=training_steps,
            alpha=lifecycle_pb2.AlphaSchedule(steps=200),
            learning_rate_scale=1.0,
        )
        name = f"kernels/{kernel_digest(kernel)}"
        self.session._protocol.germinate(slot, seed, name, kernel, None, plan, "a test")
        return name

    def step(self, batch: Batch, *, rate: float = 1.0, scale: float = 1.0) -> None:
        images, targets = batch
        self.optimizer.zero_grad()
        loss = nn.functional.cross_entropy(self.model(images), targets) * scale
        if self.tell:
            self.session.note_loss(loss)
        for group in self.optimizer.param_groups:
            group["lr"] *= rate
        if self.scaler is None:
            loss.backward()
            self.optimizer.step()
        else:
            self.scaler.scale(loss).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self.schedule.step()
        self.losses.append(float(loss.detach()))

    def everything(self) -> list[Tensor]:
        """Weights, buffers, optimizers, random state and telemetry."""
        model, session = self.model, self.session
        training = session._capture()
        grafts = [graft.optimizer for graft in training.grafts]
        kept = [
            value
            for state in (*training.optimizers, *(o.optimizer for o in grafts if o is not None))
            for opaque in state.state.values()
            for value in opaque.value.values()  # type: ignore[attr-defined]
            if isinstance(value, Tensor)
        ]
        buffers = list(model.buffers())
        rates = torch.tensor([group["lr"] for group in self.optimizer.param_groups])
        telemetry = [
            slot.telemetry.stats
            for slot in training.runtime.slots.values()
            if slot.telemetry is not None
        ]
        bank = torch.frombuffer(bytearray(model.bank.to_bytes()), dtype=torch.uint8)
        return [*model.parameters(), *buffers, *kept, rates, *telemetry, bank]


def batches(seed: int = 0) -> Iterator[Batch]:
    epoch = 0
    while True:
        yield from TASK.train_batches(seed, epoch)  # type: ignore[misc]
        epoch += 1


def assert_equal(first: Loop, second: Loop) -> None:
    for mine, theirs in zip(first.everything(), second.everything(), strict=True):
        assert torch.equal(mine, theirs)
    assert first.session.step == second.session.step


def poisoned(batch: Batch) -> Batch:
    images = batch[0].clone()
    images[3, 7] = math.nan
    return images, batch[1]


def momentum(parameters: Iterator[nn.Parameter], lr: float) -> Optimizer:
    return SGD(parameters, lr=lr, momentum=0.9)


STREAM = [batch for _, batch in zip(range(40), batches(), strict=False)]


@pytest.mark.parametrize("make", [Adam, momentum])
@pytest.mark.parametrize("tell", [True, False])
@pytest.mark.parametrize("plants", [True, False])
def test_the_continuation_is_that_of_a_run_without_the_fault(
    make: Callable[..., Optimizer], tell: bool, plants: bool
) -> None:
    hurt, clean = Loop(make, tell=tell), Loop(make, tell=tell)
    with hurt.session, clean.session:
        for loop in (hurt, clean):
            torch.manual_seed(7)
            if plants:  # it learns beside the host, and is not held responsible
                loop.plant(training_steps=100)
            for batch in STREAM[:8]:
                loop.step(batch)
        hurt.step(STREAM[8])  # it shows that the state after step 8 was good
        hurt.step(STREAM[9])
        torch.rand(5)
        hurt.step(poisoned(STREAM[10]))
        (record,) = hurt.session.history.rollbacks
        assert (record.step, record.to_step, record.seeds) == (11, 8, [])
        assert "not finite" in record.reason
        assert_equal(hurt, clean)
        random = torch.get_rng_state()
        for loop in (hurt, clean):
            torch.set_rng_state(random)
            for batch in STREAM[11:25]:
                loop.step(batch)
        assert_equal(hurt, clean)
        assert hurt.losses[-14:] == clean.losses[-14:]


def test_the_newest_seed_at_work_leaves_and_its_place_stays_empty_for_a_while(
    plane: str,
) -> None:
    hurt, clean = Loop(), Loop()
    with hurt.session, clean.session:
        with connect(plane) as client:  # that Urza knows the kernel
            signature = hurt.model.signature("net", 1, blueprint_pb2.SEED_SOURCE_OUTPUT)
            name = client.tezzeret.compile(get("bottleneck", rank=3), signature).name
        assert {loop.plant(seed=seed) for seed in (0, 1) for loop in (hurt, clean)} >= {name}
        for loop in (hurt, clean):
            torch.manual_seed(7)
            for batch in STREAM[:8]:
                loop.step(batch)
            assert loop.model.seed_state("net", 1).name == "GRAFTING"
        hurt.step(STREAM[8])
        hurt.step(poisoned(STREAM[9]))
        (record,) = hurt.session.history.rollbacks
        assert record.seeds == [("net", 1)]
        clean.model.advance("net", 1, "ROLLED_BACK", record.reason)
        clean.model.set_embargo("net", 1, QUICK.embargo_steps)
        random = torch.get_rng_state()
        for loop in (hurt, clean):
            torch.set_rng_state(random)
            for batch in STREAM[10:20]:
                loop.step(batch)
            assert loop.model.seed_state("net", 0).name == "GRAFTING"
            stats = loop.model.get_layer_stats("net").seeds[1]
            assert stats.embargo_remaining == QUICK.embargo_steps - 10
        assert_equal(hurt, clean)
        run = hurt.session.run
    with connect(plane) as client:
        (report,) = (
            report
            for report in client.urza.list_field_reports(name)
            if report.run == run and report.seed == 1
        )
        assert report.verdict == library_pb2.FIELD_VERDICT_ROLLED_BACK
        assert report.reason == record.reason
        with client.oona.subscribe("system.events.rollback", 0) as events:
            told = event_pb2.RollbackEvent()
            assert any(event.body.Unpack(told) and told.run == run for event in events)
        assert list(told.seeds) == ["net[1]"] and (told.step, told.to_step) == (10, 8)
        assert client.urza.runs.verify_run(f"runs/{run}").intact


def test_a_seed_whose_own_weights_are_broken_is_the_one() -> None:
    loop = Loop()
    with loop.session:
        for seed in (0, 1):
            loop.plant(seed=seed)
        for batch in STREAM[:10]:
            loop.step(batch)
        with torch.no_grad():
            loop.model.seed_parameters("net", 0)[0].fill_(math.inf)
        loop.step(STREAM[10])
        (record,) = loop.session.history.rollbacks
        assert record.seeds == [("net", 0)] and "weights of net[0]" in record.reason
        assert loop.model.seed_state("net", 1).name == "GRAFTING"


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


def test_what_stays_broken_ends_the_run_or_the_governor() -> None:
    loop = Loop()
    with loop.session:
        for batch in STREAM[:9]:
            loop.step(batch)
        with pytest.raises(TrainingFault, match="gone back 4 times in vain"):
            for batch in STREAM[9:20]:
                loop.step(poisoned(batch))
        assert [r.to_step for r in loop.session.history.rollbacks] == [8, 4, 0, 0]
        assert all(parameter.isfinite().all() for parameter in loop.model.parameters())
    loop = Loop(governor=replace(QUICK, give_up="go_on", max_rollbacks=0))
    with loop.session:
        for batch in STREAM[:9]:
            loop.step(batch)
        for batch in STREAM[9:14]:
            loop.step(poisoned(batch))
        assert loop.session.step == 12 and len(loop.session.history.rollbacks) == 1


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


def test_accumulation_closures_and_several_optimizers() -> None:
    torch.manual_seed(0)
    model = esper.wrap(Host(), ["net"], seeds_per_layer=1)
    body, head = list(model.host.net[0].parameters()), list(model.host.net[3].parameters())
    optimizers = [Adam(body, lr=0.01), SGD(head, lr=0.05)]
    session = Session(
        model,
        optimizers,
        epochs=1,
        held_out=TASK.held_out_batches(),
        loss=TASK.loss,
        plane=PLANE[0],
        config=CONFIG,
    )

    def step(first: Batch, second: Batch) -> None:
        for optimizer in optimizers:
            optimizer.zero_grad()

        def closure() -> float:
            total = 0.0
            for images, targets in (first, second):
                loss = nn.functional.cross_entropy(model(images), targets) / 2
                session.note_loss(loss)
                loss.backward()
                total += float(loss.detach())
            return total

        optimizers[0].step(closure)
        optimizers[1].step()

    with session:
        for first, second in zip(STREAM[:20:2], STREAM[1:20:2], strict=True):
            step(first, second)
        before = [parameter.detach().clone() for parameter in model.parameters()]
        step(STREAM[20], poisoned(STREAM[21]))
        (record,) = session.history.rollbacks
        assert (record.step, record.to_step) == (11, 8)
        after = list(model.parameters())
        assert all(parameter.isfinite().all() for parameter in after)
        assert not all(map(torch.equal, before, after))
        assert sorted(optimizers[1].state) == [] or optimizers[1].param_groups[0]["lr"] == 0.05


def _train(batches_of: Callable[[int], list[Batch]]) -> Trainer:
    torch.manual_seed(1)
    model = esper.wrap(Host(), ["net"], seeds_per_layer=2)
    trainer = Trainer(
        model,
        Adam(model.parameters(), lr=0.01),
        train=batches_of,  # type: ignore[arg-type]
        held_out=TASK.held_out_batches(),
        loss=TASK.loss,
        epochs=3,
        plane=PLANE[0],
        config=CONFIG,
    )
    trainer.fit()
    return trainer


def test_the_trainer_goes_back_in_its_data_and_leaves_out_what_was_wrong() -> None:
    epochs = [list(TASK.train_batches(0, epoch)) for epoch in range(3)]
    wrong = 10

    def with_poison(epoch: int) -> list[Batch]:
        whole: list[Batch] = list(epochs[epoch])  # type: ignore[arg-type]
        return (
            [*whole[:wrong], poisoned(whole[wrong]), *whole[wrong + 1 :]] if epoch == 1 else whole
        )

    def without(epoch: int) -> list[Batch]:
        whole: list[Batch] = list(epochs[epoch])  # type: ignore[arg-type]
        return [*whole[:wrong], *whole[wrong + 1 :]] if epoch == 1 else whole

    hurt, clean = _train(with_poison), _train(without)
    assert hurt.session is not None and clean.session is not None
    assert len(hurt.session.history.rollbacks) == 1 and not clean.session.history.rollbacks
    for mine, theirs in zip(hurt.model.parameters(), clean.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    losses = [[e.train_loss for e in t.session.history.epochs] for t in (hurt, clean)]  # type: ignore[union-attr]
    assert losses[0] == losses[1]


def test_a_run_that_goes_on_from_a_checkpoint_goes_back_as_the_other_did(
    tmp_path: Path,
) -> None:
    first = Loop()
    with first.session:
        for batch in STREAM[:10]:
            first.step(batch)
        first.step(poisoned(STREAM[10]))
        for batch in STREAM[11:14]:
            first.step(batch)
        first.session.save(tmp_path / "saved")
        record = read_checkpoint(tmp_path / "saved").record
        assert record.rollbacks == first.session.history.rollbacks and record.num_attempts == 1
        second = Loop(resume=tmp_path / "saved")
        second.model.host.seen.copy_(first.model.host.seen)  # no file holds it
        random = torch.get_rng_state()
        with second.session:
            for loop in (first, second):
                torch.set_rng_state(random)
                for batch in STREAM[14:16]:
                    loop.step(batch)
                loop.step(poisoned(STREAM[16]))
                for batch in STREAM[17:25]:
                    loop.step(batch)
            assert_equal(first, second)
            assert first.session.history.rollbacks == second.session.history.rollbacks
            assert len(first.session.history.rollbacks) == 2


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


def test_snapshots_keep_within_their_memory(caplog: pytest.LogCaptureFixture) -> None:
    whole = Loop()
    with whole.session:
        for batch in STREAM[:30]:
            whole.step(batch)
        room = whole.session._governor.snapshot_bytes
    size = room // 4  # three good ones, and one on trial
    for bound in (2 * size + size // 2, size // 2):
        loop = Loop(governor=replace(QUICK, max_snapshot_bytes=bound))
        with loop.session:
            for batch in STREAM[:30]:
                loop.step(batch)
                assert loop.session._governor.snapshot_bytes <= bound
            if bound > size:
                loop.step(poisoned(STREAM[30]))
                assert len(loop.session.history.rollbacks) == 1
                assert "too little for a snapshot" not in caplog.text
            else:
                with pytest.raises(TrainingFault, match="no snapshot to go back to"):
                    loop.step(poisoned(STREAM[30]))
    assert caplog.text.count("too little for a snapshot") == 1


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
