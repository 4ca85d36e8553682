"""Keeps readers out of the map while it is being resized."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Gate:
    """Lets readers in and out, and shuts them out while one caller is alone."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._readers = 0
        self._shut = False

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Waits while someone is alone; not to be nested, as the inner would wait for the outer."""
        with self._condition:
            while self._shut:
                self._condition.wait()
            self._readers += 1
        try:
            yield
        finally:
            with self._condition:
                self._readers -= 1
                if self._readers == 0:
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
