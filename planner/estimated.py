"""estimate: what a training step needs of a device's memory, without the device, and what would make it fit."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.fx import map_arg

from planner import arguments
from planner._compat import pytree
from planner.analysis.estimate import Margin, PlainStep, Remedy, estimate_graph
from planner.captured import captured
from planner.errors import InputError, PlannerError, first_line
from planner.graph.accumulation import num_stages
from planner.graph.graph import Graph
from planner.graph.schedule import keep_all
from planner.graph.simulate import simulate
from planner.log import PLANNER
from planner.options import PlanOptions
from planner.profiled import ProfiledStep, profiled, set_aside, target_device, with_costs
from planner.profiler.estimate import DeviceModel, most_workspace_bytes
from planner.profiler.measure import device_name
from planner.profiler.optimizer import Optimizer, state_bytes
from planner.profiler.profile import KernelCost
from planner.report.progress import stage
from planner.results.estimate import Estimate
from planner.tracer.eager import CallKey, eager_step, key_of, with_tensors
from planner.tracer.faults import concerns_model
from planner.tracer.lower import kernel_nodes
from planner.tracer.target_device import TargetDevice
from planner.units import parse_bytes, shown

CONTEXT_BYTES = 512 * 2**20
"""What a CUDA context takes of a device that is here, beside torch's allocator: 0.3 to 0.5 GiB on recent ones."""


def estimated(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None,
    options: PlanOptions,
    *,
    memory: int | str | None = None,
    autocast: str | torch.dtype | None = None,
    remedies: bool = True,
) -> Estimate:
    """Estimate a training step; see `planner.estimate`.

    Raises:
        BudgetError: `memory` cannot be read.
        InputError, CaptureError: what was given cannot be captured; says why.
    """
    arguments.check_flags(remedies=remedies)
    memory_bytes = None if memory is None else parse_bytes(memory, "memory")
    dtype = autocast_dtype(autocast)
    target = target_device(options)
    with _autocast_here(model, dtype) if target is None else nullcontext():
        step = profiled(model, args, kwargs, options, autocast=dtype)
        own = _own_step(step)
        most = _own_step(step, at_most=True) if own is not None and step.provenance.is_estimated else own
    unknown = 0 if own is None or most is None else most.peak_bytes - own.peak_bytes
    if memory_bytes is None:
        memory_bytes = _memory_bytes(step.joint.device, target)
    others = tuple(_remedies(step, dtype)) if remedies else ()
    with stage("solve", options.progress):
        found = estimate_graph(
            step.graph,
            device=device_name(step.joint.device) if target is None else target.name,
            memory_bytes=memory_bytes,
            margin=margin_of(step, unknown),
            provenance=step.provenance,
            own=own,
            remedies=others,
            limits=options.limits,
        )
    return Estimate.of(found)


def autocast_dtype(value: Any) -> torch.dtype | None:
    """The dtype of autocast: None, "bfloat16" or "float16", or torch's.

    Raises:
        InputError: another one.
    """
    known = {"bfloat16": torch.bfloat16, "bf16": torch.bfloat16, "float16": torch.float16, "fp16": torch.float16}
    if value is None or value in known.values():
        return value  # type: ignore[no-any-return]
    if not isinstance(value, str) or value not in known:
        raise InputError(f"autocast={shown(value)}: give 'bfloat16' or 'float16', or leave it out")
    return known[value]


def _autocast_here(model: nn.Module, dtype: torch.dtype | None) -> AbstractContextManager[Any]:
    tensor = next(model.parameters(), None)
    return nullcontext() if dtype is None or tensor is None else torch.autocast(tensor.device.type, dtype)


def margin_of(step: ProfiledStep, unknown_bytes: int = 0) -> Margin:
    """By a peak: by how much at most the measured one exceeds it; see docs/estimate.md.

    Args:
        unknown_bytes: by how much the plain step's peak is higher where every kernel holds the most that it may.
    """
    share, least = MARGINS[step.provenance.is_estimated], _SMALLEST[step.joint.device.type == "cuda"]
    resident = step.graph.resident_bytes
    return lambda peak_bytes: unknown_bytes + max(least, round(share * (peak_bytes - resident)))


MARGINS = {False: 0.01, True: 0.05}
"""By whether workspaces were estimated: share of what a peak holds above the resident bytes, which are known."""
_SMALLEST = {False: 2**16, True: 2**21}
"""On CUDA: a block of over 1 MiB may be 1 MiB larger than what was asked for; on a CPU: small tensors of the training loop."""


