"""Kills a server under load, again and again, and looks for what it had acknowledged."""

import os
import signal
import threading
from collections.abc import Callable

import pytest
from google.protobuf.wrappers_pb2 import Int64Value

from esper import blueprints
from esper.common.rpc import RpcError
from esper.common.v1 import digest_pb2
from esper.plane import Plane
from esper.plane import connect

CYCLES = 3
LOAD_S = 0.8


class Load:
    """Writers that note what was acknowledged to them."""

    def __init__(self, plane: Plane, cycle: int) -> None:
        self.blobs: list[tuple[digest_pb2.Digest, bytes]] = []
        self.blueprints: list[str] = []
        self.events: dict[int, int] = {}
        self._plane = plane
        self._cycle = cycle
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._repeat, args=(work,))
            for work in (self._blob, self._large_blob, self._blueprint, self._event)
        ]
        for thread in self._threads:
            thread.start()

    def end(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _repeat(self, work: Callable[[int], None]) -> None:
        number = 0
        while not self._stop.is_set():
            try:
                work(number)
            except RpcError:
                return  # the server is gone
            number += 1

    def _blob(self, number: int) -> None:
        data = os.urandom(500)
        self.blobs.append((self._plane.urza.write_blob(data), data))

    def _large_blob(self, number: int) -> None:
        data = os.urandom(200_000)
        self.blobs.append((self._plane.urza.write_blob(data), data))

    def _blueprint(self, number: int) -> None:
        blueprint = blueprints.get("bottleneck", rank=1 + 1000 * self._cycle + number)
        self.blueprints.append(self._plane.urza.create_blueprint(blueprint).name)

    def _event(self, number: int) -> None:
        value = 1_000_000 * self._cycle + number
        offset = self._plane.oona.publish(
            "crash", Int64Value(value=value), request_id=f"event-{value}"
        )
        self.events[offset] = value


@pytest.mark.slow
def test_no_acknowledged_write_is_lost_to_kill(start_server: Callable[..., object]) -> None:
    blobs: list[tuple[digest_pb2.Digest, bytes]] = []
    names: list[str] = []
    events: dict[int, int] = {}
    server = start_server("urza", "oona")
    for cycle in range(CYCLES):
        with connect(server.address, timeout_s=30) as plane:
            load = Load(plane, cycle)
            threading.Event().wait(LOAD_S)
            server.stop(signal.SIGKILL)
            server = start_server("urza", "oona")
            load.end()
        assert load.blobs
        assert load.blueprints
        assert load.events
        blobs += load.blobs
        names += load.blueprints
        events |= load.events
        with connect(server.address, timeout_s=30) as plane:
            assert plane.urza.find_missing_blobs([digest for digest, _ in blobs]) == []
            for digest, data in load.blobs:
                assert plane.urza.read_blob(digest) == data
            assert set(names) <= {record.name for record in plane.urza.list_blueprints()}
            # A retry of the last event finds it stored and stores nothing.
            last = max(load.events)
            again = plane.oona.publish(
                "crash", Int64Value(value=events[last]), request_id=f"event-{events[last]}"
            )
            assert again == last
            (topic,) = plane.oona.list_topics()
            with plane.oona.subscribe("crash", 0) as subscription:
                stored = [next(subscription) for _ in range(topic.next_offset)]
            values = []
            for position, event in enumerate(stored):
                assert event.offset == position
                value = Int64Value()
                assert event.body.Unpack(value)
                values.append(value.value)
            assert {values[offset] for offset in events} == set(events.values())
            assert all(values[offset] == value for offset, value in events.items())
            assert len(set(values)) == len(values)  # no retry was stored twice
