"""Command line of the fuzzer."""

from __future__ import annotations

import argparse
import sys

from tests.fuzz.generate import case_of
from tests.fuzz.runner import print_lines, run_case, run_many, smallest, summary
from tests.support.harness import Different


def main() -> int:
    """Run one case or many; 1 where one failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description="train random models by eager and by a plan")
    parser.add_argument("--seed", type=int, help="run this case and show its program")
    parser.add_argument("--start", type=int, default=0, help="first seed")
    parser.add_argument("--cases", type=int, default=200, help="number of seeds")
    parser.add_argument("--shrink", action="store_true", help="make failing cases as small as possible (slow)")
    parser.add_argument("--lines", action="store_true", help="one line of JSON per case, in this process")
    parser.add_argument("--units", action="store_true", help="plan every unit of a model on its own")
    given = parser.parse_args()
    if given.seed is not None:
        return _one(given.seed, given.shrink, given.units)
    if given.lines:
        print_lines(range(given.start, given.start + given.cases), shrink=given.shrink, in_units=given.units)
        return 0
    results = []
    for result in run_many(given.start, given.cases, shrink=given.shrink, in_units=given.units):
        results.append(result)
        if result.failed or len(results) % 100 == 0:
            print(f"{len(results)}: seed {result.seed}: {result.verdict}", file=sys.stderr, flush=True)
    print(summary(results))
    return int(any(result.failed for result in results))


def _one(seed: int, shrink: bool, in_units: bool) -> int:
    case = case_of(seed)
    print("\n".join(case.features), "\n")
    try:
        found = run_case(case, in_units=in_units)
    except Different as error:
        if shrink:
            case, error = smallest(case, error, in_units=in_units)
        print(" + ".join(case.features), "\n")
        print(error)
        return 1
    print(case.program().source)
    print(found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
