"""The digest by which client and server know that they speak the same protocol."""

import hashlib
from functools import cache

from esper.common.v1 import blueprint_pb2
from esper.common.v1 import check_pb2
from esper.common.v1 import digest_pb2
from esper.common.v1 import kernel_pb2
from esper.common.v1 import lifecycle_pb2
from esper.common.v1 import signal_pb2
from esper.oona.v1 import event_pb2
from esper.plane.v1 import plane_pb2
from esper.tamiyo.v1 import controller_pb2
from esper.tezzeret.v1 import forge_pb2
from esper.urza.v1 import blob_pb2
from esper.urza.v1 import library_pb2
from esper.urza.v1 import run_pb2
from esper.urza.v1 import store_pb2

FILES = (
    blueprint_pb2.DESCRIPTOR,
    check_pb2.DESCRIPTOR,
    digest_pb2.DESCRIPTOR,
    kernel_pb2.DESCRIPTOR,
    lifecycle_pb2.DESCRIPTOR,
    signal_pb2.DESCRIPTOR,
    event_pb2.DESCRIPTOR,
    plane_pb2.DESCRIPTOR,
    controller_pb2.DESCRIPTOR,
    forge_pb2.DESCRIPTOR,
    blob_pb2.DESCRIPTOR,
    library_pb2.DESCRIPTOR,
    run_pb2.DESCRIPTOR,
    store_pb2.DESCRIPTOR,
)


@cache
def contract_digest() -> str:
    """Returns the SHA-256 over the descriptors of all Esper protos, as 64 hexadecimal characters.

    Comments and formatting do not count; names, numbers, types and services do.
    """
    total = hashlib.sha256()
    for file in sorted(FILES, key=lambda file: file.name):
        content = file.serialized_pb
        total.update(f"{file.name}\0{len(content)}\0".encode())
        total.update(content)
    return total.hexdigest()
