"""Plan real models at several budgets; compare the promise with plain eager training: bytes, bits and time.

    python -m benchmarks.main_job --models gpt2 unet --fractions 0.7 0.5 --out results.jsonl

A fraction is of what the plain step takes above its resident bytes (parameters, buffers, inputs); gradients count as part
of the step. Each case runs in two processes of its own, in one thread, with a measuring cache of its own: one plans,
compares and times under the allocator's usual settings; the other unpickles the planned module and measures physical
peaks, under settings that give freed tensors back to the system (which makes both steps take half as long again), with no
holes in its heap that a capture or a solver would leave.
Every case becomes one JSON line in `--out` and one row of the Markdown table beside it.
"""

import argparse
import hashlib
import json
import pickle
import sys
import tempfile
from collections.abc import Callable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.cases import (
    MIB,
    STAGES,
    Record,
    build,
    loss_of,
    machine,
    markdown,
    mib,
    resident_bytes,
    run_module,
    timed_plan,
    training_step,
    warm_peak,
)
from benchmarks.memory import MALLOC_ENVIRONMENT, logical_peak, paired_cpu_ratio, physical_peak
from planner.results.plan_file import provenance_fields

FRACTIONS = {
    "gpt2": (1.0, 0.7, 0.5, 0.4),
    "vit": (1.0, 0.7, 0.5, 0.4),
    "resnet50": (1.0, 0.7, 0.6),
    "unet": (1.0, 0.7, 0.5, 0.4),
    "llama": (1.0, 0.7, 0.5, 0.4),
}
SEED = 1


def measure_case(name: str, fraction: float, rounds: int, pickle_file: Path | None = None, **sizes: Any) -> Record:
    """Build, plan twice, and measure one model at one budget; call it in a process that has done nothing else."""
    torch.set_num_threads(1)
    model, args, kwargs = build(name, **sizes)
    resident = resident_bytes(model, args, kwargs)
    plain_step = training_step(deepcopy(model), args, kwargs)
    plain_bytes = warm_peak(plain_step, logical_peak)
    budget = resident + int(fraction * plain_bytes)

    planned, first_seconds = timed_plan(deepcopy(model), budget, args, kwargs)
    again, second_seconds = timed_plan(deepcopy(model), budget, args, kwargs)
    planned_step = training_step(planned, args, kwargs)
    planned_bytes = warm_peak(planned_step, logical_peak)
    different = differences(trajectory(deepcopy(model), args, kwargs), trajectory(again, args, kwargs))
    ratio = paired_cpu_ratio(planned_step, plain_step, rounds)
    made = planned.plan
    if pickle_file is not None:
        pickle_file.write_bytes(pickle.dumps(again))
    return {
        "model": name,
        "fraction": fraction,
        "resident_bytes": resident,
        "budget_bytes": budget,
        "plain": {"predicted_bytes": made.plain.peak_bytes - resident, "logical_bytes": plain_bytes},
        "planned": {"predicted_bytes": made.peak_bytes - resident, "logical_bytes": planned_bytes},
        "bit_equal": not different,
        "different": different,
        "time": ratio._asdict(),
        "predicted_overhead": made.overhead,
        "gap": made.gap,
        "status": made.solution.status,
        "solver": made.solution.solver,
        "num_ops": len(made.graph.ops),
        "first_plan": first_seconds,
        "second_plan": second_seconds,
        "provenance": provenance_fields(made.provenance),
        "machine": machine(),
    }


def measure_physical(name: str, pickle_file: Path, **sizes: Any) -> dict[str, int]:
    """The physical peaks of a plain and a planned step; call it in a process started with MALLOC_ENVIRONMENT."""
    torch.set_num_threads(1)
    _, args, kwargs = build(name, **sizes)
    planned = pickle.loads(pickle_file.read_bytes())
    steps = {"plain": training_step(planned.original, args, kwargs), "planned": training_step(planned, args, kwargs)}
    return {side: warm_peak(step, physical_peak) for side, step in steps.items()}


def trajectory(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], steps: int = 3) -> dict[str, str]:
    """Train for `steps` AdamW steps from a fixed seed; return a digest of every tensor a user could look at."""
    torch.manual_seed(SEED)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    digests = {}
    for step in range(steps):
        optimizer.zero_grad()
        output = model(*args, **kwargs)
        loss_of(output).backward()
        outputs = {"loss": output} if isinstance(output, Tensor) else dict(output)
        seen = {f"output {name}": tensor for name, tensor in outputs.items()}
        seen |= {f"gradient {name}": parameter.grad for name, parameter in model.named_parameters()}
        optimizer.step()
        seen |= {f"parameter {name}": parameter for name, parameter in model.named_parameters()}
        seen |= {f"buffer {name}": buffer for name, buffer in model.named_buffers()}
        seen["RNG state"] = torch.get_rng_state()
        digests |= {f"step {step + 1}: {name}": digest(tensor) for name, tensor in seen.items()}
    return digests


