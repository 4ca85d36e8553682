"""Candidates with and without a rank."""

import pytest
import torch

import esper
from esper.config import Candidate
from esper.config import EsperConfig
from esper.config import GraftConfig
from esper.config import GrowthConfig
from esper.tolaria import tasks
from esper.tolaria.link import check_candidates
from esper.tolaria.trainer import train_epoch


def test_a_rank_is_given_where_the_blueprint_has_one() -> None:
    check_candidates([Candidate(blueprint="affine", ranks=()), Candidate(blueprint="widen")])
    check_candidates([Candidate(blueprint="widen", ranks=())])  # in its own default rank
    with pytest.raises(ValueError, match="rank"):
        check_candidates([Candidate(blueprint="affine")])


def test_a_blueprint_without_a_rank_is_planted_by_the_controller(plane: str) -> None:
    task = tasks.get("digits")
    model = esper.wrap(task.host(0), target_layers=["net.0"], seeds_per_layer=1)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    session = esper.session(
        model,
        optimizer,
        epochs=4,
        held_out=task.held_out_batches(),
        loss=task.loss,
        plane=plane,
        mode="lockstep",
        config=EsperConfig(
            candidates=(Candidate(blueprint="affine", ranks=()),),
            graft=GraftConfig(training_steps=3, ramp_steps=3, stabilization_steps=1),
            growth=GrowthConfig(first_epoch=0, min_score_ratio=0.0),
        ),
    )
    with session:
        for epoch in range(4):
            train_epoch(model, optimizer, task.train_batches(0, epoch), task.loss)
            session.epoch_end()
    planted = [event for event in session.history.events if event.after == "GERMINATED"]
    assert planted
    assert "affine with 16 parameters" in planted[0].reason
