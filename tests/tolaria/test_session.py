"""A session grows a model over a real plane, and without one leaves the run untouched."""

import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn

import esper
from esper import blueprints
from esper.common.v1 import lifecycle_pb2
from esper.config import BudgetConfig
from esper.config import Candidate
from esper.config import EsperConfig
from esper.config import GraftConfig
from esper.kasmina import MorphableModel
from esper.kasmina import Transition
from esper.oona.v1 import event_pb2
from esper.plane import EmbeddedPlane
from esper.plane import connect
from esper.tamiyo.v1 import controller_pb2
from esper.tolaria import History
from esper.tolaria import Session
from esper.tolaria import tasks
from esper.tolaria.evaluation import trial_level
from esper.tolaria.link import Advice
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
    config: EsperConfig = QUICK,
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
        config=config,
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
    steps = [e.step for e in session.history.events if (e.slot, e.seed) == (slot, seed)]
    assert [after - before for before, after in pairwise(steps[:5])] == [1, 5, 10, 3]
    with_seed = _outputs(model)
    with model.muted(slot, seed):
        assert not torch.allclose(_outputs(model), with_seed, atol=1e-3)
    trained = {id(parameter) for parameter in optimizer.param_groups[0]["params"]}
    assert all(id(parameter) in trained for parameter in model.seed_parameters(slot, seed))
    with esper.plane.connect(plane) as client:
        reports = list(client.urza.list_field_reports(f"kernels/{kernel}"))
    assert any(report.run == session.run and report.gain > 0 for report in reports)


def test_urza_keeps_the_history_and_proves_it(plane: str) -> None:
    _, _, session = _grow(plane)
    name = f"runs/{session.run}"
    expected = len(session.history.events) + len(session.history.epochs)
    with connect(plane) as client:
        verdict = client.urza.runs.verify_run(name)
        assert (verdict.intact, verdict.num_events) == (True, expected)
        moves = []
        with client.urza.runs.watch_run(name) as events:
            for _ in range(expected):
                move = event_pb2.LifecycleEvent()
                if next(events).body.Unpack(move):
                    moves.append((move.step, move.slot, move.seed, move.to))
    assert moves == [(e.step, e.slot, e.seed, e.after) for e in session.history.events]


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
        impatient = replace(QUICK, lockstep_timeout_s=1.0)
        model, _, session = _grow(NOWHERE, epochs=3, config=impatient)
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
            model, _, session = _grow(
                embedded.address, between=kill, config=replace(QUICK, lockstep_timeout_s=10.0)
            )
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


FORGETFUL = """
import sys
import torch
import esper
from esper.tolaria import tasks
from esper.tolaria.trainer import train_epoch

task = tasks.get("digits")
model = esper.wrap(task.host(0), target_layers=["net"], seeds_per_layer=2)
model(task.train.inputs[:2])
model.germinate("net", 0, "widen", rank=4)
optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
session = esper.session(
    model, optimizer, epochs=9, held_out=task.held_out_batches(), loss=task.loss, plane=sys.argv[1]
)
train_epoch(model, optimizer, task.train_batches(0, 0), task.loss)
print(session.run)
"""


def test_a_session_that_was_forgotten_ends_with_the_interpreter(plane: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FORGETFUL, plane], capture_output=True, text=True, timeout=300
    )
    assert (done.returncode, done.stderr) == (0, "")
    name = f"runs/{done.stdout.strip()}"
    with connect(plane) as client:
        last = client.urza.runs.verify_run(name).num_events - 1
        with client.urza.runs.watch_run(name, last) as events:
            move = event_pb2.LifecycleEvent()
            assert next(events).body.Unpack(move)
    assert (move.slot, move.seed, move.to) == (
        "net",
        0,
        "CANCELLED",
    ), "as the close of a session does"


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


def _open(**changes: object) -> tuple[MorphableModel, torch.optim.Optimizer, Session]:
    """A session whose plane is nowhere, unless the changes say otherwise."""
    model = esper.wrap(TASK.host(0), target_layers=["net"], seeds_per_layer=2)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    arguments: dict[str, object] = {
        "epochs": 8,
        "held_out": TASK.held_out_batches(),
        "loss": TASK.loss,
        "plane": NOWHERE,
        "config": QUICK,
        **changes,
    }
    return model, optimizer, Session(model, optimizer, **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"plane": "foo"}, "'foo' must be unix:PATH or HOST:PORT"),
        ({"plane": {"urza": NOWHERE}}, r"plane names \['urza'\]"),
        ({"config": EsperConfig(candidates=(Candidate(blueprint="widne"),))}, "widne"),
        ({"config": EsperConfig(candidates=(Candidate(blueprint="affine"),))}, "rank"),
        ({"held_out": []}, "0 batches"),
    ],
)
def test_what_would_only_fail_later_is_refused_at_the_start(
    changes: dict[str, object], message: str
) -> None:
    threads = threading.active_count()
    with pytest.raises(ValueError, match=message):
        _open(**changes)
    assert threading.active_count() == threads


