"""What bounds a publisher that is faster than the disk."""

import asyncio
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import cast

from google.protobuf.any_pb2 import Any as AnyMessage

from esper.oona.v1 import event_pb2
from esper.services.oona.contents import SCHEMA
from esper.services.oona.groups import Groups
from esper.services.oona.log import EventLog
from esper.services.oona.service import MAX_UNACKNOWLEDGED
from esper.services.oona.service import EventServicer
from esper.services.serving.context import CallContext
from esper.services.store.engine import Store


def test_a_stream_is_read_no_further_than_the_disk_has_come(tmp_path: Path) -> None:
    number = 5 * MAX_UNACKNOWLEDGED
    taken = 0

    async def requests() -> AsyncIterator[event_pb2.PublishRequest]:
        nonlocal taken
        for _ in range(number):
            taken += 1
            yield event_pb2.PublishRequest(topic="a", body=AnyMessage(type_url="t/x"))

    async def work() -> None:
        store = Store(tmp_path, SCHEMA)
        log = EventLog(store)
        servicer = EventServicer(log, Groups(store, log.followers), asyncio.Event())
        disk = threading.Event()
        store.submit(lambda row: disk.wait(30))  # commits nothing for a while
        responses = servicer.Publish(requests(), cast(CallContext, None))
        first = asyncio.ensure_future(anext(responses))
        await asyncio.sleep(0.3)
        assert not first.done()
        assert MAX_UNACKNOWLEDGED <= taken <= MAX_UNACKNOWLEDGED + 2
        disk.set()
        offsets = [(await first).offset] + [response.offset async for response in responses]
        assert offsets == list(range(number))
        store.close()

    asyncio.run(work())
