"""How far `planner.estimate` is from measured peaks of the zoo's models, in float32 on a CPU.

    python -m benchmarks.estimate_error --out benchmarks/results/estimate.jsonl [--models gpt2 unet] [--every 5]
    python -m benchmarks.estimate_error --table benchmarks/results/estimate.jsonl

For each model the peak of an eager training step is measured by the allocator's events, and estimated twice: with workspaces
measured (costs="measure") and with nothing run (costs="estimate"). One JSON line each. The second form writes the table of
records that are there.
"""

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from planner import PlannerError, estimate
from planner.graph.graph import Kind
from planner.profiler.memory import logical_peak
from tests.support.zoo.check import MODELS, build, forward_backward, seeded

COSTS = ("measure", "estimate")
LIMITS = {"measure": 0.01, "estimate": 0.05}
"""Errors that are aimed at, as a share of the measured peak."""


def record(name: str) -> dict[str, Any]:
    """The measured and the estimated peaks of a model, in bytes with everything resident."""
    model, args, kwargs = build(name)
    found: dict[str, Any] = {"name": name, "torch": torch.__version__}
    for costs in COSTS:
        made = estimate(model, args, kwargs, costs=costs, remedies=False, effort=0.05, progress=False)
        found[costs] = {"peak_bytes": made.peak_bytes, "needed_bytes": made.needed_bytes}
    given = (made.graph.value[name] for name in made.graph.inputs)
    resident = sum(value.nbytes for value in given if value.kind is not Kind.TANGENT)

    def step() -> None:
        forward_backward(model, args, kwargs, "fp32")

    with seeded():
        step()  # what a first call allocates for good is no part of a step
        model.zero_grad(set_to_none=True)
        found["measured_bytes"] = resident + logical_peak(step, torch.device("cpu"))
    return found


def table(records: Sequence[dict[str, Any]]) -> str:
    """Median and worst errors, and a row for each model, the largest error first."""
    lines = ["| costs | models | median | worst | within the aim | below the measured after the margin |", "| --- " * 6 + "|"]
    for costs in COSTS:
        errors = {r["name"]: r[costs]["peak_bytes"] / r["measured_bytes"] - 1 for r in records}
        worst = max(errors, key=lambda name: abs(errors[name]))
        within = sum(abs(error) <= LIMITS[costs] for error in errors.values())
        below = [r["name"] for r in records if r[costs]["needed_bytes"] < r["measured_bytes"]]
        lines.append(
            f"| {costs} | {len(errors)} | {statistics.median(map(abs, errors.values())):.3%} | "
            f"{errors[worst]:+.1%} ({worst}) | "
            f"{within} within {LIMITS[costs]:.0%} | {', '.join(below) or 'none'} |"
        )
    lines += [
        "",
        "| model | measured KiB | " + " | ".join(f"{costs}: off, with margin" for costs in COSTS) + " |",
        "| --- " * 4 + "|",
    ]
    for r in sorted(records, key=lambda r: -max(abs(r[costs]["peak_bytes"] / r["measured_bytes"] - 1) for costs in COSTS)):
        cells = (
            f"{r[c]['peak_bytes'] / r['measured_bytes'] - 1:+.2%}, {r[c]['needed_bytes'] / r['measured_bytes'] - 1:+.2%}"
            for c in COSTS
        )
        lines.append(f"| {r['name']} | {r['measured_bytes'] / 1024:,.0f} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON lines; appended")
    parser.add_argument("--table", type=Path, help="records to make the table of, written beside them as .md")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS), metavar="NAME")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="every N-th of the models alone")
    arguments = parser.parse_args(argv)
    if arguments.table:
        lines = arguments.table.read_text(encoding="utf-8").splitlines()
        latest = {found["name"]: found for found in map(json.loads, lines) if "measured_bytes" in found}
        arguments.table.with_suffix(".md").write_text(table(list(latest.values())), encoding="utf-8")
        return
    torch.set_num_threads(1)
    for name in arguments.models[:: arguments.every]:
        try:
            found = record(name)
        except PlannerError as error:
            found = {"name": name, "refused": str(error)}
        print(found, flush=True)
        if arguments.out is not None:
            with arguments.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
