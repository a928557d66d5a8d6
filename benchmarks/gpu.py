"""Plans on one CUDA device, against what people use there.

    python -m benchmarks.gpu --out benchmarks/results/gpu.jsonl [--models gpt2-medium unet] [--limit 460]

For each model: kernels measured, plans at shares of the plain step's peak above what is resident, each run next to eager
training: predicted peak against `max_memory_allocated`, and `max_memory_reserved`; bits (deterministic kernels); step time by
CUDA events, interleaved with eager and with today's methods (benchmarks/rivals.py); seconds of planning; the largest batch with
and without recompute. One JSON line a case, written at once; no case starts after `--limit` seconds. `--small` runs tiny
models, on a CPU too, to try the script.
"""

import argparse
import functools
import gc
import itertools
import json
import os
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS repeats its bits with this, if set before it starts

import torch
from torch import Tensor, nn

from benchmarks import cases
from benchmarks.rivals import RIVALS, Forward, NotApplicable
from examples import gpt2, llama, resnet50, unet, vit
from planner import PlannerError, ProfiledStep, max_batch, profile
from planner.limits import Limits
from planner.profiler.memory import logical_peak
from planner.results.plan import Plan
from planner.runtime.module import CheckpointedModule
from planner.runtime.step import DEFAULT_STAGES, make_step
from planner.verification.measured import measured_within

SHARES = (0.8, 0.6, 0.5, 0.4, 0.3)
PLAN_LIMIT_S = 5.0
METHODS = ("transformers", "blocks", "selective")
SLOW_METHODS = ("inductor-0.5",)  # compiles for a minute or more: after all else
Case = tuple[str, Callable[[], dict[str, Any]]]
Build = Callable[..., tuple[nn.Module, tuple[Any, ...], dict[str, Any]]]

BUILDERS: dict[str, Build] = {
    "gpt2-medium": functools.partial(gpt2.build, layers=24, width=1024, heads=16, length=2048, batch=4, vocabulary=50304),
    "llama-1b": functools.partial(llama.build, layers=20, width=2048, heads=32, length=2048, batch=2, vocabulary=32000),
    "vit-l": functools.partial(vit.build, layers=24, width=1024, heads=16, batch=64, classes=1000),
    "resnet152": functools.partial(resnet50.build, layers=(3, 8, 36, 3), batch=64),
    "unet": functools.partial(unet.build, width=64, batch=16),
}
SMALL: dict[str, Build] = {
    "gpt2-medium": functools.partial(gpt2.build, layers=2, width=32, heads=2, length=64, vocabulary=64),
    "unet": functools.partial(unet.build, width=4, pixels=32),
}
IN_BFLOAT16 = ("gpt2-medium", "llama-1b", "vit-l")


