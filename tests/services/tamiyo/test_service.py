"""Tamiyo over a real socket: one answer per observation, clear refusals, and a quick drain."""

import os
import queue
import signal
import time

import pytest

from esper.common.rpc import RpcError
from esper.plane import EmbeddedPlane
from esper.plane import connect
from esper.tamiyo.v1 import controller_pb2


def _observation(**fields: object) -> controller_pb2.Observation:
    observation = controller_pb2.Observation(
        run="r", epoch=0, num_epochs=9, host_graph_digest="d", **fields
    )
    observation.host_graph.digest = "d"
    return observation


def test_every_observation_is_answered_in_order(store_all: str) -> None:
    with connect(store_all, timeout_s=20) as plane:
        first, second = _observation(), _observation()
        second.epoch = 1
        second.ClearField("host_graph")
        answers = list(plane.tamiyo.advise([first, second]))
        assert [answer.epoch for answer in answers] == [0, 1]
        assert [d.action for a in answers for d in a.decisions] == 2 * [controller_pb2.ACTION_WAIT]
        policy = plane.tamiyo.list_policies()[0]
        assert answers[0].decisions[0].policy_digest == policy.name.removeprefix("policies/")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"run": ""}, "observation.run"),
        ({"num_epochs": 0}, "observation.num_epochs"),
        ({"epoch": 9}, "observation.epoch"),
        ({"host_graph_digest": "other"}, "observation.host_graph_digest"),
    ],
)
def test_a_bad_observation_is_refused_by_field(
    store_all: str, fields: dict[str, object], words: str
) -> None:
    observation = _observation()
    for name, value in fields.items():
        setattr(observation, name, value)
    with connect(store_all, timeout_s=20) as plane, pytest.raises(RpcError) as caught:
        list(plane.tamiyo.advise([observation]))
    assert words in str(caught.value)


def test_an_open_stream_of_advice_does_not_hold_the_drain() -> None:
    with EmbeddedPlane() as embedded, connect(embedded.address, timeout_s=20) as plane:
        observations: queue.SimpleQueue[controller_pb2.Observation | None] = queue.SimpleQueue()
        answers = plane.tamiyo.advise(iter(observations.get, None))
        observations.put(_observation())
        assert next(answers).epoch == 0
        started = time.monotonic()
        os.kill(embedded.pid, signal.SIGTERM)
        with pytest.raises(RpcError, match="UNAVAILABLE: the server is stopping"):
            next(answers)
        assert time.monotonic() - started < 4.5  # the grace of the drain is 5 s
        observations.put(None)


@pytest.fixture(scope="module")
def store_all():
    """Address of a plane with all services."""
    with EmbeddedPlane() as embedded:
        yield embedded.address
