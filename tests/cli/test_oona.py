"""`esper oona` on real servers and their directories."""

import signal
from collections.abc import Callable
from pathlib import Path

from click.testing import CliRunner
from google.protobuf.wrappers_pb2 import BytesValue

from esper.cli.main import cli
from esper.plane import connect

Start = Callable[..., object]
NUM_EVENTS = 40


def esper(*arguments: str, status: int = 0) -> str:
    """Runs `esper`; returns what it says, on stdout or as the line of an error."""
    run = CliRunner().invoke(cli, arguments)
    assert run.exit_code == status, (run.exit_code, run.output, run.exception)
    return run.output


def body(number: int) -> BytesValue:
    return BytesValue(value=number.to_bytes(4, "big") * 250)


def test_a_backup_taken_while_served_brings_the_log_back(
    start_server: Start, short_dir: Path
) -> None:
    """Events, groups, retention and request ids are as they were at the moment of the backup."""
    server = start_server("urza", "oona")
    backup, data = short_dir / "backup", short_dir / "restored"
    with connect(server.address, timeout_s=60) as plane:
        for number in range(NUM_EVENTS - 1):
            plane.oona.publish("t", body(number))
        plane.oona.publish("t", body(NUM_EVENTS - 1), request_id="last")
        plane.oona.set_retention("t", max_bytes=1 << 20)
        with plane.oona.subscribe_group("t", "g", 0, 1.0, max_in_flight=3) as member:
            given = [next(member).event.offset for _ in range(3)]
        plane.oona.acknowledge("t", "g", given[:2])
        (then,) = plane.oona.list_topics()
        assert "wrote" in esper("oona", "backup", str(backup), "--address", server.address)
        plane.oona.publish("t", body(0))
    server.stop(signal.SIGKILL)
    assert "0 problems" in esper("oona", "restore", str(backup), "--data", str(data))
    again = start_server("oona", data=data, listen=f"unix:{short_dir}/b.sock")
    with connect(again.address, timeout_s=60) as plane:
        assert plane.oona.list_topics() == [then]
        with plane.oona.subscribe("t", 0) as events:
            for number in range(NUM_EVENTS):
                event = next(events)
                assert event.offset == number
                assert event.body.value == body(number).SerializeToString()
        last = plane.oona.publish("t", body(NUM_EVENTS - 1), request_id="last")
        assert last == NUM_EVENTS - 1
        assert plane.oona.publish("t", body(1)) == NUM_EVENTS
        with plane.oona.subscribe_group("t", "g") as member:
            again_given = next(r for r in member if r.event.offset < 3)
            assert again_given.event.offset == given[2]  # not acknowledged before the backup
            assert again_given.delivery_count >= 2


def test_a_backup_is_of_one_service_and_whole(start_server: Start, short_dir: Path) -> None:
    server = start_server("urza", "oona")
    logs, store, data = short_dir / "log", short_dir / "store", short_dir / "restored"
    with connect(server.address, timeout_s=60) as plane:
        plane.oona.publish("t", body(0))
        plane.urza.write_blob(b"spark")
    assert server.stop() == 0
    esper("oona", "backup", str(logs), "--data", str(server.data))
    esper("oona", "backup", str(logs), "--data", str(server.data))  # a later one takes its place
    esper("urza", "backup", str(store), "--data", str(server.data))
    said = esper("urza", "restore", str(logs), "--data", str(data), status=1)
    assert f"{logs} is a backup of oona, not of urza" in said
    said = esper("oona", "restore", str(store), "--data", str(data), status=1)
    assert f"{store} is a backup of urza, not of oona" in said
    said = esper("oona", "backup", str(store), "--data", str(server.data), status=1)
    assert f"{store} is a backup of urza, not of oona" in said
    rows = logs / "rows" / "data.mdb"
    rows.write_bytes(rows.read_bytes()[:8192])
    esper("oona", "restore", str(logs), "--data", str(data), status=1)
    assert not any(data.iterdir())
    esper("urza", "restore", str(store), "--data", str(data))
    said = esper("oona", "restore", str(logs), "--data", str(server.data), status=1)
    assert "exists: restore into a directory without a store" in said


def test_a_log_that_is_not_there_or_served_is_refused(start_server: Start, short_dir: Path) -> None:
    server = start_server("oona")
    said = esper("oona", "compact", "--data", str(server.data), status=1)
    assert f"is in use by another server (process {server.process.pid})" in said
    empty = short_dir / "empty"
    empty.mkdir()
    said = esper("oona", "compact", "--data", str(empty), status=1)
    assert f"{empty} holds no log of Oona" in said


def test_the_file_shrinks(start_server: Start) -> None:
    server = start_server("oona")
    with connect(server.address, timeout_s=60) as plane:
        plane.oona.publish_many("t", [body(number) for number in range(1000)])
        assert plane.oona.set_retention("t", max_bytes=1024).first_offset == 999
    assert server.stop() == 0
    rows = server.data / "oona" / "rows" / "data.mdb"
    before = rows.stat().st_size
    esper("oona", "compact", "--data", str(server.data))
    assert rows.stat().st_size < before / 2
    assert "0 problems" in esper("urza", "check", "--data", str(server.data))
    again = start_server("oona", data=server.data)
    with connect(again.address, timeout_s=60) as plane:
        assert plane.oona.publish("t", body(1)) == 1000
