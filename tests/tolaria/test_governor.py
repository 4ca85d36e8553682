"""A run that went back goes on as one that never had the fault, bit for bit."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tolaria.governed import CONFIG
from tolaria.governed import PLANE
from tolaria.governed import QUICK
from tolaria.governed import STREAM
from tolaria.governed import TASK
from tolaria.governed import Batch
from tolaria.governed import Host
from tolaria.governed import Loop
from tolaria.governed import assert_equal
from tolaria.governed import momentum
from tolaria.governed import poisoned
from torch import nn
from torch.optim import SGD
from torch.optim import Adam
from torch.optim import Optimizer

import esper
from esper.blueprints import get
from esper.common.v1 import blueprint_pb2
from esper.oona.v1 import event_pb2
from esper.plane import connect
from esper.tolaria import Session
from esper.tolaria import Trainer
from esper.tolaria.checkpoint import read_checkpoint
from esper.tolaria.governor import TrainingFault
from esper.urza.v1 import library_pb2

pytestmark = pytest.mark.usefixtures("governed_plane")


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
