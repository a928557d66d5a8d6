"""planner max-batch: find the largest batch that a budget holds, and the fastest."""

from __future__ import annotations

import argparse

from planner.cli.arguments import add_json, add_target, check_runnable, checked_options, say, tell
from planner.cli.target import Target

HELP = "find the largest batch that a budget holds, and the fastest"
_TARGET = (
    "FUNCTION() returns (model, make_inputs), with args, kwargs = make_inputs(batch); or FUNCTION(batch=N) returns (model, "
    "args, kwargs): then it is called, and builds a model that is dropped, for each batch that is tried"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the command takes."""
    add_target(parser, _TARGET)
    parser.add_argument("--budget", required=True, help="bytes, or text such as '6GiB'")
    parser.add_argument("--verify", type=int, nargs="?", const=3, metavar="N", help="run and time N of the batches (default 3)")
    parser.add_argument("--save", metavar="PLAN.json", help="write the largest batch's plan")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Exit code 0."""
    check_runnable(arguments)
    target, options = Target.find(arguments.target), checked_options(arguments)
    from planner import batch
    from planner.report.progress import stage

    model, make_inputs = target.build_batches()
    found = batch.max_batch(make_inputs, model, arguments.budget, **options)
    if arguments.verify is not None:
        with stage("run planned steps", True):
            found = found.verify(arguments.verify)
    say(arguments, found, found.summary())
    if arguments.save:
        found.plan.save(arguments.save)
        tell(arguments, f"plan written to {arguments.save}")
    return 0
