"""One model of the zoo: plan it, train it next to its plain twin, and say what came of it."""

from __future__ import annotations

import copy
import random
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.utils import _pytree as pytree

from planner import InputError, MismatchWarning, PlannerError, api, captured
from planner.graph.graph import Kind
from planner.limits import Limits
from planner.profiler.memory import logical_peak
from planner.solver.solve import Solver
from planner.tracer.capture import capture
from tests.support.models import Built
from tests.support.zoo import hand_written, transformers_models

MODELS: dict[str, Callable[[], Built]] = {**transformers_models.MODELS, **hand_written.MODELS}
PRECISIONS = ("fp32", "bf16")
STEPS, ACCUMULATE = 3, 2
FROM_SECOND_CALL = "exact from its second call"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of one model in one precision.

    Attributes:
        verdict: "exact" (bit-equal and within the budget, every call planned), "exact from its second call" (likewise, but the
            first call ran the original forward, with a warning), "refused" (no plan, and the model trains as before),
            "no eager step" (plain training fails, so there is nothing to compare), or what went wrong.
        reason: the refusal's message, or the names of what differs.
        plain_bytes, budget_bytes, peak_bytes: of a step, with everything resident; the peak as measured.
        overhead: predicted share of the step's time.
    """

    name: str
    precision: str
    verdict: str
    reason: str = ""
    plain_bytes: int = 0
    budget_bytes: int = 0
    peak_bytes: int = 0
    overhead: float = 0.0

    @property
    def good(self) -> bool:
        """The promise was kept."""
        return self.verdict in ("exact", FROM_SECOND_CALL, "refused", "no eager step")


def check(name: str, precision: str) -> Outcome:
    """Plan a model halfway between the lowest peak that is found and the plain one, and compare three AdamW steps."""
    model, args, kwargs = build(name)
    try:
        expected = trajectory(copy.deepcopy(model), args, kwargs, precision)
    except (RuntimeError, NotImplementedError, ValueError, TypeError) as error:
        return Outcome(name, precision, "no eager step", str(error).splitlines()[0])
    try:
        planned = planned_halfway(model, args, kwargs, precision)
    except PlannerError as error:
        different = differences(expected, trajectory(model, args, kwargs, precision))
        verdict = "changed by a refusal" if different else "refused"
        return Outcome(name, precision, verdict, f"{type(error).__name__}: {error}")
    plan, copied = planned.plan, copy.deepcopy(planned)
    peak = measured_peak(copied, args, kwargs, precision)
    different = differences(expected, trajectory(planned, args, kwargs, precision))
    unplanned = max(planned.num_unplanned_calls, copied.num_unplanned_calls)
    verdict = "different" if different else "over the budget" if peak > plan.budget_bytes else "exact"
    if verdict == "exact" and unplanned:
        verdict = FROM_SECOND_CALL if unplanned == 1 else f"{unplanned} calls unplanned"
    reason = ", ".join(different[:4])
    return Outcome(name, precision, verdict, reason, plan.plain.peak_bytes, plan.budget_bytes, peak, plan.overhead)


def build(name: str) -> Built:
    """The model with its example call, always the same; Python's generator is always in the same state then."""
    random.seed(0)  # which layers are dropped in the example call, too
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return MODELS[name]()


