"""How far `planner.estimate` is from measured peaks: of the zoo's models in float32 on a CPU, and of an H200's records.

    python -m benchmarks.estimate_error --out benchmarks/results/estimate.jsonl [--models gpt2 unet] [--every 5]
    python -m benchmarks.estimate_error --gpu benchmarks/results/gpu-2026-11-27.jsonl --out benchmarks/results/estimate.jsonl
    python -m benchmarks.estimate_error --table benchmarks/results/estimate.jsonl

For each model the peak of an eager training step is measured by the allocator's events, and estimated twice: with workspaces
measured (costs="measure") and with nothing run (costs="estimate"). The second form estimates the eager steps of records of
benchmarks.gpu, without the device and on tensors without data. One JSON line each. The third form writes the table of records
that are there.
"""

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import BUILDERS, IN_BFLOAT16
from planner import PlannerError, estimate
from planner.graph.graph import Kind
from planner.profiler.memory import logical_peak
from tests.support.zoo.check import MODELS, build, forward_backward, seeded

COSTS = ("measure", "estimate")
LIMITS = {"measure": 0.01, "estimate": 0.05, "afar": 0.05}
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


GPU_SIZES = {"llama-1b": {"layers": 16}}
"""Of the models of benchmarks.gpu that have another size now than in the records."""


def gpu_record(name: str, measured_bytes: int) -> dict[str, Any]:
    """The measured and the estimated peak of a model of benchmarks.gpu, in bytes above what is resident."""
    with torch.device("meta"):
        model, args, kwargs = BUILDERS[name](**GPU_SIZES.get(name, {}))
    cast = "bfloat16" if name in IN_BFLOAT16 else None
    made = estimate(model, args, kwargs, device="H200", autocast=cast, remedies=False, effort=0.05, progress=False)
    above = {"peak_bytes": made.peak_bytes, "needed_bytes": made.needed_bytes}
    above = {key: nbytes - made.graph.resident_bytes for key, nbytes in above.items()}
    return {"name": f"{name} on an H200", "torch": torch.__version__, "afar": above, "measured_bytes": measured_bytes}


def table(records: Sequence[dict[str, Any]]) -> str:
    """Median and worst errors, and a row for each model, the largest error first."""
    lines = ["| costs | models | median | worst | within the aim | below the measured after the margin |", "| --- " * 6 + "|"]
    for costs in (*COSTS, "afar"):
        there = [r for r in records if costs in r]
        if not there:
            continue
        errors = {r["name"]: r[costs]["peak_bytes"] / r["measured_bytes"] - 1 for r in there}
        worst = max(errors, key=lambda name: abs(errors[name]))
        within = sum(abs(error) <= LIMITS[costs] for error in errors.values())
        below = [r["name"] for r in there if r[costs]["needed_bytes"] < r["measured_bytes"]]
        lines.append(
            f"| {costs} | {len(errors)} | {statistics.median(map(abs, errors.values())):.3%} | "
            f"{errors[worst]:+.1%} ({worst}) | "
            f"{within} within {LIMITS[costs]:.0%} | {', '.join(below) or 'none'} |"
        )
    lines += ["", "| model | measured MiB | off, with margin: measure | estimate | afar |", "| --- " * 5 + "|"]
    for r in sorted(records, key=lambda r: -max(abs(_off(r, costs, "peak_bytes")) for costs in LIMITS if costs in r)):
        cells = (f"{_off(r, c, 'peak_bytes'):+.2%}, {_off(r, c, 'needed_bytes'):+.1%}" if c in r else "" for c in LIMITS)
        lines.append(f"| {r['name']} | {r['measured_bytes'] / 2**20:,.2f} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _off(record: dict[str, Any], costs: str, key: str) -> float:
    return record[costs][key] / record["measured_bytes"] - 1


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON lines; appended")
    parser.add_argument("--table", type=Path, help="records to make the table of, written beside them as .md")
    parser.add_argument("--gpu", type=Path, help="records of benchmarks.gpu to compare with")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS), metavar="NAME")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="every N-th of the models alone")
    arguments = parser.parse_args(argv)
    if arguments.table:
        lines = arguments.table.read_text(encoding="utf-8").splitlines()
        latest = {found["name"]: found for found in map(json.loads, lines) if "measured_bytes" in found}
        arguments.table.with_suffix(".md").write_text(table(list(latest.values())), encoding="utf-8")
        return
    torch.set_num_threads(1)
    jobs: dict[str, Callable[[], dict[str, Any]]] = {n: partial(record, n) for n in arguments.models[:: arguments.every]}
    if arguments.gpu:
        rows = [json.loads(line) for line in arguments.gpu.read_text(encoding="utf-8").splitlines()]
        eager = {row["model"]: row["allocated_bytes"] for row in rows if row["case"] == "eager"}
        jobs = {name: partial(gpu_record, name, nbytes) for name, nbytes in eager.items()}
    for name, job in jobs.items():
        try:
            found = job()
        except PlannerError as error:
            found = {"name": name, "refused": str(error)}
        print(found, flush=True)
        if arguments.out is not None:
            with arguments.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
