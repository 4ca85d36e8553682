"""What a real server does when its disk is full or lies, its lock is stale or its clock jumps."""

import os
import shlex
import signal
import subprocess
from collections.abc import Callable
from collections.abc import Iterator
from contextlib import AbstractContextManager
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest
from click.testing import CliRunner
from google.protobuf.wrappers_pb2 import BytesValue
from google.protobuf.wrappers_pb2 import Int64Value
from urza_samples import new_kernel

from esper import blueprints
from esper.cli.main import cli
from esper.common.rpc import RpcError
from esper.common.rpc import readable_errors
from esper.common.v1 import digest_pb2
from esper.oona.client import OonaClient
from esper.oona.v1 import event_pb2
from esper.plane import Plane
from esper.plane import connect
from esper.plane.launch import server_command
from esper.plane.launch import server_environment
from esper.urza.admin import StoreAdmin
from esper.urza.client import UrzaClient
from esper.urza.transfer import digest_of
from esper.urza.v1 import blob_pb2
from esper.urza.v1 import blob_pb2_grpc
from esper.urza.v1 import library_pb2

Start = Callable[..., object]

DISK_BYTES = 24 << 20
BALLAST_BYTES = 2 << 20
CONNECT_S = 60
DAY_S = 24 * 3600.0
PATIENCE_S = 120.0


def check(*place: str, status: int = 0) -> str:
    """Runs `esper urza check` and returns what it says."""
    run = CliRunner().invoke(cli, ["urza", "check", *place])
    assert run.exit_code == status, (run.exit_code, run.output, run.exception)
    return run.output


def refusal(call: Callable[[], object]) -> RpcError:
    with pytest.raises(RpcError) as caught:
        call()
    return caught.value


def refused_start(data: Path, *names: str) -> str:
    """Starts a server that must not start, and returns the line that it says why in."""
    run = subprocess.run(
        server_command(names, f"unix:{data.parent}/refused.sock", data),
        capture_output=True,
        text=True,
        env=server_environment(),
        timeout=PATIENCE_S,
        check=False,
    )
    assert (run.returncode, run.stdout) == (1, "")
    return run.stderr.splitlines()[-1]


# ------------------------------------------------------------ a full disk


@dataclass
class Narrow:
    """A place with little room.

    Attributes:
        prefix: How to start a process there.
        relieve: Makes some room, where that can be done from outside.
    """

    prefix: list[str]
    relieve: Callable[[], None] | None


