"""What the benchmarks of whole training steps share: an example's step, its peaks, its plan; fresh processes; tables."""

import importlib
import inspect
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from planner import api, captured, profiled
from planner.profiler.measure import device_name
from planner.solver.solve import Solver

STAGES = {"capture": captured, "measure": profiled, "solve": Solver}  # by name, where each is called
MIB = 2**20

Record = dict[str, Any]
Step = Callable[[], None]


def build(name: str, scale: float = 1.0, **sizes: Any) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """Return `(model, args, kwargs)` of the example of that name, its batch `scale` times as large."""
    make = importlib.import_module(f"examples.{name}").build
    batch = sizes.pop("batch", inspect.signature(make).parameters["batch"].default)
    return make(batch=max(1, round(scale * batch)), **sizes)


def resident_bytes(model: nn.Module, args: Iterable[Any], kwargs: Mapping[str, Any]) -> int:
    """Count what is live before a step: parameters, buffers and inputs, each storage once."""
    tensors = [*model.parameters(), *model.buffers(), *args, *kwargs.values()]
    storages = [tensor.untyped_storage() for tensor in tensors if isinstance(tensor, Tensor)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def training_step(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], forward: Callable[..., Any] | None = None
) -> Step:
    """Return a step without optimizer that leaves nothing behind: forward, backward, gradients dropped.

    `forward` is what to call, where it is not the model itself.
    """
    call = forward or model

    def step() -> None:
        output = call(*args, **kwargs)  # held during the backward, as in most training loops
        loss_of(output).backward()
        model.zero_grad()

    return step


def loss_of(output: Any) -> Tensor:
    """Return the loss of an example's output: the output itself, or its field of that name."""
    return output if isinstance(output, Tensor) else output.loss


def warm_peak(step: Step, peak: Callable[[Step], int], num_warm_ups: int = 2) -> int:
    """Return a peak above what is live before the step, after steps of warming up."""
    for _ in range(num_warm_ups):
        step()
    return peak(step)


def timed_plan(
    model: nn.Module, budget: int, args: Any, kwargs: Any, compile: bool = False
) -> tuple[nn.Module, dict[str, float]]:
    """Return the planned module and the wall seconds of planning: of each stage, and in total."""
    seconds = dict.fromkeys((*STAGES, "total"), 0.0)

    def clocked(name: str, fn: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return fn(*args, **kwargs)
            finally:
                seconds[name] += time.perf_counter() - start

        return run

    with ExitStack() as patches:
        for name, module in STAGES.items():
            patches.enter_context(mock.patch.object(module, name, clocked(name, getattr(module, name))))
        planned = clocked("total", api.plan)(model, budget, args=args, kwargs=kwargs, compile=compile)
    return planned, seconds


def machine() -> dict[str, str]:
    """Return what measured times depend on, and the day."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "processor": device_name(torch.device("cpu")),
        "date": time.strftime("%Y-%m-%d"),
    }


def run_module(module: str, arguments: Sequence[str], settings: Mapping[str, str], limit_s: float | None = None) -> Record:
    """Run a module of ours in a fresh process and return what it prints last.

    Raises:
        RuntimeError: it failed, or took longer than `limit_s`; says how.
    """
    command = [sys.executable, "-m", module, *arguments]
    environment = os.environ | settings
    try:
        done = subprocess.run(
            command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=limit_s
        )
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"not done after {limit_s:g} s: {' '.join(command)}") from error
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    raise RuntimeError((done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1])


def mib(nbytes: int) -> str:
    return f"{nbytes / MIB:.1f}"


def markdown(columns: Mapping[str, Callable[[Record], str]], records: Sequence[Record]) -> str:
    """Return a Markdown table, a row for each record; a column is its title and what it shows of a record. "" of no records."""
    if not records:
        return ""
    rows = [list(columns), ["---"] * len(columns)]
    rows += [[column(record) for column in columns.values()] for record in records]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)
