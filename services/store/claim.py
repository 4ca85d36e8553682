"""One server to a directory."""

import contextlib
import fcntl
import os
from pathlib import Path
from typing import Self

from esper.services.serving.context import StartupError


class DirectoryError(StartupError):
    """A directory cannot be used for a store; the message says why in one sentence."""


class DirectoryClaim:
    """The exclusive right to a directory: a lock that the kernel drops when the process ends.

    A stale lock cannot exist: the file may remain, the lock does not.

    Args:
        directory: Created where missing, readable by its owner alone.

    Raises:
        DirectoryError: Where it cannot be made or written, or where another process holds it.
    """

    def __init__(self, directory: Path) -> None:
        path = directory / "lock"
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise DirectoryError(f"cannot write in {directory}: {error.strerror}") from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(self._file, 32, 0).decode("ascii", "replace").strip() or "unknown"
            os.close(self._file)
            raise DirectoryError(
                f"{directory} is in use by another server (process {holder})"
            ) from None
        with contextlib.suppress(OSError):  # a full disk: the lock is held, if by nobody known
            os.ftruncate(self._file, 0)
            os.pwrite(self._file, f"{os.getpid()}\n".encode(), 0)

    def release(self) -> None:
        """Gives the directory up."""
        os.close(self._file)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()
