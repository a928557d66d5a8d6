"""The price of units: plan_units beside the plan of the whole graph, at the same budget, in percent of the plain step.

    python -m benchmarks.units_price --out benchmarks/results/units_price.jsonl [--models gpt2 llama vit resnet50] [--effort 20]
    python -m benchmarks.units_price --table benchmarks/results/units_price.jsonl

All peaks are simulated and all times predicted, from estimated costs: nothing depends on the load of the machine. A budget is
what is resident plus a share of what the plain step takes above it. Beside them, what people do without a planner: every block
recomputed as a whole (torch.utils.checkpoint), and one budget for every block: all units at the same point of their front, the
least recompute that fits. Every case becomes one JSON line.
"""

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import cases
from planner.composite import unit_names
from planner.composite.kinds import kinds_of
from planner.composite.search import UnitSearch
from planner.composite.trial import Trial
from planner.errors import PlannerError
from planner.graph.schedule import keep_all
from planner.graph.simulate import simulate
from planner.graph.unit_point import Point, point
from planner.limits import Limits
from planner.options import PlanOptions
from planner.profiled import profiled
from planner.solver.baselines import recompute_all
from planner.solver.solve import Solver

MODELS = ("gpt2", "llama", "vit", "resnet50")
SHARES = (0.8, 0.65, 0.5, 0.4, 0.3)
SCALES = {"gpt2": 0.25, "llama": 0.25, "vit": 0.25, "resnet50": 2.0}
"""Of the examples' batches. A step of each is run; with fewer images, ResNet-50's gradients are most of what it needs."""

Record = dict[str, Any]


def measure(name: str, effort: float) -> list[Record]:
    """One record a share, for one model."""
    scale = SCALES[name]
    model, args, kwargs = cases.build(name, scale)
    options = PlanOptions(costs="estimate", progress=False)
    begun = time.process_time()
    whole = profiled(model, args, kwargs, options)
    whole_s, begun = time.process_time() - begun, time.process_time()
    trial = Trial(model, tuple(args), dict(kwargs), None)
    kinds, _ = kinds_of(trial, unit_names.repeated(model), options, descends=True)
    search = UnitSearch(trial, kinds, Limits(effort), whole.graph)
    units_s = time.process_time() - begun
    plain = simulate(whole.graph, keep_all(whole.graph))
    resident, solver = whole.graph.resident_bytes, Solver(whole.graph)
    records = []
    for share in SHARES:
        budget = resident + int(share * (plain.peak_bytes - resident))
        record: Record = {
            "model": name,
            "scale": scale,
            "share": share,
            "budget_bytes": budget,
            "plain_bytes": plain.peak_bytes,
            "resident_bytes": resident,
            "is_measured": search.outer.is_measured,
            "kinds": {kind.name: len(kind.members) for kind in kinds},
            "points": {kind.name: len(search.fronts[kind.members[0]]) for kind in kinds},
            "capture_and_fronts_s": {"whole": round(whole_s, 1), "units": round(units_s, 1)},
        }
        try:
            solution = solver.solve(budget, Limits(effort))
            record["whole"] = simulate(whole.graph, solution.schedule).time_ns / plain.time_ns - 1
            record["whole_bound"] = solution.bound_ns / plain.time_ns - 1
        except PlannerError as error:
            record["whole_error"] = type(error).__name__
        found = search.chosen(budget)
        plain_ns = search.composed.graph.plain_ns
        if found is not None:
            spent = sum(search.fronts[unit][at].time_ns for unit, at in found.points.items())
            record |= {"units": spent / plain_ns, "units_bound": found.bound_ns / plain_ns}
            record["units_bytes"] = search.predicted_bytes(found.points)
        record |= _same_for_all(search, budget) | _blocks(search)
        records.append(record)
    return records


def _spent(search: UnitSearch, points: Mapping[str, Point]) -> tuple[int, float]:
    """Simulated peak, and recompute as a share of the plain step."""
    composed = search.composed
    timeline = simulate(composed.graph, composed.schedule({unit: one.schedule for unit, one in points.items()}))
    return timeline.peak_bytes, timeline.time_ns / composed.graph.plain_ns - 1


def _same_for_all(search: UnitSearch, budget: int) -> Record:
    """One budget for every block: each kind's fastest point that saves at most a share of its plain one."""
    best = None
    for percent in range(101):
        points = {}
        for unit, front in search.fronts.items():
            limit = percent / 100 * front[0].saved_bytes
            points[unit] = next((one for one in front if one.saved_bytes <= limit), front[-1])
        peak, spent = _spent(search, points)
        if peak <= budget and (best is None or spent < best):
            best = spent
    return {} if best is None else {"one_budget": best}


def _blocks(search: UnitSearch) -> Record:
    """torch.utils.checkpoint around every block."""
    points = {unit: point(kind.graph, recompute_all(kind.graph)) for unit, kind in search.kinds.items()}
    again = {  # it runs the whole forward again, whatever of it the backward needs
        unit: sum(op.cost_ns for op in search.kinds[unit].graph.ops[: search.kinds[unit].graph.num_forward_ops])
        for unit in points
    }
    peak, _ = _spent(search, points)
    return {"blocks_bytes": peak, "blocks": sum(again.values()) / search.composed.graph.plain_ns}


def table(records: Sequence[Record]) -> str:
    """A row a model and share."""
    lines = [
        "| model | share | whole graph (bound) | units (bound) | price | one budget for all | checkpoint every block |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for one in records:
        blocks = f"{one['blocks']:.2%}, fits" if one["blocks_bytes"] <= one["budget_bytes"] else "does not fit"
        price = f"{100 * (one['units'] - one['whole']):+.2f} points" if "units" in one and "whole" in one else ""
        cells = [
            one["model"],
            f"{one['share']:.0%}",
            _cell(one, "whole") if "whole" in one else one["whole_error"],
            _cell(one, "units") if "units" in one else "no choice fits",
            price,
            f"{one['one_budget']:.2%}" if "one_budget" in one else "does not fit",
            blocks,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(record: Record, name: str) -> str:
    return f"{record[name]:.2%} ({record[f'{name}_bound']:.2%})"


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=MODELS)
    parser.add_argument("--effort", type=float, default=20.0)
    parser.add_argument("--table", type=Path)
    options = parser.parse_args(argv)
    if options.table is not None:
        print(table([json.loads(line) for line in options.table.read_text(encoding="utf-8").splitlines()]))
        return
    torch.set_num_threads(1)
    for name in options.models:
        records = measure(name, options.effort)
        print(table(records), flush=True)
        if options.out is not None:
            with options.out.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(record) + "\n" for record in records)


if __name__ == "__main__":
    main()
