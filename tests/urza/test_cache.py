"""The read-through cache of blobs, in front of a real server."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st

from esper.common.rpc import RpcError
from esper.common.v1 import digest_pb2
from esper.plane import Plane
from esper.plane import connect
from esper.urza.cache import BlobCache
from esper.urza.client import UrzaClient
from esper.urza.transfer import digest_of


@pytest.fixture
def cache(tmp_path: Path) -> BlobCache:
    return BlobCache(tmp_path / "cache", max_bytes=1 << 20)


def test_a_blob_is_fetched_once(store_plane: Plane, cache: BlobCache) -> None:
    digest = store_plane.urza.write_blob(data := os.urandom(1000))
    reader = UrzaClient(store_plane.channel("urza"), cache)
    assert [reader.read_blob(digest) for _ in range(3)] == [data] * 3
    assert (cache.hits, cache.misses) == (2, 1)


def test_cached_blobs_outlive_the_server(start_server, cache: BlobCache) -> None:
    server = start_server("urza")
    with connect(server.address, cache=cache) as plane:
        kept = plane.urza.write_blob(data := os.urandom(1000))
        other = plane.urza.write_blob(os.urandom(1000))
        assert plane.urza.read_blob(kept) == data
        server.process.kill()
        server.process.wait()
        assert plane.urza.read_blob(kept) == data
        with pytest.raises(RpcError):
            plane.urza.read_blob(other)


@pytest.mark.parametrize("damage", [b"", b"other bytes", bytes(1000)])
def test_a_damaged_file_is_fetched_anew(
    store_plane: Plane, cache: BlobCache, damage: bytes
) -> None:
    digest = store_plane.urza.write_blob(data := os.urandom(1000))
    reader = UrzaClient(store_plane.channel("urza"), cache)
    reader.read_blob(digest)
    (cache.directory / digest.hash).write_bytes(damage)
    assert reader.read_blob(digest) == data
    assert cache.get(digest) == data


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 7)), max_size=40))
def test_the_least_recently_used_goes_first(
    tmp_path_factory: pytest.TempPathFactory, uses: list[tuple[bool, int]]
) -> None:
    cache = BlobCache(tmp_path_factory.mktemp("cache"), max_bytes=300)
    blobs = [bytes([number]) * 100 for number in range(8)]
    order: list[int] = []  # the model: at most three, the last used at the end
    clock = 0
    for reads, number in uses:
        digest = digest_of(blobs[number])
        if reads:
            assert (cache.get(digest) is not None) == (number in order)
        if not reads or number in order:
            if not reads:
                cache.put(digest, blobs[number])
            order = [*(other for other in order if other != number), number][-3:]
            clock += 1  # the clock of a file system may stand still between two uses
            os.utime(cache.directory / digest.hash, ns=(clock, clock))
        assert cache.size_bytes == 100 * len(order)


def test_a_blob_that_is_larger_than_the_bound_is_not_kept(tmp_path: Path) -> None:
    cache = BlobCache(tmp_path, max_bytes=10)
    cache.put(digest_of(b"small"), b"small")
    cache.put(digest_of(bytes(11)), bytes(11))
    assert cache.get(digest_of(b"small")) == b"small"
    assert cache.get(digest_of(bytes(11))) is None


def test_processes_share_a_folder(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path\n"
        "from esper.urza.cache import BlobCache; from esper.urza.transfer import digest_of\n"
        "cache = BlobCache(Path(sys.argv[1]), 5000)\n"
        "for turn in range(300):\n"
        "    data = bytes([turn % 20]) * 500\n"
        "    cache.put(digest_of(data), data)\n"
        "    assert cache.get(digest_of(data)) in (data, None)\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    processes = [subprocess.Popen(command) for _ in range(3)]
    assert [process.wait(60) for process in processes] == [0, 0, 0]
    assert all(len(path.name) == 64 for path in tmp_path.iterdir())


@pytest.mark.parametrize("max_bytes", [0, -1])
def test_a_bound_must_be_one(tmp_path: Path, max_bytes: int) -> None:
    with pytest.raises(ValueError, match=f"max_bytes is {max_bytes}, but"):
        BlobCache(tmp_path / "new", max_bytes)
    assert not (tmp_path / "new").exists()


def test_a_digest_never_leaves_the_folder(cache: BlobCache) -> None:
    outside = digest_pb2.Digest(hash="../outside", size_bytes=1)
    with pytest.raises(ValueError, match="digest.hash"):
        cache.put(outside, b"x")
    with pytest.raises(ValueError, match="digest.hash"):
        cache.get(outside)
