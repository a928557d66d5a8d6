"""StepCopy: a copy of a planned or plain model on which training steps can run without touching the model."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from planner._compat import pytree
from planner.errors import InputError, first_line
from planner.graph.accumulation import num_stages
from planner.graph.graph import Kind
from planner.profiler.memory import logical_peak
from planner.runtime.audit import run_original
from planner.runtime.guards import call_key
from planner.runtime.guards.mismatch import Mismatch
from planner.runtime.install import uninstall
from planner.runtime.module import CheckpointedModule
from planner.runtime.planned_call import unplanned_forward
from planner.tracer.call import without_history
from planner.tracer.copies import with_left_tensors
from planner.tracer.faults import is_out_of_memory
from planner.tracer.host.arguments import bound_and_restored
from planner.tracer.host.preserve import Preserved
from planner.tracer.host.state import remembered
from planner.tracer.joint import Joint
from planner.tracer.outputs import without_caches
from planner.verification.state import generators, set_generators, state_of

CallArguments = tuple[tuple[Any, ...], dict[str, Any]]

FILLED_IN = ("host", "weight", "value")
"""Kinds of mismatches that a first forward may remove: it fills in Python state, a buffer that is None, a flag in a buffer."""


class CopyError(InputError):
    """The model cannot be copied, and running a step on the model itself would change it."""


def copy_of(module: nn.Module, *, sharing: bool = False) -> Any:
    """A deep copy. Tensors that a forward left on a module are copied without their autograd graph.

    Args:
        module: a model or a planned module.
        sharing: the copy's parameters share the memory of the module's; hooks and optimizers of the module's do not see them.

    Raises:
        CopyError: it cannot be copied.
    """
    model = module.original if isinstance(module, CheckpointedModule) else module
    left = [t for t in state_of(model).values() if isinstance(t, torch.Tensor) and not t.is_leaf]
    memo = with_left_tensors(model, {})
    memo |= {id(t): t.detach().clone().requires_grad_(t.requires_grad) for t in left}
    if sharing:
        memo |= {id(p): nn.Parameter(p.detach(), p.requires_grad) for p in model.parameters()}
    try:
        return copy.deepcopy(module, memo)
    except (TypeError, RuntimeError, NotImplementedError, AttributeError) as error:
        if is_out_of_memory(error):
            raise
        raise CopyError(f"the model cannot be copied, so no step of it can be run beside it: {first_line(error)}") from error


def own_call(planned: CheckpointedModule, call: CallArguments) -> CallArguments:
    """The call with new tensors, without history or hooks, in the same memory unless the step writes into them."""
    leaves, spec = pytree.tree_flatten(call)
    joint = planned.step.joint
    mutated = [int(given.key) for given in joint.inputs if given.kind is Kind.INPUT and given.mutated]
    places = joint.call.tensors  # further inputs are tensors of Python state
    written = {id(leaves[places[i]]) for i in mutated if i < len(places)}
    own: dict[int, torch.Tensor] = {}
    for leaf in leaves:
        if isinstance(leaf, torch.Tensor) and id(leaf) not in own:
            own[id(leaf)] = without_history(leaf, _copied(leaf) if id(leaf) in written else None)
    args, kwargs = pytree.tree_unflatten([own.get(id(leaf), leaf) for leaf in leaves], spec)
    return tuple(args), dict(kwargs)


def _copied(tensor: torch.Tensor) -> torch.Tensor:
    """A copy with the same strides."""
    made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
    return made.copy_(tensor.detach())


def autocast_of(planned: CheckpointedModule) -> Any:
    """The autocast context that the module was planned under; its casts are not shared with the caller's region."""
    torch.clear_autocast_cache()
    return call_key.autocast_of(planned.step.key, planned.device)


def check_call(planned: CheckpointedModule, args: Sequence[Any], kwargs: Mapping[str, Any] | None, what: str) -> CallArguments:
    """The call as (args, kwargs).

    Args:
        what: begins the error message.

    Raises:
        InputError: it is not the call that was planned for.
    """
    call = (tuple(args), dict(kwargs or {}))
    with autocast_of(planned), torch.enable_grad():
        mismatch = planned.mismatch(*call)
    if mismatch is not None and mismatch.kind not in FILLED_IN:  # see `run_first_calls`
        raise InputError(f"{what} the call that was planned for: {mismatch.explained}")
    return call


def state_found(joint: Joint, model: nn.Module) -> Preserved:
    """Restores the Python state that the captured call finds, before it is run again, where it leaves another one."""
    return remembered(model, joint.host.key) if joint.host.as_found else Preserved()


MOST_CALLS = 5
"""Number of calls after which Python state has to be as it was captured."""


def run_first_calls(planned: CheckpointedModule, call: CallArguments) -> int:
    """Run the model's own forward until its Python state is as planned: first calls fill caches. Returns how often it was run.

    `call` need not run planned then: see `CheckpointedModule.mismatch`.
    """
    for number in range(MOST_CALLS):
        with autocast_of(planned), torch.enable_grad():
            mismatch = planned.mismatch(*call)
            if mismatch is None or mismatch.kind not in FILLED_IN:
                return number
            with bound_and_restored(*call):
                run_original(unplanned_forward(planned.original), *call)
    return MOST_CALLS


