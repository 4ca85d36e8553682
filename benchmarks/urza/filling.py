"""Fills a data directory with records, written through the store's engine in large transactions.

    python -m benchmarks.urza.filling FOLDER ROWS

The kernels are copies of one under names of their own, so their digests are not those of their
content: right for timing, and nothing that a check would pass. The names are random, so a large
store takes long to fill on a disk: fill it in memory and copy it.
"""

import asyncio
import hashlib
import sys
from pathlib import Path

from esper.common.v1 import blueprint_pb2
from esper.common.v1 import kernel_pb2
from esper.oona.v1 import event_pb2
from esper.services.oona.contents import FOLDER as OONA
from esper.services.oona.contents import SCHEMA
from esper.services.oona.log import EventLog
from esper.services.store.engine import Store
from esper.services.store.opening import Row
from esper.services.urza.contents import FOLDER as URZA
from esper.services.urza.contents import open_contents
from esper.services.urza.library import Library
from esper.urza.v1 import library_pb2 as pb

TOPIC = "filled"
TAGS = 100
"""Number of tags, each carried by an equal share of the kernels."""
_BATCH = 1000


def name_of(number: int) -> str:
    """Returns the name of one of the kernels that `fill` has made."""
    return f"kernels/{hashlib.sha256(str(number).encode()).hexdigest()}"


def tag_of(number: int) -> str:
    """Returns the tag that a kernel carries."""
    return f"lot-{number % TAGS}"


def fill(data_dir: Path, num_rows: int) -> None:
    """Gives the library so many kernels and a topic so many events; goes on where it was ended."""
    asyncio.run(_fill(data_dir, num_rows))


async def _fill(data_dir: Path, num_rows: int) -> None:
    contents = open_contents(data_dir / URZA)
    try:
        first = contents.store.table_sizes()["kernels"]
        for start in range(first, num_rows, _BATCH):
            numbers = range(start, min(start + _BATCH, num_rows))
            contents.store.submit(lambda row, n=numbers: _save(row, contents.library, n)).result()
    finally:
        contents.store.close()
    store = Store(data_dir / OONA, SCHEMA)
    try:
        log = EventLog(store)
        for start in range(log.next_offset(TOPIC), num_rows, _BATCH):
            numbers = range(start, min(start + _BATCH, num_rows))
            for appended in [log.append(_event(number)) for number in numbers]:
                appended.result()
    finally:
        store.close()


def _save(row: Row, library: Library, numbers: range) -> None:
    for number in numbers:
        library.kernels.save(row, _record(number))


def _record(number: int) -> pb.KernelRecord:
    width = 32 << number % 6
    blueprint = hashlib.sha256(f"blueprint-{number % 1000}".encode()).hexdigest()
    return pb.KernelRecord(
        name=name_of(number),
        kernel=kernel_pb2.Kernel(
            blueprint_digest=blueprint,
            blueprint_name="bottleneck",
            signature=kernel_pb2.KernelSignature(
                slot_kind=kernel_pb2.SLOT_KIND_LINEAR,
                chunk_width=width,
                source_width=width,
                dtype=kernel_pb2.DATA_TYPE_FLOAT32,
                device_class=kernel_pb2.DEVICE_CLASS_CPU,
                source=blueprint_pb2.SEED_SOURCE_OUTPUT,
            ),
            parameter_count=width * (number % 997 + 1),
            flops_per_token=2 * width * (number % 991 + 1),
        ),
        state=pb.KERNEL_STATE_VALIDATED if number % 2 else pb.KERNEL_STATE_TESTING,
        tags=[tag_of(number)],
    )


def _event(number: int) -> event_pb2.PublishRequest:
    event = event_pb2.PublishRequest(topic=TOPIC, key=str(number))
    event.body.type_url = "type.googleapis.com/bytes"
    event.body.value = number.to_bytes(8, "big") * 8
    return event


if __name__ == "__main__":
    fill(Path(sys.argv[1]), int(sys.argv[2]))
