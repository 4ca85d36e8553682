"""`esper train` and what can be done with its runs, as a user would."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import lmdb
import onnxruntime
import pytest
import safetensors.torch
import torch
from click.testing import CliRunner

from esper import artifacts
from esper.cli.main import cli
from esper.tolaria import tasks

ESPER = Path(sys.executable).with_name("esper")
CONFIG = Path(__file__).parents[2] / "configs" / "digits.yaml"
EPOCHS = 6


def esper(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [ESPER, *map(str, arguments)], capture_output=True, text=True, timeout=110
    )


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "digits"
    done = esper("train", CONFIG, "--out", folder, "--epochs", EPOCHS, "--tensorboard")
    assert done.returncode == 0, done.stderr
    assert len(re.findall(r"^epoch \d+/6 .* samples/s", done.stdout, re.M)) == EPOCHS
    return folder


def test_a_run_leaves_metrics_events_and_a_model_that_grew(run: Path) -> None:
    metrics = lines(run / "metrics.jsonl")
    assert [row["epoch"] for row in metrics] == list(range(EPOCHS))
    assert len((run / "metrics.csv").read_text().splitlines()) == EPOCHS + 1
    assert metrics[-1]["parameters"] > metrics[0]["parameters"]
    assert any(row["to"] == "FOSSILIZED" for row in lines(run / "events.jsonl"))
    assert any(row["accepted"] for row in lines(run / "trials.jsonl"))
    assert list((run / "tensorboard").glob("events.out.tfevents.*"))
    info = json.loads((run / "run.json").read_text())
    assert info["status"] == "finished"
    task = tasks.get("digits")
    model = artifacts.load(run / "model", task.host())
    assert task.accuracy(model, task.test) == info["results"]["test_accuracy"]


def test_tensorboard_reads_the_figures(run: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard")).Reload()
    assert all(event.value == 0 for event in events.Scalars("growth/rollbacks"))
    logged = [event.value for event in events.Scalars("growth/parameters")]
    assert logged == [row["parameters"] for row in lines(run / "metrics.jsonl")]
    assert any(tag.startswith("growth/net") for tag in events.Tags()["tensors"])


def test_the_report_stands_by_itself_and_draws_every_seed(run: Path) -> None:
    done = esper("report", run)
    assert done.returncode == 0, done.stderr
    page = (run / "report.html").read_text()
    drawings = re.findall(r"<svg.*?</svg>", page, re.S)
    assert len(drawings) == 6
    for drawing in drawings:
        ElementTree.fromstring(drawing)
    assert not re.search(r"(src|href)=\"http", page)
    kept = {f"{row['slot']}[{row['seed']}]" for row in lines(run / "trials.jsonl")}
    assert kept and all(name in page for name in kept)
    live = {
        (event["slot"], event["seed"])
        for event in lines(run / "events.jsonl")
        if event["to"] == "FOSSILIZED"
    }
    worth = lines(run / "attribution.jsonl")
    assert {(row["slot"], row["seed"]) for row in worth} == live != set()
    assert all(f"{row['gain']:.4g}" in page for row in worth)


def test_what_a_run_says_is_escaped(run: Path, tmp_path: Path) -> None:
    for name in ("run.json", "config.yaml", "metrics.jsonl", "trials.jsonl"):
        (tmp_path / name).write_text((run / name).read_text())
    event = lines(run / "events.jsonl")[0] | {"reason": "<script>alert(1)</script>"}
    (tmp_path / "events.jsonl").write_text(json.dumps(event) + "\n")
    rollback = {"epoch": 1, "step": 30, "to_step": 17, "reason": "loss <b>", "seeds": [["net", 2]]}
    (tmp_path / "rollbacks.jsonl").write_text(json.dumps(rollback) + "\n")
    assert esper("report", tmp_path).returncode == 0
    page = (tmp_path / "report.html").read_text()
    assert "<script>" not in page and "&lt;script&gt;" in page
    assert "Rollbacks" in page and "loss &lt;b&gt;" in page and "net[2]" in page
    assert "undone" in page  # marked in the drawings too


def test_runs_are_listed_shown_and_compared(run: Path) -> None:
    for command in (["list", run.parent], ["show", run], ["compare", run, run]):
        done = esper("runs", *command)
        assert done.returncode == 0, done.stderr
        assert "finished" in done.stdout and f"{EPOCHS}/{EPOCHS}" in done.stdout
    assert "FOSSILIZED" in esper("runs", "show", run).stdout
    done = esper("runs", "show", run.parent)
    assert done.returncode == 1
    assert "is no run" in done.stderr


def test_a_changed_history_is_found(run: Path) -> None:
    done = esper("runs", "verify", run)
    assert done.returncode == 0, done.stderr
    assert "are those that were recorded" in done.stdout
    with lmdb.open(str(run / "plane" / "urza" / "rows"), max_dbs=64) as rows:
        table = rows.open_db(b"run_events", create=False)
        with rows.begin(write=True) as change:
            rows_of_run = change.cursor(db=table).iternext()
            key, value = next(row for row in rows_of_run if b"FOSSILIZED" in row[1])
            change.put(key, value.replace(b"FOSSILIZED", b"FOSSILISED"), db=table)
    done = esper("runs", "verify", run)
    assert done.returncode == 1
    assert "was changed" in done.stderr


@pytest.mark.parametrize("form", ["safetensors", "pt2", "onnx"])
def test_an_export_computes_what_the_model_does(run: Path, tmp_path: Path, form: str) -> None:
    out = tmp_path / f"model.{form}"
    done = esper("export", run, "--format", form, "--out", out)
    assert done.returncode == 0, done.stderr
    task = tasks.get("digits")
    model = artifacts.load(run / "model", task.host()).eval()
    images = task.validation.inputs[:7]
    if form == "onnx":
        program = onnxruntime.InferenceSession(out)
        name = program.get_inputs()[0].name

        def exported(images: torch.Tensor) -> torch.Tensor:
            return torch.from_numpy(program.run(None, {name: images.numpy()})[0])

    elif form == "pt2":
        exported = torch.export.load(out).module()
    else:
        exported = artifacts.harden(model)
        for parameter in exported.parameters():
            parameter.data.zero_()
        safetensors.torch.load_model(exported, out)
    with torch.no_grad():
        torch.testing.assert_close(exported(images), model(images))


def test_a_killed_run_goes_on_to_the_same_end(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "killed"
    command = [ESPER, "train", CONFIG, "--out", folder, "--epochs", str(EPOCHS)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("epoch 3/"):
                process.send_signal(signal.SIGKILL)
    refused = esper("train", CONFIG, "--out", folder)
    assert refused.returncode == 1
    assert "holds a run already" in refused.stderr
    done = esper("train", CONFIG, "--out", folder, "--epochs", EPOCHS, "--resume")
    assert done.returncode == 0, done.stderr
    weights = "model/weights.safetensors"
    assert (folder / weights).read_bytes() == (run / weights).read_bytes()
    times = ("samples_per_s", "wall_s")
    for ours, theirs in zip(
        lines(folder / "metrics.jsonl"), lines(run / "metrics.jsonl"), strict=True
    ):
        assert {key: ours[key] for key in ours if key not in times} == {
            key: theirs[key] for key in theirs if key not in times
        }
    assert (folder / "events.jsonl").read_text() == (run / "events.jsonl").read_text()


@pytest.mark.timeout(900)  # four torch processes on a machine that may be busy
def test_two_processes_make_one_run(tmp_path: Path) -> None:
    folder = tmp_path / "shared"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    launcher += ["--local-addr=127.0.0.1"]  # whatever the machine is called
    train = ["--no-python", ESPER, "train", CONFIG, "--out", folder, "--epochs", 4]
    done = subprocess.run(
        [*launcher, *map(str, train)],
        env={**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=840,
    )
    assert done.returncode == 0, done.stderr
    assert len(re.findall(r"^epoch \d+/4 .* samples/s", done.stdout, re.M)) == 4  # told once
    metrics = lines(folder / "metrics.jsonl")
    steps_per_epoch = len(tasks.get("digits").train_batches(0, 0))
    assert [row["step"] for row in metrics] == [steps_per_epoch * n for n in range(1, 5)]
    assert any(row["to"] == "FOSSILIZED" for row in lines(folder / "events.jsonl"))
    manifests = [json.loads(p.read_text()) for p in folder.glob("checkpoints/*/checkpoint.json")]
    assert manifests and all(manifest["num_ranks"] == 2 for manifest in manifests)
    info = json.loads((folder / "run.json").read_text())
    assert info["status"] == "finished"
    task = tasks.get("digits")
    model = artifacts.load(folder / "model", task.host())
    assert task.accuracy(model, task.test) == info["results"]["test_accuracy"] > 0.5
    assert esper("runs", "verify", folder).returncode == 0


@pytest.mark.parametrize("extra", ["mlflow", "wandb", "tensorboard"])
def test_a_logger_that_is_not_installed_is_named_before_anything_is_written(
    extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (f"esper.adapters.{extra}", "torch.utils.tensorboard"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setitem(sys.modules, extra, None)  # as where it is not installed
    option = ["--tensorboard"] if extra == "tensorboard" else [f"--{extra}", "mine"]
    arguments = ["train", str(CONFIG), "--out", str(tmp_path / "run"), *option]
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 1
    assert re.search(
        rf"--{extra} needs .* not installed .*: pip install 'esper-morphogen\[{extra}\]'\n",
        result.output,
    )
    assert not (tmp_path / "run").exists()


def test_without_growth_the_host_stays_as_it_is(tmp_path: Path) -> None:
    done = esper("train", CONFIG, "--out", tmp_path / "off", "--epochs", 2, "--no-growth")
    assert done.returncode == 0, done.stderr
    rows = lines(tmp_path / "off" / "metrics.jsonl")
    assert len({row["parameters"] for row in rows}) == 1
    assert lines(tmp_path / "off" / "events.jsonl") == []


def test_a_mistake_has_its_line_and_nothing_is_written(tmp_path: Path) -> None:
    bad = tmp_path / "bad.yaml"
    bad.write_text(CONFIG.read_text().replace("ramp_steps", "ramp_stps"))
    done = esper("train", bad, "--out", tmp_path / "run")
    assert done.returncode == 1
    assert re.search(
        r"bad.yaml:\d+: growth.graft.ramp_stps is unknown: did you mean ramp", done.stderr
    )
    assert not (tmp_path / "run").exists()
    assert esper("train", tmp_path / "none.yaml").returncode == 1
