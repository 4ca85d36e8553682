import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from esper.plane import EmbeddedPlane
from esper.plane import PlaneError
from esper.plane import connect

STORES = ("urza", "oona")


def test_a_plane_of_ones_own_comes_and_goes(tmp_path: Path, wait_gone: Callable[..., bool]) -> None:
    with EmbeddedPlane(tmp_path / "data", services=STORES) as embedded:
        folder = Path(embedded.address.removeprefix("unix:")).parent
        assert (folder.stat().st_mode & 0o777) == 0o700
        with connect(embedded.address) as plane:
            digest = plane.urza.write_blob(b"kept")
        pid = embedded.pid
        assert embedded.alive
    assert not embedded.alive
    assert not folder.exists()
    embedded.close()  # a second time has no effect
    assert wait_gone(pid)
    again = EmbeddedPlane(tmp_path / "data", services=STORES)
    with again, connect(again.address) as plane:
        assert plane.urza.read_blob(digest) == b"kept"


def test_a_plane_serves_everything_unless_told_otherwise() -> None:
    with EmbeddedPlane() as embedded, connect(embedded.address) as plane:
        health = plane.health()
        for service in ("urza", "tezzeret", "tamiyo", "oona"):
            assert any(name.startswith(f"esper.{service}.") for name in health)
            assert plane.channel(service) is plane.channel("urza")
        assert set(health.values()) == {"SERVING"}


def test_temporary_stores_go_with_the_plane() -> None:
    with EmbeddedPlane(services=("urza",)) as embedded:
        assert embedded.data_dir.is_dir()
    assert not embedded.data_dir.exists()


def test_a_plane_that_cannot_start_says_why(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(PlaneError, match="did not start: .*cannot create data directory"):
        EmbeddedPlane(tmp_path / "file" / "data", services=STORES)


def test_two_planes_do_not_share_a_store(tmp_path: Path) -> None:
    first = EmbeddedPlane(tmp_path, services=("oona",))
    complaint = rf"in use by another server \(process {first.pid}\)"
    with first, pytest.raises(PlaneError, match=complaint):
        EmbeddedPlane(tmp_path, services=("oona",))


def test_a_plane_that_takes_too_long_is_given_up(tmp_path: Path) -> None:
    with pytest.raises(PlaneError, match="not ready within 0.01 s"):
        EmbeddedPlane(tmp_path, startup_timeout_s=0.01, services=STORES)


PARENT = """
import os, time
from esper.plane import EmbeddedPlane
plane = EmbeddedPlane(services=("urza",))
# A child that outlives its parent keeps the pipe to the plane open.
child = os.fork()
if child == 0:
    time.sleep(60)
    os._exit(0)
print(plane.pid, child, plane.log_path.parent, flush=True)
time.sleep(60)
"""


def test_the_plane_and_its_folder_go_with_a_killed_parent(wait_gone: Callable[..., bool]) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        words = parent.stdout.readline().split()
        pid, child, folder = int(words[0]), int(words[1]), Path(words[2])
        assert folder.is_dir()
        os.kill(pid, 0)
        parent.kill()
        parent.wait()
        gone = wait_gone(pid)
        os.kill(child, signal.SIGKILL)
    assert gone
    assert not folder.exists()


def test_a_forked_child_does_not_stop_the_plane() -> None:
    with EmbeddedPlane(services=("urza",)) as embedded:
        child = os.fork()
        if child == 0:
            embedded.close()
            os._exit(0)
        os.waitpid(child, 0)
        assert embedded.alive
        with connect(embedded.address) as plane:
            assert plane.info.version


LOADER = """
import torch
from torch.utils.data import DataLoader, TensorDataset
from esper.plane import EmbeddedPlane, connect

with EmbeddedPlane(services=("urza", "oona")) as embedded, connect(embedded.address) as plane:
    digest = plane.urza.write_blob(b"before")
    with plane.oona.subscribe("control.kasmina.commands", 0):  # a stream with its own thread
        data = TensorDataset(torch.arange(64.0))
        for _ in range(3):
            loader = DataLoader(data, batch_size=8, num_workers=2)
            assert sum(float(batch.sum()) for (batch,) in loader) == 2016.0
            assert plane.urza.read_blob(digest) == b"before"
print("finished")
"""


@pytest.mark.timeout(90)
def test_forking_data_loaders_beside_an_open_plane_finish() -> None:
    run = subprocess.run(
        [sys.executable, "-c", LOADER], capture_output=True, text=True, timeout=80, check=False
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "finished"
    assert "fork" not in run.stderr
