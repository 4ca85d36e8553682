"""Runs arenas: ``python -m benchmarks.growth width depth``, or all of them without a name.

Every seed is written as it ends, so that a run that is cut short has what it has measured; started
again with the same folder, it goes on where it was.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from dataclasses import replace
from pathlib import Path

import click
import torch

from benchmarks.growth import arenas
from benchmarks.growth import extend
from benchmarks.growth import shuffled
from benchmarks.growth import sizing
from benchmarks.growth import stream
from benchmarks.growth.arena import Arena
from benchmarks.growth.arena import Outcome
from benchmarks.growth.gromo import gromo
from benchmarks.growth.page import write_results
from esper.plane import EmbeddedPlane

ARENAS: dict[str, Callable[[int], Arena]] = {
    "width": arenas.width,
    "depth": arenas.depth,
    "conv": arenas.conv,
    "text": arenas.text,
    "extend": extend.extend,
    "sizing-digits": sizing.sizing_digits,
    "sizing-table": sizing.sizing_table,
    "sizing-text": sizing.sizing_text,
    "stream": stream.stream,
    "shuffled": shuffled.shuffled,
}


@click.command(name="arenas")
@click.argument("names", nargs=-1, type=click.Choice(list(ARENAS)))
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs/arenas"))
@click.option(
    "--seeds", type=click.IntRange(min=2), help="Number of seeds; the arena's own if absent."
)
@click.option("--first-seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option("--quick", is_flag=True, help="2 seeds each, to see that everything runs.")
@click.option("--ablate", is_flag=True, help="Turn off each element of the recipe in turn as well.")
@click.option(
    "--tune", is_flag=True, help="Measure on validation data; use other seeds than those reported."
)
@click.option(
    "--arm",
    "arms",
    multiple=True,
    help="Train this arm beside the grown one; may be given again. All arms if absent.",
)
@click.option(
    "--gromo",
    "gromo_python",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Python of an environment with GroMo, which then takes part in the width arena.",
)
def main(
    names: tuple[str, ...],
    out: Path,
    seeds: int | None,
    first_seed: int,
    quick: bool,
    ablate: bool,
    tune: bool,
    arms: tuple[str, ...],
    gromo_python: Path | None,
) -> None:
    """Runs arenas and writes their outcomes, tables and plots."""
    torch.set_num_threads(1)
    with EmbeddedPlane() as plane:
        for name in names or ARENAS:
            arena = ARENAS[name](first_seed)
            number = 2 if quick else seeds or arena.num_seeds
            folder = out / name
            folder.mkdir(parents=True, exist_ok=True)
            outcomes: list[Outcome] = []
            for seed in range(first_seed, first_seed + number):
                arena = replace(ARENAS[name](seed), arms=frozenset(arms) or None)
                outcomes += _seed(arena, seed, plane.address, folder, ablate, tune)
                if gromo_python is not None and name == "width":
                    split = "validation" if tune else "test"
                    outcomes.append(gromo(gromo_python, arena.task, seed, split, folder))
                print(f"{name}: seed {seed} done", file=sys.stderr, flush=True)
            print(write_results(arena, outcomes, folder))


def _seed(
    arena: Arena, seed: int, plane: str, folder: Path, ablate: bool, tune: bool
) -> list[Outcome]:
    """Returns the outcomes of a seed, from its file where it has been run before."""
    path = folder / f"seed-{seed}{'-ablations' * ablate}{'-validation' * tune}.json"
    if path.exists():
        return [Outcome(**item) for item in json.loads(path.read_text())]
    split = arena.task.validation if tune else arena.task.test
    outcomes = list(arena.run(seed, plane, split))
    if ablate:
        outcomes += arena.ablate(seed, plane, split)
    path.write_text(json.dumps([asdict(outcome) for outcome in outcomes]))
    return outcomes


if __name__ == "__main__":
    main()
