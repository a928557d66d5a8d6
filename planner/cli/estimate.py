"""planner estimate: say whether a training step fits into a device's memory, and what would help."""

from __future__ import annotations

import argparse

from planner.cli.arguments import add_json, add_target, checked_options, say
from planner.cli.target import Target
from planner.errors import InputError
from planner.units import parse_bytes

HELP = "say whether a training step fits into a device's memory, and what would help"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the command takes."""
    add_target(parser)
    parser.add_argument("--memory", metavar="BYTES", help="what the step may take: '22GiB' (default: what the device has)")
    cast = "the forward runs under autocast of this dtype on the device"
    parser.add_argument("--autocast", choices=("bfloat16", "float16"), help=cast)
    meta = "call FUNCTION under torch.device('meta'), so that nothing is allocated; needs --device"
    parser.add_argument("--meta", action="store_true", help=meta)
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Exit code 0 where the step fits, or fits planned, or the memory is not known; else 1.

    Raises:
        InputError, BudgetError: what was given makes no sense; before the model is built.
    """
    target, options = Target.find(arguments.target), checked_options(arguments)
    if arguments.memory is not None:
        parse_bytes(arguments.memory, "memory")
    if arguments.meta and arguments.device is None:
        raise InputError("give --device NAME beside --meta: a model without data cannot run on this machine")
    from planner import api

    model, args, kwargs = target.build(on_meta=arguments.meta)
    found = api.estimate(model, args, kwargs, memory=arguments.memory, autocast=arguments.autocast, **options)
    say(arguments, found, found.json())
    return 1 if found.fits_planned is False else 0
