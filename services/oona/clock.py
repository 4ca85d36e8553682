"""A time of day that never goes back."""

import time
from collections.abc import Callable


class SteadyClock:
    """Time of day as it was at the start, and from there on what has really passed.

    A system clock that is set while the server runs changes nothing; one that was set back while it
    did not run is taken for one that stood still.

    Args:
        last_ns: A time that has been given out before; none earlier is given out.
        now: The system's time of day, in seconds since 1970.
        elapsed: Seconds since some moment, never going back.
    """

    def __init__(
        self,
        last_ns: int,
        now: Callable[[], float] = time.time,
        elapsed: Callable[[], float] = time.monotonic,
    ) -> None:
        self._elapsed = elapsed
        self._since_s = elapsed()
        self._start_ns = max(last_ns, int(now() * 1e9))

    def now_ns(self) -> int:
        """Returns the nanoseconds since 1970."""
        return self._start_ns + int((self._elapsed() - self._since_s) * 1e9)
