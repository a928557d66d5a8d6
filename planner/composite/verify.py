"""Planned units beside the plain model: bits over successive steps, and peaks."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import nn

from planner._compat import pytree
from planner.composite.trial import Autocast
from planner.errors import InputError
from planner.profiler.memory import logical_peak
from planner.results.unit_plan import UnitPlan
from planner.results.verify_report import VerifyReport
from planner.runtime.install import install, uninstall
from planner.runtime.module import CheckpointedModule
from planner.tracer.loss import Loss, loss_leaves
from planner.verification.state import (
    StateEntry,
    generators,
    generators_as_leaves,
    largest_difference,
    same,
    set_generators,
    state_of,
)
from planner.verification.step_copy import copy_of

_NUM_STEPS = 3


class Planned(Protocol):
    """What is verified."""

    model: nn.Module
    planned: dict[str, CheckpointedModule]
    plan: UnitPlan


def verify_units(
    planned: Planned, args: tuple[Any, ...], kwargs: dict[str, Any], loss: Loss, autocast: Autocast
) -> VerifyReport:
    """See `PlannedUnits.verify`."""
    before = generators()
    try:
        ours, plain = (_Side(planned, args, kwargs, loss, autocast, is_plain=is_plain) for is_plain in (False, True))
        differences: list[str] = []
        num_compared, largest = 0, 0.0
        states: list[Mapping[str, Any]] = [before, before]
        for number in range(1, _NUM_STEPS + 1):
            expected, states[0] = plain.result(states[0])
            found, states[1] = ours.result(states[1])
            leaves = dict.fromkeys([*expected, *found])
            wrong = [at for at in leaves if at not in expected or at not in found or not same(expected[at], found[at])]
            differences += [f"{at}{'' if number == 1 else f' (step {number})'}" for at in wrong]
            num_compared += len(leaves)
            largest = max(largest, largest_difference(expected, found)) if wrong else largest
        return VerifyReport(
            differences=tuple(differences),
            num_compared=num_compared,
            budget_bytes=planned.plan.budget_bytes,
            predicted_peak_bytes=planned.plan.peak_bytes,
            measured_peak_bytes=ours.peak(),
            plain_peak_bytes=plain.peak(),
            time_ratio=None,
            largest_difference=largest,
            num_steps=_NUM_STEPS,
            unplanned=tuple(
                f"{name}: {module.num_unplanned_calls} of its calls"
                for name, module in ours.modules.items()
                if module.num_unplanned_calls
            ),
        )
    finally:
        set_generators(before)


class _Side:
    """A copy of the model, planned or plain, and of the call."""

    def __init__(
        self,
        planned: Planned,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        loss: Loss,
        autocast: Autocast,
        *,
        is_plain: bool,
    ) -> None:
        self.model = copy_of(planned.model)
        for module in self.model.modules():
            uninstall(module)
        leaves, spec = pytree.tree_flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        if not tensors:
            raise InputError("verify needs the call that the units were planned for, verify(args, kwargs), with its tensors")
        memo: dict[int, Any] = {}
        own = [_copied(leaf, memo) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        self.inputs = [leaf for leaf in own if isinstance(leaf, torch.Tensor)]
        self.args, self.kwargs = pytree.tree_unflatten(own, spec)
        self.device, self.loss, self.autocast = tensors[0].device, loss, autocast
        self.modules: dict[str, CheckpointedModule] = {}
        for name, module in () if is_plain else planned.planned.items():
            self.modules[name] = CheckpointedModule(
                self.model.get_submodule(name), module.step, module.plan, executable=module.executable, audits=False
            )
        for module in self.modules.values():
            install(module.original, module)

    def step(self) -> list[Any]:
        self.model.zero_grad(set_to_none=True)
        for tensor in self.inputs:
            tensor.grad = None
        torch.clear_autocast_cache()
        with self.autocast.on(self.device):
            out = self.model(*self.args, **self.kwargs)
        leaves = pytree.tree_leaves(out)
        starts = loss_leaves(out, leaves, self.loss)
        with torch.autocast(self.device.type, enabled=False):
            torch.autograd.backward(starts, [torch.ones_like(start) for start in starts])
        return leaves

    def result(self, states: Mapping[str, Any]) -> tuple[dict[StateEntry, Any], Mapping[str, Any]]:
        """Everything that a step from these states of the generators changes or returns, and their states after it."""
        set_generators(states)
        leaves = self.step()
        after = generators()
        found: dict[StateEntry, Any] = {StateEntry("output", f"{i}"): leaf for i, leaf in enumerate(leaves)}
        found |= {StateEntry("gradient", name): p.grad for name, p in self.model.named_parameters()}
        found |= {StateEntry("input", f"{i}"): tensor for i, tensor in enumerate(self.inputs)}
        found |= {StateEntry("input gradient", f"{i}"): tensor.grad for i, tensor in enumerate(self.inputs)}
        return found | state_of(self.model) | generators_as_leaves(after), after

    def peak(self) -> int:
        """Measured peak of a step, everything resident included."""
        self.model.zero_grad(set_to_none=True)
        tensors = (*self.model.parameters(), *self.model.buffers(), *self.inputs)
        resident = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        for tensor in self.inputs:
            tensor.grad = None
        return sum(resident.values()) + logical_peak(self.step, self.device)


def _copied(tensor: torch.Tensor, memo: dict[int, Any]) -> torch.Tensor:
    """A leaf of its own; one for all places that hold the tensor."""
    if id(tensor) not in memo:
        memo[id(tensor)] = copy.deepcopy(tensor.detach()).requires_grad_(tensor.requires_grad)
    return memo[id(tensor)]  # type: ignore[no-any-return]