def test_a_model_is_in_one_session_at_a_time_and_in_many_in_turn() -> None:
    model, optimizer, session = _open()
    given = {"epochs": 3, "held_out": TASK.held_out_batches(), "loss": TASK.loss, "plane": NOWHERE}
    with pytest.raises(ValueError, match="in an open session already"):
        Session(model, optimizer, **given)  # type: ignore[arg-type]
    session.close()
    session.close()
    with Session(model, optimizer, **given) as second:  # type: ignore[arg-type]
        train_epoch(model, optimizer, TASK.train_batches(0, 0), TASK.loss)
        assert second.epoch_end().step == len(TASK.train_batches(0, 0))
    with pytest.raises(ValueError, match="cannot be opened again"):
        second.__enter__()


def _children() -> set[int]:
    """Process ids of this process's children, whichever thread started them."""
    lists = Path("/proc/self/task").glob("*/children")
    return {int(pid) for children in lists for pid in children.read_text().split()}


def test_an_error_in_the_loop_or_at_the_end_leaves_no_plane_and_no_hook(
    wait_gone: Callable[[int], bool],
) -> None:
    before, started = _children(), set[int]()
    model, optimizer, session = _open(plane=None, mode="lockstep")

    def refuse(transition: Transition) -> None:
        if transition.after.name == "CANCELLED":
            raise RuntimeError("an observer of the user's")

    model.observers.append(refuse)
    with pytest.raises(RuntimeError, match="an observer"), session:
        for epoch in range(2):
            train_epoch(model, optimizer, TASK.train_batches(0, epoch), TASK.loss)
            session.epoch_end()
        started = _children() - before
        assert model.occupied_seeds(), "a graft is under way"
        raise KeyError("an error in the loop")
    assert len(started) == 1 and all(wait_gone(pid) for pid in started)
    assert model.observers == [refuse] and not optimizer._optimizer_step_post_hooks


def test_a_seed_of_the_users_own_does_not_end_the_growth(plane: str) -> None:
    model, optimizer, session = _open(plane=plane, mode="lockstep")
    with session:
        for epoch in range(2):
            train_epoch(model, optimizer, TASK.train_batches(0, epoch), TASK.loss)
            if epoch == 0:
                model.germinate("net", 1, "bottleneck", rank=2)
                for state in ("TRAINING", "GRAFTING", "STABILIZATION", "EVALUATING", "FOSSILIZED"):
                    model.advance("net", 1, state)
            session.epoch_end()
    assert session.plane_failure is None


def test_a_run_that_has_diverged_does_not_end_the_plane(plane: str) -> None:
    model, optimizer, session = _open(plane=plane, mode="lockstep")
    with session:
        for epoch in range(3):
            train_epoch(model, optimizer, TASK.train_batches(0, epoch), TASK.loss)
            session.epoch_end(train_loss=float("nan"))
    assert session.plane_failure is None


