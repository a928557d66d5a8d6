"""planner report: write an interactive report of a plan and of what other budgets cost."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from planner.cli.arguments import (
    MODEL_OPTIONS,
    add_budget,
    add_options,
    add_target,
    check_runnable,
    check_saved,
    checked_options,
)
from planner.cli.target import Target
from planner.errors import InputError

if TYPE_CHECKING:
    from planner.results.plan import Plan
    from planner.results.sweep import Sweep

HELP = "write an interactive report, one HTML file, of a plan and of what other budgets cost"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the command takes."""
    add_target(parser, "a saved plan or sweep (needs no torch), or a model", "PLAN.json|SWEEP.json|FILE.py:FUNCTION")
    add_budget(parser, help="which plan to show first (default: the suggested one): bytes, '6GiB', or a fraction such as 0.6")
    add_options(parser, ["check"])
    parser.add_argument(
        "-o", "--out", default="report.html", metavar="OUT.html", help="the file to write (default report.html)"
    )
    parser.add_argument("--points", type=int, default=12, metavar="N", help="how many other budgets are planned (default 12)")
    parser.add_argument("--verify", type=int, nargs="?", const=3, metavar="N", help="measure N of the plans (default 3)")


def run(arguments: argparse.Namespace) -> int:
    """Exit code 0."""
    check_runnable(arguments)
    options = checked_options(arguments, (*MODEL_OPTIONS, "check"))
    from planner.report.html import page

    page.check()
    plan, sweep = _saved(arguments) if arguments.target.endswith(".json") else _made(arguments, options)
    if sweep is not None:
        sweep.html(arguments.out, plan)
    elif plan is not None:
        plan.html(arguments.out)
    print(f"report written to {arguments.out}; open it in a browser")
    return 0


def _saved(arguments: argparse.Namespace) -> tuple[Plan | None, Sweep | None]:
    """What a file holds: a plan; or a sweep and its plan for the budget."""
    check_saved(arguments.target)
    from planner.results import sweep_file
    from planner.results.plan import Plan
    from planner.results.sweep import Sweep

    if arguments.verify is not None:
        raise InputError(f"--verify runs a model, and {arguments.target} holds none: give FILE.py:FUNCTION")
    if sweep_file.is_sweep(arguments.target):
        sweep = Sweep.load(arguments.target)
        return None if arguments.budget is None else sweep.best(budget=arguments.budget), sweep
    if arguments.budget is not None:
        raise InputError(f"{arguments.target} is a saved plan and has a budget; --budget is for a sweep or a model")
    return Plan.load(arguments.target), None


def _made(arguments: argparse.Namespace, options: dict[str, Any]) -> tuple[Plan | None, Sweep]:
    """A model's plans: for the budget, and for others."""
    target = Target.find(arguments.target)
    from planner import api
    from planner.analysis.budgets import check_budgets

    check_budgets(None, arguments.points, None, None)
    model, args, kwargs = target.build()
    step = api.profile(model, args, kwargs, **options)
    plan = None if arguments.budget is None else step.plan(arguments.budget).plan
    sweep = step.sweep(points=arguments.points)
    return plan, sweep if arguments.verify is None else sweep.verify(arguments.verify)
