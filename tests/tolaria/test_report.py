"""report.json, the table, the time line and growth.png are what a run leaves for people."""

import io
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from esper.tolaria import plots
from esper.tolaria import report
from esper.tolaria.history import EpochRecord
from esper.tolaria.history import History
from esper.tolaria.history import LifecycleEvent

KERNEL = "0123456789abcdef" * 4


def event(step: int, after: str, *, before: str = "TRAINING", seed: int = 0) -> LifecycleEvent:
    return LifecycleEvent(
        epoch=step // 10,
        step=step,
        slot="net.0",
        seed=seed,
        before=before,
        after=after,
        kernel=KERNEL,
        reason=f"because of step {step}",
    )


def record(step: int, alphas: dict[tuple[str, int], float], loss: float = 1.0) -> EpochRecord:
    return EpochRecord(
        epoch=step // 10 - 1,
        step=step,
        train_loss=loss,
        held_out_loss=loss + 0.1,
        parameters=100 + 10 * len(alphas),
        flops=step * 1000,
        alphas=alphas,
    )


@pytest.fixture
def history() -> History:
    key = ("net.0", 0)
    return History(
        events=[
            event(10, "GERMINATED", before="DORMANT"),
            event(11, "TRAINING", before="GERMINATED"),
            event(15, "GRAFTING"),
            event(25, "STABILIZATION", before="GRAFTING"),
            event(28, "EVALUATING", before="STABILIZATION"),
            event(30, "FOSSILIZED", before="EVALUATING"),
            event(30, "GERMINATED", before="DORMANT", seed=1),
            event(32, "GRAFTING", seed=1),
            event(36, "CULLED", before="GRAFTING", seed=1),
        ],
        epochs=[
            record(10, {}, 2.0),
            record(20, {key: 0.5}, 1.0),
            record(30, {key: 1.0}, 0.5),
            record(40, {key: 1.0}, 0.25),
        ],
    )


ARMS = [
    report.Arm(
        name="static small", test_accuracy=0.9, parameters=610, flops=12_345_678, wall_s=1.25
    ),
    report.Arm(name="grown", test_accuracy=35 / 36, parameters=5418, flops=999, wall_s=2.5),
]


def test_report_json_has_the_promised_schema_and_loses_no_bit(
    tmp_path: Path, history: History
) -> None:
    document = report.Report(task="digits", seed=7, arms=ARMS, events=history.events)
    path = document.write(tmp_path)
    assert path == tmp_path / "report.json"
    assert [file.name for file in tmp_path.iterdir()] == ["report.json"]
    data = json.loads(path.read_text())
    assert list(data) == ["task", "seed", "arms", "events", "versions"]
    assert (data["task"], data["seed"]) == ("digits", 7)
    assert data["arms"][1] == {
        "name": "grown",
        "test_accuracy": 35 / 36,
        "parameters": 5418,
        "flops": 999,
        "wall_s": 2.5,
    }
    assert data["events"][0] == {
        "epoch": 1,
        "step": 10,
        "slot": "net.0",
        "seed": 0,
        "from": "DORMANT",
        "to": "GERMINATED",
        "kernel": KERNEL,
        "reason": "because of step 10",
    }
    assert len(data["events"]) == len(history.events)
    assert {"esper", "torch", "python", "scikit-learn"} <= set(data["versions"])


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0"),
        (999, "999"),
        (1000, "1 k"),
        (12_345_678, "12.3 M"),
        (2.5e9, "2.5 G"),
        (3e12, "3 T"),
    ],
)
def test_counts_are_read_at_a_glance(count: float, text: str) -> None:
    assert report.format_count(count) == text


def test_printed_report_names_every_arm_and_every_event(history: History) -> None:
    out = io.StringIO()
    console = Console(file=out, width=100)
    report.print_report(
        console, report.Report(task="digits", seed=0, arms=ARMS, events=history.events)
    )
    text = out.getvalue()
    assert re.search(r"static small\W+90\.00 %\W+610\W+12\.3 M\W+1\.2 s", text)
    assert re.search(r"grown\W+97\.22 %\W+5,418\W+999\W+2\.5 s", text)
    lines = [line for line in text.splitlines() if "->" in line]
    assert len(lines) == len(history.events)
    assert "EVALUATING -> FOSSILIZED" in lines[5]
    assert all(e.reason in line for e, line in zip(history.events, lines, strict=True))


def test_names_with_brackets_are_printed_as_they_are() -> None:
    """`net[0]` looks like rich markup, and `[/]` would even raise."""
    odd = LifecycleEvent(
        epoch=0, step=0, slot="a[/]", seed=0, before="[b]", after="X", kernel="", reason="[red]"
    )
    assert report.event_line(odd).plain.split("step     0  ")[1] == "a[/][0]  [b] -> X  [red]"


def test_alpha_curves_hold_the_exact_ends_of_every_ramp(history: History) -> None:
    curves = plots.growth_curves(history)
    first, second = curves.alphas[("net.0", 0)], curves.alphas[("net.0", 1)]
    assert list(zip(first.steps, first.values, strict=True)) == [
        (10, 0.0),
        (11, 0.0),
        (15, 0.0),
        (20, 0.5),
        (25, 1.0),
        (30, 1.0),
        (40, 1.0),
    ]
    assert list(second.steps[-2:]) == [36, 36]
    assert second.values[-2] == 0.0
    assert math.isnan(second.values[-1]), "a gap to whatever grows there next"
    assert list(curves.parameters.values) == [100, 110, 110, 110]
    assert list(curves.train_loss.values) == [2.0, 1.0, 0.5, 0.25]


def test_epochs_without_a_measured_training_loss_are_no_zeros() -> None:
    unmeasured = EpochRecord(
        epoch=0, step=10, train_loss=None, held_out_loss=1.0, parameters=1, flops=1, alphas={}
    )
    curves = plots.growth_curves(History(epochs=[unmeasured, record(20, {}, 0.5)]))
    assert (list(curves.train_loss.steps), list(curves.train_loss.values)) == ([20], [0.5])


def test_growth_plot_has_three_panels_with_curves(tmp_path: Path, history: History) -> None:
    empty, full = tmp_path / "empty.png", tmp_path / "full.png"
    bare = History(epochs=history.epochs)
    plots.plot_growth(bare, empty)
    plots.plot_growth(history, full)
    for path in (empty, full):
        with Image.open(path) as image:
            assert image.format == "PNG"
            assert image.width >= 1000
            assert image.height >= 900
            pixels = np.asarray(image.convert("RGB"))
        thirds = np.array_split(pixels, 3)
        assert all((third < 250).any() for third in thirds)
    assert full.read_bytes() != empty.read_bytes()
    with Image.open(full) as image:
        green = np.array([44, 160, 44])  # the fossilisation mark and its lines
        close = (np.abs(np.asarray(image.convert("RGB")).astype(int) - green) < 6).all(axis=-1)
        assert close.sum() > 30
