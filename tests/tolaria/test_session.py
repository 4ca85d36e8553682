"""A session grows a model over a real plane, and without one leaves the run untouched."""

import logging
import os
import signal
from collections.abc import Callable

import pytest
import torch
from torch import nn

import esper
from esper.config import Candidate
from esper.config import EsperConfig
from esper.config import GraftConfig
from esper.kasmina import MorphableModel
from esper.plane import EmbeddedPlane
from esper.tolaria import History
from esper.tolaria import Session
from esper.tolaria import tasks
from esper.tolaria.trainer import train_epoch

NOWHERE = "unix:/nonexistent/plane.sock"
QUICK = EsperConfig(
    candidates=(Candidate(blueprint="widen", ranks=(4, 8)),),
    graft=GraftConfig(training_steps=5, ramp_steps=10, stabilization_steps=3),
    telemetry_interval=4,
)
TASK = tasks.get("digits")


def _grow(
    plane: str | None,
    epochs: int = 8,
    *,
    between: Callable[[int, Session], None] = lambda epoch, session: None,
    loss: Callable[[nn.Module, object], torch.Tensor] = TASK.loss,
) -> tuple[MorphableModel, torch.optim.Optimizer, Session]:
    model = esper.wrap(TASK.host(0), target_layers=["net"], seeds_per_layer=2)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    session = esper.session(
        model,
        optimizer,
        epochs=epochs,
        held_out=TASK.held_out_batches(),
        loss=loss,
        plane=plane,
        mode="lockstep",
        config=QUICK,
    )
    with session:
        for epoch in range(epochs):
            mean = train_epoch(model, optimizer, TASK.train_batches(0, epoch), loss)
            session.epoch_end(train_loss=mean)
            between(epoch, session)
    return model, optimizer, session


def _outputs(model: nn.Module) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(TASK.validation.inputs)


def _story(history: History) -> list[tuple[object, ...]]:
    return [(e.epoch, e.step, e.slot, e.seed, e.before, e.after, e.kernel) for e in history.events]


def test_a_chosen_kernel_is_trained_grafted_and_kept(plane: str) -> None:
    model, optimizer, session = _grow(plane)
    fossils = [event for event in session.history.events if event.after == "FOSSILIZED"]
    assert fossils
    slot, seed, kernel = fossils[0].slot, fossils[0].seed, fossils[0].kernel
    path = [e.after for e in session.history.events if (e.slot, e.seed) == (slot, seed)]
    assert path == [
        "GERMINATED",
        "TRAINING",
        "GRAFTING",
        "STABILIZATION",
        "EVALUATING",
        "FOSSILIZED",
    ]
    assert "held-out gain" in fossils[0].reason
    with_seed = _outputs(model)
    with model.muted(slot, seed):
        assert not torch.allclose(_outputs(model), with_seed, atol=1e-3)
    trained = {id(parameter) for parameter in optimizer.param_groups[0]["params"]}
    assert all(id(parameter) in trained for parameter in model.seed_parameters(slot, seed))
    with esper.plane.connect(plane) as client:
        reports = list(client.urza.list_field_reports(f"kernels/{kernel}"))
    assert any(report.run == session.run and report.gain > 0 for report in reports)


def test_equal_runs_in_lockstep_are_equal_to_the_bit() -> None:
    first, _, one = _grow(None, epochs=6)
    second, _, two = _grow(None, epochs=6)
    assert _story(one.history) == _story(two.history)
    assert any(event.after == "FOSSILIZED" for event in one.history.events)
    for (name, a), (_, b) in zip(
        first.state_dict().items(), second.state_dict().items(), strict=True
    ):
        assert torch.equal(a, b), name
    assert [r.flops for r in one.history.epochs] == [r.flops for r in two.history.epochs]