def cut_history(joint: Joint, model: nn.Module) -> None:
    """Replace tensors of Python state that an earlier call computed by others of the same values, without that call's graph.

    They still are no leaves, so that the step runs as planned. Its backward ends there, and can run again and again.
    """
    computed = {int(given.key) for given in joint.inputs if given.kind is Kind.INPUT and given.is_leaf is False}
    for i, path in enumerate(joint.host.state, start=len(joint.call.tensors)):
        left = path.get(model)
        if isinstance(left, torch.Tensor) and left.requires_grad and (i in computed or not left.is_leaf):
            path.set(model, without_history(left, is_leaf=False))
    for path, number in joint.host.shared:
        path.set(model, joint.host.state[number].get(model))


def resident_bytes(planned: CheckpointedModule) -> int:
    """Bytes in use before the step: parameters, buffers, inputs, reserved bytes, and what other forwards in flight saved."""
    return planned.plan.graph.resident_bytes + planned.plan.in_flight_bytes


class StepCopy:
    """A copy of a module and of a call: steps that run on it change nothing else but the random generators.

    Attributes:
        module: the copy, planned or plain.
        call: see `own_call`.
    """

    def __init__(self, module: nn.Module, planned: CheckpointedModule, call: CallArguments) -> None:
        self.module, self.call, self._planned, self._given = module, own_call(planned, call), planned, call
        self._device = planned.device
        self._model: nn.Module = module.original if isinstance(module, CheckpointedModule) else module
        self._found = state_found(planned.step.joint, self._model)
        if isinstance(module, CheckpointedModule):
            module.__dict__["audits"] = False  # an audit would count as part of the step
        else:
            uninstall(module)

    @property
    def inputs(self) -> list[torch.Tensor]:
        """The call's tensors."""
        return [leaf for leaf in pytree.tree_leaves(self.call) if isinstance(leaf, torch.Tensor)]

    def prepare(self) -> None:
        """Reset gradients to None, inputs to their first values, and Python state as of `state_found`, `cut_history`."""
        self._found.restore()
        cut_history(self._planned.step.joint, self._model)
        self.module.zero_grad(set_to_none=True)
        given = [leaf for leaf in pytree.tree_leaves(self._given) if isinstance(leaf, torch.Tensor)]
        for own, original in zip(self.inputs, given, strict=True):
            own.grad = None
            if own.data_ptr() != original.data_ptr():
                with torch.no_grad():
                    own.detach().copy_(original)

    def repeat_first_calls(self, number: int) -> None:
        """Run the model's own forward, which fills caches and first states; the random generators are restored."""
        self.prepare()
        before = generators()
        for _ in range(number):
            with autocast_of(self._planned), torch.enable_grad(), bound_and_restored(*self.call):
                run_original(unplanned_forward(self._model), *self.call)
        set_generators(before)

    def mismatch(self) -> Mismatch | None:
        """Why the copy would not run its call planned; None if it would."""
        self.prepare()
        with autocast_of(self._planned), torch.enable_grad():
            return self.module.mismatch(*self.call)  # type: ignore[no-any-return, operator]

    def run_first_calls(self) -> int:
        """Make the copy of a planned module run its call planned; how many forwards had to fill its Python state first.

        Raises:
            InputError: it would not run planned even then.
        """
        self.prepare()
        before = generators()
        number = run_first_calls(self.module, self.call)  # type: ignore[arg-type]
        set_generators(before)
        mismatch = self.mismatch()
        if mismatch is not None:
            raise InputError(
                f"this is done on copies, and a deep copy of this model does not run planned: {mismatch}. "
                "Compare a few steps of the model itself with steps of another one that is built alike"
            )
        return number

    def step(self) -> list[Any]:
        """Forward and backward; the output's leaves. `prepare` comes first."""
        with torch.enable_grad(), bound_and_restored(*self.call):
            with autocast_of(self._planned):
                out = self.module(*self.call[0], **self.call[1])
            leaves = aligned(self._planned.step.joint, pytree.tree_leaves(out))
            backward_of_ones(self._planned.starts(leaves, self._model), self._device)
        return leaves

    def peak(self) -> int:
        """Measured peak of a step in bytes, resident bytes included. A step has to run before: what a first call allocates
        for good is not part of a step."""
        self._prepare_to_measure()
        above = logical_peak(self.step, self._device)
        if self._device.type == "cuda":  # the peak depends on cached blocks: measure again without any
            self._prepare_to_measure()
            torch.cuda.empty_cache()
            above = max(above, logical_peak(self.step, self._device))
        return resident_bytes(self._planned) + above

    def _prepare_to_measure(self) -> None:
        """`prepare`; where the plan counts gradients of earlier micro-steps, the parameters have some."""
        self.prepare()
        if num_stages(self._planned.plan.graph):
            for parameter in self.module.parameters():
                parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None


def aligned(joint: Joint, leaves: Sequence[Any]) -> list[Any]:
    """An output's leaves at their positions in the captured step; None for a cache, which a planned output leaves out."""
    outputs = joint.outputs
    if not any(out.left_out for out in outputs):
        return list(leaves)
    there = [i for i, out in enumerate(outputs) if not out.left_out and (out.result, out.input, out.constant) != (None,) * 3]
    found: list[Any] = [None] * len(outputs)
    for i, leaf in zip(there, without_caches(leaves), strict=True):
        found[i] = leaf
    return found


def backward_of_ones(starts: Sequence[torch.Tensor], device: torch.device) -> None:
    """Run backward from these tensors, each with a gradient of ones."""
    is_on = torch.is_autocast_enabled(device.type)
    with torch.autocast(device.type, enabled=False) if is_on else contextlib.nullcontext():
        torch.autograd.backward(starts, [torch.ones_like(start) for start in starts])
