"""`esper demo` in real processes: what it writes, that it repeats, that no plane can stop it."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import esper
from esper.artifacts import read_architecture
from esper.tolaria import tasks

EPOCHS = 12
ARMS = [
    "static small",
    "static small, equal compute",
    "static final size, equal compute",
    "grown",
]


def start(out: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "esper", "demo", "--out", out, "--epochs", str(EPOCHS), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def children(process: subprocess.Popen[str]) -> list[int]:
    """Children of all threads of a process."""
    tasks = Path(f"/proc/{process.pid}/task").iterdir()
    found = []
    for task in tasks:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # a thread may just end
            found += [int(child) for child in (task / "children").read_text().split()]
    return found


def report(out: Path) -> dict[str, list[dict[str, str | int | float]]]:
    document: dict[str, list[dict[str, str | int | float]]]
    document = json.loads((out / "report.json").read_text())
    return document


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Folder and output of one demo."""
    out = tmp_path_factory.mktemp("demo") / "deep" / "run"
    process = start(out)
    output, errors = process.communicate(timeout=110)
    assert process.returncode == 0, errors
    return out, output


def test_everything_promised_is_written(finished: tuple[Path, str]) -> None:
    out, output = finished
    assert sorted(path.name for path in out.iterdir()) == ["growth.png", "model", "report.json"]
    assert sorted(path.name for path in (out / "model").iterdir()) == [
        "README.md",
        "architecture.json",
        "growth_history.jsonl",
        "weights.safetensors",
    ]
    document = report(out)
    assert list(document) == ["task", "seed", "arms", "events", "versions"]
    assert [arm["name"] for arm in document["arms"]] == ARMS
    for arm in document["arms"]:
        assert set(arm) == {"name", "test_accuracy", "parameters", "flops", "wall_s"}
        assert 0.5 < float(arm["test_accuracy"]) <= 1
    for event in document["events"]:
        assert set(event) == {"epoch", "step", "slot", "seed", "from", "to", "kernel", "reason"}
    history = (out / "model" / "growth_history.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in history] == document["events"]
    for name in ARMS:
        assert name in output
    assert output.count(" -> ") == len(document["events"])
    assert re.search(r"^grown: 100 %", output, re.MULTILINE), "progress in plain lines"
    assert "\x1b" not in output, "no escape codes where there is no terminal"


def test_controls_cost_what_growth_cost(finished: tuple[Path, str]) -> None:
    arms = {arm["name"]: arm for arm in report(finished[0])["arms"]}
    grown = arms["grown"]
    for name in ARMS[1:3]:
        assert float(arms[name]["flops"]) == pytest.approx(float(grown["flops"]), rel=0.02)
    assert float(arms["static small"]["flops"]) < float(grown["flops"])
    assert arms["static small"]["parameters"] == arms[ARMS[1]]["parameters"] == 610
    final = float(arms[ARMS[2]]["parameters"])
    assert final == pytest.approx(float(grown["parameters"]), rel=0.03)


def test_a_fossilized_seed_changes_the_test_outputs(finished: tuple[Path, str]) -> None:
    out, _ = finished
    task = tasks.get("digits")
    model = esper.load(out / "model", task.host()).eval()
    fossils = [at for at in model.occupied_seeds() if model.seed_state(*at).name == "FOSSILIZED"]
    assert fossils, "a demo without growth demonstrates nothing"
    with torch.no_grad():
        whole = model(task.test.inputs)
        for at in fossils:
            with model.muted(*at):
                assert not torch.equal(model(task.test.inputs), whole)


def test_saved_model_is_the_reported_one(finished: tuple[Path, str]) -> None:
    out, _ = finished
    grown = report(out)["arms"][-1]
    assert read_architecture(out / "model").task == "digits"
    done = subprocess.run(
        [sys.executable, "-m", "esper", "evaluate", out / "model"], capture_output=True, text=True
    )
    assert done.stdout == f"test_accuracy {grown['test_accuracy']!r}\n"
    task = tasks.get("digits")
    model = esper.load(out / "model", task.host())
    assert model.num_parameters() == grown["parameters"]
    plain = esper.harden(model)
    inputs = task.test.inputs
    torch.testing.assert_close(plain(inputs), model(inputs), atol=1e-5, rtol=1e-5)


def test_equal_seeds_give_equal_reports_in_lockstep(
    finished: tuple[Path, str], tmp_path: Path
) -> None:
    process = start(tmp_path, "--mode", "lockstep")
    _, errors = process.communicate(timeout=110)
    assert process.returncode == 0, errors
    first, second = report(finished[0]), report(tmp_path)
    for document in (first, second):
        for arm in document["arms"]:
            del arm["wall_s"]
    assert first == second
    weights = [out / "model" / "weights.safetensors" for out in (finished[0], tmp_path)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


@pytest.mark.parametrize("mode", ["lockstep", "async"])
def test_plane_killed_in_the_middle_stops_nothing(tmp_path: Path, mode: str) -> None:
    process = start(tmp_path, "--mode", mode)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("grown: 20 %"):
            break
    plane = children(process)
    assert len(plane) == 1, "the demo starts a plane of its own"
    os.kill(plane[0], signal.SIGKILL)
    output, errors = process.communicate(timeout=110)
    assert process.returncode == 0, errors
    assert "Traceback" not in errors
    assert (output + errors).count("plane") >= 1
    warnings = [line for line in errors.splitlines() if "plane" in line.lower()]
    assert len(warnings) == 1, errors
    arms = report(tmp_path)["arms"]
    assert [arm["name"] for arm in arms] == ARMS


def test_no_process_is_left_behind(tmp_path: Path) -> None:
    process = start(tmp_path)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("grown: 10 %"):
            break
    plane = children(process)
    assert len(plane) == 1
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 20
    while Path(f"/proc/{plane[0]}").exists():
        assert time.monotonic() < deadline, "the plane outlives its parent"
        time.sleep(0.1)


def blocked_by_a_file(out: Path) -> None:
    out.write_text("mine")


def blocked_by_a_parent(out: Path) -> None:
    out.parent.joinpath("out").symlink_to("/proc/nowhere")


def report_is_a_folder(out: Path) -> None:
    (out / "report.json").mkdir(parents=True)


def model_is_something_else(out: Path) -> None:
    (out / "model").mkdir(parents=True)
    (out / "model" / "notes.txt").write_text("mine")


@pytest.mark.parametrize(
    ("block", "complaint"),
    [
        (blocked_by_a_file, "is a file"),
        (blocked_by_a_parent, "must be a folder that can be written"),
        (report_is_a_folder, "its report.json is not a file that can be replaced"),
        (model_is_something_else, "is there already and is no model folder"),
    ],
)
def test_a_folder_in_the_way_is_told_before_training(
    tmp_path: Path, block: Callable[[Path], None], complaint: str
) -> None:
    out = tmp_path / "out"
    block(out)
    before = sorted(tmp_path.rglob("*"))
    process = start(out)
    output, errors = process.communicate(timeout=60)
    assert process.returncode != 0
    assert complaint in errors
    assert str(out) in errors
    assert output == "", "nothing has been trained"
    assert sorted(tmp_path.rglob("*")) == before
