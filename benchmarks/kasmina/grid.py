"""One slot of every shape beside what a user would otherwise write: ``make grid``.

Every combination of 1 to 256 seeds, ranks 4 to 64, 32 to 8192 tokens and 64 to 4096 features, and
one shape that stands for them: forward, and forward with backward, each with and without telemetry,
and training with the seeds' gradients accumulated by the core itself (``direct_gradients``),
interleaved with all alternatives in one run, and the memory that they take. Times are medians of
processor time on one thread.

Each shape's row is appended to a file as soon as it is measured, and rows that are there are not
measured again: a run may be stopped at any time, and goes on. ``--minutes`` ends it at a shape's
end. ``torch.compile`` needs up to minutes for each shape, so that its forms of the loop and of the
stacked product are measured at some shapes alone (``COMPILED``), which the table marks.
"""

import argparse
import functools
import hashlib
import json
import os
import time
from collections.abc import Callable
from collections.abc import Iterable
from dataclasses import asdict
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.figure import Figure

import esper
from benchmarks.kasmina.plot import draw_growth
from benchmarks.kasmina.plot import draw_map
from benchmarks.kasmina.plot import table
from benchmarks.kasmina.problem import agreeing
from benchmarks.kasmina.problem import first_of
from benchmarks.kasmina.problem import with_compiled
from benchmarks.kasmina.rows import Cell
from benchmarks.kasmina.rows import Row
from benchmarks.kasmina.rows import Shape
from benchmarks.kasmina.rows import append_row
from benchmarks.kasmina.rows import read_rows
from benchmarks.timing import interleaved
from benchmarks.timing import peak_bytes
from benchmarks.timing import peak_flops
from benchmarks.timing import peak_of_temporaries
from esper import _C

TOKENS = (32, 512, 8192)
WIDTHS = (64, 768, 4096)
SEEDS = (1, 4, 16, 64, 256)
RANKS = (4, 16, 64)
STANDING_FOR_ALL = (2048, 768, 12, 16)
COMPILED = (
    STANDING_FOR_ALL,
    (32, 64, 4, 16),
    (512, 768, 4, 16),
    (512, 768, 16, 4),
    (512, 768, 16, 16),
    (8192, 768, 16, 16),
)
MAX_TEMPORARIES = 2 * 2**30  # bytes
LEAST_ROUNDS, WARM_UP = 3, 1
LEAST_ROUNDS_OF_LARGE, LARGE = 2, 2**29  # bytes of temporaries
BUDGET_S = 0.5  # of rounds beyond the least, for each of the groups of a shape


def temporaries(shape: Shape) -> int:
    """Bytes that training by the stacked form takes about: eight of h, six of the hidden layer."""
    tokens, width, seeds, rank = shape
    return 4 * tokens * (8 * width + 6 * seeds * rank)


def left_out() -> dict[Shape, str]:
    """Returns the shapes of the grid that are not measured, and why."""
    reasons: dict[Shape, str] = {}
    for shape in _all():
        if shape[2] > shape[1]:
            reasons[shape] = "more seeds than features"
        elif temporaries(shape) > MAX_TEMPORARIES:
            reasons[shape] = (
                f"the stacked form takes about {temporaries(shape) / 2**30:.1f} GiB, more than "
                f"{MAX_TEMPORARIES / 2**30:.0f}"
            )
    return reasons


def measured_shapes() -> list[Shape]:
    """Returns what is measured, in order: shapes with compiled forms, then cheap ones first."""
    rest = set(_all()) - set(left_out()) - set(COMPILED)
    return [*COMPILED, *sorted(rest, key=lambda shape: (temporaries(shape), shape))]


def _all() -> list[Shape]:
    return [(n, d, s, r) for n in TOKENS for d in WIDTHS for s in SEEDS for r in RANKS]


@dataclass(frozen=True)
class Effort:
    """How much is measured.

    Attributes:
        rounds: Most rounds of each group.
        compiled: Whether ``torch.compile`` forms are measured where they belong.
    """

    rounds: int = 15
    compiled: bool = True


