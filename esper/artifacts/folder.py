"""Reading and writing a model folder: all of it or nothing, and checked before it is used."""

import hashlib
import os
import shutil
import uuid
from collections.abc import Callable
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

WEIGHTS_FILE = "weights.safetensors"
ARCHITECTURE_FILE = "architecture.json"
HISTORY_FILE = "growth_history.jsonl"
CARD_FILE = "README.md"

MAX_ARCHITECTURE_BYTES = 256 * 2**20
"""Largest architecture.json that is read; a larger one is no such file."""

_MAX_VALUE_CHARS = 120


class ModelFolderError(ValueError):
    """A model folder that cannot be read or written, or a host that it does not fit.

    Attributes:
        field: What is wrong: a file, a field of architecture.json, or a tensor of the host.
        value: What was found there.
        rule: What it must be.
    """

    def __init__(self, field: str, value: object, rule: str) -> None:
        text = repr(value)
        if len(text) > _MAX_VALUE_CHARS:
            text = f"{text[:_MAX_VALUE_CHARS]}..."
        super().__init__(f"{field} is {text}, but {rule}")
        self.field = field
        self.value = value
        self.rule = rule


@dataclass(frozen=True, slots=True)
class FileDigest:
    """What a file of the folder must hold.

    Attributes:
        sha256: SHA-256 of its bytes, 64 lower-case hexadecimal characters.
        size_bytes: Its length in bytes.
    """

    sha256: str
    size_bytes: int


def file_digest(path: Path) -> FileDigest:
    """Returns digest and size of a file."""
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        return FileDigest(sha256, os.fstat(file.fileno()).st_size)


def check_file(path: Path, expected: FileDigest) -> None:
    """Refuses a file that is missing, truncated or altered.

    Raises:
        ModelFolderError: Naming the file and what differs.
    """
    if not path.is_file():
        raise ModelFolderError(path.name, "missing", "architecture.json names it")
    found = file_digest(path)
    if found.size_bytes != expected.size_bytes:
        raise ModelFolderError(
            f"size of {path.name}",
            found.size_bytes,
            f"architecture.json says {expected.size_bytes} bytes; the file is truncated or altered",
        )
    if found.sha256 != expected.sha256:
        raise ModelFolderError(
            f"sha256 of {path.name}",
            found.sha256,
            f"architecture.json says {expected.sha256}; the file is corrupt",
        )


def architecture_bytes(folder: Path) -> bytes:
    """Returns the bytes of architecture.json.

    Raises:
        ModelFolderError: If the folder or the file is missing, unreadable or too large.
    """
    if not folder.is_dir():
        raise ModelFolderError("path", str(folder), "it must be a model folder")
    path = folder / ARCHITECTURE_FILE
    if not path.is_file():
        raise ModelFolderError(
            "path", str(folder), f"it is no model folder: it has no {ARCHITECTURE_FILE}"
        )
    size = path.stat().st_size
    if size > MAX_ARCHITECTURE_BYTES:
        raise ModelFolderError(
            f"size of {ARCHITECTURE_FILE}", size, f"it may have {MAX_ARCHITECTURE_BYTES} bytes"
        )
    return path.read_bytes()


def check_target(folder: Path, mark: str = ARCHITECTURE_FILE) -> None:
    """Refuses a place that `write_folder` would refuse, before anything is written.

    Args:
        folder: The place.
        mark: The file that tells a folder that may be replaced.

    Raises:
        ModelFolderError: If something other than a model folder has the name.
    """
    if not folder.exists():
        return
    sort = "model folder" if mark == ARCHITECTURE_FILE else f"folder with a {mark}"
    if not folder.is_dir() or (any(folder.iterdir()) and not (folder / mark).is_file()):
        raise ModelFolderError(
            "path", str(folder), f"it is there already and is no {sort}; choose another"
        )


def write_folder(
    folder: Path, fill: Callable[[Path], None], *, mark: str = ARCHITECTURE_FILE
) -> None:
    """Puts a new folder in place, or leaves what was there.

    ``fill`` writes into a temporary folder beside it; once every byte is on disk that folder takes
    the name. An earlier folder of that name and sort is replaced; anything else is never touched.

    Args:
        folder: Where it is to be; missing parents are made.
        fill: Writes the files into the folder that it is given.
        mark: The file that tells its sort.

    Raises:
        ModelFolderError: If something other than a model folder has the name, or it cannot be
            written.
    """
    folder = folder.absolute()
    try:
        check_target(folder, mark)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _beside(folder, "new") as new, _beside(folder, "old") as old:
            new.mkdir()
            fill(new)
            for file in new.iterdir():
                _sync(file)
            _sync(new)
            if folder.exists():
                folder.rename(old)
            try:
                new.rename(folder)
            except OSError:
                if old.exists():
                    old.rename(folder)
                raise
            _sync(folder.parent)
    except OSError as error:
        raise ModelFolderError(
            "path", str(folder), f"it cannot be written: {error.strerror or error}"
        ) from error


@contextmanager
def _beside(folder: Path, suffix: str) -> Iterator[Path]:
    """Yields an unused path beside ``folder`` and removes what is left there in the end."""
    path = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}.{suffix}")
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
