"""The solver on the corpus: overhead, bound and seconds for every graph and budget, beside what people do today.

    python -m benchmarks.solver                     # every graph of benchmarks/graphs, gradients counted, as in the product
    python -m benchmarks.solver --without-gradients # gradients weigh nothing: comparable with published activation-only figures
    python -m benchmarks.solver --sweep             # 20 budgets at once

A budget is a fraction f of what the plain step takes above its resident bytes. One JSON line per plan goes to the output
file, the Markdown table made of all its lines to standard output.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from planner.errors import InfeasibleBudgetError, NoScheduleFoundError
from planner.graph.graph import RESIDENT_KINDS, Graph
from planner.graph.schedule import keep_all
from planner.graph.simulate import Timeline, simulate
from planner.limits import Limits
from planner.results import plan_file
from planner.solver.baselines import greedy, per_block, segments, sqrt_segments
from planner.solver.solve import Solver

GRAPHS = Path(__file__).parent / "graphs"
FRACTIONS = (0.8, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)
NEVER = 1e6
"""Seconds for the clock's backstop: a benchmark says what the work brings, on any machine."""
Row = dict[str, Any]


def names() -> list[str]:
    """Every graph of the corpus."""
    return sorted(path.name.removesuffix(".json.gz") for path in GRAPHS.glob("*.json.gz"))


def load(name: str, *, gradients: bool = True) -> Graph:
    """A graph of the corpus; without gradients, what stays resident and what the backward hands out weigh nothing."""
    graph = plan_file.load_graph(GRAPHS / f"{name}.json.gz")
    if gradients:
        return graph
    light = {*graph.backward_outputs, *(value.name for value in graph.values if value.kind in RESIDENT_KINDS)}
    return replace(graph, values=tuple(replace(v, nbytes=0) if v.name in light else v for v in graph.values))


def resident_bytes(graph: Graph) -> int:
    return sum(graph.value[name].nbytes for name in graph.inputs)


class Case:
    """One graph and what a fraction means for it."""

    def __init__(self, name: str, gradients: bool) -> None:
        self.name, self.gradients = name, gradients
        self.graph = load(name, gradients=gradients)
        self.plain = simulate(self.graph, keep_all(self.graph))
        self.resident = resident_bytes(self.graph)
        self.plain_ns = max(1, self.plain.time_ns)

    def budget(self, fraction: float) -> int:
        return self.resident + int(fraction * (self.plain.peak_bytes - self.resident))

    def fraction(self, nbytes: int) -> float:
        return (nbytes - self.resident) / max(1, self.plain.peak_bytes - self.resident)

    def overhead(self, timeline: Timeline) -> float:
        """In percent of the plain step."""
        return 100 * (timeline.time_ns / self.plain_ns - 1)

    def row(self, kind: str, budget_bytes: int, effort: float) -> Row:
        """A fresh solver's plan for one budget."""
        wall, cpu = time.monotonic(), time.process_time()
        row: Row = {"graph": self.name, "gradients": self.gradients, "kind": kind, "ops": len(self.graph.ops)}
        row |= {"fraction": self.fraction(budget_bytes), "budget_bytes": budget_bytes, "plain_bytes": self.plain.peak_bytes}
        try:
            solution = Solver(self.graph).solve(budget_bytes, Limits(effort, NEVER))
        except InfeasibleBudgetError as error:
            row |= {"status": "infeasible", "floor_fraction": self.fraction(error.floor_bytes)}
        except NoScheduleFoundError:
            row |= {"status": "none found", "floor_fraction": self.fraction(Solver(self.graph).floor_bytes)}
        else:
            timeline = simulate(self.graph, solution.schedule)
            assert timeline.peak_bytes <= budget_bytes
            gap = 100 * max(0, timeline.time_ns - solution.bound_ns) / self.plain_ns
            row |= {"status": solution.status, "overhead": self.overhead(timeline), "gap": gap, "solver": solution.solver}
            row |= {"peak_fraction": self.fraction(timeline.peak_bytes), "bound": 100 * (solution.bound_ns / self.plain_ns - 1)}
        row |= {"wall_s": time.monotonic() - wall, "cpu_s": time.process_time() - cpu}
        best = simulate(self.graph, greedy(self.graph, budget_bytes))
        row["greedy"] = self.overhead(best) if best.peak_bytes <= budget_bytes else None
        return row


def rivals(case: Case) -> Iterator[tuple[str, Timeline]]:
    """What people do today, each at its own peak."""
    yield "per block", simulate(case.graph, per_block(case.graph))
    yield "sqrt(n)", simulate(case.graph, sqrt_segments(case.graph))
    for count in (2, 4, 8, 16, 32):
        yield f"{count} segments", simulate(case.graph, segments(case.graph, count))


def measure(name: str, gradients: bool, effort: float) -> Iterator[Row]:
    """Every budget of one graph: the fractions, the minimum, and the peaks of what people do today."""
    case = Case(name, gradients)
    for fraction in FRACTIONS:
        yield case.row("fraction", case.budget(fraction), effort)
    wall = time.monotonic()
    lowest = Solver(case.graph).lowest_peak(Limits(effort, NEVER))
    minimum = case.row("minimum", lowest, effort)
    others = list(rivals(case))
    best = min(timeline.peak_bytes for _, timeline in others)
    yield minimum | {"search_s": time.monotonic() - wall - minimum["wall_s"], "lowest_rival_fraction": case.fraction(best)}
    for rival, timeline in others[:2]:
        yield case.row(rival, timeline.peak_bytes, effort) | {"rival": case.overhead(timeline)}


