"""Models with every trap of an export, planned by schedules of all kinds, and their files loaded."""

import functools
import inspect
import random
from collections import namedtuple
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from planner import CheckpointedModule, export_source
from planner.graph.provenance import Provenance
from planner.graph.schedule import Schedule
from planner.graph.solution import Solution
from planner.profiler.measure import measure
from planner.results.plan import Plan
from planner.runtime.step import make_step
from planner.tracer.capture import capture
from planner.tracer.lower import kernel_nodes, lower
from tests.support import exported, models
from tests.support.strategies import scatter


@dataclass
class Scored:
    loss: torch.Tensor
    scores: torch.Tensor


torch.export.register_dataclass(Scored)
Pair = namedtuple("Pair", "mean parts")


class Outputs(nn.Module):
    """Nested arguments and outputs, a gradient for an argument, a tensor of its own, buffers of every kind."""

    def __init__(self, out: str) -> None:
        super().__init__()
        self.out = out
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6, bias=False)
        self.second.weight, self.idle = self.first.weight, nn.Linear(2, 2)
        self.register_buffer("scale", torch.linspace(0.5, 1.5, 6), persistent=False)
        self.register_buffer("large", torch.linspace(0.1, 0.9, 600).view(100, 6), persistent=False)
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.hidden, self.same = torch.tensor([1.0, float("inf"), 0.0, -1.0, 2.0, 0.5]), torch.full((4, 1), 0.5)

    def forward(self, batch: dict[str, Any], /, scale: torch.Tensor, *rest: float, mode: str = "sum", **more: Any) -> Any:
        self.count += 1
        x = self.first(batch["x"] * self.scale * scale).tanh()
        x = F.dropout(self.second(x), 0.15) + self.hidden.clamp(max=rest[0]) * self.same + batch["more"][0] + self.large.sum(0)
        if self.out == "namedtuple":
            return Pair(x.mean(0), (x, [x.sum(0), 3, None]))
        return Scored(x.square().mean(), x) if self.out == "dataclass" else (x, batch["x"])


def outputs(out: str) -> models.Built:
    batch = {"x": torch.randn(4, 6), "more": [torch.randn(6), "text"], "idle": torch.ones(1, requires_grad=True)}
    return Outputs(out), (batch, torch.rand(6, requires_grad=True), 2.0), {"mode": "sum", "other": True}


def gpt2(layers: int = 3) -> models.Built:
    from examples.gpt2 import build

    return build(layers=layers, width=32, heads=2, length=32, vocabulary=64)


CASES = {
    **models.MODELS,
    "gpt2": gpt2,
    **{out: functools.partial(outputs, out) for out in ("namedtuple", "dataclass", "tuple")},
    "attention-bf16": models.attention,
    "convolution-bf16": models.convolution,
}


def step_of(name: str, seed: int) -> tuple[CheckpointedModule, Any, Any, torch.dtype | None]:
    """A planned module by a random schedule; the call; autocast."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, args, kwargs = CASES[name]()
    dtype = torch.bfloat16 if name.endswith("bf16") else None
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        joint = capture(model, args, kwargs)
        schedule = scatter(lower(joint), random.Random(seed), keep=0.5)
        provenance = Provenance("estimated", "cpu", torch=str(torch.__version__))
        made = Plan(lower(joint), 2**40, 0, Solution("feasible", schedule, 0, 0.0, "chance"), provenance)
        return CheckpointedModule(model, make_step(made, joint, model, args, kwargs, 4), made), args, kwargs, dtype


def write(planned: CheckpointedModule, path: Path) -> Any:
    """Export, load into this process, and fill with the original's weights."""
    export_source(planned, path)
    module = exported.load(path)
    module.model = module.model_class()
    module.model.load_state_dict(planned.original.state_dict())
    return module


def block_functions(module: Any) -> list[str]:
    return [
        name
        for name, f in vars(module).items()
        if inspect.isfunction(f) and list(inspect.signature(f).parameters)[0:1] == ["at"]
    ]


def by_schedule(built: models.Built, schedule_of: Any, *, measured: bool = False) -> CheckpointedModule:
    model, args, kwargs = built
    joint = capture(model, args, kwargs)
    graph = lower(joint, measure(kernel_nodes(joint), joint.device, progress=False) if measured else None)
    made = Plan(graph, 2**40, 0, Solution("feasible", schedule_of(graph), 0, 0.0, "test"))
    return CheckpointedModule(model, make_step(made, joint, model, args, kwargs, 4), made)


class Branching(nn.Module):
    """Its way depends on a value of a tensor, its dropout is drawn again in the backward."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(64, 64)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        x = torch.rrelu(self.body(x).tanh(), training=True)
        return (x * mask if not mask.all() else x).tanh().square().mean()


def branching() -> models.Built:
    return Branching(), (torch.randn(32, 64), torch.ones(32, 64, dtype=torch.bool)), {}


def recompute_everything(graph: Any) -> Schedule:
    return scatter(graph, random.Random(0), keep=0.0)
