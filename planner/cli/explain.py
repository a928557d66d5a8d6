"""planner explain: say why a plan keeps what it keeps, and what more memory is worth."""

from __future__ import annotations

import argparse

from planner.cli.arguments import add_budget, add_json, add_target, check_saved, checked_options, say
from planner.cli.target import Target
from planner.errors import InputError

HELP = "say why a plan keeps what it keeps, and what more memory is worth"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the command takes."""
    add_target(parser, "a saved plan (needs no torch), or a model, with --budget", "PLAN.json|FILE.py:FUNCTION")
    add_budget(parser)
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Exit code 0."""
    options = checked_options(arguments)
    if arguments.target.endswith(".json"):
        if arguments.budget is not None:
            raise InputError(f"{arguments.target} is a saved plan and has a budget; --budget is for FILE.py:FUNCTION")
        check_saved(arguments.target)
        from planner.results.plan import Plan

        made = Plan.load(arguments.target)
        explained = made.explain(effort=arguments.effort, time_limit_s=arguments.time_limit_s)
    elif arguments.budget is None:
        raise InputError(f"{arguments.target} is a model: give a --budget to plan it for")
    else:
        target = Target.find(arguments.target)
        from planner import api

        model, args, kwargs = target.build()
        explained = api.profile(model, args, kwargs, **options).explain(arguments.budget)
    from planner.results import figures

    say(arguments, explained, figures.explanation_figures(explained))
    return 0
