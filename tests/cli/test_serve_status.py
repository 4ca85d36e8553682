import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from google.protobuf.wrappers_pb2 import Int64Value

from esper import __version__
from esper import blueprints
from esper.cli.status import format_duration
from esper.plane import connect

ESPER = str(Path(sys.executable).parent / "esper")


def run(*arguments: str, address: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [ESPER, *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, "ESPER_PLANE": address, "COLUMNS": "200"},
    )


def test_status_shows_what_a_plane_says(start_server: Callable[..., object]) -> None:
    server = start_server("urza", "oona")
    with connect(server.address, timeout_s=20) as plane:
        plane.urza.create_blueprint(blueprints.get("affine"))
        plane.oona.publish("a", Int64Value())
        plane.oona.publish("b", Int64Value())
    shown = run("status", address=server.address)
    assert (shown.returncode, shown.stderr) == (0, "")
    for text in (__version__, server.address, "esper.urza.v1.BlobService", "SERVING"):
        assert text in shown.stdout
    as_json = run("status", "--json", "--address", server.address, address="localhost:1")
    status = json.loads(as_json.stdout)
    assert status["version"] == __version__
    assert status["counts"] == {"blueprints": 1, "kernels": 0, "topics": 2}
    assert set(status["services"].values()) == {"SERVING"}
    assert status["uptime_s"] > 0
    assert status["data_dir"] == str(server.data)


def test_nobody_there_is_one_line_and_status_1(short_dir: Path) -> None:
    address = f"unix:{short_dir}/nobody.sock"
    shown = run("status", "--timeout", "0.3", address=address)
    assert (shown.returncode, shown.stdout) == (1, "")
    assert shown.stderr == f"esper: no plane answers on {address} within 0.3 s\n"
    senseless = run("status", "--address", "nowhere", address=address)
    assert senseless.returncode == 1
    assert len(senseless.stderr.splitlines()) == 1
    never = run("status", "--timeout", "-1", address=address)
    assert never.returncode == 2
    assert "'--timeout': -1.0 is not in the range x>0" in never.stderr


def test_serve_takes_its_defaults_from_the_environment(short_dir: Path) -> None:
    address = f"unix:{short_dir}/plane.sock"
    environment = {**os.environ, "ESPER_PLANE": address, "XDG_DATA_HOME": str(short_dir / "home")}
    with subprocess.Popen(
        [ESPER, "serve", "oona", "urza"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment,
    ) as server:
        assert server.stdout is not None
        assert server.stdout.readline() == f"esper plane ready: urza oona on {address}\n"
        with connect(address) as plane:
            assert plane.info.data_dir == str(short_dir / "home" / "esper")
        server.send_signal(signal.SIGTERM)
        assert server.wait(20) == 0


def test_serve_refuses_unknown_services(short_dir: Path) -> None:
    refused = run("serve", "jace", address=f"unix:{short_dir}/s")
    assert refused.returncode == 2
    assert "jace" in refused.stderr


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0 s"),
        (59.9, "59 s"),
        (60, "1 min 0 s"),
        (3_725, "1 h 2 min"),
        (90_000, "1 d 1 h"),
        (86_400, "1 d 0 h"),
    ],
)
def test_durations_are_for_people(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text
