"""Leave-one-out attribution says of every live seed what a trial of its own would say."""

import math

import pytest
import torch
from seed_host import to_state
from torch import nn

import esper
from esper.kasmina import MorphableModel
from esper.tolaria import attribution
from esper.tolaria import tasks
from esper.tolaria.cost import TrainingCost
from esper.tolaria.evaluation import sample_losses

TASK = tasks.get("digits")
LIVE = {("net.0", 1): "FOSSILIZED", ("net.0", 2): "GRAFTING", ("net.2", 0): "EVALUATING"}


def _grown(host: nn.Module | None = None) -> MorphableModel:
    model = esper.wrap(host or TASK.host(0), target_layers=[nn.Linear], seeds_per_layer=3)
    model(TASK.train.inputs[:2])
    to_state(model, "net.0", 0, "TRAINING")  # acts on nothing yet
    for (slot, seed), state in LIVE.items():
        to_state(model, slot, seed, state)
    model.set_seed_alpha("net.0", 2, 0.5)
    return model


def _noisy(model: nn.Module, batch: object) -> torch.Tensor:
    """A loss that draws: every run of a batch must draw the same."""
    inputs, targets = batch  # type: ignore[misc]
    noise = 0.1 * torch.randn_like(inputs)
    return nn.functional.cross_entropy(model(inputs + noise), targets, reduction="none")


@pytest.mark.parametrize("loss", [TASK.loss, _noisy], ids=["plain", "drawing"])
def test_every_live_seed_gets_what_its_own_trial_says(loss: esper.tolaria.SampleLoss) -> None:
    model = _grown().train()
    torch.manual_seed(1)
    records = attribution(model, TASK.held_out_batches(), loss)
    assert {(one.slot, one.seed): one.state for one in records} == LIVE
    torch.manual_seed(1)
    present = sample_losses(model, TASK.held_out_batches(), loss)
    for record in records:
        with model.muted(record.slot, record.seed):
            torch.manual_seed(1)
            without = sample_losses(model, TASK.held_out_batches(), loss)
        change = without - present
        assert record.num_samples == len(change)
        assert record.gain == float(change.mean()) != 0.0
        half = 1.96 * float(change.std()) / math.sqrt(len(change))
        assert record.high - record.gain == pytest.approx(half, rel=0.01)
        assert record.gain - record.low == pytest.approx(half, rel=0.01)


def test_it_runs_each_batch_once_more_for_each_seed_and_leaves_no_trace() -> None:
    model = _grown().train()
    calls: list[int] = []
    drawn: list[int] = []
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(4)
    expected = torch.rand(3)
    torch.manual_seed(4)

    def loss(module: nn.Module, batch: object) -> torch.Tensor:
        calls.append(len(drawn))
        return TASK.loss(module, batch)

    batches = TASK.held_out_batches()
    attribution(model, (drawn.append(0) or batch for batch in batches), loss)
    assert len(drawn) == len(batches)
    assert calls == [1 + number for number in range(len(batches)) for _ in range(1 + len(LIVE))]
    assert model.training
    assert torch.equal(torch.rand(3), expected)
    assert not any(model.bank.muted(slot, seed) for slot in (0, 1) for seed in range(3))
    for name, value in model.state_dict().items():
        assert torch.equal(before[name], value), name


def test_a_model_without_live_seeds_has_none() -> None:
    assert attribution(esper.wrap(TASK.host(0)), TASK.held_out_batches(), TASK.loss) == []


def test_a_session_charges_it() -> None:
    model = _grown()
    optimizer = torch.optim.SGD(model.host.parameters(), lr=0.1)
    batches = TASK.held_out_batches()
    with esper.session(
        model,
        optimizer,
        epochs=1,
        held_out=batches,
        loss=TASK.loss,
        plane="unix:/nonexistent/plane.sock",
    ) as session:
        records = session.attribution()
        assert records == attribution(model, batches, TASK.loss)
        pass_flops = (
            records[0].num_samples
            * TrainingCost(model, TASK.loss, batches).forward_flops_per_sample()
        )
        assert session.cost.by_category["evaluation"] == pytest.approx(pass_flops, rel=1e-3)
        assert session.cost.by_category["trial"] == pytest.approx(3 * pass_flops, rel=1e-3)