def digest(tensor: Tensor | None) -> str:
    """Return a hash of the tensor's type, shape and bits; a missing gradient has one of its own."""
    if tensor is None:
        return "none"
    bits = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
    return f"{tensor.dtype} {tuple(tensor.shape)} {hashlib.sha256(bits).hexdigest()}"


def differences(expected: dict[str, str], found: dict[str, str]) -> list[str]:
    """Return the names whose digests differ, or that only one side has."""
    return sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))


def run_case(name: str, fraction: float, rounds: int) -> Record:
    """Run one case in fresh processes; a failure becomes a record that says how it failed."""
    with tempfile.TemporaryDirectory() as folder:
        pickled = str(Path(folder, "planned.pickle"))
        settings = {"OMP_NUM_THREADS": "1", "CHECKPOINT_PLANNER_CACHE": folder}
        case = ["--case", name, str(fraction), pickled]
        try:
            record = run_module("benchmarks.main_job", [*case, "--rounds", str(rounds)], settings)
            physical = run_module("benchmarks.main_job", [*case, "--physical"], settings | MALLOC_ENVIRONMENT)
        except RuntimeError as error:
            return {"model": name, "fraction": fraction, "error": str(error)}
    for side in ("plain", "planned"):
        record[side]["physical_bytes"] = physical[side]
    return record


def share(record: Record, key: str) -> str:
    """Format a planned peak: MiB, and per cent of the plain peak of the same kind."""
    planned, plain = record["planned"][key], record["plain"][key]
    return f"{planned / MIB:.1f} ({planned / plain:.1%})"


def ratio_text(record: Record) -> str:
    ratio = record["time"]
    return f"{ratio['median']:.3f} ({ratio['control']:.3f} ± {ratio['noise']:.3f})"


def stages_text(seconds: dict[str, float]) -> str:
    """Format the seconds of one planning call: the total, then its stages."""
    return f"{seconds['total']:.1f} ({', '.join(f'{name} {seconds[name]:.1f}' for name in STAGES)})"


COLUMNS: dict[str, Callable[[Record], str]] = {
    "model": lambda r: r["model"],
    "budget": lambda r: f"{r['fraction']:.0%}",
    "plain logical, MiB": lambda r: mib(r["plain"]["logical_bytes"]),
    "plain physical, MiB": lambda r: mib(r["plain"]["physical_bytes"]),
    "predicted, MiB": lambda r: mib(r["planned"]["predicted_bytes"]),
    "logical, MiB": lambda r: share(r, "logical_bytes"),
    "physical, MiB": lambda r: share(r, "physical_bytes"),
    "bit-equal": lambda r: "yes" if r["bit_equal"] else f"NO: {len(r['different'])} tensors",
    "time ratio (eager to eager)": ratio_text,
    "predicted time": lambda r: f"{1 + r['predicted_overhead']:.3f}",
    "gap": lambda r: f"{r['gap']:.2%}",
    "first plan, s": lambda r: stages_text(r["first_plan"]),
    "second plan, s": lambda r: stages_text(r["second_plan"]),
}


def table(records: list[Record]) -> str:
    """Return the records as a Markdown table; failures are listed below it."""
    failures = [f"- {r['model']} at {r['fraction']:.0%}: {r['error']}" for r in records if "error" in r]
    rows = markdown(COLUMNS, [record for record in records if "error" not in record])
    return "\n".join([rows, *failures]).rstrip() + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=FRACTIONS, default=list(FRACTIONS), metavar="MODEL")
    parser.add_argument("--fractions", nargs="+", type=float, help="of the plain step; by default each model's own")
    parser.add_argument("--out", type=Path, default=Path("main_job.jsonl"))
    parser.add_argument("--rounds", type=int, default=7, help="of timing: each is one planned and two plain steps")
    parser.add_argument("--case", nargs=3, metavar=("MODEL", "FRACTION", "PICKLE"), help="run one case here, print its record")
    parser.add_argument("--physical", action="store_true", help="with --case: measure physical peaks of what was pickled there")
    options = parser.parse_args()
    if options.case:
        name, fraction, pickled = options.case[0], float(options.case[1]), Path(options.case[2])
        physical = options.physical
        found = measure_physical(name, pickled) if physical else measure_case(name, fraction, options.rounds, pickled)
        print(json.dumps(found))
        return 0
    records = []
    with options.out.open("w") as lines:
        for name in options.models:
            for fraction in options.fractions or FRACTIONS[name]:
                records.append(run_case(name, fraction, options.rounds))
                print(json.dumps(records[-1]), file=lines, flush=True)
                print(table(records[-1:]), flush=True)
    text = table(records)
    options.out.with_suffix(".md").write_text(text)
    print(text)
    return 0 if all(record.get("bit_equal") for record in records) else 1


if __name__ == "__main__":
    sys.exit(main())
