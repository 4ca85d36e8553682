"""A run that goes on from a checkpoint is the run that was never interrupted."""

import logging
import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader
from torch.utils.data import TensorDataset

import esper
from esper.artifacts import ModelFolderError
from esper.config import Candidate
from esper.config import EsperConfig
from esper.config import GraftConfig
from esper.kasmina import MorphableModel
from esper.plane import connect
from esper.tolaria import Checkpoints
from esper.tolaria import History
from esper.tolaria import Session
from esper.tolaria import Trainer
from esper.tolaria import tasks
from esper.tolaria.checkpoint import read_checkpoint

TASK = tasks.get("digits")
CONFIG = EsperConfig(
    candidates=(Candidate(blueprint="widen", ranks=(4, 8)),),
    graft=GraftConfig(
        training_steps=5, ramp_steps=10, ramp="drift", drift_tolerance=0.5, stabilization_steps=3
    ),
    telemetry_interval=4,
)
EPOCHS = 6
STEPS_PER_EPOCH = 17


class _Noisy(nn.Module):
    """A host that draws from the random state in every training forward."""

    def __init__(self) -> None:
        super().__init__()
        self.net = TASK.host(0).net
        self.dropout = nn.Dropout(0.1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        noise = float(np.random.rand()) * 1e-3
        scores: torch.Tensor = self.net(self.dropout(images.flatten(1)) + noise)
        return scores


def _run(
    plane: str,
    folder: Path,
    make: Callable[..., Optimizer],
    *,
    resume: bool = False,
    replay: Path | None = None,
) -> tuple[MorphableModel, History, Optimizer]:
    """Trains; the batches are shuffled by the global random state, as a DataLoader does it."""
    torch.manual_seed(3)
    np.random.seed(3)
    model = esper.wrap(_Noisy(), target_layers=["net"], seeds_per_layer=2)
    optimizer = make(model.parameters(), lr=0.01)
    schedule = lr_scheduler.SequentialLR(
        optimizer,
        [
            lr_scheduler.LinearLR(optimizer, total_iters=2),
            lr_scheduler.MultiStepLR(optimizer, [2, 3]),
        ],
        [2],
    )
    data = DataLoader(
        TensorDataset(TASK.train.inputs, TASK.train.targets), TASK.batch_size, shuffle=True
    )
    trainer = Trainer(
        model,
        optimizer,
        train=data,
        held_out=TASK.held_out_batches(),
        loss=TASK.loss,
        epochs=EPOCHS,
        plane=plane,
        mode="lockstep" if replay is None else "replay",
        replay=replay,
        config=CONFIG,
        on_epoch=lambda record: schedule.step(),
        stateful={"schedule": schedule},
        checkpoints=Checkpoints(folder, keep_last=100),
        save_every_steps=7,
        resume=resume,
    )
    return model, trainer.fit(), optimizer


def _last_files(folder: Path) -> list[bytes]:
    last = Checkpoints(folder).paths()[0]
    names = ("state.safetensors", "model/weights.safetensors", "model/architecture.json")
    return [(last / name).read_bytes() for name in names]


@pytest.mark.parametrize(
    "make", [torch.optim.Adam, partial(torch.optim.SGD, momentum=0.9, weight_decay=1e-3)]
)
def test_from_any_checkpoint_the_run_ends_as_it_ended(
    plane: str, tmp_path: Path, make: Callable[..., Optimizer]
) -> None:
    model, history, optimizer = _run(plane, tmp_path / "whole", make)
    states = {event.after for event in history.events}
    assert {"FOSSILIZED", "GRAFTING", "TRAINING"} <= states
    paths = Checkpoints(tmp_path / "whole").paths()
    assert len(paths) == EPOCHS + EPOCHS * STEPS_PER_EPOCH // 7
    for path in paths[1::4]:
        torch.rand(3)  # the process that goes on has another random state
        folder = tmp_path / path.name
        shutil.copytree(path, folder / path.name)
        again, told, _ = _run(plane, folder, make, resume=True)
        assert told == history
        assert list(again.state_dict()) == list(model.state_dict())
        for (name, mine), theirs in zip(
            model.state_dict().items(), again.state_dict().values(), strict=True
        ):
            assert torch.equal(mine, theirs), (path.name, name)
        assert _last_files(folder) == _last_files(tmp_path / "whole"), path.name
    run = read_checkpoint(paths[0]).record.run
    with connect(plane) as client:
        verdict = client.urza.runs.verify_run(f"runs/{run}")
    # One history, however often parts of it were told again.
    assert verdict.intact
    assert verdict.num_events == len(history.events) + len(history.epochs)


def test_a_replayed_run_is_the_recorded_one_without_a_plane(plane: str, tmp_path: Path) -> None:
    model, history, _ = _run(plane, tmp_path / "recorded", torch.optim.Adam)
    recorded = Checkpoints(tmp_path / "recorded").paths()[0]
    nowhere = "unix:/nonexistent/plane.sock"
    again, told, _ = _run(nowhere, tmp_path / "again", torch.optim.Adam, replay=recorded)
    assert told == history and told.plane_failure is None
    assert any(event.after == "FOSSILIZED" for event in told.events)
    assert _last_files(tmp_path / "again") == _last_files(tmp_path / "recorded")
    with pytest.raises(ValueError, match="'replay' and a run to replay go together"):
        _session(plane, mode="replay")


def _session(plane: str, **arguments: object) -> tuple[MorphableModel, Session]:
    model = esper.wrap(TASK.host(0), target_layers=["net"], seeds_per_layer=2)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    given: dict[str, object] = {
        "epochs": 4,
        "held_out": TASK.held_out_batches(),
        "loss": TASK.loss,
        "plane": plane,
        "config": CONFIG,
        **arguments,
    }
    return model, Session(model, optimizer, **given)  # type: ignore[arg-type]


@pytest.fixture
def saved(plane: str, tmp_path: Path) -> Path:
    model, session = _session(plane)
    with session:
        model(TASK.train.inputs[:2])
        session.save(tmp_path / "saved")
    return tmp_path / "saved"


def _files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file() and p.name != "README.md")