@contextmanager
def small_disk(folder: Path) -> Iterator[Narrow]:
    """A file system of its own on `folder`, in a namespace that other processes may enter."""
    place = shlex.quote(str(folder))
    work = f"mount -t tmpfs -o size={DISK_BYTES} tmpfs {place} && echo there && exec cat"
    for user, enter in (
        ([], []),
        (["--user", "--map-root-user"], ["--user", "--preserve-credentials"]),
    ):
        holder = subprocess.Popen(
            ["unshare", "--mount", *user, "sh", "-c", work],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        with holder:
            assert holder.stdout is not None
            if holder.stdout.readline() == b"there\n":
                ballast = Path(f"/proc/{holder.pid}/root{folder}/ballast")
                ballast.write_bytes(bytes(BALLAST_BYTES))
                inside = ["nsenter", "--target", str(holder.pid), "--mount", *enter]
                yield Narrow(inside, ballast.unlink)
                holder.kill()
                return
            holder.kill()
    pytest.skip("this user can mount no file system, not even in a namespace of its own")


@contextmanager
def small_files(folder: Path) -> Iterator[Narrow]:
    """No file may be larger than 4 MiB."""
    yield Narrow(["bash", "-c", 'ulimit -f 4096 && exec "$@"', "bash"], None)


def publish_until_refused(oona: OonaClient) -> tuple[list[int], RpcError]:
    body = BytesValue(value=os.urandom(60_000))
    offsets: list[int] = []
    while len(offsets) * 60_000 < 4 * DISK_BYTES:
        try:
            offsets.append(oona.publish("t", body))
        except RpcError as error:
            return offsets, error
    raise AssertionError("nothing was refused")


def write_until_refused(urza: UrzaClient) -> tuple[dict[str, bytes], RpcError]:
    stored: dict[str, bytes] = {}
    while len(stored) * 300_000 < 4 * DISK_BYTES:
        data = os.urandom(40_000 if len(stored) % 2 else 300_000)
        try:
            stored[urza.write_blob(data).hash] = data
        except RpcError as error:
            return stored, error
    raise AssertionError("nothing was refused")


def all_there(plane: Plane, blobs: dict[str, bytes], offsets: list[int]) -> bool:
    digests = [digest_pb2.Digest(hash=name, size_bytes=len(data)) for name, data in blobs.items()]
    read = [plane.urza.read_blob(digest) for digest in digests]
    with plane.oona.subscribe("t", 0) as events:
        seen = [next(events).offset for _ in offsets]
    return read == list(blobs.values()) and seen == offsets


@pytest.mark.parametrize("kind", [small_disk, small_files])
def test_a_full_disk_refuses_writes_and_nothing_else(
    start_server: Start, short_dir: Path, kind: Callable[[Path], AbstractContextManager[Narrow]]
) -> None:
    """Nothing is kept free here, so it is the disk itself that refuses."""
    data = short_dir / "data"
    data.mkdir()
    with kind(data) as narrow:

        def start() -> object:
            return start_server(prefix=narrow.prefix, data=data, limits={"keep_free_bytes": 0})

        server = start()
        with connect(server.address, timeout_s=CONNECT_S) as plane:
            blobs, first = write_until_refused(plane.urza)
            offsets, second = publish_until_refused(plane.oona)
            for error in (first, second):
                assert error.code is grpc.StatusCode.RESOURCE_EXHAUSTED
                assert error.reason == "DISK_FULL"
            assert all_there(plane, blobs, offsets)
            assert " 0 problems" in check("--address", server.address)
        server.stop(signal.SIGKILL)
        server = start()  # as full as it is
        with connect(server.address, timeout_s=CONNECT_S) as plane:
            assert all_there(plane, blobs, offsets)
            assert write_until_refused(plane.urza)[1].reason == "DISK_FULL"
            if narrow.relieve is not None:
                narrow.relieve()
                offsets.append(plane.oona.publish("t", BytesValue(value=b"there is room again")))
            # What makes room is done, and then there is more.
            collected = StoreAdmin(plane.channel("urza")).collect_garbage(0)
            assert collected.num_blobs >= len(blobs)
            again = plane.urza.write_blob(b"there is room again")
            assert plane.urza.read_blob(again) == b"there is room again"
            assert all_there(plane, {}, offsets)
            assert " 0 problems" in check("--address", server.address)
        server.stop()


# ------------------------------------------------------------ a disk that lies


def flip_in_file(path: Path, content: bytes) -> None:
    """Changes one bit of every place of a file where `content` stands."""
    held = path.read_bytes()
    assert content in held
    path.write_bytes(held.replace(content, bytes([content[0] ^ 1]) + content[1:]))


def rows_of(data: Path, service: str) -> Path:
    return data / service / "rows" / "data.mdb"


def test_an_event_that_the_disk_has_changed_is_found_and_gone_round(start_server: Start) -> None:
    server = start_server()
    values = [os.urandom(32) for _ in range(5)]
    with connect(server.address, timeout_s=CONNECT_S) as plane:
        for value in values:
            plane.oona.publish("t", BytesValue(value=value))
    server.stop()
    flip_in_file(rows_of(server.data, "oona"), values[2])
    server = start_server()
    place = ("--address", server.address)
    name = "topics/t/events/2"
    with connect(server.address, timeout_s=CONNECT_S) as plane:
        for status in (1, 0):  # before the check has put it aside, and after
            with plane.oona.subscribe("t", 0) as events:
                assert [next(events).offset for _ in range(2)] == [0, 1]
                error = refusal(lambda e=events: next(e))
            assert (error.code, error.reason) == (grpc.StatusCode.DATA_LOSS, "CORRUPT_AT_REST")
            with plane.oona.subscribe("t", int(error.metadata["next_offset"])) as events:
                assert [next(events).offset for _ in range(2)] == [3, 4]
            found = check("--quarantine", *place, status=status)
            told = f"damaged: {name}: its bytes are not those that were stored (moved" in found
            assert told is (status == 1)
        with plane.oona.subscribe_group("t", "g", 0) as given:
            got = [next(given) for _ in range(5)]
        assert sorted(r.event.offset for r in got if r.HasField("event")) == [0, 1, 3, 4]
        assert [(r.gap.first_offset, r.gap.next_offset) for r in got if r.HasField("gap")] == [
            (2, 3)
        ]
        assert plane.oona.publish("t", BytesValue(value=b"next")) == 5
        assert plane.urza.write_blob(b"the rest is served")


def test_a_record_and_a_report_that_the_disk_has_changed_are_found(start_server: Start) -> None:
    server = start_server("urza")
    with connect(server.address, timeout_s=CONNECT_S) as plane:
        plane.urza.create_blueprint(blueprints.get("affine"))
        damaged = plane.urza.create_kernel(new_kernel("affine"), tags=["zebra-stripes"]).name
        kept = plane.urza.create_kernel(new_kernel("affine")).name
        for reason in ("it grew well", "it paid its price"):
            plane.urza.record_field_report(
                library_pb2.FieldReport(
                    kernel=kept,
                    run="r",
                    reason=reason,
                    verdict=library_pb2.FIELD_VERDICT_CULLED,
                )
            )
    server.stop()
    rows = rows_of(server.data, "urza")
    # In the record, in the index and in the log of changes.
    flip_in_file(rows, b"zebra-stripes")
    flip_in_file(rows, b"it paid its price")
    server = start_server("urza")
    with connect(server.address, timeout_s=CONNECT_S) as plane:
        found = check("--quarantine", "--address", server.address, status=1)
        assert f"damaged: {damaged}: its record is not what was stored (moved" in found
        assert f"damaged: {kept}/reports/1: its record is not what was stored (moved" in found
        assert refusal(lambda: plane.urza.get_kernel(damaged)).code is grpc.StatusCode.DATA_LOSS
        assert plane.urza.get_kernel(kept).name == kept
        assert [r.reason for r in plane.urza.list_field_reports(kept)] == ["it grew well"]
        report = library_pb2.FieldReport(
            kernel=kept, run="r", verdict=library_pb2.FIELD_VERDICT_CULLED
        )
        assert plane.urza.record_field_report(report).name == f"{kept}/reports/2"


@pytest.mark.parametrize(("broken", "whole"), [("urza", "oona"), ("oona", "urza")])
@pytest.mark.parametrize("left", [0, 8192])
def test_truncated_rows_are_named_and_the_other_store_is_served(
    start_server: Start, broken: str, whole: str, left: int
) -> None:
    server = start_server()
    with connect(server.address, timeout_s=CONNECT_S) as plane:
        digest = plane.urza.write_blob(b"spark")
        plane.oona.publish("t", digest)
    server.stop(signal.SIGKILL)
    rows = rows_of(server.data, broken)
    os.truncate(rows, left)
    said = refused_start(server.data, "urza", "oona")
    assert str(rows) in said
    assert ("is truncated" if left else "has lost its rows") in said
    assert "restore it from a backup" in said
    found = check("--data", str(server.data), status=1)
    assert str(rows) in found
    assert {"urza": "store: ", "oona": "log: "}[whole] in found  # the other one is checked
    with connect(start_server(whole).address, timeout_s=CONNECT_S) as plane:
        if whole == "urza":
            assert plane.urza.read_blob(digest) == b"spark"
        else:
            assert plane.oona.list_topics()[0].next_offset == 1


# ------------------------------------------------------------ a stale lock


@pytest.mark.parametrize("content", [None, b"", b"1\n", b"no number", bytes(4096)])
def test_what_a_dead_server_has_left_locks_nothing(
    start_server: Start, short_dir: Path, content: bytes | None
) -> None:
    """Whatever stands in the files of locks, ours and LMDB's; process 1 runs, and holds none."""
    server = start_server()
    with connect(server.address, timeout_s=CONNECT_S) as plane:
        digest = plane.urza.write_blob(b"spark")
    server.stop(signal.SIGKILL)
    for service in ("urza", "oona"):
        if content is not None:
            (server.data / service / "lock").write_bytes(content)
            (server.data / service / "rows" / "lock.mdb").write_bytes(content)
    server = start_server()
    with connect(server.address, timeout_s=CONNECT_S) as plane:
        assert plane.urza.read_blob(digest) == b"spark"
    said = refused_start(server.data, "oona")
    assert said == (
        f"esper: {server.data}/oona is in use by another server (process {server.process.pid})"
    )


# ------------------------------------------------------------ a disk that fails to sync


def compiled(source: str, folder: Path) -> str:
    """Compiles a library to be preloaded, and returns its path."""
    library = folder / f"{source}.so"
    path = Path(__file__).with_name(source)
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", library, path, "-ldl"], check=True)
    return str(library)


def test_after_a_failed_sync_nothing_is_acknowledged_until_a_restart(
    start_server: Start, short_dir: Path
) -> None:
    failing = short_dir / "failing"
    shim = {"LD_PRELOAD": compiled("sync.c", short_dir), "SYNC_FAILS_FILE": str(failing)}
    server = start_server(environment=shim)
    large = os.urandom(300_000)
    with connect(server.address, timeout_s=CONNECT_S) as plane:
        kept_blob = plane.urza.write_blob(b"kept")
        plane.oona.publish("t", BytesValue(value=b"kept"))
        urza_stub = blob_pb2_grpc.BlobServiceStub(plane.channel("urza"))

        def write(data: bytes) -> None:
            # Without the retries of the client, which takes UNAVAILABLE for a restart.
            request = blob_pb2.WriteBlobRequest(digest=digest_of(data), data=data)
            with readable_errors():
                urza_stub.WriteBlob(iter([request]), timeout=CONNECT_S)

        failing.touch()
        error = refusal(lambda: write(large))  # a file of its own, which may be synced later
        assert error.code is grpc.StatusCode.UNAVAILABLE
        assert "the disk of the store failed" in error.message
        state = blob_pb2.QueryWriteRequest(digest=digest_of(large))
        assert urza_stub.QueryWrite(state, timeout=CONNECT_S).committed_size == 0
        for _ in range(2):
            for attempt in (
                lambda: write(b"lost"),
                lambda: plane.oona.publish("t", BytesValue(value=b"lost")),
            ):
                error = refusal(attempt)
                assert error.code is grpc.StatusCode.UNAVAILABLE
                assert "the store failed" in error.message
            # What the disk holds now is not known, whatever it says later.
            failing.unlink(missing_ok=True)
        assert plane.urza.read_blob(kept_blob) == b"kept"
        assert plane.oona.list_topics()[0].next_offset == 1
    server.stop(signal.SIGKILL)
    server = start_server(environment=shim)
    with connect(server.address, timeout_s=CONNECT_S) as plane:
        assert plane.urza.read_blob(kept_blob) == b"kept"
        assert plane.urza.read_blob(plane.urza.write_blob(large)) == large
        plane.oona.publish("t", BytesValue(value=b"more"))
        assert " 0 problems" in check("--address", server.address)


# ------------------------------------------------------------ a clock that jumps


class Clock:
    """The time of day of a server: that of the machine and an offset."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / "offset"
        self.set(0)
        self.environment = {
            "LD_PRELOAD": compiled("clock.c", folder),
            "CLOCK_OFFSET_FILE": str(self._file),
        }

    def set(self, offset_s: float) -> None:
        """Sets the clock to so many seconds from now, at once."""
        mode = "r+b" if self._file.exists() else "wb"
        with self._file.open(mode) as file:
            file.write(int(offset_s * 1e9).to_bytes(8, "little", signed=True))


@pytest.fixture
def clock(short_dir: Path) -> Iterator[Clock]:
    yield Clock(short_dir)


def publish(oona: OonaClient, number: int) -> int:
    return oona.publish("t", Int64Value(value=number), request_id=f"event-{number}")


def kept(oona: OonaClient, number: int) -> list[event_pb2.Event]:
    with oona.subscribe("t", 0) as events:
        return [next(events) for _ in range(number)]


def deliveries_until(
    given: Iterator[event_pb2.SubscribeResponse], enough: Callable[[dict[int, int]], bool]
) -> dict[int, int]:
    """Reads deliveries and returns the last number of each event's, by offset."""
    counts: dict[int, int] = {}
    while not enough(counts):
        delivery = next(given)
        counts[delivery.event.offset] = delivery.delivery_count
    return counts


@pytest.mark.parametrize("jump_s", [-400 * DAY_S, 400 * DAY_S])
def test_a_clock_that_jumps_loses_nothing_and_delays_nothing(
    start_server: Start, clock: Clock, jump_s: float
) -> None:
    server = start_server(environment=clock.environment)
    blob = os.urandom(300_000)
    digest = digest_of(blob)
    with connect(server.address, timeout_s=CONNECT_S) as plane:
        uploads = blob_pb2_grpc.BlobServiceStub(plane.channel("urza"))
        stored = plane.urza.write_blob(b"leased")
        first = blob_pb2.WriteBlobRequest(digest=digest, data=blob[:100_000])
        assert uploads.WriteBlob(iter([first]), timeout=CONNECT_S).committed_size == 100_000
        plane.oona.set_retention("t", max_age_s=3600)
        assert [publish(plane.oona, n) for n in range(5)] == list(range(5))
        oona = plane.oona
        with (
            oona.subscribe_group("t", "hasty", 0, 0.5) as hasty,
            oona.subscribe_group("t", "patient", 0, 3600.0) as patient,
        ):
            first = deliveries_until(hasty, lambda counts: len(counts) == 5)
            assert [next(patient).event.offset for _ in range(5)] == list(range(5))
            clock.set(jump_s)
            # Visible again after what has really passed: soon here, and not at all there.
            again = deliveries_until(hasty, lambda counts: len(counts) == 5)
            assert all(again[offset] > first[offset] for offset in range(5))
            assert publish(oona, 5) == 5
            newest = next(patient)
            assert (newest.event.offset, newest.delivery_count) == (5, 1)
        # A known request is known, order and times go on, retention by age drops nothing.
        assert [publish(plane.oona, n) for n in range(6)] == list(range(6))
        times_ns = [event.publish_time.ToNanoseconds() for event in kept(plane.oona, 6)]
        assert times_ns == sorted(times_ns)
        assert times_ns[-1] - times_ns[0] < DAY_S * 1e9
        # A lease goes on; what is to go at once goes.
        admin = StoreAdmin(plane.channel("urza"))
        assert admin.collect_garbage().num_blobs == 0
        assert plane.urza.read_blob(stored) == b"leased"
        # The upload goes on.
        state = uploads.QueryWrite(blob_pb2.QueryWriteRequest(digest=digest), timeout=CONNECT_S)
        assert state.committed_size == 100_000
        assert plane.urza.write_blob(blob) == digest
        assert admin.collect_garbage(0).num_blobs == 2
        revision = plane.urza.create_blueprint(blueprints.get("affine")).revision
        with plane.urza.watch(revision) as changes:
            assert next(c.revision for c in changes if c.HasField("blueprint")) == revision
    server.stop(signal.SIGKILL)
    clock.set(0)  # and back, while it does not run
    server = start_server(environment=clock.environment)
    with connect(server.address, timeout_s=CONNECT_S) as plane:
        assert [publish(plane.oona, n) for n in range(6)] == list(range(6))
        assert publish(plane.oona, 6) == 6
        times_ns = [event.publish_time.ToNanoseconds() for event in kept(plane.oona, 7)]
        assert times_ns == sorted(times_ns)
    server.stop()
    assert " 0 problems" in check("--data", str(server.data))
