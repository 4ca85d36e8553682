"""What a run tells MLflow and Weights & Biases, read back from the files that they leave."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from esper.cli.main import cli
from esper.tolaria.history import LifecycleEvent
from esper.tolaria.runs.config import read_config
from esper.tolaria.runs.folder import RunFolder
from esper.tolaria.runs.loggers import RunLogger
from esper.tolaria.runs.training import train

CONFIG = Path(__file__).parents[2] / "configs" / "digits.yaml"
MOVE = LifecycleEvent(
    epoch=1,
    step=30,
    slot="net.0",
    seed=2,
    before="EVALUATING",
    after="CULLED",
    kernel="abc",
    reason="refused: a test",
)


def _train(logger: RunLogger, folder: Path) -> list[float]:
    """Trains for two epochs; returns the losses that the run's own folder tells."""
    logger.log_event(MOVE)
    config = replace(read_config(CONFIG), epochs=2, grow=False)
    train(config, RunFolder(folder / "run"), loggers=[logger])
    rows = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(row)["held_out_loss"] for row in rows]


def test_mlflow_has_the_figures_and_the_moves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = pytest.importorskip("mlflow", reason="the extra mlflow is not installed")
    from esper.adapters.mlflow import MlflowLogger

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # the only store without a database
    store = f"file:{tmp_path / 'store'}"
    logger = MlflowLogger(run_name="mine", tracking_uri=store, parameters={"epochs": 2})
    losses = _train(logger, tmp_path)
    client = mlflow.tracking.MlflowClient(store)
    told = client.get_run(logger.run_id)
    assert (told.info.run_name, told.info.status) == ("mine", "FINISHED")
    assert told.data.params == {"epochs": "2"}
    history = client.get_metric_history(logger.run_id, "loss/held_out")
    assert [metric.value for metric in history] == losses
    assert [metric.step for metric in history] == [17, 34]
    (state,) = client.get_metric_history(logger.run_id, "seeds/net.0/2")
    assert (state.step, state.value) == (30, 8.0)
    (events,) = (tmp_path / "store").rglob("growth_events.jsonl")
    assert json.loads(events.read_text())["reason"] == MOVE.reason
    MlflowLogger(tracking_uri=store).close()  # the experiment is there already


def test_wandb_has_the_figures_and_the_moves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb", reason="the extra wandb is not installed")
    from esper.adapters.wandb import WandbLogger

    monkeypatch.setenv("WANDB_SILENT", "true")
    losses = _train(WandbLogger(folder=tmp_path, mode="offline"), tmp_path)
    (record,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    told = record.read_bytes()
    for text in ["loss/held_out", "seeds/net.0/2", *map(repr, losses)]:
        assert text.encode() in told, text
    (table,) = tmp_path.glob("wandb/offline-run-*/files/media/table/growth_events*.json")
    assert json.loads(table.read_text())["data"] == [
        [30, "net.0", 2, "EVALUATING", "CULLED", "refused: a test"]
    ]


@pytest.mark.parametrize("extra", ["mlflow", "wandb"])
def test_esper_train_logs_there(
    extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip(extra, reason=f"the extra {extra} is not installed")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file:{tmp_path / 'store'}")
    monkeypatch.setenv("WANDB_MODE", "offline")
    arguments = ["train", str(CONFIG), "--out", str(tmp_path / "run"), "--epochs", "2"]
    result = CliRunner().invoke(cli, [*arguments, f"--{extra}", "mine"])
    assert result.exit_code == 0, result.output
    if extra == "mlflow":
        (rate,) = (tmp_path / "store").rglob("params/optimizer.learning_rate")
        assert rate.read_text() == "0.01"
        assert list((tmp_path / "store").rglob("metrics/loss/held_out"))
    else:
        assert list(tmp_path.glob("run/wandb/offline-run-*/*.wandb"))
