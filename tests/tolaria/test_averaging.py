"""The average of a growing model is the one that is computed by hand, seed by seed."""

from pathlib import Path

import pytest
import torch
from seed_host import Net
from seed_host import State
from torch import Tensor
from torch.optim.swa_utils import AveragedModel
from torch.optim.swa_utils import get_ema_multi_avg_fn

import esper
from esper.kasmina import MorphableModel
from esper.tolaria import GrowingAverage
from esper.tolaria import tasks

DECAY = 0.8


def _move(model: MorphableModel, step: int) -> None:
    """Something like an optimizer step: every parameter changes."""
    generator = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def _advance(model: MorphableModel, slot: str, seed: int, last: State) -> None:
    for stage in range(State.TRAINING, last + 1):
        model.advance(slot, seed, stage)


def test_births_fossils_and_culls_in_between_are_averaged_as_by_hand() -> None:
    torch.manual_seed(0)
    model = esper.wrap(Net(), seeds_per_layer=2, preserve_original=False)
    inputs = torch.randn(5, 6)
    model(inputs)
    average = GrowingAverage(model, get_ema_multi_avg_fn(DECAY))
    by_hand: dict[str, Tensor] = {}
    for step in range(12):
        if step == 2:
            model.germinate("body.0", 1, "bottleneck", rank=2)
        if step == 4:
            model.germinate("body.0", 0, "bottleneck", rank=2)  # comes before the older one
            _advance(model, "body.0", 1, State.GRAFTING)
        if step == 6:
            _advance(model, "body.0", 0, State.GRAFTING)
            model.set_seed_alpha("body.0", 1, 0.5)
        if step == 8:
            model.cull("body.0", 0)
            model.advance("body.0", 1, "STABILIZATION")
            model.germinate("keys", 0, "bottleneck", rank=2)
        if step == 10:
            model.advance("body.0", 1, "EVALUATING")
            model.advance("body.0", 1, "FOSSILIZED")
        _move(model, step)
        average.update_parameters(model)
        now = {name: value.detach() for name, value in model.named_parameters()}
        by_hand = {
            name: by_hand[name].lerp(value, 1 - DECAY) if name in by_hand else value.clone()
            for name, value in now.items()
        }
        found = dict(average.module.named_parameters())
        assert list(found) == list(now), step
        for name, value in by_hand.items():
            torch.testing.assert_close(found[name].detach(), value, msg=f"{name} at {step}")
    # It computes with the averages, in the same states.
    model.load_state_dict(average.module.state_dict())
    assert torch.equal(average(inputs), model(inputs))


def test_what_the_model_folds_into_a_weight_the_average_folds_with_its_own_values() -> None:
    model = esper.wrap(Net(), seeds_per_layer=2, preserve_original=False)
    inputs = torch.randn(5, 6)
    model(inputs)
    model.germinate("keys", 1, "lora", rank=2)
    average = GrowingAverage(model, get_ema_multi_avg_fn(DECAY))
    _advance(model, "keys", 1, State.FOSSILIZED)
    for step in range(3):
        _move(model, step)
        average.update_parameters(model)
    before = average(inputs)
    model.fold("keys", 1)
    average.follow()
    assert list(dict(average.module.named_parameters())) == list(dict(model.named_parameters()))
    torch.testing.assert_close(average(inputs), before)


def test_torch_s_own_class_would_not_do() -> None:
    model = esper.wrap(Net(), seeds_per_layer=2, preserve_original=False)
    model(torch.randn(5, 6))
    average = AveragedModel(model)
    average.update_parameters(model)
    model.germinate("body.0", 0, "bottleneck", rank=2)
    average.update_parameters(model)
    assert len(list(average.parameters())) < len(list(model.parameters()))


def test_other_models_are_refused() -> None:
    with pytest.raises(ValueError, match="model is a Net, but it must be a wrapped model"):
        GrowingAverage(Net())  # type: ignore[arg-type]
    average = GrowingAverage(esper.wrap(Net()))
    with pytest.raises(ValueError, match="another one"):
        average.update_parameters(esper.wrap(Net()))


def test_it_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    task = tasks.get("digits")

    def build(resume: Path | None) -> tuple[MorphableModel, GrowingAverage, esper.tolaria.Session]:
        model = esper.wrap(task.host(0), target_layers=["net"], seeds_per_layer=2)
        average = GrowingAverage(model, get_ema_multi_avg_fn(DECAY))
        session = esper.session(
            model,
            torch.optim.SGD(model.parameters(), lr=0.1),
            epochs=3,
            held_out=task.held_out_batches(),
            loss=task.loss,
            plane="unix:/nonexistent/plane.sock",
            stateful={"average": average},
            resume=resume,
        )
        return model, average, session

    model, average, session = build(None)
    with session:
        model.train()
        model(task.train.inputs[:4])
        average.update_parameters(model)
        model.germinate("net", 1, "bottleneck", rank=2)
        _advance(model, "net", 1, State.GRAFTING)
        _move(model, 1)
        session.save(tmp_path / "saved")  # the average has not seen the seed yet
    resumed, again, session = build(tmp_path / "saved")
    session.close()
    for one, source in ((average, model), (again, resumed)):
        _move(source, 2)
        one.update_parameters(source)
    assert int(again.n_averaged) == 2
    expected = average.module.state_dict()
    assert expected.keys() == again.module.state_dict().keys()
    for name, value in again.module.state_dict().items():
        assert torch.equal(value, expected[name]), name
