"""The link survives what the plane refuses, and ends with what the plane does not answer."""

import logging

import pytest

from esper.oona.v1 import event_pb2
from esper.plane import connect
from esper.tolaria.link import PlaneLink
from esper.urza.v1 import library_pb2


def test_a_refused_request_is_named_and_does_not_end_the_link(
    plane: str, caplog: pytest.LogCaptureFixture
) -> None:
    topic = "test.link"
    with caplog.at_level(logging.WARNING, logger="esper"):
        link = PlaneLink(plane, (), "r")
        link.publish("No Such Topic Name", event_pb2.EpochEvent(run="r"))
        link.report(library_pb2.FieldReport(kernel=f"kernels/{64 * '0'}", run="r"))
        link.publish(topic, event_pb2.EpochEvent(run="r", epoch=7))
        link.close()
    assert link.failure is None
    refused = [record.getMessage() for record in caplog.records]
    assert len(refused) == 2
    assert "topic" in refused[0]
    with connect(plane) as client, client.oona.subscribe(topic, start_offset=0) as events:
        stored = event_pb2.EpochEvent()
        assert next(iter(events)).body.Unpack(stored)
    assert stored.epoch == 7


def test_a_plane_that_is_not_there_ends_the_link_with_one_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING, logger="esper"):
        link = PlaneLink("unix:/nonexistent/plane.sock", (), "r")
        assert link.wait(0, timeout_s=60) == []
        link.publish("test.link", event_pb2.EpochEvent(run="r"))
        link.close()
    assert link.failure is not None and "/nonexistent/plane.sock" in link.failure
    assert len(caplog.records) == 1
