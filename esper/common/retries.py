"""How often, and after what pauses, a call is repeated that has no second effect."""

import random
from collections.abc import Iterator

import grpc

from esper.common.rpc import RpcError

CALL_ATTEMPTS = 4
FIRST_PAUSE_S = 0.1
MAX_PAUSE_S = 2.0
PAUSE_FACTOR = 2


def pauses_s() -> Iterator[float]:
    """Yields how long to wait before each further attempt, in seconds, jittered as gRPC does it."""
    longest_s = FIRST_PAUSE_S
    for _ in range(CALL_ATTEMPTS - 1):
        yield random.uniform(0.8, 1.2) * longest_s
        longest_s = min(PAUSE_FACTOR * longest_s, MAX_PAUSE_S)


def was_away(error: RpcError) -> bool:
    """Returns whether the server was away, or went away in the middle of a call."""
    # INTERNAL is what grpc.aio says where a connection breaks under a message; a server gives its
    # reason.
    broken = error.code is grpc.StatusCode.INTERNAL and not error.reason
    return broken or error.code is grpc.StatusCode.UNAVAILABLE
