"""The command line.

planner plan FILE.py:FUNCTION --budget 6GiB [--verify] [--save plan.json]
planner solve GRAPH.json[.gz] --budget 6GiB | --sweep [N]     (needs no torch)
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from planner.errors import InputError, PlannerError
from planner.graph import planfile
from planner.graph.graph import Graph
from planner.graph.plan import Plan
from planner.graph.schedule import keep_all
from planner.graph.simulate import simulate
from planner.report.sweep import sweep_table
from planner.solver.solve import Solver
from planner.units import parse_budget


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; exit code 0, or 1 after a one-line error on stderr."""
    arguments = _parser().parse_args(argv)
    try:
        return int(arguments.run(arguments))
    except PlannerError as error:
        print(f"planner: {type(error).__name__}: {' '.join(str(error).split())}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="planner", description="Fit a training step into a memory budget, bit for bit.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    plan = commands.add_parser("plan", help="plan a model under a budget and show the table")
    plan.add_argument(
        "target", metavar="FILE.py:FUNCTION", help="FUNCTION() returns (model, args, kwargs), the model in training mode"
    )
    plan.add_argument(
        "--budget", required=True, type=_budget, help="bytes, '6GiB', or a fraction of the plain step's peak such as 0.6"
    )
    plan.add_argument("--reserve", default=0, help="bytes of the budget to leave free, for example for optimizer state: '1GiB'")
    plan.add_argument("--loss", default=None, help="name of the output that backward starts from")
    plan.add_argument(
        "--costs",
        choices=("measure", "estimate"),
        default="measure",
        help="run every distinct kernel once, or compute its time",
    )
    plan.add_argument("--time-limit", type=float, default=10.0, metavar="S", help="seconds for the solver (default 10)")
    plan.add_argument("--verify", action="store_true", help="run a plain and a planned step and compare them")
    plan.add_argument("--save", metavar="PLAN.json", help="write the plan")
    plan.set_defaults(run=_plan)
    solve = commands.add_parser("solve", help="plan the graph of a plan file, without torch and without the model")
    solve.add_argument("graph", metavar="GRAPH.json", help="a plan file or a graph file, .gz or not")
    asked = solve.add_mutually_exclusive_group(required=True)
    asked.add_argument("--budget", type=_budget, help="as for `planner plan`")
    asked.add_argument("--sweep", type=int, nargs="?", const=20, metavar="N", help="N budgets at once (default 20)")
    solve.add_argument("--time-limit", type=float, default=10.0, metavar="S", help="seconds in all (default 10)")
    solve.add_argument("--save", metavar="PLAN.json", help="write the plan (with --budget)")
    solve.set_defaults(run=_solve)
    return parser


def _budget(text: str) -> float | str:
    """A number with a decimal point is a fraction; everything else is bytes."""
    try:
        return float(text) if "." in text else text
    except ValueError:
        return text


def _solve(arguments: argparse.Namespace) -> int:
    graph = planfile.load_graph(Path(arguments.graph))
    if arguments.sweep is not None:
        return _sweep(graph, arguments.sweep, arguments.time_limit)
    budget_bytes = parse_budget(arguments.budget, simulate(graph, keep_all(graph)).peak_bytes)
    made = Plan(graph, budget_bytes, 0, Solver(graph).solve(budget_bytes, time_limit_s=arguments.time_limit))
    print(made)
    if arguments.save:
        made.save(arguments.save)
        print(f"\nplan written to {arguments.save}")
    return 0


def _sweep(graph: Graph, count: int, time_limit_s: float) -> int:
    """Budgets from the floor to the plain peak, evenly spaced."""
    if count < 1:
        raise InputError(f"--sweep {count}: give the number of budgets, at least 1")
    solver, plain = Solver(graph), simulate(graph, keep_all(graph)).peak_bytes
    least = solver.floor_bytes
    budgets = [least + (plain - least) * (k + 1) // count for k in range(count)]
    Console().print(sweep_table(graph, solver.sweep(budgets, time_limit_s=time_limit_s)))
    return 0


def _plan(arguments: argparse.Namespace) -> int:
    from planner import api  # torch is imported where a model is planned, and nowhere before
    from planner.verification import verify

    model, args, kwargs = _load(arguments.target)
    planned = api.plan(
        model,
        arguments.budget,
        args,
        kwargs,
        loss=arguments.loss,
        reserve=arguments.reserve,
        costs=arguments.costs,
        time_limit_s=arguments.time_limit,
    )
    print(planned.plan)
    if arguments.save:
        planned.plan.save(arguments.save)
        print(f"\nplan written to {arguments.save}")
    if not arguments.verify:
        return 0
    report = verify(planned, args, kwargs)
    print(f"\n{report}")
    return 0 if report.exact and report.within_budget else 1


def _load(target: str) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """Call FUNCTION of FILE.py.

    Raises:
        InputError: no such file or function, or it returned something else than (model, args, kwargs).
    """
    file, _, function = target.rpartition(":")
    path = Path(file)
    if not file or not path.is_file():
        raise InputError(f"{target!r}: give FILE.py:FUNCTION; there is no file {file!r}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise InputError(f"{file} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    sys.path.insert(0, str(path.parent.resolve()))
    spec.loader.exec_module(module)
    build = getattr(module, function, None)
    if not callable(build):
        raise InputError(f"{file} has no function {function!r}")
    built = build()
    if not isinstance(built, tuple) or len(built) != 3:
        raise InputError(f"{target} must return (model, args, kwargs), not a {type(built).__name__}")
    model, args, kwargs = built
    return model, tuple(args), dict(kwargs)


if __name__ == "__main__":
    sys.exit(main())
