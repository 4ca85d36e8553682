"""What the library can be searched for: the lists and orders of its records, and its filters."""

import hashlib
import itertools
import math
import struct
from collections.abc import Iterable

from esper.common.v1 import blueprint_pb2
from esper.common.v1 import kernel_pb2
from esper.services.store.postings import Place
from esper.services.store.postings import entries
from esper.urza.v1 import library_pb2 as pb

# The first byte of a list's name says what its records share; what follows has one length for each.
_ALL = b"*"
_STATE = b"s"
_TAG = b"t"
_KIND = b"k"
_CHUNK_WIDTH = b"w"
_SOURCE_WIDTH = b"x"
_BLUEPRINT = b"b"
_PARAMETERS = b"p"
_FORWARD = b"f"

_TAG_BYTES = 16
_MAX_BUCKET = 127
_BUCKET_OF_1_US = 32

BLUEPRINT_ORDER = b"\x00"

Conditions = list[list[bytes]]


def blueprint_entries(record: pb.BlueprintRecord) -> set[bytes]:
    """Returns the rows of a blueprint in its index."""
    names = [_ALL, _number(_STATE, record.state), *map(_tag, record.blueprint.tags)]
    return entries(_key(record), names, [Place(BLUEPRINT_ORDER)])


def blueprint_conditions(request: pb.ListBlueprintsRequest) -> Conditions:
    """Returns the lists that hold just the blueprints asked for."""
    conditions = [[_tag(tag)] for tag in request.tags]
    if request.state:
        conditions.append([_number(_STATE, request.state)])
    return conditions or [[_ALL]]


def kernel_entries(record: pb.KernelRecord) -> set[bytes]:
    """Returns the rows of a kernel in its index."""
    kernel = record.kernel
    place = kernel.signature
    names = [
        _ALL,
        _kind(place.slot_kind, place.source, place.dtype, place.device_class),
        _number(_CHUNK_WIDTH, place.chunk_width),
        _number(_SOURCE_WIDTH, place.source_width),
        _number(_STATE, record.state),
        _BLUEPRINT + bytes.fromhex(kernel.blueprint_digest),
        _bucket(_PARAMETERS, kernel.parameter_count.bit_length()),
        *map(_tag, record.tags),
    ]
    places = [
        _place(pb.KERNEL_ORDER_NAME, b""),
        _place(pb.KERNEL_ORDER_PARAMETER_COUNT, struct.pack(">Q", kernel.parameter_count)),
        _place(pb.KERNEL_ORDER_FLOPS_PER_TOKEN, struct.pack(">Q", kernel.flops_per_token)),
    ]
    forward_us = newest_forward_us(record)
    if forward_us is not None:
        names.append(_bucket(_FORWARD, _bucket_of_time(forward_us)))
        places.append(_place(pb.KERNEL_ORDER_FORWARD_US, _ascending(forward_us)))
    if record.HasField("mean_gain"):
        places.append(_place(pb.KERNEL_ORDER_MEAN_GAIN, _ascending(-record.mean_gain)))
    return entries(_key(record), names, places)


def kernel_order(order: pb.KernelOrder) -> bytes:
    """Returns the name of an order in the index of kernels."""
    return bytes([order or pb.KERNEL_ORDER_NAME])


def kernel_conditions(wanted: pb.KernelFilter) -> Conditions:
    """Returns lists that hold every kernel that passes a filter, and few others.

    Bounds are met to a power of two: `within_bounds` says the rest.
    """
    conditions = [[_tag(tag)] for tag in wanted.tags]
    if wanted.blueprint:
        conditions.append(
            [_BLUEPRINT + bytes.fromhex(wanted.blueprint.removeprefix("blueprints/"))]
        )
    if wanted.HasField("chunk_width"):
        conditions.append([_number(_CHUNK_WIDTH, wanted.chunk_width)])
    if wanted.HasField("source_width"):
        conditions.append([_number(_SOURCE_WIDTH, wanted.source_width)])
    if wanted.state:
        conditions.append([_number(_STATE, wanted.state)])
    if wanted.HasField("max_parameter_count"):
        last = wanted.max_parameter_count.bit_length()
        conditions.append([_bucket(_PARAMETERS, n) for n in range(last + 1)])
    if wanted.HasField("max_forward_us"):
        last = _bucket_of_time(wanted.max_forward_us)
        conditions.append([_bucket(_FORWARD, n) for n in range(last + 1)])
    kinds = _kinds(wanted)
    if kinds:
        conditions.append(kinds)
    return conditions or [[_ALL]]


def within_bounds(record: pb.KernelRecord, wanted: pb.KernelFilter) -> bool:
    """Returns whether a kernel that meets the conditions of a filter is within its bounds."""
    too_large = record.kernel.parameter_count > wanted.max_parameter_count
    if wanted.HasField("max_parameter_count") and too_large:
        return False
    if wanted.HasField("max_forward_us"):
        forward_us = newest_forward_us(record)
        return forward_us is not None and forward_us <= wanted.max_forward_us
    return True


def newest_forward_us(record: pb.KernelRecord) -> float | None:
    """Returns the forward time of the newest measurement that has one."""
    for measurement in reversed(record.measurements):
        if measurement.HasField("forward_us"):
            return measurement.forward_us
    return None


def _key(record: pb.BlueprintRecord | pb.KernelRecord) -> bytes:
    return bytes.fromhex(record.name.rpartition("/")[2])


def _place(order: pb.KernelOrder, figure: bytes) -> Place:
    return Place(kernel_order(order), figure)


def _number(prefix: bytes, value: int) -> bytes:
    return prefix + struct.pack(">Q", value)


def _bucket(prefix: bytes, number: int) -> bytes:
    return prefix + bytes([number])


def _bucket_of_time(time_us: float) -> int:
    """Returns the power of two that a time is below, within what a byte can number."""
    if time_us == 0:
        return 0
    return min(max(math.frexp(time_us)[1] + _BUCKET_OF_1_US, 0), _MAX_BUCKET)


def _tag(tag: str) -> bytes:
    return _TAG + hashlib.sha256(tag.encode()).digest()[:_TAG_BYTES]


def _kind(slot_kind: int, source: int, dtype: int, device_class: int) -> bytes:
    return _KIND + bytes([slot_kind, source, dtype, device_class])


def _kinds(wanted: pb.KernelFilter) -> list[bytes]:
    """Returns the lists of the kinds of place that a filter leaves; none where it leaves all.

    One list for each combination of four small enumerations, instead of four long lists to walk.
    """
    parts: list[tuple[int, Iterable[int]]] = [
        (wanted.slot_kind, kernel_pb2.SlotKind.values()),
        (wanted.source, blueprint_pb2.SeedSource.values()),
        (wanted.dtype, kernel_pb2.DataType.values()),
        (wanted.device_class, kernel_pb2.DeviceClass.values()),
    ]
    if not any(value for value, _ in parts):
        return []
    choices = [[value] if value else values for value, values in parts]
    return [_kind(*kind) for kind in itertools.product(*choices)]


def _ascending(value: float) -> bytes:
    """Returns 8 bytes that compare as finite numbers do."""
    (bits,) = struct.unpack(">Q", struct.pack(">d", value + 0.0))  # no negative zero
    flipped = bits ^ ((1 << 64) - 1) if bits >> 63 else bits | (1 << 63)
    return struct.pack(">Q", flipped)
