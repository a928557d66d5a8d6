"""planner sweep: plan a model for many budgets."""

from __future__ import annotations

import argparse

from planner.cli.arguments import add_json, add_target, budget, check_runnable, checked_options, say, tell
from planner.cli.target import Target

HELP = "plan a model for many budgets: what memory costs in time"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the command takes."""
    add_target(parser)
    parser.add_argument("--points", type=int, default=20, metavar="N", help="how many budgets (default 20)")
    low = "the smallest budget (default: the lowest peak that a short search finds)"
    parser.add_argument("--low", type=budget, help=low)
    parser.add_argument("--high", type=budget, help="the largest budget (default: the plain step's peak)")
    parser.add_argument("--plot", metavar="OUT.png", help="draw peak against step time (.png or .svg)")
    parser.add_argument("--verify", type=int, nargs="?", const=5, metavar="N", help="measure N of the plans (default 5)")
    parser.add_argument("--save", metavar="SWEEP.json", help="write the sweep, for `planner show` and Sweep.load")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Exit code 0, or 1 where --verify finds a difference or a peak above its budget."""
    check_runnable(arguments)
    target, options = Target.find(arguments.target), checked_options(arguments)
    from planner.analysis.budgets import check_budgets
    from planner.report import picture
    from planner.report.progress import stage
    from planner.results import sweep_file

    check_budgets(None, arguments.points, arguments.low, arguments.high)
    if arguments.plot:
        picture.check(arguments.plot)
    from planner import api

    model, args, kwargs = target.build()
    asked = {"points": arguments.points, "low": arguments.low, "high": arguments.high}
    swept = api.sweep(model, None, args, kwargs, **asked, **options)
    if arguments.verify is not None:
        with stage("run plain and planned steps", True):
            swept = swept.verify(arguments.verify)
    say(arguments, swept, sweep_file.summary(swept))
    for path, write, what in ((arguments.save, swept.save, "sweep"), (arguments.plot, swept.plot, "picture")):
        if path:
            write(path)
            tell(arguments, f"{what} written to {path}")
    return 0 if all(found.exact and found.peak_bytes <= found.budget_bytes for found in swept.measured) else 1
