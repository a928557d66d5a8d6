"""planner doctor: say how a model's training step is captured, and what stands in the way of a plan."""

from __future__ import annotations

import argparse

from planner.cli.arguments import add_json, add_options, checked_options, say
from planner.cli.target import Target

HELP = "say how a model's training step is captured, and what stands in the way of a plan"
_OPTIONS = ("loss", "opaque", "device")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the command takes."""
    help = "FUNCTION() returns (model, args, kwargs), the model in training mode"
    parser.add_argument("target", metavar="FILE.py:FUNCTION", help=help)
    add_options(parser, _OPTIONS)
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Exit code 0, or 1 where something prevents planning."""
    target, options = Target.find(arguments.target), checked_options(arguments, _OPTIONS)
    from planner import diagnosis

    model, args, kwargs = target.build()
    found = diagnosis.doctor(model, args, kwargs, **options)
    say(arguments, found, found.json())
    return 0 if found.plannable else 1
