"""Garbage collection and the check of a store, on real stores with real damage."""

import asyncio
import hashlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from esper import blueprints
from esper.common.v1 import blueprint_pb2
from esper.common.v1 import check_pb2
from esper.common.v1 import digest_pb2
from esper.common.v1 import kernel_pb2
from esper.services.serving.errors import ServiceError
from esper.services.store.limits import StoreLimits
from esper.services.urza.check import Checker
from esper.services.urza.contents import Contents
from esper.services.urza.contents import open_contents
from esper.services.urza.garbage import collect
from esper.services.urza.resources import digest_of_blueprint
from esper.services.urza.resources import digest_of_kernel
from esper.urza.v1 import library_pb2
from esper.urza.v1 import run_pb2

LARGE = 100_000


def opened(folder: Path, limits: StoreLimits | None = None) -> Contents:
    """Opens a store on an event loop that need not run for what is done here."""

    async def make() -> Contents:
        return open_contents(folder, limits)

    return asyncio.run(make())


@pytest.fixture
def contents(tmp_path: Path) -> Iterator[Contents]:
    held = opened(tmp_path / "urza")
    yield held
    held.store.close()


def digest_of(data: bytes) -> digest_pb2.Digest:
    return digest_pb2.Digest(hash=hashlib.sha256(data).hexdigest(), size_bytes=len(data))


def write(contents: Contents, data: bytes) -> digest_pb2.Digest:
    upload = contents.blobs.begin(digest_of(data), 0)
    assert upload is not None
    upload.write(0, data)
    upload.finish().result(10)
    return digest_of(data)


def read(contents: Contents, digest: digest_pb2.Digest) -> bytes:
    return b"".join(contents.blobs.read(digest))


def plant(contents: Contents, weights: digest_pb2.Digest | None, rank: int = 2) -> str:
    """Stores a blueprint and a kernel of it, and returns the kernel's name."""
    blueprint = blueprints.get("bottleneck", rank=rank)
    digest = digest_of_blueprint(blueprint)
    contents.library.create_blueprint(
        library_pb2.CreateBlueprintRequest(blueprint=blueprint), digest
    ).result(10)
    signature = kernel_pb2.KernelSignature(
        slot_kind=kernel_pb2.SLOT_KIND_LINEAR,
        chunk_width=512,
        source_width=512,
        dtype=kernel_pb2.DATA_TYPE_FLOAT32,
        device_class=kernel_pb2.DEVICE_CLASS_CPU,
        source=blueprint_pb2.SEED_SOURCE_OUTPUT,
    )
    kernel = blueprints.lower(blueprint, signature)
    if weights is not None:
        kernel.weights.CopyFrom(weights)
    request = library_pb2.CreateKernelRequest(kernel=kernel)
    return contents.library.create_kernel(request, digest_of_kernel(kernel)).result(10).kernel.name


def findings(contents: Contents, *, quarantine: bool = False) -> list[check_pb2.Finding]:
    steps = list(Checker(contents, quarantine=quarantine))
    found = [step.finding for step in steps if step.HasField("finding")]
    summary = steps[-1].summary
    assert summary.structure_checked
    orphans = sum(f.kind == check_pb2.FINDING_KIND_ORPHAN for f in found)
    assert (summary.num_problems, summary.num_orphans) == (len(found) - orphans, orphans)
    return found


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


# ------------------------------------------------------------ garbage


def test_what_a_kernel_refers_to_stays_and_the_rest_goes(contents: Contents) -> None:
    kept = [write(contents, os.urandom(size)) for size in (100, LARGE)]
    for rank, digest in enumerate(kept, 2):
        plant(contents, digest, rank)
    lost = [write(contents, os.urandom(size)) for size in (200, LARGE + 1)]
    only_counted = collect(contents.store, contents.blobs, 0, dry_run=True)
    assert contents.blobs.room.num_stored == 4
    outcome = collect(contents.store, contents.blobs, 0)
    assert outcome == only_counted
    assert (outcome.num_blobs, outcome.blob_bytes) == (2, LARGE + 201)
    assert contents.blobs.missing([*kept, *lost]) == lost
    assert (contents.blobs.room.num_stored, contents.blobs.room.stored_bytes) == (2, LARGE + 100)
    assert not contents.blobs.path_of(lost[1].hash).exists()
    assert findings(contents) == []


def test_a_lease_keeps_garbage_and_a_restart_renews_all(contents: Contents) -> None:
    digest = write(contents, b"spark")
    assert collect(contents.store, contents.blobs, 60).num_blobs == 0
    contents.blobs.leases._used_s[digest.hash] -= 61
    contents.blobs.leases._started_s -= 61
    assert contents.blobs.missing([digest]) == []  # asking renews it
    assert collect(contents.store, contents.blobs, 60).num_blobs == 0
    contents.store.close()
    again = opened(contents.store.directory)
    assert collect(again.store, again.blobs, 60).num_blobs == 0
    assert collect(again.store, again.blobs, 0).num_blobs == 1
    again.store.close()


