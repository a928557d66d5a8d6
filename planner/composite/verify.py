"""Planned units beside the plain model: bits over successive steps, and peaks."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import nn

from planner._compat import pytree
from planner.composite.training_step import Autocast, TrainingStep
from planner.errors import InputError
from planner.results.unit_plan import UnitPlan
from planner.results.verify_report import VerifyReport
from planner.runtime.install import install, uninstall
from planner.runtime.module import CheckpointedModule
from planner.tracer.loss import Loss
from planner.verification import state
from planner.verification.step_copy import copy_of

_NUM_STEPS = 3


class VerifiedUnits(Protocol):
    """Planned units, as they are verified."""

    model: nn.Module
    planned: dict[str, CheckpointedModule]
    plan: UnitPlan


def verify_units(
    planned: VerifiedUnits, args: tuple[Any, ...], kwargs: dict[str, Any], loss: Loss, autocast: Autocast
) -> VerifyReport:
    """See `PlannedUnits.verify`."""
    before = state.generators()
    try:
        ours, plain = (_Side(planned, args, kwargs, loss, autocast, is_plain=is_plain) for is_plain in (False, True))
        differences: list[str] = []
        num_compared, largest = 0, 0.0
        states: list[Mapping[str, Any]] = [before, before]
        for number in range(1, _NUM_STEPS + 1):
            expected, states[0] = plain.result(states[0])
            found, states[1] = ours.result(states[1])
            leaves = dict.fromkeys([*expected, *found])
            wrong = [at for at in leaves if at not in expected or at not in found or not state.same(expected[at], found[at])]
            differences += [f"{at}{'' if number == 1 else f' (step {number})'}" for at in wrong]
            num_compared += len(leaves)
            largest = max(largest, state.largest_difference(expected, found)) if wrong else largest
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
            compiled=any(module.step.is_compiled for module in planned.planned.values()),
            unplanned=tuple(
                f"{name}: {module.num_unplanned_calls} of its calls"
                for name, module in ours.modules.items()
                if module.num_unplanned_calls
            ),
        )
    finally:
        state.set_generators(before)


class _Side:
    """A copy of the model, planned or plain, and of the call."""

    def __init__(
        self,
        planned: VerifiedUnits,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        loss: Loss,
        autocast: Autocast,
        *,
        is_plain: bool,
    ) -> None:
        model = copy_of(planned.model)
        for module in model.modules():
            uninstall(module)
        leaves, spec = pytree.tree_flatten((args, kwargs))
        if not any(isinstance(leaf, torch.Tensor) for leaf in leaves):
            raise InputError("verify needs the call that the units were planned for, verify(args, kwargs), with its tensors")
        memo: dict[int, Any] = {}
        own = [_copied(leaf, memo) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        own_args, own_kwargs = pytree.tree_unflatten(own, spec)
        accumulates = planned.plan.accumulates
        self.step, self.autocast = TrainingStep(model, own_args, own_kwargs, loss, accumulates=accumulates), autocast
        self.modules: dict[str, CheckpointedModule] = {}
        for name, module in () if is_plain else planned.planned.items():
            self.modules[name] = CheckpointedModule(
                model.get_submodule(name), module.step, module.plan, executable=module.executable, audits=False
            )
        for module in self.modules.values():
            install(module.original, module)

    def result(self, states: Mapping[str, Any]) -> tuple[dict[state.StateEntry, Any], Mapping[str, Any]]:
        """Everything that a step from these states of the generators changes or returns, and their states after it."""
        state.set_generators(states)
        leaves = self.step.run(self.autocast)
        after = state.generators()
        found: dict[state.StateEntry, Any] = {state.StateEntry("output", f"{i}"): leaf for i, leaf in enumerate(leaves)}
        found |= {state.StateEntry("gradient", name): p.grad for name, p in self.step.model.named_parameters()}
        found |= {state.StateEntry("input", f"{i}"): tensor for i, tensor in enumerate(self.step.inputs)}
        found |= {state.StateEntry("input gradient", f"{i}"): tensor.grad for i, tensor in enumerate(self.step.inputs)}
        return found | state.state_of(self.step.model) | state.generators_as_leaves(after), after

    def peak(self) -> int:
        """Measured peak of a step, everything resident included."""
        return self.step.peak(self.autocast)


def _copied(tensor: torch.Tensor, memo: dict[int, Any]) -> torch.Tensor:
    """A leaf of its own; one for all places that hold the tensor."""
    if id(tensor) not in memo:
        plain = tensor.detach()
        copied = copy.deepcopy(plain) if tensor.layout is torch.strided else plain.clone()
        memo[id(tensor)] = copied.requires_grad_(tensor.requires_grad)
    return memo[id(tensor)]  # type: ignore[no-any-return]
