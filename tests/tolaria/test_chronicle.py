"""Urza is told of every verdict over a kernel, and of why."""

import pytest
import torch
from tolaria.governed import STREAM
from tolaria.governed import Loop

from esper.blueprints import get
from esper.common.v1 import blueprint_pb2
from esper.plane import connect
from esper.urza.v1 import library_pb2

pytestmark = pytest.mark.usefixtures("governed_plane")


def test_seeds_that_were_culled_or_cancelled_are_reported_with_their_reasons(plane: str) -> None:
    loop = Loop()
    with connect(plane) as client, loop.session:
        signature = loop.model.signature("net", 0, blueprint_pb2.SEED_SOURCE_OUTPUT)
        name = client.tezzeret.compile(get("bottleneck", rank=3), signature).name
        torch.manual_seed(7)
        assert loop.plant(seed=0) == loop.plant(seed=1, training_steps=100) == name
        for batch in STREAM[:6]:
            loop.step(batch)
        assert loop.model.seed_state("net", 0).name == "GRAFTING"
        loop.model.cull("net", 0, reason="by hand")
    with connect(plane) as client:
        reports = {
            report.seed: (report.verdict, report.reason)
            for report in client.urza.list_field_reports(name)
            if report.run == loop.session.run
        }
    assert reports == {
        0: (library_pb2.FIELD_VERDICT_CULLED, "by hand"),
        1: (library_pb2.FIELD_VERDICT_CANCELLED, "the run ended before the trial"),
    }
