"""Real processes grow one model together, and what they grow is what one process grows."""

import dataclasses
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from tolaria import distributed_worker as worker

import esper
from esper.kasmina import MorphableModel
from esper.tolaria import Checkpoints
from esper.tolaria.checkpoint import Checkpoint
from esper.tolaria.history import LifecycleEvent
from esper.tolaria.optimizer_state import OptimizerState

pytestmark = pytest.mark.timeout(900)  # several torch processes on a machine that may be busy

WORKER = Path(worker.__file__)


def torchrun(*arguments: object, restarts: int = 0) -> None:
    """Runs a program in two processes."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["--local-addr=127.0.0.1"]  # whatever the machine is called
    agent = subprocess.Popen(
        [*command, f"--max-restarts={restarts}", *map(str, arguments)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        output, _ = agent.communicate(timeout=800)
    finally:
        agent.terminate()  # it takes its processes along
        agent.wait(60)
    assert agent.returncode == 0, output


@pytest.fixture(scope="module")
def runs(plane: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run by one process, by two under DDP, and by two over a sharded model.

    And by one until the middle, then by two ("joined"), and the other way round ("parted").
    """
    folder = tmp_path_factory.mktemp("runs")
    model = worker.wrapped()
    worker.train(model, model, plane, folder / "single")
    torchrun(WORKER, "grow", folder, plane)
    middle = Checkpoints(folder / "ddp").path(worker.MIDDLE)
    shutil.copytree(middle, folder / "parted" / middle.name)
    model = worker.wrapped()
    worker.train(model, model, plane, folder / "parted")
    return folder


def _last(folder: Path) -> Checkpoint:
    latest = Checkpoints(folder).latest()
    assert latest is not None
    return latest


def _model(checkpoint: Checkpoint) -> MorphableModel:
    model = worker.wrapped()
    checkpoint.load_model(model)
    return model


def _events(checkpoint: Checkpoint) -> list[LifecycleEvent]:
    """The events; reasons tell of scores and losses in digits that rounding may change."""
    return [dataclasses.replace(event, reason="") for event in checkpoint.record.events]


def _tensors(state: OptimizerState) -> dict[str, torch.Tensor]:
    return {
        f"{name}.{key}": value
        for name, values in state.state.items()
        for key, value in values.value.items()  # type: ignore[attr-defined]
    }


@pytest.mark.parametrize("kind", ["ddp", "fsdp", "joined", "parted"])
def test_two_processes_grow_what_one_grows(runs: Path, kind: str) -> None:
    one, two = _last(runs / "single"), _last(runs / kind)
    moves = [(event.step <= worker.MIDDLE, event.after) for event in one.record.events]
    assert {(True, "FOSSILIZED"), (False, "FOSSILIZED"), (True, "GERMINATED")} <= set(moves)
    assert _events(two) == _events(one)
    for mine, alone in zip(two.record.epochs, one.record.epochs, strict=True):
        assert mine.train_loss == pytest.approx(alone.train_loss, rel=1e-4)
        assert mine.held_out_loss == pytest.approx(alone.held_out_loss, rel=1e-4)
        assert (mine.parameters, mine.step) == (alone.parameters, alone.step)
        assert (mine.flops, mine.alphas) == (alone.flops, alone.alphas)
    for trial, other in zip(two.record.trials, one.record.trials, strict=True):
        assert (trial.gain, trial.low) == pytest.approx((other.gain, other.low), rel=1e-2)
        assert trial.accepted == other.accepted
    torch.testing.assert_close(
        _model(two).state_dict(), _model(one).state_dict(), rtol=1e-3, atol=1e-5
    )
    [shared], [single] = two.training.optimizers, one.training.optimizers
    assert shared.groups == single.groups
    torch.testing.assert_close(_tensors(shared), _tensors(single), rtol=1e-2, atol=1e-5)


def test_a_checkpoint_of_a_sharded_run_is_like_any_other(runs: Path) -> None:
    checkpoint = _last(runs / "fsdp")
    files = sorted(path.name for path in checkpoint.path.iterdir())
    assert files == [
        "checkpoint.json",
        "model",
        "rank-0001.json",
        "rank-0001.safetensors",
        "state.json",
        "state.safetensors",
    ]
    assert not [path for path in (runs / "fsdp").iterdir() if path.name.startswith(".")]
    # The processes went on with it, found the run at its end and kept the model as it was.
    model = esper.load(runs / "model", worker.TASK.host(1))
    torch.testing.assert_close(
        model.state_dict(), _model(checkpoint).state_dict(), rtol=0.0, atol=0.0
    )
    assert isinstance(esper.harden(model), torch.nn.Module)


def test_ranks_that_differ_are_told_so(runs: Path) -> None:
    told = (runs / "told-0").read_text()
    assert (runs / "told-1").read_text() == told
    batches, steps, structure, adoption = told.splitlines()
    assert "ValueError: held_out has [3, 2] batches on the ranks" in batches
    assert "RanksDisagreeError: the ranks have taken [5, 6] optimizer steps" in steps
    assert structure == (
        "RanksDisagreeError: after step 5 rank 1 has parameter slots.net.grafts.1.A [64, 8] "
        "float32, but rank 0 has not: the ranks do not hold the same model any more"
    )
    assert "ValueError: net[1] is GERMINATED, but several processes take over no seeds" in adoption


def test_a_fault_of_one_rank_is_undone_on_all(plane: str, tmp_path: Path) -> None:
    torchrun(WORKER, "govern", tmp_path, plane)


def test_a_killed_rank_restarts_and_the_run_ends_as_it_would_have(
    runs: Path, plane: str, tmp_path: Path
) -> None:
    torchrun(WORKER, "elastic", tmp_path, plane, restarts=1)
    steps = {path.name: path.read_text().split() for path in tmp_path.glob("steps-*")}
    assert steps["steps-1-0"][-1] == str(worker.MIDDLE + 4)
    assert [steps[f"steps-{rank}-1"][0] for rank in range(2)] == [str(worker.MIDDLE)] * 2
    again, whole = _last(tmp_path), _last(runs / "ddp")
    assert again.record.events == whole.record.events
    assert again.record.epochs == whole.record.epochs
    for name in ("model/weights.safetensors", "state.safetensors", "rank-0001.safetensors"):
        mine = safetensors.torch.load_file(again.path / name)
        theirs = safetensors.torch.load_file(whole.path / name)
        torch.testing.assert_close(mine, theirs, rtol=0.0, atol=0.0, equal_nan=True)
