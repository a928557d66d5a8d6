"""What people use to train in less memory, next to plans for the same peak: bytes, time, and whether results change.

    python -m benchmarks.compare [--models gpt2 unet] [--methods selective ours-0.5] [--out FILE.jsonl]
    python -m benchmarks.compare --table FILE.jsonl

A case is one model and one method: a rival (benchmarks/rivals.py) beside a plan whose budget is the rival's measured logical
peak, or a plan at a share of eager's. Beside inductor, the plan is compiled by inductor too. Peaks are above the resident
bytes (parameters, buffers, inputs). Each case runs in two fresh processes, in one thread: one measures logical peaks and
results, then times the rival, the plan, eager and eager again in rotation; the other measures physical peaks under an
allocator that gives freed tensors back to the system. What was measured of kernels, and what inductor compiled, is kept on
disk until the run ends, for the next cases.
Every case becomes one JSON line in `--out`, as soon as it is done. Cases that stand there already are not run again, unless
they failed. The second form makes the Markdown table beside the first file, of the latest record of each case.
"""

import argparse
import json
import math
import pickle
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from copy import deepcopy
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import cases
from benchmarks.cases import Record
from benchmarks.comparison import tables
from benchmarks.memory import MALLOC_ENVIRONMENT, interleaved_cpu_seconds, logical_peak, middle, physical_peak
from benchmarks.rivals import RIVALS, Method, NotApplicable
from planner.errors import PlannerError
from planner.results.plan import Plan

MODELS = ("gpt2", "llama", "bert", "vit", "resnet50", "unet")
SHARES = {f"ours-{share}": share for share in (0.8, 0.65, 0.5, 0.4, 0.3)}
METHODS = (*RIVALS, *SHARES)
RESULTS = Path(__file__).parent / "results" / f"compare-{time.strftime('%Y-%m-%d')}.jsonl"
SEED = 1
LIMIT_S = 1200.0  # for a process; inductor compiles for minutes

Results = dict[str, dict[str, Tensor | None]]


class Side:
    """One way to train a model of its own: warmed up, its results and its peak taken, ready to be timed.

    Attributes:
        step: a forward and a backward.
        results: the loss, gradients and buffers after one step from the model's buffers and a fixed seed.
        record: what was measured.
    """

    def __init__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], method: Method) -> None:
        before = {name: buffer.clone() for name, buffer in model.named_buffers()}
        start = time.perf_counter()
        forward = method(model)
        self.step = cases.training_step(model, args, kwargs, forward)
        self.step()
        first_s = time.perf_counter() - start
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                buffer.copy_(before[name])
        with torch.random.fork_rng():
            torch.manual_seed(SEED)
            loss = cases.loss_of(forward(*args, **kwargs))
            loss.backward()
        self.results: Results = {
            "loss": {"": loss.detach()},
            "gradients": {name: parameter.grad for name, parameter in model.named_parameters()},
            "buffers": {name: buffer.clone() for name, buffer in model.named_buffers()},
        }
        model.zero_grad()
        self.record: Record = {"first_step_s": first_s, "logical_bytes": logical_peak(self.step)}

    def compare(self, eager: "Side") -> None:
        """Record by how much the results differ from eager's."""
        self.record["difference"] = {kind: difference(eager.results[kind], self.results[kind]) for kind in eager.results}


def difference(expected: dict[str, Tensor | None], found: dict[str, Tensor | None]) -> float:
    """The largest difference of an entry, as a share of the largest expected entry of all; inf where a tensor is missing."""
    largest = scale = 0.0
    for name in expected.keys() | found.keys():
        a, b = expected.get(name), found.get(name)
        if a is None or b is None:
            largest = max(largest, math.inf if a is not b else 0.0)
        elif a.numel():
            scale = max(scale, float(a.abs().max()))
            off = float((a.double() - b.double()).abs().max())
            largest = max(largest, math.inf if math.isnan(off) else off)
    return largest / scale if largest else 0.0


