"""Draws a benchmark run: ``python -m benchmarks.kasmina.plot RUN.json OUT.svg [--table OUT.md]``.

One panel for each group. A few shapes are drawn as dots, one for each alternative, at how many
times longer it took than ours; a whole grid as a map of the ratio of the best alternative.
"""

import argparse
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure

COLOURS = {
    "loop": "#7f7f7f",
    "bmm": "#d95f02",
    "vmap": "#7570b3",
    "compiled loop": "#1b9e77",
    "compiled bmm": "#e7298a",
}
GROUPS = (
    "forward",
    "forward with telemetry",
    "forward and backward",
    "forward and backward with telemetry",
)
MANY = 20


@dataclass(frozen=True)
class Cell:
    """What one group shows at one shape.

    Attributes:
        ratios: Time of each alternative over ours.
        roofline: Share of the roofline that ours reaches.
        median_s: Median of ours.
    """

    ratios: dict[str, float]
    roofline: float
    median_s: float

    @property
    def best(self) -> str:
        """The alternative that took the least."""
        return min(self.ratios, key=lambda name: self.ratios[name])

    @property
    def ratio(self) -> float:
        """Its time over ours."""
        return self.ratios[self.best]


Panels = dict[str, dict[str, Cell]]


def panels(run: Path) -> tuple[Panels, dict[str, dict[str, float]]]:
    """Returns what a run shows by group and shape, and megabytes by shape and alternative."""
    groups: Panels = {}
    memory: dict[str, dict[str, float]] = {}
    for test in json.loads(run.read_text())["benchmarks"]:
        info = test["extra_info"]
        if test["group"] in GROUPS:
            groups.setdefault(test["group"], {})[test["param"]] = Cell(
                info["median_over_ours"], info["share_of_roofline"], info["interleaved_median_s"]
            )
        elif "megabytes" in info:
            memory[test["param"]] = info["megabytes"]
    return groups, memory


def draw_dots(groups: Panels, figure: Figure) -> None:
    """Draws the panels side by side, shapes in the order of the run."""
    figure.set_size_inches(3.2 * len(groups) + 1.5, 4.2)
    axes = figure.subplots(1, len(groups), sharey=True, squeeze=False)
    for axis, (group, shapes) in zip(axes[0], groups.items(), strict=True):
        names = list(shapes)
        alternatives = sorted({name for cell in shapes.values() for name in cell.ratios})
        for alternative in alternatives:
            axis.plot(
                [shapes[name].ratios.get(alternative) for name in names],
                range(len(names)),
                "o",
                label=alternative,
                color=COLOURS.get(alternative),
            )
        axis.axvline(1.0, color="black", linewidth=0.8)
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter("{x:g}")
        axis.set_yticks(range(len(names)), names)
        axis.set_title(group, fontsize=9)
        axis.grid(axis="x", alpha=0.3)
    axes[0][0].invert_yaxis()
    axes[0][0].set_xlabel("time over ours", fontsize=9)
    axes[0][-1].legend(fontsize=8)


def _place(shape: str) -> tuple[tuple[int, int], tuple[int, int]]:
    """Row (tokens, width) and column (seeds, rank) of a shape."""
    found = re.fullmatch(r"N(\d+)-D(\d+)-S(\d+)-r(\d+)", shape)
    assert found is not None, shape
    tokens, width, seeds, rank = (int(number) for number in found.groups())
    return (tokens, width), (seeds, rank)


def draw_map(groups: Panels, figure: Figure) -> None:
    """Draws the ratio of the best alternative, tokens and width down, seeds and rank across."""
    figure.set_size_inches(15, 9)
    axes = figure.subplots(2, 2).flat
    for axis, (group, shapes) in zip(axes, groups.items(), strict=True):
        _map_of(group, {_place(name): cell for name, cell in shapes.items()}, axis)


def _map_of(
    group: str, cells: dict[tuple[tuple[int, int], tuple[int, int]], Cell], axis: Axes
) -> None:
    rows = sorted({row for row, _ in cells})
    columns = sorted({column for _, column in cells})
    logs = [
        [
            math.log2(cells[row, column].ratio) if (row, column) in cells else math.nan
            for column in columns
        ]
        for row in rows
    ]
    axis.imshow(logs, cmap="RdYlGn", norm=TwoSlopeNorm(0.0, -2.0, 4.0), aspect="auto")
    for y, row in enumerate(rows):
        for x, column in enumerate(columns):
            if (row, column) in cells:
                text = f"{cells[row, column].ratio:.1f}"
                axis.text(x, y, text, ha="center", va="center", fontsize=7)
    axis.set_xticks(
        range(len(columns)), [f"{s} x {r}" for s, r in columns], rotation=90, fontsize=7
    )
    axis.set_yticks(range(len(rows)), [f"{n}, {d}" for n, d in rows], fontsize=7)
    axis.set_title(f"{group}: time of the best alternative over ours", fontsize=9)
    axis.set_xlabel("seeds x rank", fontsize=8)
    axis.set_ylabel("tokens, width", fontsize=8)


def table(groups: Panels, memory: dict[str, dict[str, float]]) -> str:
    """Returns a row a shape: ratio of the best alternative, its name, share of the roofline."""
    heads = ["tokens, width, seeds, rank", *GROUPS]
    if memory:
        heads.append("MB, ours / least other")
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for shape in groups[GROUPS[0]]:
        cells = [groups.get(group, {}).get(shape) for group in GROUPS]
        shown = [
            "-" if cell is None else f"{cell.ratio:.2f} {cell.best}, {cell.roofline:.0%}"
            for cell in cells
        ]
        if memory:
            others = dict(memory.get(shape, {}))
            own = others.pop("ours", None)
            shown.append("-" if own is None else f"{own:.0f} / {min(others.values()):.0f}")
        (tokens, width), (seeds, rank) = _place(shape)
        lines.append(f"| {tokens}, {width}, {seeds}, {rank} | {' | '.join(shown)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Reads the run and writes the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--table", type=Path, help="where to write a table of all shapes")
    given = parser.parse_args()
    groups, memory = panels(given.run)
    figure = Figure(layout="tight")
    draw = draw_map if len(groups[GROUPS[0]]) > MANY else draw_dots
    draw(groups, figure)
    figure.savefig(given.out)
    if given.table is not None:
        given.table.write_text(table(groups, memory))


if __name__ == "__main__":
    main()
