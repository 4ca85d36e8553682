"""How an upload gets into its file, and what goes on beside it."""

import contextlib
import errno
import hashlib
import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from esper.common.v1 import digest_pb2
from esper.services.serving.limits import MAX_CHUNK_BYTES
from esper.services.store.engine import Store
from esper.services.store.opening import Schema
from esper.services.urza.blobs import TABLES
from esper.services.urza.blobs import BlobStore
from esper.services.urza.uploads import WRITTEN_ASIDE_BYTES
from esper.services.urza.writing import BLOCK_BYTES
from esper.services.urza.writing import SYNC_BYTES
from esper.services.urza.writing import Buffers
from esper.services.urza.writing import EarlySync
from esper.services.urza.writing import FileWriting


def test_an_early_sync_that_fails_fails_the_upload() -> None:
    """The system tells of a failure only once: it must not be lost because nobody waited."""
    reading, writing = os.pipe()  # cannot be synced
    try:
        early = EarlySync(writing)
        early.note(SYNC_BYTES)
        with pytest.raises(OSError):
            early.end()
        again = EarlySync(writing)
        with pytest.raises(OSError):
            for _ in range(1_000_000):
                again.note(SYNC_BYTES)
        with pytest.raises(OSError):
            again.end()
    finally:
        os.close(reading)
        os.close(writing)


@pytest.mark.parametrize("aside", [False, True])
@pytest.mark.parametrize("takes_direct_writes", [True, False])
@pytest.mark.parametrize(
    "piece_bytes",
    [MAX_CHUNK_BYTES, 100_000, 1],
    ids=["whole blocks and a short end", "no whole blocks", "bytes"],
)
def test_a_file_has_what_was_added(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    piece_bytes: int,
    takes_direct_writes: bool,
    aside: bool,
) -> None:
    """Whatever the pieces, and also where the file goes on after an odd number of bytes."""
    if not takes_direct_writes:
        monkeypatch.setattr(os, "open", refusing_direct(os.open))
    data = os.urandom(3 * piece_bytes + min(piece_bytes, 17))
    path = tmp_path / "file"
    buffers = Buffers()
    for _ in range(2):
        with contextlib.closing(FileWriting(path, buffers, aside=aside)) as file:
            held = bytearray()
            for start in range(0, len(data), piece_bytes):
                piece = bytearray(data[start : start + piece_bytes])
                file.add(bytes(piece))
                held += piece
            assert file.sync() == path.stat().st_size
    assert path.read_bytes() == data + data


def refusing_direct(opened: Callable[..., int]) -> Callable[..., int]:
    """Returns `os.open` of a filesystem without direct writes."""

    def refuse(path: Path, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return opened(path, flags, mode)

    return refuse


@pytest.mark.parametrize("aside", [False, True])
def test_a_piece_that_cannot_be_written_leaves_no_gap(tmp_path: Path, aside: bool) -> None:
    """What comes behind a piece that failed must not stand in its place."""
    path = tmp_path / "file"
    file = FileWriting(path, Buffers(), aside=aside)
    piece = os.urandom(MAX_CHUNK_BYTES)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (MAX_CHUNK_BYTES + BLOCK_BYTES, before[1]))
        with pytest.raises(OSError):
            for _ in range(3):
                file.add(piece)
            file.settle()
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        with pytest.raises(OSError):
            file.add(b"more")
            file.settle()
        held = file.sync()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
        file.close()
    assert held == MAX_CHUNK_BYTES + BLOCK_BYTES
    assert path.read_bytes() == piece + piece[:BLOCK_BYTES]


def test_chunks_that_come_after_the_end_of_their_call_change_nothing(tmp_path: Path) -> None:
    """A call is cancelled while a thread writes: what was held then is what stays."""
    data = os.urandom(WRITTEN_ASIDE_BYTES)
    digest = digest_pb2.Digest(hash=hashlib.sha256(data).hexdigest(), size_bytes=len(data))
    with contextlib.closing(Store(tmp_path, Schema(TABLES, 1))) as store:
        blobs = BlobStore(store, tmp_path / "blobs")
        upload = blobs.begin(digest, 0)
        assert upload is not None
        upload.write(0, data[:1000])
        assert upload.interrupt() == 1000
        upload.write(1000, data[1000:2000])
        assert blobs.committed(digest) == (1000, False)
        upload = blobs.begin(digest, 1000)
        assert upload is not None
        for start in range(1000, len(data), MAX_CHUNK_BYTES):
            upload.write(start, data[start : start + MAX_CHUNK_BYTES])
        upload.finish().result(60)
        assert b"".join(blobs.read(digest)) == data
