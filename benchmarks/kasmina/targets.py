"""Prints the targets of Kasmina beside what this machine shows: ``make targets``.

Every ratio is the median of the best alternative over the median of ours, interleaved in one run on
one thread, in processor time.
``--json`` and ``--page`` write the figures and a table. The heap's settings decide much of what
temporaries cost: what is set in the environment is written down with the figures.
"""

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from dataclasses import asdict
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch import nn

import esper
from benchmarks.kasmina.lifecycle import median_moves
from benchmarks.kasmina.lifecycle import ticking_bank
from benchmarks.kasmina.problem import Problem
from benchmarks.kasmina.problem import agreeing
from benchmarks.kasmina.problem import first_of
from benchmarks.kasmina.problem import with_compiled
from benchmarks.timing import interleaved
from benchmarks.timing import peak_bytes
from benchmarks.timing import peak_flops
from benchmarks.timing import peak_of_temporaries

SHAPE = (2048, 768, 12, 16)
EPOCHS, EPOCH_STEPS = 2, 390  # steps of an epoch of CIFAR-10 in batches of 128
ALLOCATOR = ("MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_")


@dataclass(frozen=True)
class Target:
    """One line of the table; `better` is `over` or `under`."""

    what: str
    measured: float
    unit: str
    better: str
    target: float
    detail: str

    @property
    def met(self) -> bool:
        """Whether the figure is on the right side of the target."""
        over = self.better == "over"
        return self.measured >= self.target if over else self.measured <= self.target


def _against_best(
    what: str,
    target: float,
    ours: Callable[[], object],
    others: dict[str, Callable[[], object]],
    least_s: float,
) -> Target:
    medians = interleaved({"ours": ours, **others}, budget_s=30.0)
    own = medians.pop("ours")
    best = min(medians, key=lambda name: medians[name])
    shown = ", ".join(f"{name} {1e6 * median:.0f}" for name, median in medians.items())
    detail = f"ours {1e6 * own:.0f} us ({least_s / own:.0%} of the roofline); {shown}; best {best}"
    return Target(what, medians[best] / own, "x", "over", target, detail)


def slot_targets(compiled: bool) -> list[Target]:
    """One slot of 2048 tokens, 768 features and 12 seeds of rank 16."""
    problem = agreeing(*SHAPE)
    forward_s, both_s = problem.forward_work.least_s(), problem.training_work.least_s()
    others = problem.forwards()
    measured = {name: problem.measured(call) for name, call in others.items()}
    if compiled:
        others, measured = with_compiled(others), with_compiled(measured)

    def telemetry() -> Tensor:
        return problem.ours(telemetry=True)

    with torch.no_grad():
        lines = [
            _against_best("forward", 3.0, problem.ours, dict(others), forward_s),
            _against_best("forward with telemetry", 5.0, telemetry, dict(measured), forward_s),
        ]
    trained = {name: problem.trained(call) for name, call in others.items()}
    lines.append(
        _against_best(
            "forward and backward", 3.0, problem.trained(problem.ours), dict(trained), both_s
        )
    )
    trained = {name: problem.trained(first_of(call)) for name, call in measured.items()}
    lines.append(
        _against_best(
            "forward and backward with telemetry",
            3.0,
            problem.trained(telemetry),
            dict(trained),
            both_s,
        )
    )
    return lines


def dormant_target() -> Target:
    """Epochs of a 12-layer transformer with every slot dormant, over the bare model's.

    Steps alternate and all of them are summed, as the dear ones are few; telemetry is at its
    defaults and is collected at the end of each epoch.
    """
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(128, 4, 256, dropout=0.0, batch_first=True)
    bare = nn.TransformerEncoder(layer, 12, enable_nested_tensor=False)
    wrapped = esper.wrap(nn.TransformerEncoder(layer, 12, enable_nested_tensor=False))
    inputs = torch.randn(8, 64, 128)

    def step(model: nn.Module) -> None:
        model(inputs).square().mean().backward()
        model.zero_grad(set_to_none=True)

    spent_s = {bare: 0.0, wrapped: 0.0}
    for epoch in range(EPOCHS):
        for number in range(EPOCH_STEPS):
            for model in (wrapped, bare) if number % 2 else (bare, wrapped):
                started = time.process_time()
                step(model)
                if model is wrapped and number == EPOCH_STEPS - 1:
                    wrapped.collect_signals(epoch)
                spent_s[model] += time.process_time() - started
    num_steps = EPOCHS * EPOCH_STEPS
    detail = (
        f"{len(wrapped.slots)} slots, default telemetry, {EPOCHS} epochs of {EPOCH_STEPS} steps, "
        f"bare {1e3 * spent_s[bare] / num_steps:.1f} ms"
    )
    ratio = spent_s[wrapped] / spent_s[bare]
    return Target("dormant training over the bare model", ratio, "x", "under", 1.01, detail)


def lifecycle_targets() -> list[Target]:
    """A tick of many seeds, and a cached kernel put into a seed."""
    bank = ticking_bank(100_000)
    tick = interleaved({"tick": bank.tick})["tick"]
    moves, cold = median_moves(), median_moves(busy=True)
    detail = f"rank 16, the twelfth of a slot; right after a forward {1e6 * cold.whole:.0f} us"
    swap = f"the slot's new plan; right after a forward {1e6 * cold.swap:.0f} us"
    return [
        Target("tick of 100 000 seeds", 1e3 * tick, "ms", "under", 20.0, "all of them on a ramp"),
        Target("cached kernel into a seed", 1e6 * moves.whole, "us", "under", 100.0, detail),
        Target("its swap alone", 1e6 * moves.swap, "us", "under", 10.0, swap),
    ]


def memory() -> dict[str, float]:
    """Peak of what forward and backward of one slot take beside their inputs, in MB."""
    problem = Problem.make(*SHAPE)
    calls = {"ours": problem.ours, **problem.forwards()}
    return {name: peak_of_temporaries(problem.trained(call)) for name, call in calls.items()}


def page(targets: list[Target], peaks: dict[str, float]) -> str:
    """Returns the figures as a table."""
    lines = ["| what | measured | target | met | detail |", "|---|---|---|---|---|"]
    for line in targets:
        sign = ">=" if line.better == "over" else "<="
        lines.append(
            f"| {line.what} | {line.measured:.3g} {line.unit} | {sign} {line.target:g} {line.unit} "
            f"| {'yes' if line.met else 'no'} | {line.detail} |"
        )
    shown = ", ".join(f"{name} {value:.0f}" for name, value in peaks.items())
    lines += ["", f"Peak of temporaries of forward and backward, in MB: {shown}."]
    lines.append(
        f"Peaks of one core: {peak_flops() / 1e9:.0f} GFLOP/s (768 x 768 product of the BLAS), "
        f"{peak_bytes() / 1e9:.1f} GB/s (copy of 8 MB)."
    )
    return "\n".join(lines)


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile forms out")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--page", type=Path, help="where to write the table")
    given = parser.parse_args()
    torch.set_num_threads(1)
    targets = [*slot_targets(not given.no_compile), *lifecycle_targets(), dormant_target()]
    peaks = memory()
    text = page(targets, peaks)
    print(text)
    if given.page is not None:
        given.page.write_text(text + "\n")
    if given.json is not None:
        figures = {
            "targets": [{**asdict(line), "met": line.met} for line in targets],
            "temporaries_mb": peaks,
            "peak_flops": peak_flops(),
            "peak_bytes": peak_bytes(),
            "allocator": {name: os.environ.get(name) for name in ALLOCATOR},
            "capability": esper.build_info().cpu_capability,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "shape": SHAPE,
        }
        given.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
