"""Seeds under way in a model that is given to a session come to their end there."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.amp import GradScaler
from torch.optim import SGD
from torch.optim import Adam
from torch.optim import Muon
from torch.optim import Optimizer

import esper
from esper.config import EsperConfig
from esper.config import GraftConfig
from esper.kasmina import MorphableModel
from esper.tolaria import Session
from esper.tolaria import tasks
from esper.tolaria.protocol import GraftProtocol
from esper.tolaria.trainer import train_epoch

NOWHERE = "unix:/nonexistent/plane.sock"
TASK = tasks.get("digits")
WAY = ("TRAINING", "GRAFTING", "STABILIZATION", "EVALUATING", "FINE_TUNING")
QUICK = EsperConfig(graft=GraftConfig(training_steps=5, ramp_steps=10, stabilization_steps=3))


def _planted(state: str) -> tuple[MorphableModel, Optimizer]:
    """A model whose seed was brought into a state by hand, in an optimizer over all of it."""
    torch.manual_seed(0)
    model = esper.wrap(TASK.host(0), target_layers=["net"], seeds_per_layer=2)
    model(TASK.train.inputs[:2])
    model.germinate("net", 1, "widen", rank=8)
    for name in WAY[: WAY.index(state) + 1]:
        model.advance("net", 1, name)
        if name == "GRAFTING":
            model.set_seed_alpha("net", 1, 0.5)
    return model, Adam(model.parameters(), lr=0.01)


def _session(model: MorphableModel, optimizer: Optimizer, resume: Path | None = None) -> Session:
    return esper.session(
        model,
        optimizer,
        epochs=3,
        held_out=TASK.held_out_batches(),
        loss=TASK.loss,
        plane=NOWHERE,
        config=QUICK,
        resume=resume,
    )


def _ids(parameters: list[nn.Parameter]) -> list[int]:
    return [id(parameter) for parameter in parameters]


def finish(folder: str) -> Mapping[str, object]:
    """Loads the model of a folder and trains it to the end of its seed; says what became of it."""
    model = esper.load(folder, TASK.host(1))
    born = [parameter.detach().clone() for parameter in model.seed_parameters("net", 1)]
    alpha = model.alpha("net", 1)
    optimizer = Adam(model.parameters(), lr=0.01)
    (group,) = optimizer.param_groups
    alphas = []
    with _session(model, optimizer) as session:
        seed = model.seed_parameters("net", 1)
        live_in_users = len(set(_ids(seed)) & set(_ids(group["params"])))
        for epoch in range(3):
            train_epoch(model, optimizer, TASK.train_batches(0, epoch), TASK.loss)
            if model.kernel_of("net", 1):
                alphas.append(model.alpha("net", 1))
                born = [
                    before if not torch.equal(before, after) else torch.full_like(before, torch.nan)
                    for before, after in zip(born, seed, strict=True)
                ]
            session.epoch_end()
    events = [event for event in session.history.events if event.after != "DORMANT"]
    return {
        "alpha": alpha,
        "alphas": alphas,
        "live_in_users": live_in_users,
        "in_users": [_ids(group["params"]).count(p) for p in _ids(seed)],
        "learnt": not any(bool(before.isnan().any()) for before in born),
        "way": [event.after for event in events],
        "reason": events[-1].reason,
    }


@pytest.mark.parametrize("state", WAY)
def test_a_seed_of_a_loaded_model_comes_to_its_end(state: str, tmp_path: Path) -> None:
    model, optimizer = _planted(state)
    train_epoch(model, optimizer, TASK.train_batches(0, 9), TASK.loss)
    esper.save(model, tmp_path / "model")
    if state == "GRAFTING":  # as most will: in another process
        code = "from tolaria.test_adoption import *; print(json.dumps(finish(sys.argv[1])))"
        done = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / "model")],
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
            capture_output=True,
            text=True,
            timeout=110,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
    else:
        found = dict(finish(str(tmp_path / "model")))
    kept = found["way"][-1] == "FOSSILIZED"
    assert found["way"][:-1] == list(WAY[WAY.index(state) + 1 : 4])
    assert kept or found["way"][-1] == "CULLED"
    assert ("held-out gain" in found["reason"]) == (state != "FINE_TUNING")
    assert found["live_in_users"] == 0
    assert found["in_users"] == [int(kept)] * len(found["in_users"])
    assert all(before <= after for before, after in pairwise([found["alpha"], *found["alphas"]]))
    assert found["learnt"] or state in ("STABILIZATION", "EVALUATING")


def test_a_run_that_took_a_seed_over_is_resumed_as_any_other(tmp_path: Path) -> None:
    ends = []
    for resume in (None, tmp_path / "saved"):
        model, optimizer = _planted("TRAINING")
        if resume is not None:  # made as for a new run: the checkpoint has the seed
            model = esper.wrap(TASK.host(0), target_layers=["net"], seeds_per_layer=2)
            optimizer = Adam(model.parameters(), lr=0.01)
        with _session(model, optimizer, resume) as session:
            for epoch in range(session.epoch, 3):
                for number, batch in enumerate(TASK.train_batches(0, epoch)):
                    if session.step != 17 * epoch + number:
                        continue  # of before the checkpoint
                    train_epoch(model, optimizer, [batch], TASK.loss)
                    if resume is None and session.step == 12:
                        assert model.seed_state("net", 1).name == "GRAFTING"
                        session.save(tmp_path / "saved")
                session.epoch_end()
        ends.append((model.state_dict(), session.history.events))
    assert ends[0][1] == ends[1][1]
    for name, value in ends[0][0].items():
        assert torch.equal(ends[1][0][name], value), name


def test_alpha_goes_on_from_where_it_is() -> None:
    model, optimizer = _planted("GRAFTING")
    config = GraftConfig(ramp="linear", ramp_steps=4, stabilization_steps=2)
    protocol = GraftProtocol(model, optimizer, config)
    assert protocol.adopt() == [("net", 1)] and protocol.adopt() == []
    seen = []
    for _ in range(4):
        protocol.on_step()
        seen.append((model.seed_state("net", 1).name, model.alpha("net", 1)))
    assert seen == [
        ("GRAFTING", 0.75),
        ("STABILIZATION", 1.0),
        ("STABILIZATION", 1.0),
        ("EVALUATING", 1.0),
    ]


def test_what_the_users_optimizer_knows_of_a_seed_moves_with_it() -> None:
    model, optimizer = _planted("GRAFTING")
    train_epoch(model, optimizer, TASK.train_batches(0, 0), TASK.loss)
    seed = model.seed_parameters("net", 1)
    host = [optimizer.state[parameter]["exp_avg"] for parameter in model.host.parameters()]
    moments = [optimizer.state[parameter]["exp_avg"].clone() for parameter in seed]
    protocol = GraftProtocol(model, optimizer, GraftConfig())
    protocol.adopt()
    assert not set(_ids(seed)) & set(_ids(list(optimizer.state)))
    assert [optimizer.state[parameter]["exp_avg"] for parameter in model.host.parameters()] == host
    names = {parameter: str(number) for number, parameter in enumerate(seed)}
    (graft,) = protocol.state(names)
    assert graft.optimizer is not None
    kept = graft.optimizer.optimizer.state
    for name, moment in zip(names.values(), moments, strict=True):
        assert torch.equal(kept[name].value["exp_avg"], moment)  # type: ignore[index]


def test_in_isolation_the_host_trains_as_if_the_seed_were_not_there() -> None:
    model, _ = _planted("TRAINING")
    plain = TASK.host(0)
    users = [SGD(host.parameters(), lr=0.1, momentum=0.9) for host in (model, plain)]
    protocol = GraftProtocol(model, users[0], GraftConfig(training_steps=100))
    protocol.adopt()
    users[0].register_step_post_hook(lambda user, *_: protocol.on_step(user))
    for host, optimizer in zip((model, plain), users, strict=True):
        for inputs, targets in TASK.train_batches(0, 0)[:8]:
            optimizer.zero_grad()
            nn.functional.cross_entropy(host(inputs), targets).backward()
            nn.utils.clip_grad_norm_(host.parameters(), 0.1)
            optimizer.step()
    for mine, theirs in zip(model.host.parameters(), plain.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_a_seed_that_no_optimizer_takes_is_refused_and_nothing_has_changed() -> None:
    model, _ = _planted("TRAINING")
    matrices = [parameter for parameter in model.parameters() if parameter.ndim == 2]
    optimizer = Muon(matrices)
    with pytest.raises(ValueError, match="Muon"):
        _session(model, optimizer)
    assert model.observers == [] and not model._forward_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    assert _ids(optimizer.param_groups[0]["params"]) == _ids(matrices)
    assert model.seed_state("net", 1).name == "TRAINING"


def test_a_scaler_s_optimizer_over_seeds_alone_is_refused() -> None:
    model, _ = _planted("TRAINING")
    seed = model.seed_parameters("net", 1)
    optimizer = SGD(seed, lr=0.1)
    with pytest.raises(ValueError, match="SGD over seeds under way alone"):
        GraftProtocol(model, optimizer, GraftConfig(), GradScaler("cpu")).adopt()
    assert _ids(optimizer.param_groups[0]["params"]) == _ids(seed)
    GraftProtocol(model, optimizer, GraftConfig()).adopt()
    assert optimizer.param_groups[0]["params"] == []
    optimizer.step()  # there is nothing to do, and nothing wrong


def test_an_embargo_runs_on_in_the_next_session(tmp_path: Path) -> None:
    model, _ = _planted("GRAFTING")
    model.cull("net", 1)
    model.set_embargo("net", 1, 20)
    esper.save(model, tmp_path / "model")
    loaded = esper.load(tmp_path / "model", TASK.host(1))
    optimizer = Adam(loaded.parameters(), lr=0.01)
    with _session(loaded, optimizer) as session:
        train_epoch(loaded, optimizer, TASK.train_batches(0, 0), TASK.loss)
        assert loaded.seed_state("net", 1).name == "CULLED" and session.step == 17
        train_epoch(loaded, optimizer, TASK.train_batches(0, 1), TASK.loss)
        assert loaded.seed_state("net", 1).name == "DORMANT"