class Bench:
    """One model on the device.

    Attributes:
        model, args, kwargs: as built.
        cast: makes the context that its forward runs in.
        resident_bytes: parameters, buffers and inputs.
    """

    def __init__(self, name: str, build: Build, device: torch.device) -> None:
        self.name, self.device = name, device
        with device:
            model, args, kwargs = build()
        self.model = model.to(device)
        self.args = tuple(arg.to(device) for arg in args)
        self.kwargs = {key: arg.to(device) for key, arg in kwargs.items()}
        self.cast = functools.partial(torch.autocast, device.type, torch.bfloat16) if name in IN_BFLOAT16 else nullcontext
        self.resident_bytes = cases.resident_bytes(self.model, self.args, self.kwargs)

    def step(self, model: nn.Module, forward: Forward) -> Callable[[], Tensor]:
        """Forward and backward from empty gradients, which holds the output as training loops do; returns the loss."""

        def run() -> Tensor:
            model.zero_grad(set_to_none=True)
            with self.cast():
                out = forward(*self.args, **self.kwargs)
            loss = cases.loss_of(out)
            loss.backward()
            return loss.detach()

        return run

    def peaks(self, model: nn.Module, step: Callable[[], Tensor]) -> dict[str, int]:
        """Of a warm step above what is live before: allocated; on CUDA also reserved, in all."""
        step()
        model.zero_grad(set_to_none=True)
        gc.collect()  # what earlier cases left would count as reserved
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        found = {"allocated_bytes": logical_peak(step, self.device)}
        if self.device.type == "cuda":
            stats = torch.cuda.memory_stats(self.device)
            found["reserved_bytes"], found["requested_bytes"] = (
                stats["reserved_bytes.all.peak"],
                stats["requested_bytes.all.peak"],
            )
        model.zero_grad(set_to_none=True)
        return found

    def results(self, model: nn.Module, step: Callable[[], Tensor]) -> dict[str, Tensor]:
        """Loss, gradients and buffers after a step from a fixed seed; buffers are put back."""
        start = {name: buffer.clone() for name, buffer in model.named_buffers()}
        torch.manual_seed(1)
        found = {"loss": step()}
        found |= {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        for name, buffer in model.named_buffers():
            found[f"buffer {name}"] = buffer.clone()
            buffer.copy_(start[name])
        model.zero_grad(set_to_none=True)
        return found


def seconds(step: Callable[[], Tensor], device: torch.device) -> float:
    """One step: between CUDA events, or in CPU time."""
    if device.type != "cuda":
        start = time.process_time()
        step()
        return time.process_time() - start
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    before.record()
    step()
    after.record()
    torch.cuda.synchronize(device)
    return float(before.elapsed_time(after)) / 1e3


def time_ratio(ours: Callable[[], Tensor], eager: Callable[[], Tensor], device: torch.device, rounds: int) -> dict[str, float]:
    """Median of paired ratios to eager, and eager's seconds; the order alternates."""
    spent: dict[Any, list[float]] = {ours: [], eager: []}
    for turn in range(rounds):
        for step in (ours, eager) if turn % 2 else (eager, ours):
            spent[step].append(seconds(step, device))
    ratios = [a / b for a, b in zip(spent[ours], spent[eager], strict=True)]
    return {"time_ratio": statistics.median(ratios), "eager_s": statistics.median(spent[eager])}


def compared(bench: Bench, model: nn.Module, forward: Forward, plain: Callable[[], Tensor], rounds: int) -> dict[str, Any]:
    """Peaks, bits and time of one way to train, next to the plain step."""
    step = bench.step(model, forward)
    found: dict[str, Any] = dict(bench.peaks(model, step))
    expected, results = bench.results(bench.model, plain), bench.results(model, step)
    found["different"] = sorted(name for name in expected if not torch.equal(expected[name], results.get(name, torch.empty(0))))
    return found | time_ratio(step, plain, bench.device, rounds)


def today(bench: Bench, method: str, plain: Callable[[], Tensor], rounds: int) -> dict[str, Any]:
    """A copy of the model trained by one of today's methods."""
    model = deepcopy(bench.model)
    return compared(bench, model, RIVALS[method](model), plain, rounds)


def cases_of(bench: Bench, rounds: int, plans: Path | None) -> Iterator[Case]:
    """The model's cases by name, each to be run in turn: eager, plans, today's methods."""
    plain = bench.step(bench.model, bench.model)
    known: dict[str, Any] = {}

    def eager() -> dict[str, Any]:
        known["eager"] = bench.peaks(bench.model, plain)
        first, again = bench.results(bench.model, plain), bench.results(bench.model, plain)
        return known["eager"] | {"different": sorted(name for name in first if not torch.equal(first[name], again[name]))}

    def prepare() -> dict[str, Any]:
        start = time.perf_counter()
        with bench.cast():
            step = known["step"] = profile(bench.model, bench.args, bench.kwargs)
        return {"seconds": time.perf_counter() - start, "num_ops": len(step.graph.ops)}

    def planned(share: float) -> dict[str, Any]:
        profiled: ProfiledStep = known["step"]
        budget = bench.resident_bytes + int(share * known["eager"]["allocated_bytes"])
        solved: list[tuple[Plan, float]] = []

        def within(aim_bytes: int) -> CheckpointedModule:
            start = time.perf_counter()
            made = replace(profiled.solved(aim_bytes, Limits(PLAN_LIMIT_S)), budget_bytes=budget)
            solved.append((made, time.perf_counter() - start))
            with bench.cast():
                step = make_step(made, profiled.joint, bench.model, bench.args, bench.kwargs, DEFAULT_STAGES)
            return CheckpointedModule(bench.model, step, made, strict=True)

        module = measured_within(budget, within, bench.args, bench.kwargs)
        made = module.plan
        predicted = {"predicted_bytes": made.peak_bytes - bench.resident_bytes, "predicted_time": 1 + made.overhead}
        predicted["first_predicted_bytes"] = solved[0][0].peak_bytes - bench.resident_bytes
        figures = {"budget_bytes": budget - bench.resident_bytes, "gap": made.gap, "solve_s": [s for _, s in solved]}
        if plans is not None:
            solved[0][0].save(plans / f"{bench.name}-{share}.json")
        return predicted | figures | compared(bench, module, module, plain, rounds)

    yield "eager", eager
    yield "prepare", prepare
    for share in SHARES:
        yield f"plan {share}", functools.partial(planned, share)
    for method in METHODS:
        yield method, functools.partial(today, bench, method, plain, rounds)


def slow_cases_of(bench: Bench, rounds: int, plans: Path | None) -> Iterator[Case]:
    """What takes a minute or more; for when all else has been measured: the largest batch, methods that compile."""

    def largest() -> dict[str, Any]:
        build, whole, limit_s = SMALL[bench.name], 2**20, 0.5
        if bench.device.type == "cuda":
            build, limit_s = BUILDERS[bench.name], 4.0
            whole = torch.cuda.get_device_properties(bench.device).total_memory

        def inputs(batch: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
            _, args, kwargs = build(batch=batch)
            return tuple(arg.to(bench.device) for arg in args), {key: arg.to(bench.device) for key, arg in kwargs.items()}

        with bench.cast():
            found = max_batch(inputs, bench.model, int(0.9 * whole), costs="estimate", effort=limit_s)
        return {"summary": found.summary()}

    yield "largest batch", largest
    plain = bench.step(bench.model, bench.model)
    for method in SLOW_METHODS:
        yield method, functools.partial(today, bench, method, plain, rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=BUILDERS, default=list(BUILDERS), metavar="MODEL")
    parser.add_argument("--out", type=Path, default=Path("gpu.jsonl"), help="JSON lines; appended")
    parser.add_argument("--limit", type=float, default=460.0, metavar="S", help="no case starts later (default 460)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--plans", type=Path, metavar="FOLDER", help="save the plan files there")
    parser.add_argument("--small", action="store_true", help="tiny models, on a CPU where there is no GPU")
    options = parser.parse_args()
    if not options.small and not torch.cuda.is_available():
        parser.error("no CUDA device here; --small tries the script on a CPU")
    run(options.models, options.out, options.limit, options.rounds, options.small, options.plans)


def run(models: list[str], out: Path, limit_s: float, rounds: int, small: bool, plans: Path | None = None) -> None:
    """Run the models' cases until the time is over."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cudnn.benchmark = False
    start = time.perf_counter()
    machine = cases.machine() | {"device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"}
    for cases_made_by, name in itertools.product((cases_of, slow_cases_of), models):
        bench = Bench(name, (SMALL if small else BUILDERS)[name], device)
        # asked for strictly, attention is deterministic; some kernels of images have no such variant, and repeat in practice
        torch.use_deterministic_algorithms(True, warn_only=name not in IN_BFLOAT16)
        for case, measure in cases_made_by(bench, rounds, plans):
            if time.perf_counter() - start > limit_s:
                return
            try:
                found = measure()
            except (PlannerError, NotApplicable, RuntimeError) as error:
                found = {"error": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
                if not isinstance(error, (PlannerError, NotApplicable)):
                    traceback.print_exc()
            with out.open("a", encoding="utf-8") as lines:
                print(json.dumps({"model": name, "case": case, "machine": machine} | found), file=lines)
            print(name, case, found, flush=True)


if __name__ == "__main__":
    main()