def sweep(name: str, gradients: bool, effort: float, count: int = 20) -> Row:
    """Evenly spaced budgets from the floor to the plain peak, at once."""
    case = Case(name, gradients)
    least = Solver(case.graph).floor_bytes
    budgets = [least + (case.plain.peak_bytes - least) * (k + 1) // count for k in range(count)]
    wall, cpu = time.monotonic(), time.process_time()
    solver = Solver(case.graph)
    found = solver.sweep(budgets, Limits(effort, NEVER))
    seconds = {"wall_s": time.monotonic() - wall, "cpu_s": time.process_time() - cpu}
    times, gaps = [], []
    for budget in budgets:
        solution = found[budget]
        if isinstance(solution, Exception):
            continue
        timeline = simulate(case.graph, solution.schedule)
        times.append(timeline.time_ns)
        gaps.append(100 * max(0, timeline.time_ns - solution.bound_ns) / case.plain_ns)
    assert times == sorted(times, reverse=True), "a larger budget got a dearer plan"
    row = {"graph": name, "gradients": gradients, "kind": "sweep", "ops": len(case.graph.ops), "budgets": count}
    row |= {"forward_ops": case.graph.num_forward_ops, "planned": len(times), **seconds}
    return row | {"median_gap": statistics.median(gaps), "largest_gap": max(gaps)}


def _cell(row: Row | None) -> str:
    if row is None:
        return ""
    if "overhead" not in row:
        return f"{row['status']} (floor {row['floor_fraction']:.3f})" if row["status"] == "infeasible" else "none found"
    return f"{row['overhead']:.2f} / {row['gap']:.2f} / {row['wall_s']:.1f}"


def plans_table(rows: list[Row]) -> str:
    """Overhead / gap / seconds by graph and fraction, then the minimum and the rivals."""
    head = ["graph", *(f"f={f}" for f in FRACTIONS), "lowest f found (rivals' lowest): overhead"]
    head += ["per block -> ours", "sqrt(n) -> ours"]
    lines = ["| " + " | ".join(head) + " |", "| --- " * len(head) + "|"]
    for name in dict.fromkeys(row["graph"] for row in rows):
        mine = [row for row in rows if row["graph"] == name]
        by_fraction = {round(row["fraction"], 3): row for row in mine if row["kind"] == "fraction"}
        cells = [name, *(_cell(by_fraction.get(f)) for f in FRACTIONS)]
        for row in (row for row in mine if row["kind"] == "minimum"):
            cells.append(f"{row['fraction']:.3f} ({row['lowest_rival_fraction']:.3f}): {row.get('overhead', float('nan')):.1f}")
        for rival in ("per block", "sqrt(n)"):
            for row in (row for row in mine if row["kind"] == rival):
                cells.append(f"{row['rival']:.1f} -> {row.get('overhead', float('nan')):.1f} at {row['fraction']:.2f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def summary(rows: list[Row]) -> str:
    """What the issue of record asks of all rows together."""
    planned = [row for row in rows if row["kind"] == "fraction" and "gap" in row]
    low = [row for row in planned if row["fraction"] >= 0.199]
    wide = [f"{row['graph']} {row['fraction']:.1f}: {row['gap']:.2f}" for row in low if row["gap"] > 1.0]
    lines = [f"{len(planned)} plans; median gap {statistics.median(row['gap'] for row in planned):.3f} points of the step"]
    lines.append(f"gaps above 1 point at f >= .2: {', '.join(wide) or 'none'}")
    middle = [row["wall_s"] for row in planned if 0.4 <= row["fraction"] <= 0.61]
    lines.append(f"seconds at f .4-.6: median {statistics.median(middle):.2f}, largest {max(middle):.2f}")
    beaten = [row for row in planned if row["greedy"] is not None]
    lines.append(f"greedy fits in {len(beaten)} of them, at {statistics.median(r['greedy'] for r in beaten):.1f} against "
                 f"{statistics.median(r['overhead'] for r in beaten):.1f} % (medians)")  # fmt: skip
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="graphs of the corpus (default: all but the tiny and the scale graphs)")
    parser.add_argument("--without-gradients", action="store_true")
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--effort", type=float, default=20.0, metavar="E", help="work per budget, or per sweep")
    parser.add_argument("--out", type=Path, default=None, help="append JSON lines here")
    parser.add_argument("--table", action="store_true", help="only print the table of the lines in --out")
    arguments = parser.parse_args()
    chosen = arguments.names or [name for name in names() if name not in ("gpt2-1", "gpt2-2", "gpt-192")]
    gradients = not arguments.without_gradients
    rows: list[Row] = []
    if arguments.table:
        rows = [json.loads(line) for line in arguments.out.read_text().splitlines()]
        chosen = []
    for name in chosen:
        how = (name, gradients, arguments.effort)
        for row in [sweep(*how)] if arguments.sweep else measure(*how):
            rows.append(row)
            line = json.dumps(row, sort_keys=True)
            print(line, flush=True)
            if arguments.out:
                with arguments.out.open("a") as out:
                    out.write(line + "\n")
    if not arguments.sweep:
        print(plans_table(rows), "\n", summary(rows), sep="")


if __name__ == "__main__":
    main()
