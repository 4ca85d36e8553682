"""A backup of Urza or Oona as a folder: laid out like a store, complete once `backup.json` stands.

The folder of an earlier backup may be used again: blobs never change, so those that are there with
their full size are not fetched anew.
"""

import json
import os
import shutil
from collections.abc import Iterable
from datetime import UTC
from datetime import datetime
from pathlib import Path

from esper import __version__
from esper.common.v1 import digest_pb2

FORMAT = 1
MANIFEST = "backup.json"


class BackupError(ValueError):
    """A folder is no backup, or cannot become one; the message says why."""


class BackupWriter:
    """Writes one backup: `put_rows`, `put_blob` for each blob that is wanted, `finish`.

    Args:
        folder: Created where missing; what is in it must be a backup of `service`, finished or not.
        service: What is backed up, `urza` or `oona`.

    Raises:
        BackupError: Where there is something else in it.
    """

    def __init__(self, folder: Path, service: str) -> None:
        self._folder = folder
        self._service = service
        self._blobs = folder / "blobs" / "files"
        self._rows = folder / "rows" / "data.mdb"
        self._names: set[str] = set()
        self._blob_bytes = 0
        known = {MANIFEST, "rows", "blobs"}
        if folder.exists() and not {path.name for path in folder.iterdir()} <= known:
            raise BackupError(f"{folder} has something in it that is no backup: choose another")
        if (folder / MANIFEST).exists():
            read_manifest(folder, service)
        self._rows.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        (folder / MANIFEST).unlink(missing_ok=True)

    def put_rows(self, pieces: Iterable[bytes]) -> None:
        """Writes the file with the rows."""
        _write(self._rows, pieces)

    def wants(self, digest: digest_pb2.Digest) -> bool:
        """Notes a blob as part of the backup; returns whether it is to be put."""
        self._names.add(digest.hash)
        self._blob_bytes += digest.size_bytes
        path = self._path(digest)
        return not (path.exists() and path.stat().st_size == digest.size_bytes)

    def put_blob(self, digest: digest_pb2.Digest, pieces: Iterable[bytes]) -> None:
        """Writes a blob; its bytes must have been verified."""
        path = self._path(digest)
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        _write(path, pieces)

    def finish(self) -> dict[str, object]:
        """Removes the blobs of earlier backups, writes the manifest and returns it."""
        for path in self._blobs.glob("*/*"):
            if path.name not in self._names:
                path.unlink()
        manifest: dict[str, object] = {
            "format": FORMAT,
            "service": self._service,
            "release": __version__,
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "row_file_bytes": self._rows.stat().st_size,
            "num_blob_files": len(self._names),
            "blob_file_bytes": self._blob_bytes,
        }
        _write(self._folder / MANIFEST, [json.dumps(manifest, indent=2).encode() + b"\n"])
        return manifest

    def _path(self, digest: digest_pb2.Digest) -> Path:
        return self._blobs / digest.hash[:2] / digest.hash


def read_manifest(folder: Path, service: str) -> dict[str, object]:
    """Returns the manifest of a complete backup.

    Args:
        folder: Holds the backup.
        service: What must have been backed up, `urza` or `oona`.

    Raises:
        BackupError: Where `folder` holds none of the service that this release can read.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        found = manifest["format"]
        held = manifest.get("service", "urza")
    except FileNotFoundError:
        raise BackupError(f"{folder} is no complete backup: it has no {MANIFEST}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise BackupError(f"{folder} is no backup: its {MANIFEST} cannot be read") from None
    if found != FORMAT:
        raise BackupError(f"{folder} is a backup of format {found}; this release reads {FORMAT}")
    if held != service:
        raise BackupError(f"{folder} is a backup of {held}, not of {service}")
    return dict(manifest)


def copy_backup(folder: Path, target: Path, service: str) -> None:
    """Copies a complete backup to `target`, as the directory of a store that it lays out.

    Raises:
        BackupError: As `read_manifest` does.
    """
    read_manifest(folder, service)
    for name in ("rows", "blobs"):
        if (folder / name).exists():
            shutil.copytree(folder / name, target / name)


def _write(path: Path, pieces: Iterable[bytes]) -> None:
    """Writes a file beside and moves it into place, durably."""
    beside = path.with_name(f".{path.name}")
    with beside.open("wb") as file:
        for piece in pieces:
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)
    handle = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
