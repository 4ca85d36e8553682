"""growth.png: how a model grew, at a glance."""

import math
from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from esper.tolaria.history import History
from esper.tolaria.history import LifecycleEvent

PLOT_FILE = "growth.png"

_VERDICT_STYLES = {
    "FOSSILIZED": ("o", "tab:green"),
    "CULLED": ("X", "tab:red"),
    "CANCELLED": ("X", "tab:orange"),
    "ROLLED_BACK": ("X", "tab:purple"),
}
_LEGEND_ROWS = 12


@dataclass(frozen=True, slots=True)
class Series:
    """Points of one curve.

    Attributes:
        steps: Optimizer steps, ascending.
        values: One value per step.
    """

    steps: Sequence[int]
    values: Sequence[float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Curves:
    """What the plot shows of one run.

    Attributes:
        train_loss: Mean training loss per epoch, where it was measured.
        held_out_loss: Held-out loss at the end of each epoch that measured it.
        alphas: Alpha of every seed that ever held a kernel, by (slot, seed).
        parameters: Trainable elements of the model.
        events: Lifecycle events, for marks.
    """

    train_loss: Series
    held_out_loss: Series
    alphas: Mapping[tuple[str, int], Series]
    parameters: Series
    events: Sequence[LifecycleEvent]


def growth_curves(history: History) -> Curves:
    """Returns the curves of a run: its epoch records, and alpha where lifecycle events tell it."""
    epochs = history.epochs
    return Curves(
        train_loss=_measured((epoch.step, epoch.train_loss) for epoch in epochs),
        held_out_loss=_measured((epoch.step, epoch.held_out_loss) for epoch in epochs),
        alphas=_alphas(history),
        parameters=Series([epoch.step for epoch in epochs], [epoch.parameters for epoch in epochs]),
        events=tuple(history.events),
    )


def _measured(points: Iterable[tuple[int, float | None]]) -> Series:
    known = [(step, value) for step, value in points if value is not None]
    return Series([step for step, _ in known], [value for _, value in known])


def _alphas(history: History) -> dict[tuple[str, int], Series]:
    """Alpha over steps: 0 until GRAFTING, 1 from STABILIZATION on, 0 and a gap once removed."""
    points: dict[tuple[str, int], list[tuple[int, float]]] = {}
    for event in history.events:
        track = points.setdefault((event.slot, event.seed), [])
        if event.after in ("GERMINATED", "TRAINING", "GRAFTING"):
            track.append((event.step, 0.0))
        elif event.after == "STABILIZATION":
            track.append((event.step, 1.0))
        elif event.after in ("CULLED", "CANCELLED", "ROLLED_BACK") and track:
            # The gap keeps a later graft in the same seed from being joined to this one.
            track += [(event.step, track[-1][1]), (event.step, 0.0), (event.step, math.nan)]
    for epoch in history.epochs:
        for key, alpha in epoch.alphas.items():
            points.setdefault(key, []).append((epoch.step, alpha))
    return {
        key: Series([step for step, _ in ordered], [alpha for _, alpha in ordered])
        for key, track in points.items()
        for ordered in [sorted(track, key=lambda point: point[0])]
    }


def plot_growth(history: History, path: Path, *, title: str = "How the model grew") -> None:
    """Draws losses, alphas and parameters over optimizer steps into a PNG.

    Args:
        history: The run to draw.
        path: File to write; its folder must exist.
        title: Heading of the figure.
    """
    # Imported late, and without pyplot, which would pick a window system and keep global figures.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    curves = growth_curves(history)
    figure = Figure(figsize=(10, 9), layout="constrained")
    FigureCanvasAgg(figure)
    losses, alphas, parameters = figure.subplots(3, 1, sharex=True)
    figure.suptitle(title)

    losses.plot(curves.train_loss.steps, curves.train_loss.values, label="training")
    losses.plot(curves.held_out_loss.steps, curves.held_out_loss.values, label="held-out")
    losses.set_ylabel("loss")
    losses.set_yscale("log")
    losses.legend(loc="upper right")

    for (slot, seed), series in curves.alphas.items():
        alphas.plot(series.steps, series.values, label=f"{slot}[{seed}]", alpha=0.85)
    for word, (marker, colour) in _VERDICT_STYLES.items():
        verdicts = [event for event in curves.events if event.after == word]
        if verdicts:
            level = 1.0 if word == "FOSSILIZED" else 0.0
            alphas.scatter(
                [event.step for event in verdicts],
                [level] * len(verdicts),
                marker=marker,
                color=colour,
                s=60,
                zorder=3,
                label=word.lower().replace("_", " "),
            )
    alphas.set_ylabel("alpha of each seed")
    alphas.set_ylim(-0.08, 1.08)
    rows = len(curves.alphas) + len(_VERDICT_STYLES)
    if curves.alphas:
        alphas.legend(
            loc="upper left",
            bbox_to_anchor=(1.01, 1.0),
            ncols=1 + rows // (_LEGEND_ROWS + 1),
            fontsize="small",
        )
    else:
        alphas.text(0.5, 0.5, "no seed germinated", transform=alphas.transAxes, ha="center")

    parameters.plot(
        curves.parameters.steps, curves.parameters.values, drawstyle="steps-post", color="tab:gray"
    )
    parameters.set_ylabel("trainable parameters")
    parameters.set_ylim(bottom=0)
    parameters.set_xlabel("optimizer steps")

    for axes in (losses, alphas, parameters):
        axes.grid(alpha=0.3)
        for event in curves.events:
            if event.after == "FOSSILIZED":
                axes.axvline(event.step, color="tab:green", alpha=0.35, linewidth=1)
    figure.savefig(path, dpi=120)
