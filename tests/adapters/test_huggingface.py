"""A real Hugging Face trainer grows a model, and without growth trains as it would."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch import nn

import esper
from esper.config import Candidate
from esper.config import EsperConfig
from esper.config import GraftConfig
from esper.plane import EmbeddedPlane
from esper.tolaria import tasks

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
TASK = tasks.get("digits")
QUICK = EsperConfig(
    candidates=(Candidate(blueprint="widen", ranks=(4,)),),
    graft=GraftConfig(training_steps=5, ramp_steps=5, stabilization_steps=3),
)


class Classifier(nn.Module):
    """As the trainer wants it: keyword inputs, a mapping with the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.net = TASK.host(0)

    def forward(self, inputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.net(inputs)
        return {"logits": logits, "loss": nn.functional.cross_entropy(logits, labels)}


def _loss(model: nn.Module, batch: object) -> Tensor:
    inputs, labels = batch  # type: ignore[misc]
    logits = model(inputs=inputs, labels=labels)["logits"]
    return nn.functional.cross_entropy(logits, labels, reduction="none")


def _fit(model: nn.Module, epochs: int, callbacks: list[object], folder: Path) -> None:
    model.accepts_loss_kwargs = False  # type: ignore[assignment]
    data = [
        {"inputs": x, "labels": y}
        for x, y in zip(TASK.train.inputs, TASK.train.targets, strict=True)
    ]
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=epochs,
        per_device_train_batch_size=64,
        learning_rate=0.01,
        remove_unused_columns=False,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        seed=3,
    )
    transformers.Trainer(
        model=model, args=arguments, train_dataset=data, callbacks=callbacks
    ).train()


def _callback(plane: str, mode: str = "async") -> object:
    from esper.adapters.huggingface import GrowthCallback

    return GrowthCallback(
        held_out=TASK.held_out_batches(), loss=_loss, plane=plane, mode=mode, config=QUICK
    )


def test_a_seed_lives_through_a_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = esper.wrap(Classifier(), "auto", seeds_per_layer=1)
    with EmbeddedPlane() as plane:
        callback = _callback(plane.address, "lockstep")
        _fit(model, 5, [callback], tmp_path)
    history = callback.history  # type: ignore[attr-defined]
    assert len(history.epochs) == 5
    assert [event.after for event in history.events][:3] == ["GERMINATED", "TRAINING", "GRAFTING"]
    assert history.epochs[-1].held_out_loss < history.epochs[0].held_out_loss
    assert not model.observers, "the session is closed"
    assert "max_gradient_norm" not in caplog.text, "newborns are clipped as the trainer clips"


def test_without_a_plane_the_training_is_the_plain_one_bit_for_bit(tmp_path: Path) -> None:
    bare = Classifier()
    _fit(bare, 2, [], tmp_path)
    model = esper.wrap(Classifier(), "auto", seeds_per_layer=1)
    _fit(model, 2, [_callback("unix:/nonexistent/plane.sock")], tmp_path)
    for name, value in bare.state_dict().items():
        assert torch.equal(model.host.state_dict()[name], value), name


def test_a_model_that_is_not_wrapped_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="model is a Classifier, but growth needs the wrapped"):
        _fit(Classifier(), 1, [_callback("unix:/nonexistent/plane.sock")], tmp_path)
