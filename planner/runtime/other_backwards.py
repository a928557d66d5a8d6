"""OtherBackwards: backwards for gradients that the plan was not made for, captured when such gradients first come.

The forward that has run, and what it saved, stay as they are. The other backward runs in one stage, within the plan's budget.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn

from planner._compat import pytree
from planner._compat.fake_tensors import fake_mode
from planner.errors import BackwardError, PlannerError
from planner.graph.accumulation import num_stages
from planner.graph.graph import Graph, Kind, Op
from planner.graph.schedule import keep_all
from planner.graph.simulate import simulate
from planner.kernels import custom
from planner.kernels.calls import tensors_in
from planner.log import RUNTIME
from planner.profiler.estimate import estimate
from planner.profiler.measure import measure
from planner.profiler.profile import KernelCost, Profile
from planner.results.plan import Plan
from planner.rewriter.partition import partition
from planner.rewriter.reschedule import Candidate, MissingValueError, reschedule
from planner.runtime.backward_key import BackwardKey, normal
from planner.runtime.executable import Boxed, OtherBackward
from planner.runtime.garbage import collected
from planner.runtime.guards.call_key import autocast_of
from planner.runtime.step import RewrittenStep
from planner.tracer.graft import graft
from planner.tracer.host.fingerprint import TensorKey, tensor_key
from planner.tracer.host.path import Path
from planner.tracer.joint import Joint
from planner.tracer.lower import backward_is_fixed, kernel_nodes, lower
from planner.tracer.real_layouts import capture_again
from planner.tracer.replay import Replay
from planner.tracer.storage import Storages
from planner.units import format_bytes

MOST_KEYS = 8
"""Maximum number of backwards that are remembered; then the oldest is dropped."""
_CURE = (
    "Make the loss part of the plan: plan(..., criterion=your loss, criterion_args=(targets,)), or loss= naming the outputs "
    "that your loss is made of"
)


class OtherBackwards:
    """The other backwards of one planned module, by key. A new key is captured, which takes seconds."""

    def __init__(self, model: nn.Module, step: RewrittenStep, plan: Plan, compiled: Callable[[fx.Graph], Boxed]) -> None:
        """`compiled`: turns a backward graph into code."""
        self._model, self._step, self._plan, self._compiled = model, step, plan, compiled
        self._known: dict[tuple[BackwardKey, tuple[int, ...], tuple[bool, ...]], OtherBackward] = {}

    def find(
        self, key: BackwardKey, gradients: Sequence[torch.Tensor | None], written: tuple[int, ...], leaves: tuple[bool, ...]
    ) -> OtherBackward | None:
        """The backward for these gradients; None where the planned one is right for them.

        Args:
            written: positions of the saved activations that the caller has written into, which have to be recomputed.
            leaves: per gradient of the planned step, whether it is that of a leaf of autograd.

        Raises:
            BackwardError: there is no exact one, or none fits the budget.
        """
        known = self._known.get((key, written, leaves))
        if known is None:
            key = normal(key, gradients)
            if not written and key == normal(self._step.backward_key, gradients):
                return None
            known = self._known.get((key, written, leaves))
        if known is None:
            try:
                with collected():
                    known = self._capture(gradients, written, leaves)
            except BackwardError:
                raise
            except PlannerError as error:
                raise BackwardError(f"{self._described(gradients, written)}: {error}") from error
            if len(self._known) >= MOST_KEYS:
                del self._known[next(iter(self._known))]
            self._known[key, written, leaves] = known
        return known

    def modified(self, read: Iterable[tuple[str, int, torch.Tensor | None]]) -> str:
        """The name of the first tensor whose version has changed; "" if there is none.

        Args:
            read: (name, version when it was saved, the tensor), or None instead of a tensor that the model holds.
        """
        held = dict((*self._model.named_parameters(), *self._model.named_buffers()))
        for name, version, tensor in read:
            now = held.get(name) if tensor is None else tensor
            if now is not None and now._version != version:
                return name
        return ""

    def _capture(
        self, gradients: Sequence[torch.Tensor | None], written: tuple[int, ...], leaves: tuple[bool, ...]
    ) -> OtherBackward:
        begun = time.monotonic()
        step, plan = self._step, self._plan
        strides = tuple(None if gradient is None else gradient.stride() for gradient in gradients)
        joint = graft(step.joint, recaptured(step, self._model, strides, leaves))
        graph = _lowered(joint, plan, step)
        limits = _limits(graph, plan, step.fraction)
        storages = Storages(joint.graph)
        given = {given.node for given in joint.inputs if given.kind is Kind.TANGENT}
        given |= {*step.partitioned.saved_inputs, *step.partitioned.spare}
        kept = {storages.root[node] for node in joint.graph.find_nodes(op="placeholder") if node.name in given}
        kept |= {name for i, name in enumerate(step.partitioned.saved) if i not in written}
        try:
            candidate = reschedule(graph, plan.graph, plan.solution.schedule, kept, limits, backward_is_fixed(joint))
        except MissingValueError as error:
            raise self._missing(error.value, joint, self._described(gradients, written)) from None
        what = self._described(gradients, written)
        if candidate.peak_bytes > limits[-1]:
            raise self._over(candidate, what)
        self._check_owners(joint, what)
        other = self._compile(joint, graph, candidate)
        # possible with a fractional budget only: it is the fraction of this backward's plain step, which peaks higher
        over = candidate.peak_bytes > plan.budget_bytes
        RUNTIME.log(
            logging.WARNING if over else logging.INFO,
            "%s: captured in %.1f s; its step peaks at %s (planned for %s), simulated time %+.1f %% against the planned step",
            what,
            time.monotonic() - begun,
            format_bytes(candidate.peak_bytes),
            format_bytes(plan.budget_bytes),
            100 * (candidate.time_ns / max(1, plan.timeline.time_ns) - 1),
        )
        return other

    def _compile(self, joint: Joint, graph: Graph, candidate: Candidate) -> OtherBackward:
        planned, partitioned = self._step.partitioned, partition(joint, graph, candidate.schedule)
        there = [*planned.saved, *planned.saved_inputs, *planned.spare]
        try:
            takes = tuple(there.index(name) for name in (*partitioned.saved, *partitioned.saved_inputs))
        except ValueError as error:
            raise BackwardError(f"internal error: {error}; please report it with the model") from error
        position = {(given.kind, given.key): i for i, (given, _) in enumerate(joint.gradients)}
        return OtherBackward(
            run=self._compiled(partitioned.backward),
            takes=takes,
            output_gradients=partitioned.output_gradients,
            gradients=tuple(position.get((given.kind, given.key)) for given, _ in self._step.joint.gradients),
            swaps=any(node.target is custom.swap_rng_state for node in partitioned.backward.nodes),
            peak_bytes=candidate.peak_bytes,
        )

    def _check_owners(self, joint: Joint, what: str) -> None:
        """Raise BackwardError where it computes a gradient of a tensor that has none in the planned step."""
        known = {(given.kind, given.key) for given, _ in self._step.joint.gradients}
        lost = [str(given.key) for given, _ in joint.gradients if (given.kind, given.key) not in known]
        if lost:
            raise BackwardError(
                f"{what}: it reaches {', '.join(lost[:5])}, which the gradients of the planned outputs do not reach. {_CURE}"
            )

    def _missing(self, value: str, joint: Joint, what: str) -> BackwardError:
        name = {given.node: given.key for given in joint.inputs}.get(value, value)
        where = joint.sources.get(value)
        return BackwardError(
            f"{what}: its backward reads {name}{f' ({where})' if where else ''}, which the plan neither saved nor can "
            f"recompute, as its own backward does not read it. {_CURE}"
        )

    def _over(self, candidate: Candidate, what: str) -> BackwardError:
        plan = self._plan
        would_do = candidate.peak_bytes + max(plan.margin_bytes, candidate.peak_bytes // 100)
        return BackwardError(
            f"{what}: with it this step needs {format_bytes(candidate.peak_bytes)}, more than the budget of "
            f"{format_bytes(plan.budget_bytes)} ({plan.margin_bytes} bytes of it kept free); budget={would_do} would do. "
            f"{_CURE}"
        )

    def _described(self, gradients: Sequence[torch.Tensor | None], written: tuple[int, ...]) -> str:
        """The gradients beside the planned ones, for messages."""
        step = self._step
        outputs = (*step.joint.outputs, *step.joint.left)
        name = {out.result: out.name for out in reversed(outputs) if out.result is not None}
        came = [f"{name[i]!r} with strides {tuple(g.stride())}" for i, g in enumerate(gradients) if g is not None]
        planned = [f"{name[i]!r} with strides {strides}" for i, strides in enumerate(step.backward_key) if strides is not None]
        roots = {step.partitioned.saved[i] for i in written}
        modified = [repr(name[i]) for i, root in enumerate(step.partitioned.roots) if root in roots]
        also = f", after {', '.join(modified)} {'was' if len(modified) == 1 else 'were'} modified in place" if modified else ""
        return f"backward through {', '.join(came) or 'no output'}{also} (planned for {', '.join(planned)})"


def _limits(graph: Graph, plan: Plan, fraction: float | None) -> tuple[int, ...]:
    """Bounds on the peak, to be tried in this order: the plan's; then the same fraction of this plain step's peak.

    A gradient with other strides may make the plain step itself need more (a copy that eager makes, too). A budget given as a
    fraction is then the fraction of that step.
    """
    limit = plan.budget_bytes - plan.margin_bytes
    if fraction is None:
        return (limit,)
    return limit, max(limit, int(fraction * simulate(graph, keep_all(graph)).peak_bytes) - plan.margin_bytes)


def recaptured(step: RewrittenStep, model: nn.Module, strides: BackwardKey, leaves: tuple[bool, ...]) -> Joint:
    """Capture the planned call again for other gradients; fake tensors stand for the call's.

    Args:
        strides: of the gradients that come.
        leaves: per gradient of the planned step, whether it is that of a leaf of autograd.

    Raises:
        InputError, CaptureError: the model can no longer be captured.
    """
    call, host = step.joint.call, step.joint.host
    computed = {
        int(g.key) for (g, _), leaf in zip(step.joint.gradients, leaves, strict=True) if g.kind is Kind.INPUT and not leaf
    }
    with fake_mode():
        made = _tensors_like(step.key.inputs, step.storages) + _tensors_like(host.state_keys, host.state_storages)
        made = [tensor.view_as(tensor) if i in computed else tensor for i, tensor in enumerate(made)]
    for i, path in enumerate(host.state, start=len(call.tensors)):
        found = _as_found(step, model, path, i not in computed)
        made[i] = made[i] if found is None else found
    arguments = list(call.leaves)
    for i, position in enumerate(call.tensors):
        arguments[position] = made[step.same_inputs[i]]
    args, kwargs = pytree.tree_unflatten(arguments, call.in_spec)
    opaque = tuple(dict.fromkeys(spec.module for spec in step.joint.opaque_calls.values()))
    with torch.enable_grad(), autocast_of(step.key, step.joint.device):
        state = made[len(call.tensors) :]
        known = Replay(strides, step.joint.recorded, step.joint.opaque_calls, step.joint.host, state)
        return capture_again(model, args, kwargs, known, opaque)


def _tensors_like(keys: Sequence[TensorKey], storages: Sequence[int]) -> list[Any]:
    """Tensors like those that a call was planned for; those without gradients share a storage where they did.

    None stands for one that is not strided.
    """
    memory: dict[int, torch.Tensor] = {}
    made: list[Any] = []
    for i, (shape, strides, dtype, device, requires_grad) in enumerate(keys):
        if not all(isinstance(stride, int) for stride in strides):
            made.append(None)
            continue
        group = [k for k in range(len(keys)) if storages[k] == storages[i]]
        if len(group) == 1 or any(keys[k][2] != dtype or keys[k][4] for k in group):
            tensor = torch.empty_strided(shape, strides, dtype=dtype, device=device)
            made.append(tensor.requires_grad_(requires_grad))
            continue
        if storages[i] not in memory:
            size = max(_extent(*keys[k][:2]) for k in group)
            memory[storages[i]] = torch.empty(size, dtype=dtype, device=device)
        made.append(memory[storages[i]].as_strided(shape, strides))
    return made


def _as_found(step: RewrittenStep, model: nn.Module, path: Path, is_leaf: bool) -> torch.Tensor | None:
    """The tensor that the planned call found at a place of Python state, where the call has not replaced it."""
    host = step.joint.host
    key, now = host.state_keys[host.state.index(path)], path.get(model)
    if any(path.is_inside(effect.path) for effect in host.effects) or not isinstance(now, torch.Tensor):
        return None
    return now if tensor_key(now) == key and (now.is_leaf == is_leaf or not now.requires_grad) else None


def _extent(shape: Sequence[int], strides: Sequence[int]) -> int:
    """Elements from the first to the last one of a strided tensor."""
    return 0 if 0 in shape else 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))


def _lowered(joint: Joint, plan: Plan, step: RewrittenStep) -> Graph:
    """The other step's graph, with the plan's costs of the forward and new costs of the other backward.

    Raises:
        BackwardError: its forward differs from the plan's.
    """
    planned = plan.graph
    graph = lower(joint, _costs(joint, plan), accumulate=min(1, num_stages(planned)), in_flight=planned.in_flight)
    num_forward = planned.num_forward_ops
    ours, theirs = planned.ops[:num_forward], graph.ops[: graph.num_forward_ops]
    for one, other in zip(ours, theirs, strict=False):
        if not _is_same_op(one, other):
            raise BackwardError(f"captured again, the forward has {other.name} ({other.source}) where the plan has {one.name}")
    if len(ours) != len(theirs):
        raise BackwardError(f"captured again, the forward has {len(theirs)} ops where the plan has {len(ours)}")
    outside = {op_name for op in planned.ops[num_forward:] for op_name in op.writes}
    values = tuple(
        planned.value[v.name] if v.name in planned.value and v.name not in outside and v.kind is not Kind.TANGENT else v
        for v in graph.values
    )
    reserved = tuple(v for v in planned.values if v.kind is Kind.RESERVED and v.name not in graph.value)
    ops = tuple(
        replace(other, cost_ns=one.cost_ns, workspace_bytes=one.workspace_bytes, recomputable=one.recomputable)
        for one, other in zip(ours, theirs, strict=True)
    )
    return replace(
        graph,
        ops=(*ops, *graph.ops[num_forward:]),
        values=(*values, *reserved),
        inputs=(*graph.inputs, *(v.name for v in reserved)),
    )


def _is_same_op(planned: Op, other: Op) -> bool:
    """Whether two forward ops are the same.

    A result that nothing in the plan reads has no node there and is named by its position; here it may have one.
    """
    if (planned.name, planned.reads, len(planned.writes)) != (other.name, other.reads, len(other.writes)):
        return False
    pairs = zip(planned.writes, other.writes, strict=True)
    return all(one == two or one not in planned.nodes for one, two in pairs)


def _costs(joint: Joint, plan: Plan) -> Profile:
    """Costs of the other backward's kernels, estimated or measured as the plan's were.

    On CUDA they are always estimated, because the interrupted step occupies the device's memory; each non-contiguous input then
    counts as a copy in the workspace.
    """
    forward = {node.name for node in list(joint.graph.nodes)[: joint.num_forward_nodes]}
    nodes = [node for node in kernel_nodes(joint) if node.name not in forward]
    if plan.is_estimated:
        return estimate(nodes, None)
    if joint.device.type != "cuda":
        return measure(nodes, joint.device, progress=False)
    known = estimate(nodes, None)
    return replace(known, costs={node.name: _with_copies(node, known.costs[node.name]) for node in nodes})


def _with_copies(node: fx.Node, cost: KernelCost) -> KernelCost:
    read = [t for arg in node.all_input_nodes for t in tensors_in(arg.meta.get("val"))]
    copied = sum(t.numel() * t.element_size() for t in read if not t.is_contiguous())
    return KernelCost(cost.time_ns, cost.workspace_bytes + copied, cost.hidden_bytes)