def measure(shape: Shape, effort: Effort) -> Row:
    """Measures one shape.

    Args:
        shape: Tokens, width, seeds, rank.
        effort: How much is measured.
    """
    problem = agreeing(*shape)
    compiles = effort.compiled and shape in COMPILED
    plain = problem.forwards()
    measured = {name: problem.measured(forward) for name, forward in plain.items()}
    if compiles:
        plain, measured = with_compiled(plain), with_compiled(measured)
    forward, training = problem.forward_work, problem.training_work
    least_rounds = LEAST_ROUNDS if temporaries(shape) < LARGE else LEAST_ROUNDS_OF_LARGE

    def with_telemetry() -> torch.Tensor:
        return problem.ours(telemetry=True)

    def direct() -> torch.Tensor:
        return problem.ours(direct=True)

    def cell(
        ours: Callable[[], object], others: dict[str, Callable[[], object]], least_s: float
    ) -> Cell:
        times = interleaved(
            {"ours": ours, **others},
            budget_s=BUDGET_S,
            rounds=effort.rounds,
            least_rounds=least_rounds,
            warm_up=WARM_UP,
        )
        own = times.pop("ours")
        return Cell({name: t / own for name, t in times.items()}, least_s / own, own)

    with torch.no_grad():
        groups = {
            "forward": cell(problem.ours, dict(plain), forward.least_s()),
            "forward with telemetry": cell(with_telemetry, dict(measured), forward.least_s()),
        }
    trained = {name: problem.trained(call) for name, call in plain.items()}
    groups["forward and backward"] = cell(
        problem.trained(problem.ours), dict(trained), training.least_s()
    )
    trained = {name: problem.trained(first_of(call)) for name, call in measured.items()}
    groups["forward and backward with telemetry"] = cell(
        problem.trained(with_telemetry), dict(trained), training.least_s()
    )
    trained = {name: problem.trained(call) for name, call in plain.items()}
    groups["forward and backward, direct gradients"] = cell(
        problem.trained(direct), dict(trained), training.least_s()
    )
    memory = {"ours": problem.ours, **problem.forwards()}
    return Row(
        shape=shape,
        groups=groups,
        megabytes={n: peak_of_temporaries(problem.trained(call)) for n, call in memory.items()},
        peak_flops=peak_flops(),
        peak_bytes=peak_bytes(),
        made_by=made_by(),
    )


@functools.cache
def made_by() -> str:
    """What decides about the figures beside the machine; rows of another one are another grid."""
    core = hashlib.sha256(Path(_C.__file__).read_bytes()).hexdigest()[:8]
    heap = os.environ.get("MALLOC_MMAP_MAX_", "default")
    return (
        f"torch {torch.__version__}, core {core} ({esper.build_info().cpu_capability}), heap {heap}"
    )


def fill(
    path: Path,
    shapes: Iterable[Shape],
    measure_one: Callable[[Shape], Row],
    deadline: float = float("inf"),
) -> list[Shape]:
    """Measures the shapes that a file has no row of, and appends each row at once.

    Args:
        path: The file; made if there is none.
        shapes: The shapes, in the order in which they are measured.
        measure_one: Measures one.
        deadline: No shape is begun after this moment of ``time.monotonic``.

    Returns:
        The shapes that the file has no row of yet.

    Raises:
        ValueError: If the file's rows were made by another build.
    """
    there = {row.shape for row in read_rows(path)}
    missing = [shape for shape in shapes if shape not in there]
    while missing and time.monotonic() < deadline:
        row = measure_one(missing[0])
        append_row(path, row)
        missing.pop(0)
        ratios = ", ".join(f"{cell.ratio:.2f}" for cell in row.groups.values())
        print(f"{row.name}: {ratios} times ours; {len(missing)} to go", flush=True)
    return missing


def check_made_by(rows: Iterable[Row]) -> None:
    """Refuses rows of another build or heap.

    Raises:
        ValueError: With both.
    """
    for row in rows:
        if row.made_by != made_by():
            raise ValueError(
                f"the file's rows were made by {row.made_by}, but this is {made_by()}: give "
                "another --out"
            )


def page(rows: list[Row], missing: list[Shape]) -> str:
    """Returns the figures as a page of tables."""
    lines = [table(rows)]
    if rows:
        last = rows[-1]
        lines.append(
            f"Peaks of one core: {last.peak_flops / 1e9:.0f} GFLOP/s (768 x 768 product of the "
            f"BLAS), {last.peak_bytes / 1e9:.1f} GB/s (copy of 8 MB). {last.made_by}.\n"
        )
    reasons: dict[str, list[Shape]] = {}
    for shape, reason in left_out().items():
        reasons.setdefault(reason, []).append(shape)
    lines += [
        f"Left out, {reason}: {'; '.join(', '.join(map(str, shape)) for shape in shapes)}.\n"
        for reason, shapes in reasons.items()
    ]
    if missing:
        lines.append(f"Not measured yet: {len(missing)} shapes.\n")
    return "\n".join(lines)


def main() -> None:
    """Measures what is missing, prints and draws all there is."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/kasmina-grid.jsonl"))
    parser.add_argument("--minutes", type=float, default=float("inf"))
    parser.add_argument("--rounds", type=int, default=Effort.rounds)
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile forms out")
    parser.add_argument("--json", type=Path, help="where to write all rows as one document")
    parser.add_argument("--page", type=Path, help="where to write the tables")
    parser.add_argument("--map", type=Path, help="where to draw the ratios of all shapes")
    parser.add_argument("--growth", type=Path, help="where to draw the times by seeds and tokens")
    given = parser.parse_args()
    deadline = time.monotonic() + 60 * given.minutes
    torch.set_num_threads(1)
    effort = Effort(given.rounds, not given.no_compile)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    check_made_by(read_rows(given.out))
    missing = fill(
        given.out, measured_shapes(), lambda shape: measure(shape, effort), deadline=deadline
    )
    rows = read_rows(given.out)
    text = page(rows, missing)
    print(text)
    if given.page is not None:
        given.page.write_text(text)
    if given.json is not None:
        given.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    for path, draw in ((given.map, draw_map), (given.growth, draw_growth)):
        if path is not None:
            figure = Figure(layout="tight")
            draw(rows, figure)
            figure.savefig(path)


if __name__ == "__main__":
    main()
