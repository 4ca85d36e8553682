"""Keeps readers out of the map while it is being resized."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Gate:
    """Lets readers in and out, and shuts them out while one caller is alone."""

    def __init__(self) -> None:
        # Every read passes twice: through the lock itself, which is cheaper than its condition.
        self._lock = threading.Lock()
        self._condition = threading.Condition(self._lock)
        self._readers = 0
        self._shut = False

    def enter(self) -> None:
        """Lets a reader in, once nobody is alone.

        Every `enter` needs one `leave`; not to be nested, as the inner would wait for the outer.
        """
        with self._lock:
            while self._shut:
                self._condition.wait()
            self._readers += 1

    def leave(self) -> None:
        """Lets a reader out."""
        with self._lock:
            self._readers -= 1
            if self._shut and self._readers == 0:
                self._condition.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Waits until the readers have left, and keeps new ones waiting."""
        with self._condition:
            self._shut = True
            while self._readers:
                self._condition.wait()
        try:
            yield
        finally:
            with self._condition:
                self._shut = False
                self._condition.notify_all()
