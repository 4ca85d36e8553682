"""A plane of one's own: a child process on a Unix socket."""

import os
import selectors
import shutil
import signal
import subprocess
import tempfile
import time
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from esper.plane.errors import PlaneError
from esper.plane.launch import server_command
from esper.plane.launch import server_environment

READY_PREFIX = b"esper plane ready:"
STOP_TIMEOUT_S = 10.0
SHOWN_LOG_LINES = 5


class EmbeddedPlane:
    """Starts a plane and stops it at `close`, or when this process ends in whatever way.

    The stores live in `data_dir`, or in a temporary directory that goes with the plane.

    Args:
        data_dir: Directory of the stores, created where missing. Default None is a temporary one.
        startup_timeout_s: How long the plane may take until it answers, in seconds.
        services: `all`, or some of `urza`, `tezzeret`, `tamiyo`, `oona`.

    Raises:
        PlaneError: Where it does not start; with what it said.
    """

    def __init__(
        self,
        data_dir: Path | None = None,
        startup_timeout_s: float = 60.0,
        services: Sequence[str] = ("all",),
    ) -> None:
        # Not under TMPDIR: the path of a Unix socket must be short.
        self._folder = Path(tempfile.mkdtemp(prefix="esper-", dir="/tmp"))
        self.address = f"unix:{self._folder / 'plane.sock'}"
        """Where it listens."""
        self.data_dir = self._folder / "data" if data_dir is None else Path(data_dir)
        """Directory of its stores."""
        self.log_path = self._folder / "plane.log"
        """What it logs; gone with the plane."""
        try:
            with self.log_path.open("wb") as log:
                self._process = subprocess.Popen(
                    server_command(services, self.address, self.data_dir, scratch=self._folder),
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    env=server_environment(),
                    # Ctrl-C is for the training process, which then closes the plane in order.
                    start_new_session=True,
                )
        except OSError as error:
            shutil.rmtree(self._folder, ignore_errors=True)
            raise PlaneError(f"cannot start a plane: {error}") from error
        self._finalizer = weakref.finalize(
            self, _stop, self._process, self._folder, owner=os.getpid()
        )
        try:
            self._await_ready(startup_timeout_s)
        except BaseException:
            self.close()
            raise

    @property
    def pid(self) -> int:
        """Process id of the plane."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether the process runs."""
        return self._process.poll() is None

    def close(self) -> None:
        """Stops the plane and removes what was temporary; safe to repeat."""
        self._finalizer()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _await_ready(self, timeout_s: float) -> None:
        stdout = self._process.stdout
        assert stdout is not None
        deadline_s = time.monotonic() + timeout_s
        said = b""
        with selectors.DefaultSelector() as selector:
            selector.register(stdout, selectors.EVENT_READ)
            while b"\n" not in said:
                remaining_s = deadline_s - time.monotonic()
                if remaining_s <= 0 or not selector.select(remaining_s):
                    raise PlaneError(f"the plane was not ready within {timeout_s:g} s")
                piece = os.read(stdout.fileno(), 4096)
                if not piece:
                    raise PlaneError(f"the plane did not start: {self._last_words()}")
                said += piece
        assert said.startswith(READY_PREFIX), said

    def _last_words(self) -> str:
        lines = self.log_path.read_text(errors="replace").strip().splitlines()
        return "; ".join(lines[-SHOWN_LOG_LINES:]) or "it said nothing"


def _stop(process: "subprocess.Popen[bytes]", folder: Path, owner: int) -> None:
    if os.getpid() != owner:  # a forked child has a copy of the object, not the plane
        return
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    for stream in (process.stdin, process.stdout):
        assert stream is not None
        stream.close()
    shutil.rmtree(folder, ignore_errors=True)
