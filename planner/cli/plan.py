"""planner plan: plan a model under a budget and show the table."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from planner.cli.arguments import (
    MODEL_OPTIONS,
    add_budget,
    add_json,
    add_options,
    add_target,
    check_runnable,
    checked_options,
    say,
    tell,
)
from planner.cli.target import Target

HELP = "plan a model under a budget and show the table"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the command takes."""
    add_target(parser)
    add_budget(parser, required=True)
    add_options(parser, ["check"])
    parser.add_argument("--verify", action="store_true", help="run a plain and a planned step and compare them")
    parser.add_argument("--save", metavar="PLAN.json", help="write the plan")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Exit code 0, or 1 where --verify finds a difference or a peak above the budget."""
    check_runnable(arguments)
    target, options = Target.find(arguments.target), checked_options(arguments, (*MODEL_OPTIONS, "check"))
    from planner import api
    from planner.report.progress import stage
    from planner.results import figures

    model, args, kwargs = target.build()
    planned = api.plan(model, arguments.budget, args, kwargs, **options)
    summary, report = figures.plan_figures(planned.plan), None
    if not arguments.json:
        print(planned.plan)
    if arguments.save:
        planned.plan.save(arguments.save)
        tell(arguments, f"plan written to {arguments.save}")
    if arguments.verify:
        from planner.verification.verify import verify

        with stage("run plain and planned steps", True):
            report = verify(planned, args, kwargs)
        summary["measured"] = asdict(report)
    if arguments.json or report:
        say(arguments, f"\n{report}", summary)
    return 0 if report is None or (report.exact and report.within_budget) else 1
