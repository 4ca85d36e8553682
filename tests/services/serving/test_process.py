"""A server as its operator sees it: start, stop, and the reasons not to start."""

import hashlib
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2

from esper.common.rpc import RpcError
from esper.common.v1 import digest_pb2
from esper.plane import connect
from esper.plane.launch import server_command
from esper.plane.launch import server_environment
from esper.services.serving.__main__ import main
from esper.urza.v1 import blob_pb2
from esper.urza.v1 import blob_pb2_grpc

Start = Callable[..., object]


def refusal(*arguments: str) -> str:
    """Returns the one line that a server says instead of starting."""
    run = subprocess.run(
        [sys.executable, "-P", "-m", "esper.services.serving", *arguments],
        capture_output=True,
        text=True,
        env=server_environment(),
        timeout=60,
        check=False,
    )
    assert run.returncode == 1, (run.returncode, run.stderr)
    assert run.stdout == ""
    lines = run.stderr.splitlines()
    assert len(lines) == 1, run.stderr
    assert lines[0].startswith("esper: ")
    return lines[0]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_open_streams_and_the_server_cleanly(
    start_server: Start, number: signal.Signals
) -> None:
    server = start_server("oona", listen="127.0.0.1:0")
    with connect(server.address, timeout_s=20) as plane:
        watch = plane.channel("oona").unary_stream(
            "/grpc.health.v1.Health/Watch",
            request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
            response_deserializer=health_pb2.HealthCheckResponse.FromString,
        )(health_pb2.HealthCheckRequest(service=""))
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        plane.oona.publish("a", digest_pb2.Digest())
        events = plane.oona.subscribe("a", 0)
        assert next(events).offset == 0
        server.process.send_signal(number)
        assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
        with pytest.raises(RpcError) as caught:
            next(events)
        assert caught.value.code is grpc.StatusCode.UNAVAILABLE
        watch.cancel()
    assert server.process.wait(20) == 0
    log = server.log.read_text()
    assert "stopped" in log
    assert "Traceback" not in log


def test_a_call_under_way_may_end_while_the_server_drains(start_server: Start) -> None:
    server = start_server("urza")
    data = os.urandom(200_000)
    digest = digest_pb2.Digest(hash=hashlib.sha256(data).hexdigest(), size_bytes=len(data))
    draining = threading.Event()

    def upload() -> Iterator[blob_pb2.WriteBlobRequest]:
        yield blob_pb2.WriteBlobRequest(digest=digest, data=data[:100_000])
        assert draining.wait(20)
        yield blob_pb2.WriteBlobRequest(write_offset=100_000, data=data[100_000:])

    with connect(server.address, timeout_s=20) as plane:
        call = blob_pb2_grpc.BlobServiceStub(plane.channel("urza")).WriteBlob.future(upload())
        partial = server.data / "urza" / "blobs" / "partial"
        deadline_s = time.monotonic() + 20
        while not any(partial.iterdir()) and time.monotonic() < deadline_s:
            time.sleep(0.01)
        server.process.send_signal(signal.SIGTERM)
        while "draining" not in server.log.read_text() and time.monotonic() < deadline_s:
            time.sleep(0.01)
        draining.set()
        assert call.result(20).committed_size == len(data)
    assert server.process.wait(20) == 0
    with connect(start_server("urza").address, timeout_s=20) as plane:
        assert plane.urza.read_blob(digest) == data


def test_the_socket_is_private_and_goes_with_the_server(
    start_server: Start, short_dir: Path
) -> None:
    server = start_server("oona", listen=f"unix:{short_dir}/deep/plane.sock")
    path = short_dir / "deep" / "plane.sock"
    assert path.is_socket()
    assert (path.stat().st_mode & 0o077) == 0
    assert (path.parent.stat().st_mode & 0o077) == 0
    assert ((short_dir / "data" / "oona").stat().st_mode & 0o077) == 0
    assert server.stop() == 0
    assert not path.exists()


def test_the_socket_of_a_dead_server_is_replaced_and_of_a_live_one_not(
    start_server: Start, short_dir: Path
) -> None:
    first = start_server("oona")
    first.stop(signal.SIGKILL)
    assert (short_dir / "plane.sock").is_socket()
    second = start_server("oona")
    assert second.address == first.address
    line = refusal("oona", "--listen", second.address, "--data", str(short_dir / "other"))
    assert line == f"esper: {second.address} is in use by a running server"
    with connect(second.address) as plane:
        assert plane.oona.list_topics() == []


def test_a_second_server_on_the_same_data_is_told_who_has_it(
    start_server: Start, short_dir: Path
) -> None:
    first = start_server("urza")
    line = refusal("urza", "--listen", f"unix:{short_dir}/b.sock", "--data", str(first.data))
    assert line.endswith(f"/urza is in use by another server (process {first.process.pid})")


def test_the_same_data_serves_other_services(start_server: Start, short_dir: Path) -> None:
    start_server("urza")
    other = start_server("oona", listen=f"unix:{short_dir}/b.sock")
    with connect(other.address) as plane:
        assert plane.oona.list_topics() == []


