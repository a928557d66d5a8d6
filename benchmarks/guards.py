"""What a planned call costs beside its kernels: the guards, and the audits of 1,000 steps, of a GPT-2.

    python -m benchmarks.guards [--layers 12] [--width 768] [--length 128] [--rounds 30]

One thread, process CPU time. Guards: medians of a match, and of the step that it stands before. Audits: how many of 1,000 steps
are audited, and how much longer such a step takes than a planned one, medians of interleaved steps.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from datetime import date
from typing import Any

import torch

import planner
from examples.gpt2 import build
from planner.runtime.audit import is_due

STEPS = 1_000


def seconds(run: Callable[[], Any]) -> float:
    """CPU seconds of one call."""
    begun = time.process_time()
    run()
    return time.process_time() - begun


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--budget", type=float, default=1.0, help="of the plain peak")
    parser.add_argument("--rounds", type=int, default=30)
    given = parser.parse_args()
    torch.set_num_threads(1)
    shape = {"layers": given.layers, "width": given.width, "heads": max(1, given.width // 64), "length": given.length}
    model, args, kwargs = build(**shape, batch=given.batch, vocabulary=256)
    planned = planner.plan(model, given.budget, args, kwargs, costs="estimate", effort=1, progress=False, check=False)
    planned.audits = False

    def step() -> None:
        planned(*args, **kwargs).loss.backward()
        planned.zero_grad(set_to_none=True)

    def audited() -> None:
        planned.audits, planned.__dict__["num_runs"] = True, 1  # the second run is audited
        step()
        planned.audits = False

    guard = planned.__dict__["_guard"]
    for run in (step, audited, lambda: guard.match(args, kwargs)):
        run()
    steps, audits, matches = [], [], []
    for _ in range(given.rounds):
        steps.append(seconds(step))
        audits.append(seconds(audited))
        matches.append(seconds(lambda: [guard.match(args, kwargs) for _ in range(100)]) / 100)
    one, more, match = (
        statistics.median(steps),
        statistics.median(audits) - statistics.median(steps),
        statistics.median(matches),
    )
    due = sum(is_due(run) for run in range(1, STEPS + 1))
    print(f"{date.today()}, torch {torch.__version__}, one thread, {shape | {'batch': given.batch}}, {given.rounds} rounds\n")
    print("| what | median |\n| --- | --- |")
    print(f"| a planned step | {1e3 * one:.1f} ms |")
    print(f"| its guards | {1e6 * match:.0f} us, {100 * match / one:.3f} % of the step |")
    print(f"| an audit, beside its step | {1e3 * more:.1f} ms |")
    print(f"| audits in {STEPS} steps | {due}: {100 * due * more / (STEPS * one):.2f} % of the steps' time |")


if __name__ == "__main__":
    main()
