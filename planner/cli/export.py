"""planner export: write the planned step as one Python file that needs torch alone."""

from __future__ import annotations

import argparse

from planner.cli.arguments import add_budget, add_json, add_target, check_saved, checked_options, say, tell
from planner.cli.target import Target

HELP = "write the planned step as one Python file that needs torch alone"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the command takes."""
    add_target(parser)
    made = parser.add_mutually_exclusive_group(required=True)
    add_budget(made)
    made.add_argument("--plan", metavar="PLAN.json", help="a plan of this model and call that was saved before")
    out = "the file to write; load a state_dict into its class"
    parser.add_argument("-o", "--out", required=True, metavar="OUT.py", help=out)
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Exit code 0."""
    target, options = Target.find(arguments.target), checked_options(arguments)
    if arguments.plan:
        check_saved(arguments.plan)
    from planner import api
    from planner.export.source import check_path, export_source
    from planner.results import figures
    from planner.results.plan import Plan

    check_path(arguments.out)
    made = Plan.load(arguments.plan) if arguments.plan else None
    model, args, kwargs = target.build()
    if made is None:
        planned = api.plan(model, arguments.budget, args, kwargs, **options)
    else:
        planned = api.apply(made, model, args, kwargs, loss=options["loss"], opaque=options["opaque"])
    export_source(planned, arguments.out)
    say(arguments, planned.plan, figures.plan_figures(planned.plan))
    tell(arguments, f"planned step written to {arguments.out}")
    return 0
