"""Urza's history of a run is told once, whatever is repeated, lost or done otherwise."""

import uuid
from collections.abc import Sequence

from esper.oona.v1 import event_pb2
from esper.plane import connect
from esper.tolaria.recording import RunRecorder
from esper.tolaria.recording import effective_events
from esper.urza.runs import RunClient


def _events(*epochs: int) -> list[event_pb2.EpochEvent]:
    return [event_pb2.EpochEvent(run="r", epoch=epoch) for epoch in epochs]


def _tell(runs: RunClient, recorder: RunRecorder, epochs: Sequence[int]) -> None:
    for event in _events(*epochs):
        recorder.add(event)
        recorder.flush(runs)


def _held(runs: RunClient, run: str) -> tuple[list[int], int]:
    """Epochs of the events that hold, and the number of all events."""
    verdict = runs.verify_run(f"runs/{run}")
    assert verdict.intact
    bodies = effective_events(runs, run, verdict.num_events)
    events = _events(*[0] * len(bodies))
    assert all(body.Unpack(event) for body, event in zip(bodies, events, strict=True))
    return [event.epoch for event in events], verdict.num_events


def test_what_is_told_again_is_stored_once(plane: str) -> None:
    run = uuid.uuid4().hex
    with connect(plane) as client:
        runs = client.urza.runs
        first = RunRecorder(run)
        _tell(runs, first, [0, 1])
        checkpoint = first.messages
        _tell(runs, first, [2, 3])
        second = RunRecorder(run, checkpoint)  # goes on from a checkpoint that is two events old
        _tell(runs, second, [2, 3, 4])
        second.disconnect()
        _tell(runs, second, [5])
        assert _held(runs, run) == ([0, 1, 2, 3, 4, 5], 6)


def test_a_plane_without_the_run_is_told_all_of_it(plane: str) -> None:
    run = uuid.uuid4().hex
    with connect(plane) as client:
        runs = client.urza.runs
        elsewhere = RunRecorder(run)
        for event in _events(0, 1, 2):
            elsewhere.add(event)
        _tell(runs, RunRecorder(run, elsewhere.messages), [3])
        assert _held(runs, run) == ([0, 1, 2, 3], 4)


def test_a_run_that_goes_on_differently_says_so(plane: str) -> None:
    run = uuid.uuid4().hex
    with connect(plane) as client:
        runs = client.urza.runs
        first = RunRecorder(run)
        _tell(runs, first, [0])
        checkpoint = first.messages
        _tell(runs, first, [1, 2, 3])
        second = RunRecorder(run, checkpoint)
        _tell(runs, second, [1, 7, 8])
        assert _held(runs, run) == ([0, 1, 7, 8], 7)
        third = RunRecorder(run, second.messages)  # sees through the fork
        _tell(runs, third, [9])
        assert _held(runs, run) == ([0, 1, 7, 8, 9], 8)
