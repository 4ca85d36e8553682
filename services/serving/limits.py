"""Limits that every server declares and enforces."""

from dataclasses import dataclass

MIB = 1 << 20
MAX_MESSAGE_BYTES = 4 * MIB
MAX_CHUNK_BYTES = MIB


@dataclass(frozen=True)
class ServerLimits:
    """What one server takes on at a time.

    Attributes:
        max_concurrent_rpcs: Calls under way at once, streams included; more are RESOURCE_EXHAUSTED.
        default_deadline_s: Deadline of a unary call whose caller set none, in seconds.
        drain_grace_s: How long calls under way may go on once the server stops, in seconds.
    """

    max_concurrent_rpcs: int = 1024
    default_deadline_s: float = 60.0
    drain_grace_s: float = 5.0
