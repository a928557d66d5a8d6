"""planner solve: plan the graph of a plan file, without torch and without the model."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from planner.cli.arguments import add_budget, add_json, add_options, check_saved, say, tell
from planner.errors import InfeasibleBudgetError, NoScheduleFoundError
from planner.options import PlanOptions
from planner.units import format_bytes, fraction_of, parse_budget

if TYPE_CHECKING:
    from planner.results.plan import Plan
    from planner.results.sweep import Sweep

HELP = "plan the graph of a plan file, without torch and without the model"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the command takes."""
    parser.add_argument("graph", metavar="GRAPH.json", help="a plan file or a graph file, .gz or not")
    asked = parser.add_mutually_exclusive_group(required=True)
    add_budget(asked)
    asked.add_argument("--sweep", type=int, nargs="?", const=20, metavar="N", help="N budgets at once (default 20)")
    add_options(parser, ["effort", "time_limit_s"])
    parser.add_argument("--save", metavar="OUT.json", help="write the plan, or the sweep")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Exit code 0."""
    limits = PlanOptions(effort=arguments.effort, time_limit_s=arguments.time_limit_s).limits
    check_saved(arguments.graph)
    from planner.analysis.budgets import restated
    from planner.analysis.sweep import sweep_graph
    from planner.graph.schedule import keep_all
    from planner.graph.simulate import simulate
    from planner.results import figures, plan_file, sweep_file
    from planner.results.plan import Plan
    from planner.results.sweep import Sweep
    from planner.solver.solve import Solver

    graph, saved = plan_file.load_solvable(Path(arguments.graph))
    plain_bytes, kept = simulate(graph, keep_all(graph)).peak_bytes, saved.margin_bytes if saved is not None else 0

    def margin(budget_bytes: int) -> int:  # what the file's plan leaves to the allocator
        return kept if budget_bytes < plain_bytes else 0

    provenance = saved.provenance if saved is not None else None
    result: Plan | Sweep
    if arguments.sweep is not None:
        swept = sweep_graph(graph, points=arguments.sweep, margin=margin, limits=limits, provenance=provenance)
        result = Sweep.of(swept)
    else:
        budget_bytes = parse_budget(arguments.budget, plain_bytes)
        left = margin(budget_bytes)
        fraction_of_bytes = plain_bytes if fraction_of(arguments.budget) is not None else None
        try:
            solution = Solver(graph).solve(budget_bytes - left, limits)
        except (InfeasibleBudgetError, NoScheduleFoundError) as error:
            raise restated(error, format_bytes(budget_bytes), budget_bytes, margin, plain_bytes=fraction_of_bytes) from error
        result = Plan(graph, budget_bytes, left, solution, provenance)
    say(arguments, result, sweep_file.summary(result) if isinstance(result, Sweep) else figures.plan_figures(result))
    if arguments.save:
        result.save(arguments.save)
        tell(arguments, f"written to {arguments.save}")
    return 0