def test_an_upload_under_way_is_never_garbage(contents: Contents) -> None:
    data = os.urandom(LARGE)
    upload = contents.blobs.begin(digest_of(data), 0)
    assert upload is not None
    upload.write(0, data[:70_000])
    outcome = collect(contents.store, contents.blobs, 0)
    assert outcome.num_uploads == 0
    upload.write(70_000, data[70_000:])
    upload.finish().result(10)
    assert read(contents, digest_of(data)) == data


def test_interrupted_uploads_and_orphans_go(contents: Contents) -> None:
    data = os.urandom(LARGE)
    upload = contents.blobs.begin(digest_of(data), 0)
    assert upload is not None
    upload.write(0, data[:70_000])
    upload.interrupt()
    name = hashlib.sha256(b"orphan").hexdigest()
    orphan = contents.blobs.path_of(name)
    orphan.parent.mkdir(exist_ok=True)
    orphan.write_bytes(b"orphan")
    assert [(f.kind, f.name) for f in findings(contents)] == [(check_pb2.FINDING_KIND_ORPHAN, name)]
    outcome = collect(contents.store, contents.blobs, 0)
    assert (outcome.num_orphans, outcome.num_uploads) == (1, 1)
    assert not orphan.exists()
    assert contents.blobs.committed(digest_of(data)) == (0, False)


