"""Who may count on a blob that nothing refers to yet."""

import threading
import time
from collections import Counter
from collections.abc import Callable


class Leases:
    """Keeps garbage collection off the blobs that someone is about to use.

    A blob is leased from when it was last asked about, uploaded or read, and held for as long as a
    call works on it. A blob chosen for removal is condemned: from then on nobody is told that it is
    there. Leases are kept in memory alone; those of a process before are covered by counting every
    blob as used when this one started. Time is that of a clock that never jumps.

    Args:
        now: Gives the time in seconds, monotonic.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self.now = now
        self._started_s = now()
        self._lock = threading.Lock()
        self._used_s: dict[str, float] = {}
        self._held: Counter[str] = Counter()
        self._condemned: set[str] = set()

    def use(self, name: str) -> bool:
        """Renews the lease of a blob; returns False where it is being removed."""
        with self._lock:
            if name in self._condemned:
                return False
            self._used_s[name] = self.now()
            return True

    def hold(self, name: str) -> None:
        """Keeps a blob until `release`, also one that is being removed and comes anew."""
        with self._lock:
            self._held[name] += 1

    def release(self, name: str) -> None:
        """Ends a `hold`; the lease goes on from now."""
        with self._lock:
            self._used_s[name] = self.now()
            self._held[name] -= 1
            if not self._held[name]:
                del self._held[name]

    def is_held(self, name: str) -> bool:
        """Returns whether a call works on a blob."""
        with self._lock:
            return name in self._held

    def is_free(self, name: str, before_s: float) -> bool:
        """Returns whether nobody holds a blob, or has used it at `before_s` or later."""
        with self._lock:
            return self._is_free(name, before_s)

    def condemn(self, name: str, before_s: float) -> bool:
        """Announces the removal of a blob, if it is free; to be ended by `forget`."""
        with self._lock:
            if not self._is_free(name, before_s):
                return False
            self._condemned.add(name)
            return True

    def forget(self, name: str, *, removed: bool) -> None:
        """Ends a removal that was announced."""
        with self._lock:
            self._condemned.discard(name)
            if removed and name not in self._held:
                self._used_s.pop(name, None)

    def _is_free(self, name: str, before_s: float) -> bool:
        used_s = self._used_s.get(name, self._started_s)
        return name not in self._held and used_s < before_s
