"""Draws the ratios of a benchmark run: ``python -m benchmarks.kasmina.plot RUN.json OUT.svg``.

One panel for each group; a dot for each alternative, at how many times longer it took than ours.
"""

import argparse
import json
from pathlib import Path

from matplotlib.figure import Figure

COLOURS = {"loop": "#7f7f7f", "bmm": "#d95f02", "vmap": "#7570b3"}


def panels(run: Path) -> dict[str, dict[str, dict[str, float]]]:
    """Returns the ratios of a run by group, shape and alternative."""
    groups: dict[str, dict[str, dict[str, float]]] = {}
    for test in json.loads(run.read_text())["benchmarks"]:
        ratios = test["extra_info"].get("median_over_ours")
        if ratios and test["group"].startswith("forward"):
            groups.setdefault(test["group"], {})[test["param"]] = ratios
    return groups


def draw(groups: dict[str, dict[str, dict[str, float]]], to: Path) -> None:
    """Writes the panels side by side, shapes in the order of the run."""
    figure = Figure(figsize=(3.2 * len(groups) + 1.5, 4.2), layout="tight")
    axes = figure.subplots(1, len(groups), sharey=True, squeeze=False)
    for axis, (group, shapes) in zip(axes[0], groups.items(), strict=True):
        names = list(shapes)
        alternatives = sorted({name for ratios in shapes.values() for name in ratios})
        for alternative in alternatives:
            axis.plot(
                [shapes[name].get(alternative) for name in names],
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
    figure.savefig(to)


def main() -> None:
    """Reads the run and writes the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("out", type=Path)
    given = parser.parse_args()
    draw(panels(given.run), given.out)


if __name__ == "__main__":
    main()
