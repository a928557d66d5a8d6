"""The arguments of the command line, checked as far as they can be without the model."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping

Command = Callable[[argparse.Namespace], int]

_JSON_HELP = "print figures for machines instead of the table"
_BUDGET_HELP = "bytes, '6GiB', or a fraction of the plain step's peak such as 0.6"


def parser(commands_by_name: Mapping[str, Command]) -> argparse.ArgumentParser:
    """The parser of the command line; parsed arguments have the chosen command's function as `run`."""
    parser = argparse.ArgumentParser(prog="planner", description="Fit a training step into a memory budget, bit for bit.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    plan = commands.add_parser("plan", help="plan a model under a budget and show the table")
    _model_options(plan)
    plan.add_argument("--budget", required=True, type=_budget, help=_BUDGET_HELP)
    _effort_option(plan, 10.0)
    plan.add_argument("--verify", action="store_true", help="run a plain and a planned step and compare them")
    plan.add_argument("--no-check", action="store_true", help="do not run one planned step to see that it runs and fits")
    plan.add_argument("--save", metavar="PLAN.json", help="write the plan")
    plan.add_argument("--json", action="store_true", help=_JSON_HELP)
    _sweep_parser(commands.add_parser("sweep", help="plan a model for many budgets: what memory costs in time"))
    _max_batch_parser(commands.add_parser("max-batch", help="find the largest batch that a budget holds, and the fastest"))
    _export_parser(commands.add_parser("export", help="write the planned step as one Python file that needs torch alone"))
    show = commands.add_parser("show", help="show a plan or a sweep that was saved, as a table or a picture; needs no torch")
    show.add_argument("file", metavar="PLAN.json|SWEEP.json")
    show.add_argument("--timeline", metavar="OUT.png", help="draw live memory over the step (a plan; .png or .svg)")
    show.add_argument("--trace", metavar="OUT.json", help="write a trace for Perfetto or chrome://tracing (a plan)")
    show.add_argument("--plot", metavar="OUT.png", help="draw peak against step time (a sweep; .png or .svg)")
    show.add_argument("--json", action="store_true", help=_JSON_HELP)
    explain = commands.add_parser("explain", help="say why a plan keeps what it keeps, and what more memory is worth")
    _model_options(explain, "PLAN.json|FILE.py:FUNCTION", "a saved plan (needs no torch), or a model, with --budget")
    explain.add_argument("--budget", type=_budget, help=_BUDGET_HELP)
    _effort_option(explain, 6.0)
    explain.add_argument("--json", action="store_true", help=_JSON_HELP)
    solve = commands.add_parser("solve", help="plan the graph of a plan file, without torch and without the model")
    solve.add_argument("graph", metavar="GRAPH.json", help="a plan file or a graph file, .gz or not")
    asked = solve.add_mutually_exclusive_group(required=True)
    asked.add_argument("--budget", type=_budget, help="as for `planner plan`")
    asked.add_argument("--sweep", type=int, nargs="?", const=20, metavar="N", help="N budgets at once (default 20)")
    _effort_option(solve, 10.0)
    solve.add_argument("--save", metavar="OUT.json", help="write the plan, or the sweep")
    for name, command in commands.choices.items():
        command.set_defaults(run=commands_by_name[name])
        command.add_argument("--log-level", choices=("debug", "info", "warning"), help="show the planner's log on stderr")
    return parser


def _effort_option(parser: argparse.ArgumentParser, default: float, each: str = "in all") -> None:
    text = f"work for the solver {each}, about its seconds on an idle core (default {default})"
    parser.add_argument("--effort", type=float, default=default, metavar="E", help=text)


def _model_options(
    parser: argparse.ArgumentParser,
    metavar: str = "FILE.py:FUNCTION",
    what: str = "FUNCTION() returns (model, args, kwargs), the model in training mode",
) -> None:
    parser.add_argument("target", metavar=metavar, help=what)
    parser.add_argument(
        "--reserve", default=0, help="bytes of the budget to leave free, for example for optimizer state: '1GiB'"
    )
    parser.add_argument("--loss", type=_loss, help="name or position of the output that backward starts from")
    costs = "run every distinct kernel once, or compute its time"
    parser.add_argument("--costs", choices=("measure", "estimate"), default="measure", help=costs)
    there = "plan for a device that is not here, such as H100-80GB: nothing is allocated, times are estimated"
    parser.add_argument("--device", help=f"{there} (an unknown name lists the known)")
    parser.add_argument("--optimizer", help="set its state aside: a name of torch.optim, such as adamw")
    master = "set float32 copies of narrower parameters aside, and optimizer state for these"
    parser.add_argument("--master-weights", action="store_true", help=master)


def _sweep_parser(parser: argparse.ArgumentParser) -> None:
    _model_options(parser)
    parser.add_argument("--points", type=int, default=20, metavar="N", help="how many budgets (default 20)")
    parser.add_argument("--low", type=_budget, help="the smallest budget (default: the lowest peak that is found soon)")
    parser.add_argument("--high", type=_budget, help="the largest budget (default: the plain step's peak)")
    _effort_option(parser, 4.0)
    parser.add_argument("--plot", metavar="OUT.png", help="draw peak against step time (.png or .svg)")
    parser.add_argument("--verify", type=int, nargs="?", const=5, metavar="N", help="measure N of the plans (default 5)")
    parser.add_argument("--save", metavar="SWEEP.json", help="write the sweep, for `planner show` and Sweep.load")
    parser.add_argument("--json", action="store_true", help=_JSON_HELP)


def _max_batch_parser(parser: argparse.ArgumentParser) -> None:
    _model_options(parser, what="FUNCTION(batch=N) returns (model, args, kwargs) for N samples, the model in training mode")
    parser.add_argument("--budget", required=True, help="bytes, or text such as '6GiB'")
    _effort_option(parser, 4.0, "a batch")
    parser.add_argument("--verify", type=int, nargs="?", const=3, metavar="N", help="run and time N of the batches (default 3)")
    parser.add_argument("--save", metavar="PLAN.json", help="write the largest batch's plan")
    parser.add_argument("--json", action="store_true", help=_JSON_HELP)


def _export_parser(parser: argparse.ArgumentParser) -> None:
    _model_options(parser)
    made = parser.add_mutually_exclusive_group(required=True)
    made.add_argument("--budget", type=_budget, help=_BUDGET_HELP)
    made.add_argument("--plan", metavar="PLAN.json", help="a plan of this model and call that was saved before")
    _effort_option(parser, 10.0)
    parser.add_argument(
        "-o", "--out", required=True, metavar="OUT.py", help="the file to write; load a state_dict into its class"
    )


def _budget(text: str) -> float | str:
    """A number with a decimal point is a fraction; everything else is bytes."""
    try:
        return float(text) if "." in text else text
    except ValueError:
        return text


def _loss(text: str) -> int | str:
    """Digits are a position among the outputs; everything else is a name."""
    return int(text) if text.isdecimal() and len(text) < 10 else text
