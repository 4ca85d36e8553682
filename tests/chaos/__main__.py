"""`python -m chaos --cycles 300`, with `tests/` on the path: see `make chaos`."""

import argparse
import sys

from chaos.run import run_chaos


def main() -> int:
    """Returns 0 where every promise was kept."""
    parser = argparse.ArgumentParser(prog="chaos", description=__doc__)
    parser.add_argument("--cycles", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    outcome = run_chaos(options.cycles, options.seed, lambda line: print(line, flush=True))
    print(f"{outcome.num_cycles} cycles, {outcome.num_kills} kills")
    print(f"acknowledged and brought: {outcome.counts}")
    print(f"files without a row that crashes left, over all checks: {outcome.num_orphans}")
    for fault in outcome.faults:
        print(f"BROKEN: {fault}")
    print("every promise was kept" if not outcome.faults else f"{len(outcome.faults)} broken")
    return 1 if outcome.faults else 0


if __name__ == "__main__":
    sys.exit(main())