def _plain_bytes(graph: Graph) -> int:
    return simulate(graph, keep_all(graph)).peak_bytes


def _memory_bytes(device: torch.device, target: DeviceModel | None) -> int | None:
    """What a step may take on a device; None where that is not known."""
    if target is not None:
        return target.memory_bytes - target.held_bytes or None
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory) - CONTEXT_BYTES
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):  # a system that does not tell
        return None


def _remedies(step: ProfiledStep, autocast: torch.dtype | None) -> Iterator[Remedy]:
    """What would lower the peak beside a plan and a smaller batch: other dtypes, another optimizer."""
    plain, options = _plain_bytes(step.graph), step.options
    if any(p.dtype is torch.float32 for p in step.model.parameters()):
        others: dict[str, torch.dtype | None] = {"parameters and inputs in bfloat16": None}
        if autocast is None and not torch.is_autocast_enabled(step.joint.device.type):
            others["bfloat16 autocast"] = torch.bfloat16
        for what, dtype in others.items():
            graph = _tried(what, functools.partial(_in_bfloat16, step, dtype))
            if graph is not None:
                yield Remedy(what, plain - _plain_bytes(graph), "results change")
    if options.optimizer is None:
        return
    now = state_bytes(step.model, options.optimizer, master_weights=options.master_weights)
    for what, optimizer in _OPTIMIZERS.items():
        yield Remedy(
            what, now - state_bytes(step.model, optimizer, master_weights=options.master_weights), "trains differently"
        )


_OPTIMIZERS: Mapping[str, Optimizer] = {
    "SGD with momentum as the optimizer": functools.partial(torch.optim.SGD, momentum=0.9),
    "SGD as the optimizer": "sgd",
}


def _tried(what: str, capture: Callable[[], Graph | None]) -> Graph | None:
    """What it returns; None where the model cannot be captured so (it reads values, or another dtype fails in it)."""
    try:
        return capture()
    except Exception as error:
        if not isinstance(error, PlannerError) and not concerns_model(error):
            raise
        PLANNER.debug("what %s would save is not known: %s", what, first_line(error))
        return None


def _in_bfloat16(step: ProfiledStep, autocast: torch.dtype | None) -> Graph:
    """The step on tensors without data: under autocast, or with parameters and inputs in bfloat16 where that is None."""
    target, device = target_device(step.options), step.joint.device
    if target is not None:
        there = TargetDevice(target.name, target.capability, autocast)
    else:
        capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
        there = TargetDevice(str(device), capability, autocast)
    model, args, kwargs = with_tensors(step.model, step.args, step.kwargs, _without_data)
    if autocast is None:
        model = model.to(torch.bfloat16)
        args, kwargs = pytree.tree_map(_narrow, (args, kwargs))
    options = replace(step.options, costs="estimate")
    found = captured(model, args, kwargs, options, there)
    return with_costs(found, set_aside(model, options, target)).graph


def _without_data(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [torch.empty_like(t, device="meta", requires_grad=False).requires_grad_(t.requires_grad) for t in tensors]


def _narrow(leaf: Any) -> Any:
    return leaf.to(torch.bfloat16) if isinstance(leaf, torch.Tensor) and leaf.dtype is torch.float32 else leaf


def _own_step(step: ProfiledStep, *, at_most: bool = False) -> PlainStep | None:
    """The model's own step, followed on tensors without data; None where that cannot be done, and the graph's stands for it.

    The kernels of a CUDA device that is not here are known of the graph alone. `at_most`: with the most that kernels may hold.
    """
    joint, graph = step.joint, step.graph
    if joint.device.type != "cpu" or graph.in_flight > 1:
        return None
    ops = {op.name: op for op in graph.ops}
    by_call: dict[CallKey, KernelCost] = {}
    for node in kernel_nodes(joint):
        arguments, op = map_arg((node.args, node.kwargs), lambda arg: arg.meta.get("val")), ops[node.name]
        workspace = max(op.workspace_bytes, most_workspace_bytes(node) if at_most else 0)
        hidden = tuple(graph.value[name].hidden_bytes for name in op.writes)
        by_call.setdefault(key_of(node.target, arguments), KernelCost(0, workspace, hidden))
    how = {"accumulates": bool(num_stages(graph)), "all_known": not joint.opaque_calls}
    try:
        return eager_step(step.model, joint, step.args, step.kwargs, step.options.loss, by_call, **how)
    except Exception as error:
        if not isinstance(error, PlannerError) and not concerns_model(error):
            raise
        PLANNER.info("the model's own step cannot be followed, its graph stands for it: %s", first_line(error))
        return None
