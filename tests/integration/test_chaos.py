"""The short form of `make chaos-train`: a run that is killed over and over ends equal."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

CHAOS = Path(__file__).parents[2] / "benchmarks" / "chaos" / "run.py"


@pytest.mark.timeout(400)
def test_a_run_that_is_killed_with_its_plane_ends_equal(tmp_path: Path) -> None:
    out = tmp_path / "results.json"
    command = [sys.executable, str(CHAOS), "--kills", "3", "--kills-per-run", "3"]
    command += ["--epochs", "6", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=390)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads(out.read_text())
    assert sum(results["kills"].values()) == 3
    assert all(run["equal"] for run in results["runs"])