def measure_case(
    name: str, method: str, rounds: int, pickle_file: Path | None = None, scale: float = 1.0, **sizes: Any
) -> Record:
    """Measure all but physical peaks, and pickle the plan's module; call it in a process that has done nothing else."""
    torch.set_num_threads(1)
    model, args, kwargs = cases.build(name, scale, **sizes)
    resident = cases.resident_bytes(model, args, kwargs)
    sides = {"eager": Side(deepcopy(model), args, kwargs, RIVALS["eager"])}
    if method in RIVALS:
        sides["rival"] = Side(deepcopy(model), args, kwargs, RIVALS[method])
        budget = resident + sides["rival"].record["logical_bytes"]
    else:
        budget = resident + int(SHARES[method] * sides["eager"].record["logical_bytes"])
    failed: Record = {}
    try:
        is_compiled = method.startswith("inductor")
        sides["ours"] = planned_side(deepcopy(model), args, kwargs, budget, pickle_file, is_compiled)
    except PlannerError as error:
        failed = {"ours": {"budget_bytes": budget, "error": f"{type(error).__name__}: {error}"}}
    for side in sides.values():
        side.compare(sides["eager"])
    times = timed(sides, rounds)
    measured = {name: side.record for name, side in sides.items()}
    return {"machine": cases.machine(), "resident_bytes": resident, **failed, **measured, **times}


def planned_side(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    budget: int,
    pickle_file: Path | None,
    is_compiled: bool = False,
) -> Side:
    """The side of a plan within `budget`, its record with what the plan promised."""
    planned, planning = cases.timed_plan(model, budget, args, kwargs, is_compiled)
    if pickle_file is not None:
        pickle_file.write_bytes(pickle.dumps(planned))
    side = Side(model, args, kwargs, lambda _: planned)
    side.record |= promise(planned.plan) | {"budget_bytes": budget, "planning": planning}
    side.record["predicted_bytes"] -= cases.resident_bytes(model, args, kwargs)
    return side


def promise(plan: Plan) -> Record:
    """What a plan predicts: its peak with what is resident, its time, how far from the best plan it can be."""
    return {
        "predicted_bytes": plan.peak_bytes,
        "predicted_time": 1 + plan.overhead,
        "predicted_s": plan.timeline.time_ns / 1e9,
        "gap": plan.gap,
        "status": plan.solution.status,
        "solver": plan.solution.solver,
        "num_ops": len(plan.graph.ops),
    }


def timed(sides: dict[str, Side], rounds: int) -> Record:
    """Time the sides and eager a second time in rotation; records of sides get their ratio to eager, the rest is returned.

    A ratio is the median over rounds and half the interquartile range; "control" is eager against itself.
    """
    steps = [*(side.step for side in sides.values()), sides["eager"].step]
    *spent, again = interleaved_cpu_seconds(steps, rounds)
    seconds = dict(zip(sides, spent, strict=True))
    eager = [(a + b) / 2 for a, b in zip(seconds["eager"], again, strict=True)]
    for name, side in sides.items():
        side.record["step_s"] = statistics.median(seconds[name])
        side.record["time"] = paired(seconds[name], eager)
    found = {"rounds": rounds, "control": paired(seconds["eager"], again)}
    if "rival" in sides and "ours" in sides:
        found["ours_to_rival"] = paired(seconds["ours"], seconds["rival"])
    return found


def paired(spent: Sequence[float], reference: Sequence[float]) -> dict[str, float]:
    median, noise = middle([a / b for a, b in zip(spent, reference, strict=True)])
    return {"median": median, "noise": noise}


def measure_physical(name: str, method: str, pickle_file: Path, scale: float = 1.0, **sizes: Any) -> dict[str, int]:
    """The physical peak of each side; call it in a process started with MALLOC_ENVIRONMENT.

    The rival comes last: a compiler leaves holes in the heap.
    """
    torch.set_num_threads(1)
    model, args, kwargs = cases.build(name, scale, **sizes)
    steps = {"eager": cases.training_step(deepcopy(model), args, kwargs)}
    if pickle_file.exists():
        steps["ours"] = cases.training_step(pickle.loads(pickle_file.read_bytes()), args, kwargs)
    peaks = {side: cases.warm_peak(step, physical_peak, 1) for side, step in steps.items()}
    if method in RIVALS:
        step = cases.training_step(model, args, kwargs, RIVALS[method](model))
        peaks["rival"] = cases.warm_peak(step, physical_peak, 1)
    return peaks


