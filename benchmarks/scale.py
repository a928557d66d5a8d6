"""Seconds and bytes of every stage of the solver against the size of the graph, each graph in a fresh process.

    python -m benchmarks.scale

The graphs are GPTs of 1 to 192 layers out of the corpus. `alpha` is the slope between neighbours on a log-log scale:
1 is linear.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.solver import NEVER, load
from planner.graph.floor import floor
from planner.graph.graph import Graph
from planner.graph.schedule import keep_all
from planner.graph.simulate import simulate
from planner.limits import Limits
from planner.solver.certificate import Certificate
from planner.solver.reorder import reordered
from planner.solver.solve import Solver
from planner.solver.work import Work

NAMES = ("gpt2-1", "gpt2-2", "gpt2-medium-eager", "gpt2-xl-eager", "gpt-96", "gpt-192")
STAGES = ("simulate", "floor", "reorder", "certificate", "solver", "plan")


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """CPU seconds of one run, and what it returned."""
    start = time.process_time()
    result = work()
    return time.process_time() - start, result


def _first_bound(graph: Graph, budget_bytes: int) -> int:
    """By the linear program of the best single cut."""
    certificate = Certificate(graph)
    return certificate.bound(budget_bytes, tuple(certificate.cuts.ranked(budget_bytes)[:1]), Work(), relax=True).time_ns


def measure(name: str) -> dict[str, Any]:
    """All stages for one graph, in this process; the budget is half-way from the floor to the plain peak, without gradients."""
    graph = load(name, gradients=False)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    row: dict[str, Any] = {"graph": name, "ops": len(graph.ops)}
    row["simulate"], plain = timed(lambda: simulate(graph, keep_all(graph)))
    row["floor"], (least, _) = timed(lambda: floor(graph))
    row["reorder"], _ = timed(lambda: reordered(graph))
    budget = (least + plain.peak_bytes) // 2
    row["certificate"], _ = timed(lambda: _first_bound(graph, budget))
    row["solver"], solver = timed(lambda: Solver(graph))
    row["plan"], solution = timed(lambda: solver.solve(budget, Limits(60.0, NEVER)))
    timeline = simulate(graph, solution.schedule)
    row["overhead"] = 100 * (timeline.time_ns / plain.time_ns - 1)
    row["gap"] = 100 * max(0, timeline.time_ns - solution.bound_ns) / plain.time_ns
    row["mebibytes"] = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return row


def table(rows: list[dict[str, Any]]) -> str:
    """CPU seconds by stage; a line of slopes after each line but the first."""
    head = ["graph", "ops", *STAGES, "MiB", "overhead, gap"]
    lines = ["| " + " | ".join(head) + " |", "| --- " * len(head) + "|"]
    for n, row in enumerate(rows):
        cells = [row["graph"], str(row["ops"])]
        for stage in STAGES:
            cell = f"{row[stage]:.2f}"
            if n and row["ops"] > 1000 and min(row[stage], rows[n - 1][stage]) > 0.01:
                slope = math.log(row[stage] / rows[n - 1][stage]) / math.log(row["ops"] / rows[n - 1]["ops"])
                cell += f" (alpha {slope:.1f})"
            cells.append(cell)
        cells += [f"{row['mebibytes']:.0f}", f"{row['overhead']:.2f} %, {row['gap']:.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one", metavar="GRAPH", help="measure this graph in this process and print its JSON line")
    parser.add_argument("--out", type=Path, default=None, help="append JSON lines here")
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments.one), sort_keys=True))
        return
    rows = []
    for name in NAMES:
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.scale", "--one", name], check=True, capture_output=True, text=True
        )
        rows.append(json.loads(done.stdout))
        if arguments.out:
            with arguments.out.open("a") as out:
                out.write(done.stdout)
    print(table(rows))


if __name__ == "__main__":
    main()
