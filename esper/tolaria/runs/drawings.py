"""The drawings of a run's report, as SVG."""

import io
from collections.abc import Mapping
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from esper.tolaria.history import History
from esper.tolaria.history import LifecycleEvent
from esper.tolaria.history import SeedAttribution
from esper.tolaria.plots import Series
from esper.tolaria.plots import growth_curves

STATE_COLOURS = {
    "GERMINATED": "#cfe8f3",
    "TRAINING": "#9ecae1",
    "GRAFTING": "#4292c6",
    "STABILIZATION": "#6a51a3",
    "EVALUATING": "#9e9ac8",
    "FINE_TUNING": "#74c476",
    "FOSSILIZED": "#238b45",
    "CULLED": "#cb181d",
    "CANCELLED": "#fd8d3c",
    "ROLLED_BACK": "#67000d",
}
"""Colour of every state that a lane shows."""

_GONE = ("CULLED", "CANCELLED", "ROLLED_BACK", "DORMANT")


def _svg(figure: Figure) -> str:
    FigureCanvasSVG(figure)
    file = io.StringIO()
    # Without a date and with fixed ids, equal runs give equal pages.
    figure.savefig(file, format="svg", metadata={"Date": None})
    text = file.getvalue()
    return text[text.index("<svg") :]


def losses(history: History) -> str:
    """Draws training and held-out loss over optimizer steps."""
    curves = growth_curves(history)
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    axes = figure.subplots()
    axes.plot(curves.train_loss.steps, curves.train_loss.values, label="training")
    axes.plot(curves.held_out_loss.steps, curves.held_out_loss.values, label="held-out")
    if curves.train_loss.values or curves.held_out_loss.values:
        axes.set_yscale("log")
    axes.set_ylabel("loss")
    _mark_rollbacks(axes, history)
    axes.legend()
    _finish(axes)
    return _svg(figure)


