"""Making an upload durable while it is under way."""

import os

import pytest

from esper.services.urza.uploads import SYNC_BYTES
from esper.services.urza.uploads import EarlySync


def test_an_early_sync_that_fails_fails_the_upload() -> None:
    """The system tells of a failure only once: it must not be lost because nobody waited."""
    reading, writing = os.pipe()  # cannot be synced
    try:
        early = EarlySync(writing)
        early.note(SYNC_BYTES)
        with pytest.raises(OSError):
            early.end()
        again = EarlySync(writing)
        with pytest.raises(OSError):
            for _ in range(1_000_000):
                again.note(SYNC_BYTES)
        with pytest.raises(OSError):
            again.end()
    finally:
        os.close(reading)
        os.close(writing)
