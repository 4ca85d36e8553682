"""How stores of former schema versions become those of the next."""

import struct
from collections.abc import Callable

from esper.oona.v1 import event_pb2
from esper.services.oona.log import CLOCK_KEY
from esper.services.oona.topics import TopicState
from esper.services.oona.topics import event_key
from esper.services.store.opening import Database
from esper.services.store.opening import Row
from esper.services.store.seals import SEAL_BYTES
from esper.services.store.seals import seal_rows


def from_1(row: Row, table: Callable[[str], Database]) -> None:
    """Measures the topics, of which version 1 knew the first and the next offset alone."""
    last_ns = 0
    for key, value in list(row.cursor(db=table("topics"))):
        state = TopicState(*struct.unpack(">QQ", value))
        topic = key.decode()
        for offset in range(state.first, state.following):
            content = row.get(event_key(topic, offset), db=table("events")) or b""
            state.size_bytes += len(content)
            last_ns = max(last_ns, event_pb2.Event.FromString(content).publish_time.ToNanoseconds())
        row.put(key, state.encode(), db=table("topics"))
    row.put(CLOCK_KEY, last_ns.to_bytes(8, "big"), db=table("clock"))


def from_2(row: Row, table: Callable[[str], Database]) -> None:
    """Gives the events a checksum each, which counts as a part of them."""
    seal_rows(row, table("events"))
    for key, value in list(row.cursor(db=table("topics"))):
        state = TopicState.decode(value)
        state.size_bytes += SEAL_BYTES * (state.following - state.first)
        row.put(key, state.encode(), db=table("topics"))