def size(history: History) -> str:
    """Draws parameters and operations spent over optimizer steps."""
    steps = [epoch.step for epoch in history.epochs]
    figure = Figure(figsize=(9, 2.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.step(steps, [epoch.parameters for epoch in history.epochs], where="post")
    left.set_ylabel("trainable parameters")
    left.set_ylim(bottom=0)
    right.plot(steps, [epoch.flops for epoch in history.epochs])
    right.set_ylabel("operations spent")
    right.set_ylim(bottom=0)
    _finish(left)
    _finish(right)
    return _svg(figure)


def lanes(history: History) -> str:
    """Draws the life of every seed as a lane: its states as colours, its alpha as a line."""
    lives = _lives(history.events)
    figure = Figure(figsize=(9, 0.9 + 0.5 * max(1, len(lives))), layout="constrained")
    axes = figure.subplots()
    end = history.epochs[-1].step if history.epochs else 1
    alphas: Mapping[tuple[str, int], Series] = growth_curves(history).alphas
    shown: set[str] = set()
    for lane, (key, events) in enumerate(lives.items()):
        for event, after in zip(events, [*events[1:], None], strict=True):
            stop = end if after is None else after.step
            if event.after in _GONE:
                if event.after in STATE_COLOURS:
                    colour = STATE_COLOURS[event.after]
                    axes.plot(event.step, lane, marker="x", color=colour, markersize=8)
                    shown.add(event.after)
                continue
            axes.barh(
                lane,
                max(stop - event.step, end / 400),
                left=event.step,
                height=0.8,
                color=STATE_COLOURS[event.after],
            )
            shown.add(event.after)
        series = alphas.get(key)
        if series is not None:
            heights = [lane + 0.4 - 0.8 * alpha for alpha in series.values]  # the axis points down
            axes.plot(series.steps, heights, color="black", linewidth=1)
    axes.set_yticks(range(len(lives)), [f"{slot}[{seed}]" for slot, seed in lives])
    axes.set_xlim(0, end)
    axes.invert_yaxis()
    _mark_rollbacks(axes, history)
    if not lives:
        axes.text(0.5, 0.5, "no seed germinated", transform=axes.transAxes, ha="center")
    for state in STATE_COLOURS:
        if state in shown:
            axes.bar(0, 0, color=STATE_COLOURS[state], label=state.lower().replace("_", " "))
    if shown:
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize="small")
    _finish(axes)
    return _svg(figure)


def trials(history: History) -> str:
    """Draws the gain of every held-out trial with its 95 percent interval and its price."""
    records = history.trials
    figure = Figure(figsize=(9, 0.9 + 0.35 * max(1, len(records))), layout="constrained")
    axes = figure.subplots()
    for lane, trial in enumerate(records):
        colour = STATE_COLOURS["FOSSILIZED" if trial.accepted else "CULLED"]
        axes.plot([trial.low, trial.high], [lane, lane], color=colour, linewidth=2)
        axes.plot(trial.gain, lane, marker="o", color=colour)
        axes.plot(trial.price, lane, marker="|", color="black", markersize=12)
    axes.axvline(0, color="gray", linewidth=1)
    names = [f"epoch {one.epoch}  {one.slot}[{one.seed}]" for one in records]
    axes.set_yticks(range(len(records)), names)
    axes.set_xlabel("held-out loss that the seed saves; the bar is its price")
    axes.invert_yaxis()
    axes.grid(alpha=0.3)
    return _svg(figure)


def attribution(records: Sequence[SeedAttribution]) -> str:
    """Draws what each live seed saves of the held-out loss, with its 95 percent interval."""
    figure = Figure(figsize=(9, 0.9 + 0.35 * max(1, len(records))), layout="constrained")
    axes = figure.subplots()
    for lane, record in enumerate(records):
        axes.plot([record.low, record.high], [lane, lane], color="#238b45", linewidth=2)
        axes.plot(record.gain, lane, marker="o", color="#238b45")
    axes.axvline(0, color="gray", linewidth=1)
    axes.set_yticks(range(len(records)), [f"{one.slot}[{one.seed}]" for one in records])
    axes.set_xlabel("held-out loss that the seed saves")
    axes.invert_yaxis()
    axes.grid(alpha=0.3)
    return _svg(figure)


def structure(parts: Sequence[tuple[str, int, Sequence[tuple[str, int]]]]) -> str:
    """Draws the host's modules as boxes, as wide as they have parameters, with their grafts.

    Args:
        parts: Name and parameters of every module that holds some, in order, each with label and
            parameters of its grafts.
    """
    figure = Figure(figsize=(9, 0.9 + 0.4 * max(1, len(parts))), layout="constrained")
    axes = figure.subplots()
    for lane, (_, parameters, grafts) in enumerate(parts):
        axes.barh(lane, parameters, height=0.7, color="#bdbdbd")
        left = parameters
        for label, graft_parameters in grafts:
            axes.barh(
                lane, graft_parameters, left=left, height=0.7, color=STATE_COLOURS["FOSSILIZED"]
            )
            axes.text(left, lane, f" {label}", va="center", fontsize="small", color="white")
            left += graft_parameters
    axes.set_yticks(range(len(parts)), [name for name, _, _ in parts])
    axes.set_xlabel("parameters: the host's in gray, the grafts' in green")
    axes.invert_yaxis()
    return _svg(figure)


def _mark_rollbacks(axes: Axes, history: History) -> None:
    for number, one in enumerate(history.rollbacks):
        axes.axvspan(
            one.to_step,
            one.step,
            color=STATE_COLOURS["ROLLED_BACK"],
            alpha=0.15,
            label="undone" if number == 0 else None,
        )


def _finish(axes: Axes) -> None:
    axes.set_xlabel("optimizer steps")
    axes.grid(alpha=0.3)


def _lives(events: Sequence[LifecycleEvent]) -> dict[tuple[str, int], list[LifecycleEvent]]:
    lives: dict[tuple[str, int], list[LifecycleEvent]] = {}
    for event in events:
        lives.setdefault((event.slot, event.seed), []).append(event)
    return lives
