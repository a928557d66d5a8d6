"""What commands share: arguments, made of `PlanOptions`, and how results are printed. Imports nothing heavy."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from planner.errors import InputError, PlanFileError
from planner.options import OPTIONS, MaxBatchKeywords, PlanOptions
from planner.units import check_budget

MODEL_OPTIONS = tuple(name for name in OPTIONS if name in MaxBatchKeywords.__annotations__ and name != "progress")
"""The options of every command that plans a model."""


def add_target(
    parser: argparse.ArgumentParser,
    help: str = "FUNCTION() returns (model, args, kwargs), the model in training mode",
    metavar: str = "FILE.py:FUNCTION",
) -> None:
    """Add the model, and the options that every command that plans one takes."""
    parser.add_argument("target", metavar=metavar, help=help)
    add_options(parser, MODEL_OPTIONS)


def add_options(parser: argparse.ArgumentParser, names: Iterable[str]) -> None:
    """Add options of `PlanOptions`, with its defaults and help."""
    for name in names:
        described = OPTIONS[name]
        default, flag, help = described.default, f"--{name.replace('_', '-')}", described.metadata["help"].replace("%", "%%")
        given: dict[str, Any] = {"default": default, "help": help}
        if default is True:
            given["action"] = argparse.BooleanOptionalAction
        elif default is False:
            given["action"] = "store_true"
        elif name == "opaque":
            given |= {"action": "append", "metavar": "NAME", "help": f"{help} (may be given several times)"}
            given["default"] = None  # argparse would append to the default
        else:
            given |= _READ.get(name, {})
            if default:
                given["help"] = f"{help} (default {default})"
        parser.add_argument(flag, **given)


def add_budget(container: Any, **given: Any) -> None:
    """Add --budget to a parser or a group."""
    text = "bytes, '6GiB', or a fraction of the plain step's peak such as 0.6"
    container.add_argument("--budget", **{"type": budget, "help": text, **given})


def add_json(parser: argparse.ArgumentParser) -> None:
    """Add --json."""
    parser.add_argument("--json", action="store_true", help="print figures for machines instead of the table")


def checked_options(arguments: argparse.Namespace, names: Iterable[str] = MODEL_OPTIONS) -> dict[str, Any]:
    """The options of `PlanOptions` that were given, checked; --budget is checked, too, where there is one.

    Raises:
        InputError, BudgetError: one of them makes no sense.
    """
    options = {name: getattr(arguments, name) for name in names}
    options["opaque"] = tuple(options["opaque"] or ())
    PlanOptions(**options)
    if getattr(arguments, "budget", None) is not None:
        check_budget(arguments.budget)
    return options


def check_runnable(arguments: argparse.Namespace) -> None:
    """Raise InputError where a step is to be measured on a device that is not here."""
    if arguments.device is not None and arguments.verify:
        raise InputError(f"--verify runs the step, and --device {arguments.device} is not here: give one of them")


def check_saved(path: str) -> None:
    """Raise PlanFileError where there is no such file."""
    if not Path(path).exists():
        raise PlanFileError(f"cannot read {path}: there is no such file")


def budget(text: str) -> float | str:
    """A number with a decimal point is a fraction; everything else is bytes."""
    try:
        return float(text) if "." in text else text
    except ValueError:
        return text


def _loss(text: str) -> int | str:
    """Digits are a position among the outputs; everything else is a name."""
    return int(text) if text.isdecimal() and len(text) < 10 else text


_READ: Mapping[str, Mapping[str, Any]] = {
    "loss": {"type": _loss},
    "costs": {"choices": ("measure", "estimate")},
    "remeasure": {"action": argparse.BooleanOptionalAction},
    "effort": {"type": float, "metavar": "E"},
    "time_limit_s": {"type": float, "metavar": "S"},
    "in_flight": {"type": int, "metavar": "N"},
}
"""How options that are no flags are read, where it is not as text."""


def say(arguments: argparse.Namespace, result: object, figures: Mapping[str, Any]) -> None:
    """Print a result: as people read it, or for machines."""
    print(json.dumps(figures, indent=1, sort_keys=True) if arguments.json else result)


def tell(arguments: argparse.Namespace, what: str) -> None:
    """Say what was done besides; not where a machine reads."""
    print(what, file=sys.stderr) if arguments.json else print(f"\n{what}")
