"""In `async` mode the training loop never waits for the plane, however long an answer takes."""

import os
import signal
import time

import pytest
import torch

import esper
from esper.config import Candidate
from esper.config import EsperConfig
from esper.plane import EmbeddedPlane
from esper.plane import connect
from esper.tolaria import tasks

EPOCHS = 5
CONFIG = EsperConfig(candidates=(Candidate(blueprint="widen", ranks=(4,)),))


@pytest.mark.timeout(300)
def test_the_loop_ends_before_anyone_notices_that_the_plane_is_silent() -> None:
    """The plane is stopped, so no call returns: whoever waited for one would see it fail."""
    task = tasks.get("digits")
    batches, held_out = task.train_batches(0, 0)[:2], task.held_out_batches()[:1]
    model = esper.wrap(task.host(0), target_layers=["net"], seeds_per_layer=2)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    with EmbeddedPlane() as plane:
        session = esper.session(
            model,
            optimizer,
            epochs=EPOCHS,
            held_out=held_out,
            loss=task.loss,
            plane=plane.address,
            config=CONFIG,
        )
        with session:
            try:
                for epoch in range(EPOCHS):
                    for batch in batches:
                        optimizer.zero_grad()
                        task.loss(model, batch).mean().backward()
                        optimizer.step()
                    session.epoch_end()
                    if epoch == 0:
                        _await_first_event(plane.address)
                        os.kill(plane.pid, signal.SIGSTOP)
                assert session.plane_failure is None
            finally:
                os.kill(plane.pid, signal.SIGCONT)
    assert len(session.history.epochs) == EPOCHS


def _await_first_event(address: str) -> None:
    """Returns once the session's own thread has reached the plane."""
    deadline_s = time.monotonic() + 100
    with connect(address, timeout_s=60) as client:
        while not any(run.num_events for run in client.urza.runs.list_runs()):
            assert time.monotonic() < deadline_s, "the session has told the plane nothing"
            time.sleep(0.05)
