"""Durable changes of folders."""

import os
import shutil
from pathlib import Path


def sync_folder(folder: Path) -> None:
    """Makes the entries of a folder durable: names created, replaced or removed in it."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_file(path: Path) -> None:
    """Makes the content of a file durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def free_bytes(folder: Path) -> int:
    """Returns the room on the disk of a folder, as far as this user may have it."""
    facts = os.statvfs(folder)
    return facts.f_bavail * facts.f_frsize


def scratch_folder(directory: Path) -> Path:
    """Returns the folder for temporary files of a claimed store, freed of what a crash has left."""
    folder = directory / "tmp"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(mode=0o700)
    return folder
