"""What an arena says in the end: results.json, results.md and a plot."""

import json
import platform
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from statistics import stdev

from benchmarks.growth.arena import Arena
from benchmarks.growth.arena import Bar
from benchmarks.growth.arena import Outcome
from benchmarks.growth.comparison import Paired
from benchmarks.growth.comparison import paired

_PACKAGES = ("esper-morphogen", "torch", "scikit-learn", "numpy")


def write_results(arena: Arena, outcomes: Sequence[Outcome], folder: Path) -> str:
    """Writes results.json, results.md and results.png into a folder; returns the markdown."""
    arms: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        arms.setdefault(outcome.arm, []).append(outcome)
    text = _markdown(arena, arms)
    document = {
        "arena": arena.name,
        "versions": versions(),
        "configuration": configuration(arena),
        "outcomes": [asdict(outcome) for outcome in outcomes],
        "bars": [
            {**asdict(bar), "gain": asdict(gain), "compute": compute, "reached": reached}
            for bar in arena.bars
            for gain, compute, reached in [judge(arena, bar, arms)]
        ],
    }
    (folder / "results.json").write_text(json.dumps(document, indent=1) + "\n")
    (folder / "results.md").write_text(text)
    _plot(arena, arms, folder / "results.png")
    return text


def versions() -> dict[str, str]:
    """Returns the versions that a result depends on, by name."""
    return {**{name: version(name) for name in _PACKAGES}, "python": platform.python_version()}


def configuration(arena: Arena) -> dict[str, object]:
    """Returns all that was chosen."""
    return {
        "steps": arena.steps,
        "epochs": arena.epochs,
        "batch_size": arena.task.batch_size,
        "held_out": arena.num_held_out,
        "training of the grown arm": asdict(arena.grown),
        "training of the static arms": {arm: asdict(r) for arm, r in arena.static.items()},
        "growth": asdict(arena.config),
    }


def judge(arena: Arena, bar: Bar, arms: dict[str, list[Outcome]]) -> tuple[Paired, float, bool]:
    """Returns the paired gain of a bar, its share of compute, and whether the bar is reached."""
    sign = 1.0 if arena.higher_is_better else -1.0
    one, other = arms[bar.arm], arms[bar.against]
    gain = paired([sign * o.figure for o in one], [sign * o.figure for o in other])
    compute = fmean(o.flops for o in one) / fmean(o.flops for o in other)
    reached = (
        (bar.floor is None or gain.low > bar.floor)
        and (bar.point is None or gain.mean >= bar.point)
        and (bar.compute is None or compute <= bar.compute)
    )
    return gain, compute, reached


def _markdown(arena: Arena, arms: dict[str, list[Outcome]]) -> str:
    first = next(iter(arms.values()))
    sign = 1.0 if arena.higher_is_better else -1.0
    best = "higher is better" if arena.higher_is_better else "lower is better"
    lines = [
        f"{arena.title} Figures in {arena.unit} ({best}) over {len(first)} seeds; the gain is that "
        "of the first arm over each other, paired by seed, with its 95 % interval.",
        "",
        "| arm | figure | gain of the first arm | parameters | MFLOP | wall s | kept / refused |",
        "|---|---|---|---|---|---|---|",
    ]
    for arm, outcomes in arms.items():
        figures = [o.figure for o in outcomes]
        gain = ""
        if outcomes is not first:
            found = paired([sign * o.figure for o in first], [sign * f for f in figures])
            gain = f"{found.mean:+.3f} [{found.low:+.3f}, {found.high:+.3f}]"
        grafts = ""
        if any(o.kept or o.refused for o in outcomes):
            kept, refused = (fmean(getattr(o, n) for o in outcomes) for n in ("kept", "refused"))
            grafts = f"{kept:.1f} / {refused:.1f}"
        lines.append(
            f"| {arm} | {fmean(figures):.3f} ± {stdev(figures):.3f} | {gain} "
            f"| {fmean(o.parameters for o in outcomes):.0f} "
            f"| {fmean(o.flops for o in outcomes) / 1e6:.0f} "
            f"| {fmean(o.wall_s for o in outcomes):.2f} | {grafts} |"
        )
    lines.append("")
    for bar in arena.bars:
        found, compute, reached = judge(arena, bar, arms)
        lines.append(
            f"* {bar.arm} against {bar.against}: {found.mean:+.3f} "
            f"[{found.low:+.3f}, {found.high:+.3f}] at {100 * compute:.0f} % of its compute; "
            f"asked: {_asked(bar)}: **{'reached' if reached else 'not reached'}**."
        )
    return "\n".join(lines) + "\n"


def _asked(bar: Bar) -> str:
    rules = []
    if bar.point is not None:
        rules.append(f"mean at least {bar.point:+g}")
    if bar.floor is not None:
        rules.append(f"interval above {bar.floor:+g}")
    if bar.compute is not None:
        rules.append(f"at most {100 * bar.compute:.0f} % of its compute")
    return ", ".join(rules)


def _plot(arena: Arena, arms: dict[str, list[Outcome]], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for position, (arm, outcomes) in enumerate(arms.items()):
        flops = [o.flops / 1e6 for o in outcomes]
        figures = [o.figure for o in outcomes]
        colour = f"C{position % 10}"
        axes.scatter(flops, figures, s=12, alpha=0.35, color=colour)
        axes.scatter(
            [fmean(flops)], [fmean(figures)], s=90, color=colour, label=arm, edgecolor="black"
        )
    axes.set_xscale("log")
    axes.set_xlabel("training compute in MFLOP, everything included")
    axes.set_ylabel(arena.unit)
    axes.set_title(f"{arena.name}: every seed, and the mean of each arm")
    axes.legend(fontsize="small", bbox_to_anchor=(1.01, 1.0), loc="upper left")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
