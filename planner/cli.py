"""The command line.

planner plan FILE.py:FUNCTION --budget 6GiB [--verify] [--save plan.json] [--device H100-80GB] [--optimizer adamw]
planner sweep FILE.py:FUNCTION [--plot sweep.png] [--verify] [--save sweep.json] [--json]
planner explain FILE.py:FUNCTION --budget 6GiB
planner max-batch FILE.py:FUNCTION --budget 6GiB [--device H100-80GB] [--verify] [--json]
planner export FILE.py:FUNCTION --budget 6GiB | --plan plan.json -o model_ckpt.py
With --json, all but the last print figures for machines; --log-level info shows the steps on stderr. These need no torch:
planner explain PLAN.json
planner show PLAN.json [--timeline step.png] [--trace step.json]     or     planner show SWEEP.json [--plot sweep.png]
planner solve GRAPH.json[.gz] --budget 6GiB | --sweep [N]
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from planner.arguments import check_call, limits
from planner.errors import InputError, PlannerError
from planner.graph import planfile
from planner.graph.plan import Plan
from planner.graph.schedule import keep_all
from planner.graph.simulate import simulate
from planner.log import PLANNER
from planner.report import figures, picture, sweepfile
from planner.report.sweep import Sweep, sweep_graph
from planner.solver.solve import Solver
from planner.units import kind, parse_budget

_JSON_HELP = "print figures for machines instead of the table"
_BUDGET_HELP = "bytes, '6GiB', or a fraction of the plain step's peak such as 0.6"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; exit code 0, or 1 after a one-line error on stderr."""
    arguments = _parser().parse_args(argv)
    try:
        with _log_shown(arguments.log_level):
            code = int(arguments.run(arguments))
            sys.stdout.flush()
            return code
    except BrokenPipeError:  # the reader (`| head`) has seen enough; nothing is flushed at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except PlannerError as error:
        print(f"planner: {type(error).__name__}: {' '.join(str(error).split())}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
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
    plan.set_defaults(run=_plan)
    _sweep_parser(commands.add_parser("sweep", help="plan a model for many budgets: what memory costs in time"))
    _max_batch_parser(commands.add_parser("max-batch", help="find the largest batch that a budget holds, and the fastest"))
    _export_parser(commands.add_parser("export", help="write the planned step as one Python file that needs torch alone"))
    show = commands.add_parser("show", help="show a plan or a sweep that was saved, as a table or a picture; needs no torch")
    show.add_argument("file", metavar="PLAN.json|SWEEP.json")
    show.add_argument("--timeline", metavar="OUT.png", help="draw live memory over the step (a plan; .png or .svg)")
    show.add_argument("--trace", metavar="OUT.json", help="write a trace for Perfetto or chrome://tracing (a plan)")
    show.add_argument("--plot", metavar="OUT.png", help="draw peak against step time (a sweep; .png or .svg)")
    show.add_argument("--json", action="store_true", help=_JSON_HELP)
    show.set_defaults(run=_show)
    explain = commands.add_parser("explain", help="say why a plan keeps what it keeps, and what more memory is worth")
    _model_options(explain, "PLAN.json|FILE.py:FUNCTION", "a saved plan (needs no torch), or a model, with --budget")
    explain.add_argument("--budget", type=_budget, help=_BUDGET_HELP)
    _effort_option(explain, 6.0)
    explain.add_argument("--json", action="store_true", help=_JSON_HELP)
    explain.set_defaults(run=_explain)
    solve = commands.add_parser("solve", help="plan the graph of a plan file, without torch and without the model")
    solve.add_argument("graph", metavar="GRAPH.json", help="a plan file or a graph file, .gz or not")
    asked = solve.add_mutually_exclusive_group(required=True)
    asked.add_argument("--budget", type=_budget, help="as for `planner plan`")
    asked.add_argument("--sweep", type=int, nargs="?", const=20, metavar="N", help="N budgets at once (default 20)")
    _effort_option(solve, 10.0)
    solve.add_argument("--save", metavar="OUT.json", help="write the plan, or the sweep")
    solve.set_defaults(run=_solve)
    for command in commands.choices.values():
        command.add_argument("--log-level", choices=("debug", "info", "warning"), help="show the planner's log on stderr")
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
    parser.set_defaults(run=_sweep)


def _max_batch_parser(parser: argparse.ArgumentParser) -> None:
    _model_options(parser, what="FUNCTION(batch=N) returns (model, args, kwargs) for N samples, the model in training mode")
    parser.add_argument("--budget", required=True, help="bytes, or text such as '6GiB'")
    _effort_option(parser, 4.0, "a batch")
    parser.add_argument("--verify", type=int, nargs="?", const=3, metavar="N", help="run and time N of the batches (default 3)")
    parser.add_argument("--save", metavar="PLAN.json", help="write the largest batch's plan")
    parser.add_argument("--json", action="store_true", help=_JSON_HELP)
    parser.set_defaults(run=_max_batch)


def _export_parser(parser: argparse.ArgumentParser) -> None:
    _model_options(parser)
    made = parser.add_mutually_exclusive_group(required=True)
    made.add_argument("--budget", type=_budget, help=_BUDGET_HELP)
    made.add_argument("--plan", metavar="PLAN.json", help="a plan of this model and call that was saved before")
    _effort_option(parser, 10.0)
    parser.add_argument(
        "-o", "--out", required=True, metavar="OUT.py", help="the file to write; load a state_dict into its class"
    )
    parser.set_defaults(run=_export)


def _budget(text: str) -> float | str:
    """A number with a decimal point is a fraction; everything else is bytes."""
    try:
        return float(text) if "." in text else text
    except ValueError:
        return text


def _loss(text: str) -> int | str:
    """Digits are a position among the outputs; everything else is a name."""
    return int(text) if text.isdecimal() and len(text) < 10 else text


def _solve(arguments: argparse.Namespace) -> int:
    effort = limits(arguments.effort, what="--effort")
    graph, plan = planfile.load_solvable(Path(arguments.graph))
    plain_bytes, kept = simulate(graph, keep_all(graph)).peak_bytes, plan.margin_bytes if plan is not None else 0

    def margin(budget_bytes: int) -> int:  # what the file's plan leaves to the allocator
        return kept if budget_bytes < plain_bytes else 0

    provenance = plan.provenance if plan is not None else None
    result: Plan | Sweep
    if arguments.sweep is not None:
        result = sweep_graph(graph, points=arguments.sweep, margin=margin, limits=effort, provenance=provenance)
    else:
        budget_bytes = parse_budget(arguments.budget, plain_bytes)
        left = margin(budget_bytes)
        result = Plan(graph, budget_bytes, left, Solver(graph).solve(budget_bytes - left, effort), provenance)
    print(result)
    if arguments.save:
        result.save(arguments.save)
        print(f"\nwritten to {arguments.save}")
    return 0


def _sweep(arguments: argparse.Namespace) -> int:
    from planner import api

    _check_runnable(arguments)
    if arguments.plot:
        picture.check(arguments.plot)
    model, args, kwargs = _load(arguments.target)
    swept = api.sweep(
        model,
        None,
        args,
        kwargs,
        points=arguments.points,
        low=arguments.low,
        high=arguments.high,
        **_options(arguments),
    )
    if arguments.verify is not None:
        swept = swept.verify(arguments.verify)
    _say(arguments, swept, sweepfile.summary(swept))
    for path, write, what in ((arguments.save, swept.save, "sweep"), (arguments.plot, swept.plot, "picture")):
        if path:
            write(path)
            _tell(arguments, f"{what} written to {path}")
    return 0 if all(found.exact and found.peak_bytes <= found.budget_bytes for found in swept.measured) else 1


def _max_batch(arguments: argparse.Namespace) -> int:
    from planner import batch

    _check_runnable(arguments)
    model, _, _ = _load(arguments.target, batch=1)
    found = batch.max_batch(
        lambda size: _load(arguments.target, batch=size)[1:], model, arguments.budget, **_options(arguments)
    )
    if arguments.verify is not None:
        found = found.verify(arguments.verify)
    _say(arguments, found, found.summary())
    if arguments.save:
        found.plan.save(arguments.save)
        _tell(arguments, f"plan written to {arguments.save}")
    return 0


def _check_runnable(arguments: argparse.Namespace) -> None:
    if arguments.device is not None and arguments.verify:
        raise InputError(f"--verify runs the step, and --device {arguments.device} is not here: give one of them")


def _show(arguments: argparse.Namespace) -> int:
    swept = sweepfile.is_sweep(arguments.file)
    shown: Plan | Sweep = Sweep.load(arguments.file) if swept else Plan.load(arguments.file)
    asked = {"--plot": arguments.plot, "--timeline": arguments.timeline, "--trace": arguments.trace}
    wrong = [option for option, path in asked.items() if path and swept != (option == "--plot")]
    if wrong:
        raise InputError(f"{wrong[0]} is for a {'plan' if swept else 'sweep'}; {arguments.file} holds a {type(shown).__name__}")
    if arguments.plot or arguments.timeline:
        picture.check(arguments.plot or arguments.timeline)
    _say(arguments, shown, sweepfile.summary(shown) if isinstance(shown, Sweep) else figures.plan_figures(shown))
    for path in (arguments.plot, arguments.timeline):
        if path:
            shown.plot(path)
            _tell(arguments, f"picture written to {path}")
    if isinstance(shown, Plan) and arguments.trace:
        shown.trace(arguments.trace)
        _tell(arguments, f"trace written to {arguments.trace}; open it in https://ui.perfetto.dev or chrome://tracing")
    return 0


def _say(arguments: argparse.Namespace, result: object, summary: Mapping[str, Any]) -> None:
    """Print a result: as people read it, or for machines."""
    print(json.dumps(summary, indent=1, sort_keys=True) if arguments.json else result)


def _tell(arguments: argparse.Namespace, what: str) -> None:
    """Say what was done besides; not where a machine reads."""
    print(what, file=sys.stderr) if arguments.json else print(f"\n{what}")


def _explain(arguments: argparse.Namespace) -> int:
    if arguments.target.endswith(".json"):
        if arguments.budget is not None:
            raise InputError(f"{arguments.target} is a saved plan and has a budget; --budget is for FILE.py:FUNCTION")
        plan = Plan.load(arguments.target)
    elif arguments.budget is None:
        raise InputError(f"{arguments.target} is a model: give a --budget to plan it for")
    else:
        plan = _planned(arguments)[0].plan
    explained = plan.explain(effort=arguments.effort)
    _say(arguments, explained, figures.explanation_figures(explained))
    return 0


def _options(arguments: argparse.Namespace) -> dict[str, Any]:
    """What `plan`, `sweep` and `max_batch` are told alike."""
    names = ("loss", "reserve", "costs", "device", "optimizer", "master_weights")
    return {"effort": arguments.effort, **{name: getattr(arguments, name) for name in names}}


def _planned(arguments: argparse.Namespace) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """The planned module and its call."""
    from planner import api  # torch is imported where a model is planned, and nowhere before

    model, args, kwargs = _load(arguments.target)
    planned = api.plan(
        model,
        arguments.budget,
        args,
        kwargs,
        check=not getattr(arguments, "no_check", False),
        **_options(arguments),
    )
    return planned, args, kwargs


def _plan(arguments: argparse.Namespace) -> int:
    _check_runnable(arguments)
    planned, args, kwargs = _planned(arguments)
    summary, report = figures.plan_figures(planned.plan), None
    if not arguments.json:
        print(planned.plan)
    if arguments.save:
        planned.plan.save(arguments.save)
        _tell(arguments, f"plan written to {arguments.save}")
    if arguments.verify:
        from planner.analysis.verify import verify

        report = verify(planned, args, kwargs)
        summary["measured"] = asdict(report)
    if arguments.json or report:
        _say(arguments, f"\n{report}", summary)
    return 0 if report is None or (report.exact and report.within_budget) else 1


def _export(arguments: argparse.Namespace) -> int:
    from planner import api
    from planner.export.source import check_path, export_source

    check_path(arguments.out)
    if arguments.plan:
        made = Plan.load(arguments.plan)
        model, args, kwargs = _load(arguments.target)
        planned = api.apply(made, model, args, kwargs, loss=arguments.loss)
    else:
        planned, _, _ = _planned(arguments)
    export_source(planned, arguments.out)
    print(f"{planned.plan}\n\nplanned step written to {arguments.out}")
    return 0


def _load(target: str, **sizes: int) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """Call FUNCTION of FILE.py.

    Raises:
        InputError: no such file or function, or it returned something else than (model, args, kwargs).
    """
    try:
        built = _function(target)(**sizes)
    except PlannerError:
        raise
    except Exception as error:
        raise InputError(f"{target} cannot be run: {_reason(error, target)}") from error
    if not isinstance(built, tuple) or len(built) != 3:
        raise InputError(f"{target} must return (model, args, kwargs), not {kind(built)}")
    model, args, kwargs = built
    check_call(args, kwargs)
    return model, tuple(args), dict(kwargs or {})


def _reason(error: Exception, target: str) -> str:
    """An exception of the user's file in a line, with the last line of that file that led to it."""
    file = target.rpartition(":")[0]
    lines = [entry.lineno for entry in traceback.extract_tb(error.__traceback__) if entry.filename == file]
    if isinstance(error, SyntaxError) and error.filename == file:
        lines = [error.lineno]
    where = f" at {Path(file).name}:{lines[-1]}" if lines else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}{where}"


def _function(target: str) -> Callable[..., Any]:
    """FUNCTION of FILE.py."""
    file, _, function = target.rpartition(":")
    path = Path(file)
    if not file or not path.is_file():
        raise InputError(f"{target!r}: give FILE.py:FUNCTION; there is no file {file!r}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise InputError(f"{file} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    sys.path.insert(0, str(path.parent.resolve()))
    spec.loader.exec_module(module)
    build = getattr(module, function, None)
    if not callable(build):
        raise InputError(f"{file} has no function {function!r}")
    return build  # type: ignore[no-any-return]


if __name__ == "__main__":
    sys.exit(main())
