"""planner show: show a plan or a sweep that was saved, as a table or a picture. Needs no torch."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from planner.cli.arguments import add_json, check_saved, say, tell
from planner.errors import InputError

if TYPE_CHECKING:
    from planner.results.plan import Plan
    from planner.results.sweep import Sweep

HELP = "show a plan or a sweep that was saved, as a table or a picture; needs no torch"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the command takes."""
    parser.add_argument("file", metavar="PLAN.json|SWEEP.json")
    parser.add_argument("--timeline", metavar="OUT.png", help="draw live memory over the step (a plan; .png or .svg)")
    parser.add_argument("--trace", metavar="OUT.json", help="write a trace for Perfetto or chrome://tracing (a plan)")
    parser.add_argument("--plot", metavar="OUT.png", help="draw peak against step time (a sweep; .png or .svg)")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Exit code 0."""
    check_saved(arguments.file)
    from planner.report import picture
    from planner.results import figures, sweep_file
    from planner.results.plan import Plan
    from planner.results.sweep import Sweep

    swept = sweep_file.is_sweep(arguments.file)
    shown: Plan | Sweep = Sweep.load(arguments.file) if swept else Plan.load(arguments.file)
    asked = {"--plot": arguments.plot, "--timeline": arguments.timeline, "--trace": arguments.trace}
    wrong = [option for option, path in asked.items() if path and swept != (option == "--plot")]
    if wrong:
        raise InputError(f"{wrong[0]} is for a {'plan' if swept else 'sweep'}; {arguments.file} holds a {type(shown).__name__}")
    if arguments.plot or arguments.timeline:
        picture.check(arguments.plot or arguments.timeline)
    say(arguments, shown, sweep_file.summary(shown) if isinstance(shown, Sweep) else figures.plan_figures(shown))
    for path in (arguments.plot, arguments.timeline):
        if path:
            shown.plot(path)
            tell(arguments, f"picture written to {path}")
    if isinstance(shown, Plan) and arguments.trace:
        shown.perfetto(arguments.trace)
        tell(arguments, f"trace written to {arguments.trace}; open it in https://ui.perfetto.dev or chrome://tracing")
    return 0