def test_a_port_in_use_is_refused(start_server: Start, short_dir: Path) -> None:
    server = start_server("oona", listen="127.0.0.1:0")
    line = refusal("oona", "--listen", server.address, "--data", str(short_dir / "other"))
    assert line == f"esper: cannot listen on {server.address}: it is in use"


def test_reasons_not_to_start(short_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refusal(*arguments: str) -> str:  # a process for each would cost a second for each
        mask = os.umask(0o077)
        handlers = logging.getLogger().handlers[:]
        assert main(arguments) == 1
        logging.getLogger().handlers[:] = handlers
        os.umask(mask)
        said = capsys.readouterr()
        assert said.out == ""
        return said.err

    data = str(short_dir / "data")
    plain = short_dir / "plain"
    plain.write_text("")
    assert "must be unix:PATH or HOST:PORT" in refusal("oona", "--listen", "x", "--data", data)
    line = refusal("oona", "--listen", "0.0.0.0:0", "--data", data)
    assert "TLS" in line
    assert "--insecure" in line
    line = refusal("oona", "--listen", f"unix:{plain}", "--data", data)
    assert line.endswith("exists and is not a socket\n")
    assert plain.exists()
    line = refusal("oona", "--listen", f"unix:{short_dir}/s", "--data", str(plain / "data"))
    assert "cannot create data directory" in line
    assert "unknown" in refusal("jace", "--data", data)
    (short_dir / "data" / "oona").mkdir(parents=True)
    (short_dir / "data" / "oona" / "rows").write_text("not a directory")
    line = refusal("oona", "--listen", f"unix:{short_dir}/s", "--data", data)
    assert "cannot open the store" in line


def test_insecure_opens_other_addresses(start_server: Start) -> None:
    server = start_server("oona", listen="0.0.0.0:0", insecure=True)
    port = server.address.rpartition(":")[2]
    with connect(f"127.0.0.1:{port}") as plane:
        assert plane.oona.list_topics() == []


def test_log_lines_can_be_json(start_server: Start) -> None:
    server = start_server("oona", log_json=True)
    with connect(server.address) as plane:
        plane.oona.list_topics()
    assert server.stop() == 0
    entries = [json.loads(line) for line in server.log.read_text().splitlines()]
    calls = [entry for entry in entries if entry["logger"] == "esper.call"]
    assert [call["method"].rpartition("/")[2] for call in calls] == ["GetPlaneInfo", "ListTopics"]
    assert all(call["code"] == "OK" and call["level"] == "INFO" for call in calls)


def test_urza_alone_serves_nothing_else(start_server: Start) -> None:
    server = start_server("urza")
    with connect(server.address) as plane:
        packages = {name.split(".")[1] for name in plane.info.services}
    assert packages == {"plane", "urza"}


BUF = shutil.which("buf", path=str(Path(sys.executable).parent))


def buf_curl(url: str, *options: str) -> str:
    assert BUF is not None, "buf-bin is one of the development requirements"
    command = [BUF, "curl", "--protocol", "grpc", "--http2-prior-knowledge", *options, url]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.mark.parametrize("kind", ["tcp", "unix"])
def test_tools_reach_the_services_by_reflection(
    start_server: Start, short_dir: Path, kind: str
) -> None:
    listen = "127.0.0.1:0" if kind == "tcp" else f"unix:{short_dir}/plane.sock"
    server = start_server("urza", "oona", listen=listen)
    with connect(server.address) as plane:
        digest = plane.urza.write_blob(b"spark")
    place: tuple[str, ...] = ()
    base = f"http://{server.address}"
    if kind == "unix":
        place = ("--unix-socket", str(short_dir / "plane.sock"))
        base = "http://localhost"
    methods = buf_curl(base, "--list-methods", *place).split()
    assert "esper.urza.v1.LibraryService/ListKernels" in methods
    assert "esper.oona.v1.EventService/Subscribe" in methods
    assert "grpc.health.v1.Health/Check" in methods
    answer = buf_curl(f"{base}/esper.plane.v1.PlaneService/GetPlaneInfo", *place)
    assert "esper.urza.v1.BlobService" in json.loads(answer)["services"]
    request = json.dumps({"digest": {"hash": digest.hash, "sizeBytes": digest.size_bytes}})
    stream = buf_curl(f"{base}/esper.urza.v1.BlobService/ReadBlob", "-d", request, *place)
    assert json.loads(stream) == {"data": "c3Bhcms="}


def test_a_slow_start_does_not_turn_clients_away(start_server: Start, short_dir: Path) -> None:
    """A client may come before the server and is answered once it is there."""
    address = f"unix:{short_dir}/plane.sock"
    answers: list[str] = []

    def ask() -> None:
        with connect(address, timeout_s=60) as plane:
            answers.append(plane.info.version)

    thread = threading.Thread(target=ask)
    thread.start()
    start_server("oona", listen=address)
    thread.join()
    assert len(answers) == 1


def test_exit_with_parent_needs_a_pipe(short_dir: Path) -> None:
    command = server_command(
        ("oona",), f"unix:{short_dir}/s", short_dir / "data", scratch=short_dir
    )
    run = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env=server_environment(),
        timeout=60,
        check=False,
    )
    assert (run.returncode, run.stderr.strip()) == (
        1,
        "esper: --exit-with-parent needs a pipe as stdin",
    )