def test_a_dead_plane_leaves_the_run_that_plain_torch_would_make(
    caplog: pytest.LogCaptureFixture,
) -> None:
    torch.manual_seed(7)
    with caplog.at_level(logging.WARNING, logger="esper"):
        model, _, session = _grow(NOWHERE, epochs=3)
    grown_random = torch.random.get_rng_state()
    torch.manual_seed(7)
    host = TASK.host(0)
    optimizer = torch.optim.Adam(host.parameters(), lr=0.01)
    losses = [
        train_epoch(host, optimizer, TASK.train_batches(0, epoch), TASK.loss) for epoch in range(3)
    ]
    for name, value in host.state_dict().items():
        assert torch.equal(model.host.state_dict()[name], value), name
    assert [record.train_loss for record in session.history.epochs] == losses
    assert torch.equal(torch.random.get_rng_state(), grown_random)
    assert len([r for r in caplog.records if "plane is gone" in r.message]) == 1
    assert session.history.events == []


def test_killing_the_plane_changes_nothing_but_the_growth(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with EmbeddedPlane() as embedded:

        def kill(epoch: int, session: Session) -> None:
            if epoch == 1:
                os.kill(embedded.pid, signal.SIGKILL)

        with caplog.at_level(logging.WARNING, logger="esper"):
            model, _, session = _grow(embedded.address, between=kill)
    events = session.history.events
    assert [event.epoch for event in events if event.after == "GERMINATED"] == [1]
    assert events[-1].after in {"FOSSILIZED", "CULLED"}  # the live seed still had its trial
    assert "held-out gain" in events[-1].reason
    assert len(session.history.epochs) == 8
    assert session.plane_failure is not None
    assert len([r for r in caplog.records if "plane is gone" in r.message]) == 1


def test_nothing_is_kept_where_there_is_nothing_to_learn(plane: str) -> None:
    generator = torch.Generator().manual_seed(5)
    shuffled = torch.randint(0, 10, (4096,), generator=generator)

    def loss(model: nn.Module, batch: object) -> torch.Tensor:
        inputs, _ = batch  # type: ignore[misc]
        keys = (inputs.flatten(1) * 16).sum(1).long() % len(shuffled)
        return nn.functional.cross_entropy(model(inputs), shuffled[keys], reduction="none")

    _, _, session = _grow(plane, loss=loss)
    assert not [event for event in session.history.events if event.after == "FOSSILIZED"]


def test_trials_and_evaluation_are_on_the_bill(plane: str) -> None:
    _, _, session = _grow(plane)
    spent = session.cost.by_category
    assert spent["train"] > spent["evaluation"] > spent["trial"] > 0
    assert session.cost.total == sum(spent.values())
    flops = [record.flops for record in session.history.epochs]
    assert flops == sorted(flops)


def test_a_closed_session_lets_go_of_the_loop(plane: str) -> None:
    model, optimizer, session = _grow(plane, epochs=3)
    events = len(session.history.events)
    spent = session.cost.total
    train_epoch(model, optimizer, TASK.train_batches(0, 9), TASK.loss)
    assert (len(session.history.events), session.cost.total) == (events, spent)
    with pytest.raises(ValueError, match="closed"):
        session.epoch_end()


def test_bad_arguments_are_refused_by_name() -> None:
    host = TASK.host(0)
    optimizer = torch.optim.SGD(host.parameters(), lr=0.1)
    given = {"epochs": 3, "held_out": TASK.held_out_batches(), "loss": TASK.loss}
    with pytest.raises(ValueError, match="wrapped model"):
        esper.session(host, optimizer, **given)  # type: ignore[arg-type]
    model = esper.wrap(host)
    with pytest.raises(ValueError, match="epochs is 0"):
        esper.session(model, optimizer, **{**given, "epochs": 0})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="mode is 'fast'"):
        esper.session(model, optimizer, mode="fast", **given)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="LBFGS"):
        esper.session(model, torch.optim.LBFGS(host.parameters()), **given)  # type: ignore[arg-type]
