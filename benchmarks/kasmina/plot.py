"""Tables and drawings of the grid's rows."""

import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure

from benchmarks.kasmina.rows import GROUPS
from benchmarks.kasmina.rows import Cell
from benchmarks.kasmina.rows import Row
from benchmarks.kasmina.rows import Shape

COLOURS = {
    "ours": "#000000",
    "loop": "#7f7f7f",
    "bmm": "#d95f02",
    "vmap": "#7570b3",
    "compiled loop": "#1b9e77",
    "compiled bmm": "#e7298a",
}


def draw_map(rows: Sequence[Row], figure: Figure) -> None:
    """Draws the ratio of the best alternative, tokens and width down, seeds and rank across."""
    figure.set_size_inches(15, 13)
    *axes, spare = figure.subplots(3, 2).flat
    spare.set_axis_off()
    for axis, group in zip(axes, GROUPS, strict=True):
        _map_of(group, {row.shape: row.groups[group] for row in rows}, axis)


def _map_of(group: str, cells: dict[Shape, Cell], axis: Axes) -> None:
    places = {(shape[:2], shape[2:]): cell for shape, cell in cells.items()}
    rows = sorted({row for row, _ in places})
    columns = sorted({column for _, column in places})
    logs = [
        [
            math.log2(places[row, column].ratio) if (row, column) in places else math.nan
            for column in columns
        ]
        for row in rows
    ]
    axis.imshow(logs, cmap="RdYlGn", norm=TwoSlopeNorm(0.0, -2.0, 4.0), aspect="auto")
    for y, row in enumerate(rows):
        for x, column in enumerate(columns):
            if (row, column) in places:
                text = f"{places[row, column].ratio:.1f}"
                axis.text(x, y, text, ha="center", va="center", fontsize=7)
    axis.set_xticks(
        range(len(columns)), [f"{s} x {r}" for s, r in columns], rotation=90, fontsize=7
    )
    axis.set_yticks(range(len(rows)), [f"{n}, {d}" for n, d in rows], fontsize=7)
    axis.set_title(f"{group}: time of the best alternative over ours", fontsize=9)
    axis.set_xlabel("seeds x rank", fontsize=8)
    axis.set_ylabel("tokens, width", fontsize=8)


def draw_growth(rows: Sequence[Row], figure: Figure) -> None:
    """Draws how times grow with the seeds and with the tokens, all else as in the middle."""
    figure.set_size_inches(11, 7.5)
    axes = figure.subplots(2, 2)
    for axis, group in zip(axes[0], ("forward", "forward and backward"), strict=True):
        chosen = [row for row in rows if (*row.shape[:2], row.shape[3]) == (512, 768, 16)]
        _lines(axis, chosen, 2, group)
        axis.set_xlabel("seeds (512 tokens, width 768, rank 16)", fontsize=8)
    for axis, group in zip(axes[1], ("forward", "forward and backward"), strict=True):
        chosen = [row for row in rows if row.shape[1:] == (768, 16, 16)]
        _lines(axis, chosen, 0, group)
        axis.set_xlabel("tokens (width 768, 16 seeds of rank 16)", fontsize=8)
    axes[0][0].legend(fontsize=8)


def _lines(axis: Axes, rows: Sequence[Row], along: int, group: str) -> None:
    rows = sorted(rows, key=lambda row: row.shape)
    for name, colour in COLOURS.items():
        points = [
            (row.shape[along], row.groups[group].median_s * row.groups[group].ratios.get(name, 1.0))
            for row in rows
            if name == "ours" or name in row.groups[group].ratios
        ]
        if points:
            axis.plot(*zip(*points, strict=True), "o-", color=colour, label=name)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_ylabel("seconds", fontsize=8)
    axis.set_title(group, fontsize=9)
    axis.grid(alpha=0.3)


def table(rows: Sequence[Row]) -> str:
    """Returns a row a shape: ratio of the best alternative, its name, share of the roofline.

    Args:
        rows: The rows; shapes at which compiled forms were measured carry a star.
    """
    heads = ["tokens, width, seeds, rank", *GROUPS, "MB, ours / least other"]
    lines = [
        "Each cell: time of the best alternative over ours, its name, and ours as a share of the "
        "roofline. At shapes with a star what `torch.compile` makes of the loop and of the stacked "
        "product is among the alternatives, at the others it is not.",
        "",
        f"| {' | '.join(heads)} |",
        "|---" * len(heads) + "|",
    ]
    for row in sorted(rows, key=lambda row: row.shape):
        cells = [row.groups[group] for group in GROUPS]
        shown = [f"{cell.ratio:.2f} {cell.best}, {cell.roofline:.0%}" for cell in cells]
        others = [value for name, value in row.megabytes.items() if name != "ours"]
        shown.append(f"{row.megabytes['ours']:.0f} / {min(others):.0f}")
        star = "*" if "compiled bmm" in cells[0].ratios else ""
        lines.append(f"| {', '.join(map(str, row.shape))}{star} | {' | '.join(shown)} |")
    return "\n".join(lines) + "\n"