def run_case(name: str, method: str, rounds: int, cache: str, scale: float = 1.0, **sizes: Any) -> Record:
    """Run one case in fresh processes; that it does not apply, or failed, becomes a record that says why."""
    head = {"model": name, "method": method, "scale": scale, "sizes": sizes}
    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "OMP_NUM_THREADS": "1",
            "CHECKPOINT_PLANNER_CACHE": cache,
            "TORCHINDUCTOR_CACHE_DIR": cache,
            "TORCHINDUCTOR_COMPILE_THREADS": "1",
        }
        case = ["--case", name, method, f"{folder}/planned.pickle"]
        case += ["--scale", str(scale), "--sizes", json.dumps(sizes), "--rounds", str(rounds)]
        record: Record = {}
        try:
            record = cases.run_module("benchmarks.compare", case, settings, LIMIT_S)
            if "not_applicable" not in record:
                case.append("--physical")
                peaks = cases.run_module("benchmarks.compare", case, settings | MALLOC_ENVIRONMENT, LIMIT_S)
                for side, nbytes in peaks.items():
                    record[side]["physical_bytes"] = nbytes
        except RuntimeError as error:
            record["error"] = str(error)
    return head | record


def run_here(options: argparse.Namespace) -> Record:
    """Measure the one case that this process was started for; what it raises ends the process with one line."""
    name, method, pickled = options.case
    try:
        if options.physical:
            return measure_physical(name, method, Path(pickled), options.scale, **options.sizes)
        return measure_case(name, method, options.rounds, Path(pickled), options.scale, **options.sizes)
    except NotApplicable as reason:
        return {"not_applicable": str(reason)}
    except Exception as error:  # of any method: torch's messages end in advice, their first line says what happened
        sys.exit(f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}")


def case_of(record: Record) -> tuple[str, str, float, str]:
    """What a record is of."""
    return record["model"], record["method"], record["scale"], json.dumps(record["sizes"], sort_keys=True)


def read(files: Sequence[Path]) -> list[Record]:
    """The latest record of each case, in the order of models and methods."""
    lines = [line for file in files if file.exists() for line in file.read_text(encoding="utf-8").splitlines()]
    latest = {case_of(record): record for record in map(json.loads, lines)}
    return sorted(latest.values(), key=lambda r: (r["scale"], MODELS.index(r["model"]), METHODS.index(r["method"])))


def run_all(options: argparse.Namespace) -> None:
    """Run the cases that have no record yet; append a record for each as soon as it is done."""
    done = {case_of(record) for record in read([options.out]) if "error" not in record}
    with tempfile.TemporaryDirectory() as cache:
        for name, method in product(options.models, options.methods):
            asked = {"model": name, "method": method, "scale": options.scale, "sizes": options.sizes}
            if case_of(asked) in done:
                continue
            start = time.perf_counter()
            record = run_case(name, method, options.rounds, cache, options.scale, **options.sizes)
            with options.out.open("a", encoding="utf-8") as lines:
                print(json.dumps(record), file=lines)
            outcome = record.get("error") or record.get("not_applicable") or "done"
            print(f"{name} {method}: {outcome} in {time.perf_counter() - start:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS, metavar="MODEL", help=", ".join(MODELS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, metavar="METHOD", help=", ".join(METHODS))
    parser.add_argument("--scale", type=float, default=1.0, help="batches this many times as large (default 1)")
    parser.add_argument("--rounds", type=int, default=5, help="of timing: each is a step of every side and a second eager one")
    parser.add_argument("--out", type=Path, default=RESULTS, help="JSON lines; appended (default: of today)")
    parser.add_argument("--table", type=Path, nargs="+", metavar="JSONL", help="only make the Markdown table of these records")
    parser.add_argument("--case", nargs=3, metavar=("MODEL", "METHOD", "PICKLE"), help="run one case here, print its record")
    parser.add_argument("--sizes", type=json.loads, default={}, metavar="JSON", help="of the model: arguments of its builder")
    parser.add_argument("--physical", action="store_true", help="with --case: measure physical peaks of what was pickled there")
    options = parser.parse_args()
    if options.case:
        print(json.dumps(run_here(options)))
        return
    if not options.table:
        run_all(options)
    files = options.table or [options.out]
    text = tables(read(files))
    files[0].with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
