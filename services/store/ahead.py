"""Reads the rows of a store from the disk before anyone asks for them."""

import logging
import os
import threading
from pathlib import Path

from esper.services.serving import metrics

LOG = logging.getLogger("esper.store")

MEMORY_SHARE = 0.25
"""Share of the memory available at the opening that the rows read ahead may take."""
LEAST_BYTES = 4 << 20
"""Smaller files are left to the reads that come."""
STEP_BYTES = 2 << 20
"""How much is asked for at a time; a read that comes meanwhile waits for no more than this."""
PAGE_BYTES = 4096


class ReadAhead:
    """Brings a file into the page cache from its beginning, in a thread, until done or closed.

    A map is read from the disk page by page, wherever a row happens to be: after a start the first
    reads of a large store would each wait for several pages. The page cache may drop what was read
    whenever memory is short, so nothing is taken away from others.

    Args:
        path: The file.
        name: Of the store.
        most_bytes: How much is read at most.
    """

    def __init__(self, path: Path, name: str, most_bytes: int | None = None) -> None:
        self._path = path
        self._done_bytes = metrics.READ_AHEAD_BYTES.labels(name)
        self._done_bytes.set(0)
        size_bytes = path.stat().st_size
        most = int(MEMORY_SHARE * available_bytes()) if most_bytes is None else most_bytes
        self._end = min(size_bytes, most)
        self._closing = False
        self._thread: threading.Thread | None = None
        if size_bytes < LEAST_BYTES:
            return
        LOG.info("reading %d of the %d bytes of %s ahead", self._end, size_bytes, path)
        self._thread = threading.Thread(target=self._run, name=f"ahead-{name}", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends the thread, at the latest after one step."""
        self._closing = True
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        try:
            with self._path.open("rb", buffering=0) as file:
                for start in range(0, self._end, STEP_BYTES):
                    if self._closing:
                        return
                    num_bytes = min(STEP_BYTES, self._end - start)
                    os.posix_fadvise(file.fileno(), start, num_bytes, os.POSIX_FADV_WILLNEED)
                    # Waits for the last of it, so that no more than one step is ever under way.
                    os.pread(file.fileno(), 1, max(start + num_bytes - PAGE_BYTES, start))
                    self._done_bytes.set(start + num_bytes)
        except OSError as error:  # whoever needs that page will be told
            LOG.warning("cannot read %s ahead: %s", self._path, error.strerror)


def available_bytes() -> int:
    """Returns how much memory the system could give away without swapping; 0 where unknown."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) << 10
    except (OSError, ValueError):
        pass
    return 0
