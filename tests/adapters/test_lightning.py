"""A real Lightning trainer grows a model, and without growth trains as it would."""

import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader
from torch.utils.data import TensorDataset

import esper
from esper.config import Candidate
from esper.config import EsperConfig
from esper.config import GraftConfig
from esper.plane import EmbeddedPlane
from esper.tolaria import tasks

lightning = pytest.importorskip("lightning")
TASK = tasks.get("digits")
QUICK = EsperConfig(
    candidates=(Candidate(blueprint="widen", ranks=(4,)),),
    graft=GraftConfig(training_steps=5, ramp_steps=5, stabilization_steps=3),
)


class Module(lightning.LightningModule):  # type: ignore[name-defined,misc]
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        loss = TASK.loss(self.net, batch).mean()
        self.log("train_loss", loss, on_epoch=True, on_step=False)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.net.parameters(), lr=0.01)


def _fit(net: nn.Module, epochs: int, callbacks: list[object], folder: Path) -> None:
    data = TensorDataset(TASK.train.inputs, TASK.train.targets)
    trainer = lightning.Trainer(
        max_epochs=epochs,
        callbacks=callbacks,
        accelerator="cpu",
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        gradient_clip_val=0.5,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(Module(net), DataLoader(data, batch_size=64))


def _callback(plane: str, mode: str = "async") -> object:
    from esper.adapters.lightning import GrowthCallback

    return GrowthCallback(
        held_out=TASK.held_out_batches(), loss=TASK.loss, plane=plane, mode=mode, config=QUICK
    )


def test_a_seed_lives_through_a_fit(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = esper.wrap(TASK.host(0), "auto", seeds_per_layer=1)
    with EmbeddedPlane() as plane:
        callback = _callback(plane.address, "lockstep")
        _fit(model, 5, [callback], tmp_path)
    history = callback.history  # type: ignore[attr-defined]
    assert len(history.epochs) == 5
    assert [event.after for event in history.events][:3] == ["GERMINATED", "TRAINING", "GRAFTING"]
    assert history.epochs[-1].train_loss < history.epochs[0].train_loss
    assert not model.observers, "the session is closed"
    assert "max_gradient_norm" not in caplog.text, "newborns are clipped as the trainer clips"


def test_without_a_plane_the_fit_is_the_plain_one_bit_for_bit(tmp_path: Path) -> None:
    bare = TASK.host(0)
    _fit(bare, 2, [], tmp_path)
    model = esper.wrap(TASK.host(0), "auto", seeds_per_layer=1)
    _fit(model, 2, [_callback("unix:/nonexistent/plane.sock")], tmp_path)
    for name, value in bare.state_dict().items():
        assert torch.equal(model.host.state_dict()[name], value), name


def test_a_module_without_a_wrapped_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Module holds no wrapped model"):
        _fit(TASK.host(0), 2, [_callback("unix:/nonexistent/plane.sock")], tmp_path)