def test_collections_beside_writers_lose_nothing_that_is_acknowledged(contents: Contents) -> None:
    """Blobs come, are collected and come again, with and without kernels; no kernel is bereft."""
    stop = threading.Event()
    datas = [os.urandom(size) for size in (50, 500, LARGE, LARGE + 1)]
    planted: list[tuple[str, bytes]] = []
    refused = 0

    def work(worker: int) -> None:
        nonlocal refused
        for number in range(60):
            data = datas[(worker + number) % len(datas)] + bytes([number % 3])
            upload = contents.blobs.begin(digest_of(data), 0)
            if upload is not None:
                for start in range(0, len(data), 60_000):
                    upload.write(start, data[start : start + 60_000])
                upload.finish().result(10)
            if number % 5 == 0:
                try:
                    name = plant(contents, digest_of(data), 2 + 100 * worker + number)
                    planted.append((name, data))
                except ServiceError as error:
                    assert error.reason == "NO_WEIGHTS"  # collected before the kernel came
                    refused += 1

    def sweep() -> None:
        while not stop.is_set():
            collect(contents.store, contents.blobs, 0)

    sweeper = threading.Thread(target=sweep)
    sweeper.start()
    workers = [threading.Thread(target=work, args=(n,)) for n in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    stop.set()
    sweeper.join()
    assert len(planted) + refused == 36
    assert planted
    for name, data in planted:
        assert contents.library.get_kernel(name).kernel.weights == digest_of(data)
        assert read(contents, digest_of(data)) == data
    assert [f for f in findings(contents) if f.kind != check_pb2.FINDING_KIND_ORPHAN] == []


# ------------------------------------------------------------ quota


def test_a_quota_is_kept_before_the_first_byte(tmp_path: Path) -> None:
    held = opened(tmp_path / "urza", StoreLimits(max_blob_bytes=250_000))
    called = threading.Event()
    held.blobs.room.on_short = called.set
    first = write(held, os.urandom(LARGE))
    promised = held.blobs.begin(digest_of(os.urandom(LARGE)), 0)
    assert promised is not None
    assert not called.is_set()
    with pytest.raises(ServiceError, match=r"quota of 250000 bytes has 50000 left") as caught:
        held.blobs.begin(digest_of(os.urandom(LARGE)), 0)
    assert (caught.value.reason, caught.value.retry_after_s) == ("QUOTA", 30)
    assert called.is_set()
    promised.drop()
    write(held, os.urandom(LARGE))
    assert len(read(held, first)) == LARGE
    held.store.close()


def test_an_interrupted_upload_counts_towards_the_quota(tmp_path: Path) -> None:
    held = opened(tmp_path / "urza", StoreLimits(max_blob_bytes=150_000))
    upload = held.blobs.begin(digest_of(os.urandom(LARGE)), 0)
    assert upload is not None
    upload.write(0, bytes(90_000))
    upload.interrupt()
    with pytest.raises(ServiceError) as caught:
        held.blobs.begin(digest_of(os.urandom(LARGE)), 0)
    assert caught.value.reason == "QUOTA"
    collect(held.store, held.blobs, 0)
    write(held, os.urandom(LARGE))
    held.store.close()


# ------------------------------------------------------------ check


@pytest.mark.parametrize("size", [100, LARGE])
def test_a_damaged_blob_is_found_quarantined_and_healed(contents: Contents, size: int) -> None:
    data, other = os.urandom(size), os.urandom(size)
    digest, whole = write(contents, data), write(contents, other)
    key = bytes.fromhex(digest.hash)
    if size == LARGE:
        damage(contents.blobs.path_of(digest.hash))
    else:
        table = contents.store.table("blobs")
        contents.store.submit(lambda row: row.put(key, b"\0" + bytes(size), db=table)).result(10)
    (finding,) = findings(contents)
    assert finding.kind == check_pb2.FINDING_KIND_DAMAGED
    assert digest.hash in finding.name
    assert not finding.quarantined
    assert contents.blobs.contains(digest)  # only told, nothing changed
    assert findings(contents, quarantine=True)[0].quarantined
    assert findings(contents) == []
    with pytest.raises(ServiceError) as caught:
        read(contents, digest)
    assert caught.value.code.name == "DATA_LOSS"
    assert contents.blobs.missing([digest, whole]) == [digest]
    assert read(contents, whole) == other
    (aside,) = (contents.store.directory / "blobs" / "quarantine").iterdir()
    assert len(aside.read_bytes()) == size
    write(contents, data)
    assert read(contents, digest) == data
    assert contents.store.table_sizes()["blob_quarantine"] == 0


def test_a_kernel_without_its_blob_is_dangling(contents: Contents) -> None:
    digest = write(contents, os.urandom(LARGE))
    name = plant(contents, digest)
    contents.blobs.path_of(digest.hash).unlink()
    assert [f.kind for f in findings(contents, quarantine=True)] == [
        check_pb2.FINDING_KIND_DAMAGED,
        check_pb2.FINDING_KIND_DANGLING,
    ]
    assert [(f.kind, f.name) for f in findings(contents)] == [
        (check_pb2.FINDING_KIND_DANGLING, name)
    ]


@pytest.mark.parametrize("table", ["blueprints", "kernels"])
@pytest.mark.parametrize("how", ["bytes", "key"])
def test_a_damaged_record_is_found(contents: Contents, table: str, how: str) -> None:
    plant(contents, None)
    plant(contents, None, rank=3)
    handle = contents.store.table(table)

    def work(row: "object") -> None:
        cursor = row.cursor(db=handle)  # type: ignore[attr-defined]
        assert cursor.first()
        key, value = cursor.item()
        if how == "bytes":
            middle = len(value) // 2
            value = value[:middle] + bytes([value[middle] ^ 0x55]) + value[middle + 1 :]
            row.put(key, value, db=handle)  # type: ignore[attr-defined]
        else:
            row.put(bytes(32), value, db=handle)  # type: ignore[attr-defined]

    contents.store.submit(work).result(10)
    assert check_pb2.FINDING_KIND_DAMAGED in {finding.kind for finding in findings(contents)}
    found = findings(contents, quarantine=True)
    damaged = next(f for f in found if f.kind == check_pb2.FINDING_KIND_DAMAGED)
    assert damaged.quarantined
    get = contents.library.get_kernel if table == "kernels" else contents.library.get_blueprint
    with pytest.raises(ServiceError) as caught:
        get(damaged.name)
    assert caught.value.code.name == "DATA_LOSS"
    # Storing the same again heals what is left to heal.
    plant(contents, None)
    plant(contents, None, rank=3)
    assert findings(contents) == []


@pytest.mark.parametrize(
    ("table", "which", "detail"),
    [
        ("lineage", 0, "its lineage lacks 1 of 2 rows"),
        ("kernel_index", 3, "lacks 1 of its"),
        ("changes", 1, "revisions 2 to 2 are missing"),
        ("changes", -1, "the last change is"),
        ("requests", 0, "rows are not two for each of the places"),
    ],
)
def test_an_index_that_lacks_a_row_is_found(
    contents: Contents, table: str, which: int, detail: str
) -> None:
    plant(contents, None)
    for number in range(3):
        request = library_pb2.CreateBlueprintRequest(
            blueprint=blueprints.get("bottleneck", rank=5 + number), request_id=f"r{number}"
        )
        digest = digest_of_blueprint(request.blueprint)
        contents.library.create_blueprint(request, digest).result(10)
    assert findings(contents) == []
    handle = contents.store.table(table)

    def work(row: "object") -> None:
        keys = [key for key, _ in row.cursor(db=handle)]  # type: ignore[attr-defined]
        row.delete(keys[which], db=handle)  # type: ignore[attr-defined]

    contents.store.submit(work).result(10)
    found = findings(contents)
    assert {finding.kind for finding in found} == {check_pb2.FINDING_KIND_INDEX}
    assert any(detail in finding.detail for finding in found), found


def test_a_broken_history_is_found(contents: Contents) -> None:
    async def record() -> Contents:
        held = open_contents(contents.store.directory)
        create = run_pb2.CreateRunRequest(run_id="r")
        held.runs.create(create).result(10)
        events = []
        for number in range(3):
            event = run_pb2.AppendRunEventsRequest(run="runs/r", expected_sequence=number)
            event.body.Pack(digest_pb2.Digest(size_bytes=number))
            events.append(event)
        held.runs.append("runs/r", events).result(10)
        return held

    contents.store.close()
    held = asyncio.run(record())
    assert findings(held) == []
    table = held.store.table("run_events")

    def work(row: "object") -> None:
        cursor = row.cursor(db=table)  # type: ignore[attr-defined]
        assert cursor.last()
        row.delete(cursor.key(), db=table)  # type: ignore[attr-defined]

    held.store.submit(work).result(10)
    (finding,) = findings(held)
    assert (finding.name, finding.kind) == ("runs/r", check_pb2.FINDING_KIND_DAMAGED)
    assert "event 2" in finding.detail
    held.store.close()