def test_a_checkpoint_of_which_any_file_is_torn_or_altered_is_refused(
    plane: str, saved: Path
) -> None:
    for file in _files(saved):
        whole = file.read_bytes()
        middle = len(whole) // 2
        changed = whole[:middle] + bytes([(whole or b" ")[middle] ^ 1]) + whole[middle + 1 :]
        for broken in (whole[:middle], changed) if whole else (changed,):
            file.write_bytes(broken)
            assert Checkpoints(saved.parent).latest() is None
            with pytest.raises(ModelFolderError):
                _session(plane, resume=saved)
        file.write_bytes(whole)
        file.rename(file.with_suffix(".away"))
        with pytest.raises(ModelFolderError):
            _session(plane, resume=saved)
        file.with_suffix(".away").rename(file)
    _session(plane, resume=saved)[1].close()


def test_the_newest_sound_one_is_taken_and_the_others_are_named(
    saved: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints = Checkpoints(tmp_path / "all")
    for step in (1, 2, 3):
        shutil.copytree(saved, checkpoints.path(step))
    (checkpoints.path(3) / "model" / "weights.safetensors").write_bytes(b"torn")
    with caplog.at_level(logging.WARNING, logger="esper"):
        latest = checkpoints.latest()
    assert latest is not None and latest.path == checkpoints.path(2)
    assert "step-0000000003 is not used: size of weights.safetensors" in caplog.text


def test_the_newest_and_the_best_are_kept(plane: str, tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "all", keep_last=2)
    model, session = _session(plane)
    losses = iter([0.5, 0.1, 0.4, 0.3])
    with session:
        for step in range(4):
            record = session.epoch_end()
            session.history.epochs[-1] = replace(record, held_out_loss=next(losses))
            (checkpoints.folder / ".step-0000000009.x.new").mkdir(parents=True)
            session.save(checkpoints.path(step))
            checkpoints.prune()
    assert [path.name[-1] for path in checkpoints.paths()] == ["3", "2", "1"]
    assert not list(checkpoints.folder.glob(".*"))
    with pytest.raises(ValueError, match="keep_last is 0"):
        Checkpoints(tmp_path, keep_last=0)


def test_what_does_not_fit_the_checkpoint_is_refused_and_nothing_is_left_behind(
    plane: str, saved: Path
) -> None:
    threads = threading.active_count()
    other = esper.wrap(TASK.host(0, size=4), target_layers=["net"], seeds_per_layer=2)
    optimizer = torch.optim.Adam(other.parameters())
    given = {"epochs": 4, "held_out": TASK.held_out_batches(), "loss": TASK.loss}
    with pytest.raises(ModelFolderError, match="host.net.0.weight"):
        Session(other, optimizer, resume=saved, **given)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"stateful names \['more'\]"):
        _session(plane, resume=saved, stateful={"more": lr_scheduler.ConstantLR(optimizer)})
    assert threading.active_count() == threads
    assert other.observers == []


def test_a_state_that_is_no_data_is_named(plane: str, tmp_path: Path) -> None:
    class Odd:
        def state_dict(self) -> dict[str, object]:
            return {"when": object()}

        def load_state_dict(self, state_dict: dict[str, object]) -> None: ...

    _, session = _session(plane, stateful={"odd": Odd()})
    with session, pytest.raises(ValueError, match=r"stateful\.odd\.when is a object"):
        session.save(tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_parameters_of_the_users_own_come_along(plane: str, tmp_path: Path) -> None:
    def build(value: float) -> tuple[nn.Parameter, MorphableModel, Optimizer]:
        model = esper.wrap(TASK.host(0), target_layers=["net"])
        scale = nn.Parameter(torch.tensor(value))
        optimizer = torch.optim.AdamW(
            [{"params": model.parameters()}, {"params": [scale], "lr": 0.5}], lr=0.01
        )
        return scale, model, optimizer

    given = {
        "epochs": 2,
        "held_out": TASK.held_out_batches(),
        "loss": TASK.loss,
        "plane": plane,
    }
    scale, model, optimizer = build(1.0)
    with Session(model, optimizer, **given) as session:  # type: ignore[arg-type]
        (TASK.loss(model, TASK.train_batches(0, 0)[0]).mean() * scale).backward()
        optimizer.step()
        session.save(tmp_path / "s")
    other, fresh, anew = build(7.0)
    with Session(fresh, anew, resume=tmp_path / "s", **given) as session:  # type: ignore[arg-type]
        assert torch.equal(other, scale)
        assert torch.equal(anew.state[other]["exp_avg"], optimizer.state[scale]["exp_avg"])
        assert session.step == 1