def test_a_plane_that_hangs_is_given_up(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with EmbeddedPlane() as embedded:
        model, optimizer, session = _open(plane=embedded.address, mode="lockstep")
        train_epoch(model, optimizer, TASK.train_batches(0, 0), TASK.loss)
        session.epoch_end()
        session._link.publish("system.events.epoch", event_pb2.EpochEvent(run="r"))
        os.kill(embedded.pid, signal.SIGSTOP)
        session._link.publish("system.events.epoch", event_pb2.EpochEvent(run="r"))
        with caplog.at_level(logging.WARNING, logger="esper"):
            session._link.close(timeout_s=0.5)
        os.kill(embedded.pid, signal.SIGCONT)
        session.close()
    assert not session._link._thread.is_alive()
    assert [r.message for r in caplog.records if "did not take the last reports" in r.message]


def _decide(action: "controller_pb2.Action", **fields: object) -> Advice:
    decision = controller_pb2.Decision(action=action, slot="net", **fields)  # type: ignore[arg-type]
    return Advice(decision)


def test_no_decision_leads_around_the_trial() -> None:
    model, _, session = _open()
    with session:
        model(TASK.train.inputs[:2])
        model.germinate("net", 0, "bottleneck", rank=2)
        for state in ("TRAINING", "GRAFTING", "STABILIZATION", "EVALUATING"):
            model.advance("net", 0, state)
        for target in (lifecycle_pb2.SEED_STATE_FINE_TUNING, lifecycle_pb2.SEED_STATE_FOSSILIZED):
            session._apply(_decide(controller_pb2.ACTION_ADVANCE, target_state=target))
        session._apply(_decide(controller_pb2.ACTION_FOSSILIZE))
        session._apply(_decide(99))  # type: ignore[arg-type]
        assert model.seed_state("net", 0).name == "EVALUATING"
        assert len(session.history.refusals) == 4


def test_a_kernel_beyond_the_budget_is_refused_whatever_the_controller_says() -> None:
    model = esper.wrap(TASK.host(0), target_layers=["net"], seeds_per_layer=2)
    model(TASK.train.inputs[:2])
    blueprint = blueprints.get("widen", rank=8)
    kernel = blueprints.lower(
        blueprint, model.signature("net", 0, blueprint.graph.inputs[0].source)
    )
    forward = 2 * (64 * 8 + 8 * 10)
    for spare, planted in ((kernel.flops_per_token, 1), (kernel.flops_per_token - 1, 0)):
        config = EsperConfig(budget=BudgetConfig(max_flops_per_sample=forward + spare))
        model, optimizer, session = _open(epochs=30, config=config)
        with session:
            train_epoch(model, optimizer, TASK.train_batches(0, 0), TASK.loss)
            decision = controller_pb2.Decision(
                action=controller_pb2.ACTION_GERMINATE, slot="net", kernel="kernels/0"
            )
            session._apply(Advice(decision, kernel))
            assert len(model.occupied_seeds()) == planted, session.history.refusals


def test_direct_insertion_trains_at_full_strength_from_birth(plane: str) -> None:
    direct = GraftConfig(training_steps=0, ramp="none", ramp_steps=9, stabilization_steps=0)
    _, _, session = _grow(plane, config=replace(QUICK, graft=direct))
    first = next(e for e in session.history.events if e.after == "GERMINATED")
    path = [
        (e.after, e.step - first.step)
        for e in session.history.events
        if e.slot == first.slot and e.seed == first.seed
    ]
    assert path[:4] == [("GERMINATED", 0), ("TRAINING", 1), ("GRAFTING", 1), ("STABILIZATION", 10)]
    assert "FOSSILIZED" in [state for state, _ in path]


def test_without_an_accept_test_every_seed_stays_and_no_trial_is_paid(plane: str) -> None:
    _, _, session = _grow(plane, config=replace(QUICK, accept="always"))
    verdicts = [e for e in session.history.events if e.after in ("FOSSILIZED", "CULLED")]
    assert verdicts
    assert {(e.after, e.reason) for e in verdicts} == {("FOSSILIZED", "kept without a trial")}
    assert session.cost.by_category["trial"] == 0


def test_only_trials_that_are_not_passed_spend_significance(plane: str) -> None:
    _, _, session = _grow(plane)
    failed = 0
    for trial in session.history.trials:
        assert trial.level == trial_level(QUICK.significance, 1 + failed)
        failed += not trial.accepted
    assert len(session.history.trials) > 1 and session.history.trials[0].accepted


def test_held_out_loss_is_measured_as_often_as_configured(plane: str) -> None:
    _, _, often = _grow(plane)
    _, _, seldom = _grow(plane, config=replace(QUICK, evaluation_interval=4))
    measured = [record.held_out_loss is not None for record in seldom.history.epochs]
    assert not all(measured) and measured[0] and measured[4] and measured[-1]
    assert all(record.held_out_loss is not None for record in often.history.epochs)
    trials = {e.epoch for e in seldom.history.events if "held-out gain" in e.reason}
    assert trials and all(measured[epoch] for epoch in trials)
    assert seldom.cost.by_category["evaluation"] < often.cost.by_category["evaluation"]


def test_a_run_does_not_see_the_kernels_of_others(plane: str) -> None:
    _grow(plane)  # leaves kernels of rank 4 and 8 in the library
    small = replace(QUICK, candidates=(Candidate(blueprint="widen", ranks=(2,)),))
    model, _, _ = _grow(plane, config=small)
    assert {model.kernel_of(*at).bottleneck.rank for at in model.occupied_seeds()} == {2}
