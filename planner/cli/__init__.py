"""The command line: `planner COMMAND ...`, one file per command.

A command's file imports what is heavy (torch, the solver) where it runs, after its arguments were checked: help and errors come
at once, and commands on saved plans need no torch.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from planner.cli import cache, doctor, estimate, explain, export, max_batch, plan, report, show, solve, sweep
from planner.errors import PlannerError
from planner.log import PLANNER
from planner.report import progress

_COMMANDS = {
    "estimate": estimate,
    "plan": plan,
    "sweep": sweep,
    "max-batch": max_batch,
    "doctor": doctor,
    "export": export,
    "show": show,
    "explain": explain,
    "report": report,
    "solve": solve,
    "cache": cache,
}
"""Each with HELP, add_arguments(parser), and run(arguments), which returns the exit code."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; exit code 0, 1 after a one-line error on stderr, or 130 after Ctrl-C."""
    arguments = _parser().parse_args(argv)
    try:
        with _log_shown(arguments.log_level), progress.in_lines():
            code = int(arguments.run(arguments))
            sys.stdout.flush()
            return code
    except BrokenPipeError:  # the reader (`| head`) has seen enough; nothing is flushed at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print("planner: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if arguments.log_level == "debug":
            traceback.print_exc()
        print(f"planner: {_one_line(error)}", file=sys.stderr)
        return 1


def _one_line(error: Exception) -> str:
    """An error in a line; what is no fault of the user's says how to see more."""
    said = " ".join(str(error).split())
    if isinstance(error, PlannerError):
        return f"{type(error).__name__}: {said}"
    notes = " ".join(" ".join(note.split()) for note in getattr(error, "__notes__", ()))
    text = f"{type(error).__name__}: {said[:_LONGEST]}".rstrip(": ")
    return f"{text}. {notes}{' ' if notes else ''}(--log-level debug shows the traceback)"


_LONGEST = 300


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="planner", description="Fit a training step into a memory budget, bit for bit.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, command in _COMMANDS.items():
        added = commands.add_parser(name, help=command.HELP, description=command.HELP)
        command.add_arguments(added)
        added.add_argument("--log-level", choices=("debug", "info", "warning"), help="show the planner's log on stderr")
        added.set_defaults(run=command.run)
    return parser


@contextmanager
def _log_shown(level: str | None) -> Iterator[None]:
    """While entered, the log from this level on goes to stderr; None shows nothing."""
    if level is None:
        yield
        return
    handler, before = logging.StreamHandler(), PLANNER.level
    handler.setFormatter(logging.Formatter("%(name)s: %(levelname)s: %(message)s"))
    PLANNER.addHandler(handler)
    PLANNER.setLevel(level.upper())
    try:
        yield
    finally:
        PLANNER.removeHandler(handler)
        PLANNER.setLevel(before)
