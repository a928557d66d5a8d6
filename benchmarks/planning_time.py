"""CPU seconds of capture, planning, a new size, `apply` and `max_batch` of a GPT-2, stage by stage, medians of a few rounds.

    python -m benchmarks.planning_time [--rounds 3] [--only capture plan max_batch large] [--layers 12 48]

`large`: capture and planning of models of several sizes for an H100 that is not here, with estimated costs.

One thread. The model is narrow, so that planning is measured and not its kernels: width 64, 64 tokens, batch 2. Children's time
counts. Each round also runs a fixed piece of work as a reference: compare its time where the machine was busy.
"""

import argparse
import os
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from datetime import date
from functools import partial
from typing import Any

import torch

import planner
from examples import llama_7b, unet
from examples.gpt2 import build
from planner.captured import captured
from planner.graph.floor import floor
from planner.limits import Limits
from planner.options import PlanOptions
from planner.profiled import with_costs

Built = tuple[torch.nn.Module, Sequence[Any], dict[str, Any]]
NARROW = {"width": 64, "heads": 4, "length": 64, "batch": 2, "vocabulary": 256}


class Seconds:
    """CPU seconds by what they were spent on."""

    def __init__(self) -> None:
        self.found: dict[str, list[float]] = {}

    def of(self, what: str, run: Callable[[], Any]) -> Any:
        begun = _cpu_s()
        result = run()
        self.found.setdefault(what, []).append(_cpu_s() - begun)
        return result

    def __str__(self) -> str:
        lines = ["| stage | median | all |", "| --- | --- | --- |"]
        for what, seconds in self.found.items():
            lines.append(f"| {what} | {statistics.median(seconds):.2f} | {' '.join(f'{s:.2f}' for s in seconds)} |")
        return "\n".join(lines)


def _cpu_s() -> float:
    return time.process_time() + sum(os.times()[2:4])


def reference() -> None:
    """A fixed piece of work, kernels and Python."""
    x = torch.rand(512, 512)
    for _ in range(60):
        x = torch.tanh(x @ x / 100)
    sum(range(2_000_000))


def stages(seconds: Seconds, layers: int) -> None:
    """One plan, from the model to the second step, and what comes after it."""
    model, args, kwargs = build(layers=layers, **NARROW)
    options, name = PlanOptions(progress=False, dynamic=True), f"{layers} layers: "
    step = seconds.of(f"{name}capture", partial(captured, model, args, kwargs, options))
    profiled = seconds.of(f"{name}costs, known", partial(with_costs, step))
    plan = seconds.of(f"{name}solve", lambda: profiled.solved(profiled.budget_bytes(0.6), options.limits))
    seconds.of(f"{name}rewrite", lambda: profiled.rewritten(plan))
    planned = seconds.of(f"{name}solve, rewrite and check", lambda: profiled.plan(0.6))
    seconds.of(f"{name}first step", lambda: planned(**kwargs).loss.backward())
    seconds.of(f"{name}apply", lambda: planner.apply(planned.plan, model, args, kwargs, progress=False))
    model.zero_grad()
    seconds.of(f"{name}a new size", lambda: planned(**{key: value[:1] for key, value in kwargs.items()}))


def largest_batch(seconds: Seconds, layers: int) -> None:
    """`max_batch` within the plain peak of 8 samples."""
    model, _, kwargs = build(layers=layers, **NARROW)
    make = lambda batch: ((), {key: torch.zeros(batch, NARROW["length"], dtype=torch.long) for key in kwargs})
    budget = planner.profile(model, *make(8), progress=False).plain_bytes
    found = seconds.of(f"{layers} layers: max_batch", lambda: planner.max_batch(make, model, budget, progress=False))
    print(found, flush=True)


def swin() -> Built:
    """Swin-T's blocks, with 96 channels, for images of 224 pixels."""
    from transformers import SwinConfig, SwinForImageClassification

    model = SwinForImageClassification(SwinConfig(num_labels=10)).train()
    return model, (), {"pixel_values": torch.randn(4, 3, 224, 224), "labels": torch.zeros(4, dtype=torch.long)}


LARGE: dict[str, Callable[[], Built]] = {
    "Llama, 7 billion parameters": llama_7b.build,
    "Llama, 70 billion parameters": lambda: llama_7b.build(80, 8192, 28672, 64, batch=8),
    "diffusion UNet": unet.build,
    "Swin-T": swin,
}


def large(seconds: Seconds, name: str) -> None:
    """A model planned for half way between the floor and the plain peak, on a device that is not here."""
    model, args, kwargs = LARGE[name]()
    options = {"device": "H100-80GB", "progress": False}
    profiled = seconds.of(f"{name}: capture", lambda: planner.profile(model, args, kwargs, **options))
    budget = (floor(profiled.graph)[0] + profiled.plain_bytes) // 2
    plan = seconds.of(f"{name}: solve", lambda: profiled.solved(budget, Limits()))
    print(f"{name}: {len(plan.graph.ops)} ops, overhead {plan.overhead:.2%}, gap {plan.gap:.2%}", flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, nargs="*", default=[12, 48])
    parser.add_argument("--only", nargs="*", default=["plan", "max_batch"], choices=["capture", "plan", "max_batch", "large"])
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    planner.profile(*build(layers=2, **NARROW), progress=False)  # imports, and kernels that torch loads late
    seconds, loads = Seconds(), []
    for _ in range(options.rounds):
        seconds.of("reference", reference)
        for layers in options.layers:
            if "capture" in options.only:
                model, args, kwargs = build(layers=layers, **NARROW)
                seconds.of(f"{layers} layers: capture", partial(captured, model, args, kwargs, PlanOptions(progress=False)))
            if "plan" in options.only:
                stages(seconds, layers)
        loads.append(os.getloadavg()[0])
    if "large" in options.only:
        for name in LARGE:
            large(seconds, name)
    if "max_batch" in options.only:
        largest_batch(seconds, options.layers[0])
    print(f"{date.today()}, torch {torch.__version__}, one thread, load {min(loads):.1f} to {max(loads):.1f}\n\n{seconds}")


if __name__ == "__main__":
    main()
