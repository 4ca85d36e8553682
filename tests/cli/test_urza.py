"""`esper urza` on real servers and their directories, whole and damaged."""

import hashlib
import json
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from esper.cli.main import cli
from esper.common.rpc import RpcError
from esper.common.v1 import digest_pb2
from esper.plane import connect
from esper.plane.launch import server_command
from esper.plane.launch import server_environment

Start = Callable[..., object]
LARGE = 300_000


def esper_urza(*arguments: str, status: int = 0) -> str:
    """Runs `esper urza`; returns what it says, on stdout or as the line of an error."""
    run = CliRunner().invoke(cli, ["urza", *arguments])
    assert run.exit_code == status, (run.exit_code, run.output, run.exception)
    return run.output


def path_of(data: Path, digest: digest_pb2.Digest) -> Path:
    return data / "urza" / "blobs" / "files" / digest.hash[:2] / digest.hash


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_damage_is_found_quarantined_and_served_around(start_server: Start) -> None:
    """A running server with a damaged blob: the check tells, the rest is served, it can heal."""
    server = start_server("urza")
    place = ("--address", server.address)
    whole, broken = os.urandom(LARGE), os.urandom(LARGE)
    with connect(server.address, timeout_s=60) as plane:
        kept, digest = plane.urza.write_blob(whole), plane.urza.write_blob(broken)
        damage(path_of(server.data, digest))
        said = esper_urza("check", *place, status=1)
        assert (
            f"damaged: blobs/{digest.hash}/{LARGE}: its bytes are not those of its digest" in said
        )
        assert "1 problems" in said
        said = esper_urza("check", "--quarantine", *place, status=1)
        assert "(moved to quarantine)" in said
        assert "0 problems, 0 orphans" in esper_urza("check", *place)
        with pytest.raises(RpcError) as caught:
            plane.urza.read_blob(digest)
        assert caught.value.code.name == "DATA_LOSS"
        assert plane.urza.read_blob(kept) == whole
        assert json.loads(esper_urza("stats", "--json", *place))["numQuarantined"] == "1"
        plane.urza.write_blob(broken)
        assert plane.urza.read_blob(digest) == broken
        assert json.loads(esper_urza("stats", "--json", *place))["numQuarantined"] == "0"


def test_a_backup_brings_a_truncated_store_back(start_server: Start, short_dir: Path) -> None:
    """Backed up while it runs; then the rows are truncated: told by name, Oona served, restored."""
    server = start_server("urza", "oona")
    small, large = b"spark", os.urandom(LARGE)
    backup = short_dir / "backup"
    with connect(server.address, timeout_s=60) as plane:
        digests = [plane.urza.write_blob(small), plane.urza.write_blob(large)]
        plane.oona.publish("t", digests[0])
        assert "1 blob files" in esper_urza("backup", str(backup), "--address", server.address)
        # Brought up to date, it copies what is new.
        digests.append(plane.urza.write_blob(large + b"more"))
        esper_urza("backup", str(backup), "--address", server.address)
    server.stop(signal.SIGKILL)
    rows = server.data / "urza" / "rows" / "data.mdb"
    rows.write_bytes(rows.read_bytes()[:16_384])
    command = server_command(("urza", "oona"), server.address, server.data)
    run = subprocess.run(
        command, capture_output=True, text=True, env=server_environment(), timeout=60, check=False
    )
    assert run.returncode == 1
    assert f"esper: {rows} is truncated" in run.stderr.splitlines()[-1]
    assert "restore it from a backup" in run.stderr
    with connect(start_server("oona").address, timeout_s=60) as plane:  # the rest is served
        assert plane.oona.list_topics()[0].next_offset == 1
    data = short_dir / "restored"
    said = esper_urza("restore", str(backup), "--data", str(data))
    assert "0 problems" in said
    assert "exists: restore into a directory" in esper_urza(
        "restore", str(backup), "--data", str(data), status=1
    )
    again = start_server("urza", data=data, listen=f"unix:{short_dir}/b.sock")
    with connect(again.address, timeout_s=60) as plane:
        assert plane.urza.find_missing_blobs(digests) == []
        assert plane.urza.read_blob(digests[2]) == large + b"more"


def test_a_damaged_backup_is_not_restored(start_server: Start, short_dir: Path) -> None:
    server = start_server("urza")
    with connect(server.address, timeout_s=60) as plane:
        plane.urza.write_blob(os.urandom(LARGE))
    server.stop()
    backup, data = short_dir / "backup", short_dir / "restored"
    esper_urza("backup", str(backup), "--data", str(server.data))
    (file,) = (path for path in (backup / "blobs").rglob("*") if path.is_file())
    damage(file)
    said = esper_urza("restore", str(backup), "--data", str(data), status=1)
    assert "is not sound: 1 problems; nothing restored" in said
    assert not any(data.iterdir())
    (backup / "backup.json").unlink()
    said = esper_urza("restore", str(backup), "--data", str(data), status=1)
    assert "is no complete backup" in said


def test_a_served_directory_is_refused_and_names_the_server(start_server: Start) -> None:
    server = start_server("urza")
    for operation in ("stats", "check", "gc", "compact"):
        said = esper_urza(operation, "--data", str(server.data), status=1)
        assert said == (
            f"Error: {server.data}/urza is in use by another server "
            f"(process {server.process.pid})\n"
        )


def test_garbage_goes_and_the_file_shrinks(start_server: Start) -> None:
    server = start_server("urza")
    place = ("--address", server.address)
    with connect(server.address, timeout_s=60) as plane:
        digests = [plane.urza.write_blob(os.urandom(60_000)) for _ in range(20)]
        assert "removed 0 blobs" in esper_urza("gc", *place)
        assert "would remove 20 blobs" in esper_urza("gc", "--dry-run", "--grace", "0", *place)
        assert "removed 20 blobs" in esper_urza("gc", "--grace", "0", *place)
        assert plane.urza.find_missing_blobs(digests) == digests
    server.stop()
    rows = server.data / "urza" / "rows" / "data.mdb"
    before = rows.stat().st_size
    esper_urza("compact", "--data", str(server.data))
    assert rows.stat().st_size < before / 4
    assert "0 problems" in esper_urza("check", "--data", str(server.data))


def test_the_empty_blob_needs_no_upload(start_server: Start) -> None:
    server = start_server("urza")
    empty = digest_pb2.Digest(hash=hashlib.sha256(b"").hexdigest())
    with connect(server.address, timeout_s=60) as plane:
        assert plane.urza.find_missing_blobs([empty]) == []
        assert plane.urza.read_blob(empty) == b""
        assert "0 blobs" in esper_urza("check", "--address", server.address)
