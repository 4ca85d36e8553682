"""Calls GroMo in an environment of its own, for the comparison only."""

import json
import subprocess
from pathlib import Path

import numpy as np

from benchmarks.growth.arena import Outcome
from esper.tolaria.tasks import Task

LEARNING_RATE = 0.03
"""Chosen on validation data among 0.02, 0.03 and 0.05."""


def gromo(python: Path, task: Task, seed: int, split: str, folder: Path) -> Outcome:
    """Trains GroMo's variance transfer on a seed of the width arena.

    Args:
        python: Interpreter of an environment in which GroMo is installed.
        task: The digits of the seed.
        seed: Seed of initial weights and batches.
        split: ``test`` or ``validation``.
        folder: Folder for what the two processes tell each other.

    Raises:
        subprocess.CalledProcessError: If it fails.
    """
    data, out = folder / f"gromo-{seed}.npz", folder / f"gromo-{seed}.json"
    arrays = {}
    for name in ("train", "validation", "test"):
        part = getattr(task, name)
        arrays[f"{name}_x"] = part.inputs.flatten(1).numpy()
        arrays[f"{name}_y"] = part.targets.numpy()
    np.savez(data, **arrays)
    script = Path(__file__).with_name("gromo_arm.py")
    # -P: the folder of the script holds modules that are none of GroMo's business.
    command = [python, "-P", script, data, out, str(LEARNING_RATE), str(seed), "1", split]
    subprocess.run(command, check=True, capture_output=True, text=True)
    outcome = Outcome(**json.loads(out.read_text())[0])
    data.unlink()
    out.unlink()
    return outcome
