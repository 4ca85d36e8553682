"""`esper evaluate` rebuilds a saved model in a fresh process and gets the same number."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import esper
from esper.kasmina import MorphableModel
from esper.tolaria import tasks


def evaluate(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "esper", "evaluate", *arguments], capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def grown() -> MorphableModel:
    """A trained digits model with one graft that counts."""
    task = tasks.get("digits")
    model = esper.wrap(task.host(seed=1), target_layers=["net"])
    model.train()
    model(task.train.inputs[:2])
    model.germinate("net", 0, "bottleneck", rank=4)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for state in ("TRAINING", "GRAFTING", "STABILIZATION", "EVALUATING", "FINE_TUNING"):
        model.advance("net", 0, state)
    for epoch in range(3):
        for batch in task.train_batches(seed=0, epoch=epoch):
            optimizer.zero_grad()
            task.loss(model, batch).mean().backward()
            optimizer.step()
    return model


def test_fresh_process_prints_the_same_number(tmp_path: Path, grown: MorphableModel) -> None:
    task = tasks.get("digits")
    accuracy = task.accuracy(grown, task.test)
    with grown.muted("net", 0):
        assert task.accuracy(grown, task.test) != accuracy, "the graft must count"
    esper.save(grown, tmp_path / "model", task="digits")
    plain, as_json = evaluate(tmp_path / "model"), evaluate("--json", tmp_path / "model")
    assert plain.stdout == f"test_accuracy {accuracy!r}\n"
    assert float(plain.stdout.split()[1]) == accuracy
    assert json.loads(as_json.stdout) == {
        "task": "digits",
        "test_accuracy": accuracy,
        "num_samples": 360,
        "parameters": grown.num_parameters(),
    }


def test_model_without_a_known_task_is_refused(tmp_path: Path, grown: MorphableModel) -> None:
    esper.save(grown, tmp_path / "none")
    esper.save(grown, tmp_path / "other", task="imagenet")
    for name, words in (("none", "names no task"), ("other", "task is 'imagenet', but it must be")):
        done = evaluate(tmp_path / name)
        assert done.returncode == 1
        assert words in done.stderr
        assert done.stderr.count("\n") == 1


def test_corrupt_model_is_refused(tmp_path: Path, grown: MorphableModel) -> None:
    esper.save(grown, tmp_path / "model", task="digits")
    with (tmp_path / "model" / "weights.safetensors").open("r+b") as file:
        file.truncate(100)
    done = evaluate(tmp_path / "model")
    assert done.returncode == 1
    assert done.stderr.startswith("esper: size of weights.safetensors is 100, but ")
