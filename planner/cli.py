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

from planner.analysis.sweep import sweep_graph
from planner.arguments import check_call, limits
from planner.command_line import parser
from planner.errors import InputError, PlannerError
from planner.graph.schedule import keep_all
from planner.graph.simulate import simulate
from planner.log import PLANNER
from planner.report import picture
from planner.results import figures, plan_file, sweep_file
from planner.results.plan import Plan
from planner.results.sweep import Sweep
from planner.solver.solve import Solver
from planner.units import kind, parse_budget


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; exit code 0, or 1 after a one-line error on stderr."""
    arguments = parser(_COMMANDS).parse_args(argv)
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


def _solve(arguments: argparse.Namespace) -> int:
    effort = limits(arguments.effort, what="--effort")
    graph, plan = plan_file.load_solvable(Path(arguments.graph))
    plain_bytes, kept = simulate(graph, keep_all(graph)).peak_bytes, plan.margin_bytes if plan is not None else 0

    def margin(budget_bytes: int) -> int:  # what the file's plan leaves to the allocator
        return kept if budget_bytes < plain_bytes else 0

    provenance = plan.provenance if plan is not None else None
    result: Plan | Sweep
    if arguments.sweep is not None:
        found = sweep_graph(graph, points=arguments.sweep, margin=margin, limits=effort, provenance=provenance)
        result = Sweep.of(found)
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
    _say(arguments, swept, sweep_file.summary(swept))
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
    swept = sweep_file.is_sweep(arguments.file)
    shown: Plan | Sweep = Sweep.load(arguments.file) if swept else Plan.load(arguments.file)
    asked = {"--plot": arguments.plot, "--timeline": arguments.timeline, "--trace": arguments.trace}
    wrong = [option for option, path in asked.items() if path and swept != (option == "--plot")]
    if wrong:
        raise InputError(f"{wrong[0]} is for a {'plan' if swept else 'sweep'}; {arguments.file} holds a {type(shown).__name__}")
    if arguments.plot or arguments.timeline:
        picture.check(arguments.plot or arguments.timeline)
    _say(arguments, shown, sweep_file.summary(shown) if isinstance(shown, Sweep) else figures.plan_figures(shown))
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
        from planner.verification.verify import verify

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


_COMMANDS = {
    "plan": _plan,
    "sweep": _sweep,
    "max-batch": _max_batch,
    "export": _export,
    "show": _show,
    "explain": _explain,
    "solve": _solve,
}


if __name__ == "__main__":
    sys.exit(main())
