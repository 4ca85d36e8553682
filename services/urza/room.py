"""Room for blobs: promised before the first byte is written."""

import logging
import threading
from collections.abc import Callable
from pathlib import Path

from esper.services.serving import metrics
from esper.services.serving.errors import exhausted
from esper.services.store.files import free_bytes
from esper.services.store.limits import RETRY_AFTER_S
from esper.services.store.limits import SOFT_SHARE
from esper.services.store.limits import StoreLimits

LOG = logging.getLogger("esper.urza.blobs")


class Room:
    """Counts the bytes of blobs: those stored, and those promised to uploads under way.

    Args:
        folder: A folder on the disk of the blobs.
        limits: The quota, and what is left free on the disk.
        parked_bytes: Gives the size of what interrupted uploads have left.
    """

    def __init__(self, folder: Path, limits: StoreLimits, parked_bytes: Callable[[], int]) -> None:
        self._folder = folder
        self._limits = limits
        self._parked_bytes = parked_bytes
        self._lock = threading.Lock()
        self._promised_bytes = 0
        self.stored_bytes = 0
        self.num_stored = 0
        self.on_short: Callable[[], None] = lambda: None
        """Called, from any thread, with every promise beyond a soft limit."""

    def promise(self, name: str, size_bytes: int) -> None:
        """Sets room aside for a blob, to be given back by `give_back`.

        Raises:
            ServiceError: RESOURCE_EXHAUSTED where there is too little.
        """
        with self._lock:
            free = free_bytes(self._folder) - self._limits.keep_free_bytes - self._promised_bytes
            if size_bytes > free:
                self._pass_soft_limit("the disk")
                raise exhausted(
                    "DISK_FULL",
                    f"{name} needs {size_bytes} bytes and the disk has {max(free, 0)} to give",
                    RETRY_AFTER_S,
                )
            quota = self._limits.max_blob_bytes
            if quota is not None:
                taken = self.stored_bytes + self._promised_bytes + self._parked_bytes()
                if taken + size_bytes > SOFT_SHARE * quota:
                    self._pass_soft_limit("the quota")
                if taken + size_bytes > quota:
                    raise exhausted(
                        "QUOTA",
                        f"{name} needs {size_bytes} bytes and the quota of {quota} bytes has "
                        f"{max(quota - taken, 0)} left",
                        RETRY_AFTER_S,
                    )
            self._promised_bytes += size_bytes

    def give_back(self, size_bytes: int) -> None:
        """Ends a promise."""
        with self._lock:
            self._promised_bytes -= size_bytes

    def count(self, num_blobs: int, size_bytes: int) -> None:
        """Notes that blobs have come, or have gone where the numbers are negative."""
        with self._lock:
            self.num_stored += num_blobs
            self.stored_bytes += size_bytes
            metrics.BLOBS.set(self.num_stored)
            metrics.BLOB_BYTES.set(self.stored_bytes)

    def _pass_soft_limit(self, what: str) -> None:
        LOG.warning("blobs near the end of %s", what)
        self.on_short()