def planned_halfway(model: nn.Module, args: Any, kwargs: Any, precision: str) -> Any:
    """Captured once; planned for the middle between its lowest and its plain peak."""
    args, kwargs = copy.deepcopy((args, kwargs))
    with cast(precision):
        joint = capture(model, args, kwargs)
        with mock.patch.object(captured, "capture", return_value=joint):
            full = api.plan(model, 1.0, args, kwargs, progress=False).plan
            lowest = Solver(full.graph).lowest_peak(Limits(effort=2.0))
            # what the allocator's margin takes from a budget comes on top
            budget = min(full.plain.peak_bytes, (lowest + full.plain.peak_bytes) // 2 + lowest // 100)
            return api.plan(model, budget, args, kwargs, effort=5, progress=False)


def cast(precision: str) -> Any:
    """The context that the forward runs in."""
    return torch.autocast("cpu", torch.bfloat16) if precision == "bf16" else nullcontext()


def forward_backward(module: nn.Module, args: Any, kwargs: Any, precision: str) -> list[Any]:
    """One accumulation step from the loss, or from all outputs that require grad; the output's leaves."""
    with cast(precision):
        out = module(*args, **kwargs)
    leaves = pytree.tree_leaves(out)
    named = out.get("loss") if isinstance(out, dict) else getattr(out, "loss", None)
    starts = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.requires_grad]
    if isinstance(named, torch.Tensor):
        starts = [named]
    if len(starts) == 1:
        starts[0].backward(torch.ones_like(starts[0]))
    else:  # tangents that this loop held would be memory no plan can know of
        torch.stack([start.sum() for start in starts]).sum().backward()
    return leaves


def trajectory(module: nn.Module, args: Any, kwargs: Any, precision: str) -> dict[str, Any]:
    """Everything that planning must not change, by name; seeded, the caller's random state untouched."""
    args, kwargs = copy.deepcopy((args, kwargs))
    trained = [p for p in module.parameters() if p.requires_grad]
    sparse = any(getattr(part, "sparse", False) for part in module.modules())
    optimizer = torch.optim.SGD(trained, 1e-2) if sparse else torch.optim.AdamW(trained, 1e-2)
    seen: dict[str, Any] = {}
    with seeded():
        for step in range(STEPS):
            for turn in range(ACCUMULATE):
                leaves = forward_backward(module, args, kwargs, precision)
                seen |= {f"output {i} of step {step}.{turn}": _kept(leaf) for i, leaf in enumerate(leaves)}
            seen |= {f"gradient {name} of step {step}": _kept(p.grad) for name, p in module.named_parameters()}
            if not sparse:
                seen[f"norm of step {step}"] = torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
        seen["rng"] = torch.get_rng_state()
    seen |= {f"buffer {name}": _kept(buffer) for name, buffer in module.named_buffers()}
    seen |= {f"parameter {name}": _kept(p) for name, p in module.named_parameters()}
    tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    return seen | {f"input {i}": _kept(tensor) for i, tensor in enumerate(tensors)}


@contextmanager
def seeded() -> Iterator[None]:
    """The same random numbers each time; calls that run unplanned are counted by the planned module."""
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore", MismatchWarning)
        torch.manual_seed(7)
        random.seed(7)
        yield


def _kept(leaf: Any) -> Any:
    return leaf.detach().clone() if isinstance(leaf, torch.Tensor) else leaf


def differences(expected: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """Names of what is not bit-equal, the first difference first; both must name the same."""
    if expected.keys() != found.keys():
        raise InputError(f"one side has no {sorted(expected.keys() ^ found.keys())[0]}")
    return [name for name in expected if not same(expected[name], found[name])]


def same(a: Any, b: Any) -> bool:
    """Equal bit for bit, NaNs included."""
    if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor):
        return type(a) is type(b) and bool(a == b)
    if (a.dtype, a.shape, a.layout) != (b.dtype, b.shape, b.layout):
        return False
    if a.layout is not torch.strided:
        a, b = a.coalesce(), b.coalesce()
        return same(a.indices(), b.indices()) and same(a.values(), b.values())
    return torch.equal(a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8))


def measured_peak(planned: Any, args: Any, kwargs: Any, precision: str) -> int:
    """The allocator's peak in a step from empty gradients, on top of what is resident."""
    args, kwargs = copy.deepcopy((args, kwargs))

    def step() -> None:
        forward_backward(planned, args, kwargs, precision)

    with seeded():
        step()  # what a first call allocates for good is no part of a step
        planned.zero_grad(set_to_none=True)
        above = logical_peak(step, planned.device)
    graph = planned.plan.graph
    return above + sum(graph.value[name].nbytes for name in graph.inputs if graph.value[name].kind is not Kind.TANGENT)
