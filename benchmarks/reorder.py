"""What moving backward ops gains: floor, plain peak, and overhead at f = .3 and .4, with and without, where anything moves.

python -m benchmarks.reorder
"""

from __future__ import annotations

from benchmarks.solver import NEVER, Case, names
from planner.graph.floor import floor
from planner.graph.schedule import keep_all
from planner.graph.simulate import simulate
from planner.limits import Limits
from planner.solver.reorder import reordered
from planner.solver.solve import Solver

FRACTIONS = (0.4, 0.3)


def plan(case: Case, fraction: float, *, reorder: bool) -> str:
    """Overhead (gap) in percent of the plain step, or what stopped it."""
    try:
        solution = Solver(case.graph, reorder=reorder).solve(case.budget(fraction), Limits(20.0, NEVER))
    except Exception as error:
        return type(error).__name__
    timeline = simulate(case.graph, solution.schedule)
    gap = 100 * max(0, timeline.time_ns - solution.bound_ns) / case.plain_ns
    return f"{case.overhead(timeline):.2f} ({gap:.2f})"


def main() -> None:
    print(
        "| graph | gradients | ops moved | plain peak, MiB | floor, MiB | " + " | ".join(f"f = {f}" for f in FRACTIONS) + " |"
    )
    print("| --- " * (5 + len(FRACTIONS)) + "|")
    for name in names():
        for gradients in (True, False):
            case = Case(name, gradients)
            moved, order = reordered(case.graph)
            if moved is case.graph:
                continue
            peaks = [simulate(graph, keep_all(graph)).peak_bytes / 2**20 for graph in (case.graph, moved)]
            floors = [floor(graph)[0] / 2**20 for graph in (case.graph, moved)]
            count = sum(i != n for n, i in enumerate(order))
            cells = [name, "counted" if gradients else "left aside", str(count)]
            cells += [f"{peaks[0]:.1f} -> {peaks[1]:.1f}", f"{floors[0]:.1f} -> {floors[1]:.1f}"]
            cells += [f"{plan(case, f, reorder=False)} -> {plan(case, f, reorder=True)}" for f in FRACTIONS]
            print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
