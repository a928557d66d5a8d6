"""Equal units as one kind: captured, profiled and solved once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from planner._compat import pytree
from planner.captured import CapturedStep
from planner.composite.trial import Call, Made, Trial
from planner.errors import CaptureError, InputError, PlanFileError, PlannerError
from planner.graph.graph import Graph
from planner.graph.provenance import Provenance
from planner.graph.schedule import Schedule, keep_all
from planner.graph.simulate import simulate
from planner.graph.solution import Solution
from planner.log import PLANNER
from planner.options import PlanOptions
from planner.profiled import with_costs
from planner.results.plan import Plan
from planner.runtime.guards.call import CallGuard
from planner.runtime.guards.mismatch import Mismatch
from planner.runtime.module import CheckpointedModule
from planner.runtime.step import make_step
from planner.tracer.faults import is_fault, noting
from planner.tracer.real_layouts import capture
from planner.tracer.replay import Strides
from planner.tracer.units.choice import is_inside, structure


@dataclass(eq=False)
class UnitKind:
    """Units that run the same kernels.

    Attributes:
        captured: the step of the first unit, which was captured.
        graph: of that step, with costs.
        provenance: of the costs.
        call: the first unit's call.
        used: strides of the gradients of the first unit's outputs, by the outputs' positions.
        members: names of all units, the first one first.
    """

    captured: CapturedStep
    graph: Graph
    provenance: Provenance | None
    call: Call
    used: Mapping[int, Strides]
    members: list[str]
    _made: dict[tuple[Schedule, bool], Made] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The units' class."""
        return type(self.captured.model).__name__

    def made(self, schedule: Schedule, *, is_compiled: bool = False) -> Made:
        """What planned modules of the units are made of, for a schedule of the kind's graph; made, and compiled, once.

        Raises:
            CompileError: inductor cannot compile it.
        """
        if (schedule, is_compiled) not in self._made:
            step, module, device = self.captured, self.captured.model, self.captured.joint.device
            solution = Solution("feasible", schedule, self.graph.plain_ns, 0.0, "plan_units")
            # its own peak as the budget: an audit, which runs the original forward as well, never takes more than the plan
            plan = Plan(self.graph, simulate(self.graph, schedule).peak_bytes, 0, solution, self.provenance)
            with self.call.autocast.on(device):
                made = make_step(
                    plan, step.joint, module, step.args, step.kwargs, step.options.num_stages, is_compiled=is_compiled
                )
            self._made[schedule, is_compiled] = made, plan, CheckpointedModule(module, made, plan).executable
        return self._made[schedule, is_compiled]

    def difference(self, module: nn.Module, call: Call, used: Mapping[int, Strides]) -> str:
        """Why another unit is not of this kind; "" if it is.

        Everything that the capture held fixed is compared, as before each planned call: what the forward reads of Python's
        state, shapes, strides, dtypes, requires_grad, autocast. A step that holds anything of the first unit's own is shared
        with no other one.
        """
        joint = self.captured.joint
        if joint.constants or joint.opaque_calls or joint.host.state or joint.host.effects or joint.left:
            return "it holds tensors or state of its own"
        own = structure(self.captured.model)
        if own is None or own != structure(module):
            return "its parts, weights or buffers differ, or it has hooks"
        if call.autocast != self.call.autocast or self.used != used:
            return "autocast differs, or which of its outputs get a gradient, or their strides"
        step, _, _ = self.made(keep_all(self.graph))
        with call.autocast.on(joint.device):
            found = CallGuard(module, step).match(call.args, call.kwargs)
        return str(found) if isinstance(found, Mismatch) else ""


CostsOf = Callable[[CapturedStep], tuple[Graph, "Provenance | None"]]
"""The graph of a captured unit, with costs."""


def profiled_costs(step: CapturedStep) -> tuple[Graph, Provenance | None]:
    """Measured or estimated here."""
    found = with_costs(step)
    return found.graph, found.provenance


def kinds_of(
    trial: Trial, names: Sequence[str], options: PlanOptions, costs: CostsOf = profiled_costs, *, descends: bool
) -> tuple[list[UnitKind], dict[str, str]]:
    """The units that can be captured, by kind, and why others are left.

    Args:
        trial: of the model.
        names: of the submodules to capture.
        options: for capture and costs.
        costs: the graph of a captured unit.
        descends: where one cannot be captured, its own submodules take its place; else that is an error.

    Raises:
        CaptureError: none can be captured; says why, for each. Or a given unit would run unplanned; says what differs.
        InputError: a given unit cannot be a unit.
        PlanFileError: from `costs`.
    """
    kinds: list[UnitKind] = []
    left: dict[str, str] = {}
    frontier = list(names)
    while frontier:
        calls = trial.record([name for name in frontier if trial.submodules.counts[name]])
        below = []
        for name in frontier:
            module = trial.original.get_submodule(name)
            try:
                _check_alone(trial, name, module)
                if len(calls.get(name, ())) != trial.submodules.counts[name]:
                    raise CaptureError("a second forward with the same random numbers calls it another number of times")
                with noting(f"capturing the submodule {name}"):
                    _add(kinds, name, module, calls.pop(name), trial, options, costs)
            except PlannerError as error:
                if is_fault(error):
                    raise
                if not descends and isinstance(error, PlanFileError):
                    raise
                if not descends:
                    raise InputError(f"units: {name} cannot be a unit: {error}") from error
                children = [f"{name}.{child}" for child, _ in module.named_children()]
                below += children
                is_skipped = trial.is_random and not trial.submodules.counts[name] and name in names
                if is_skipped or (trial.submodules.counts[name] and not children):
                    left[name] = str(error)
                    PLANNER.warning("%s: left as it is, unplanned: %s", name, error)
                else:
                    PLANNER.info("%s: not captured by itself (its submodules may be): %s", name, error)
        frontier = below
    kinds = _called_as_captured(kinds, trial, left, descends)
    if not kinds:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in left.items())
        raise CaptureError(f"no submodule of the model can be captured ({reasons or 'it has none'})")
    return kinds, left


def _called_as_captured(kinds: Sequence[UnitKind], trial: Trial, left: dict[str, str], descends: bool) -> list[UnitKind]:
    """The kinds without units that would run unplanned, as their Python state is not the captured one; `left` says why."""
    steps = {name: kind.made(keep_all(kind.graph))[0] for kind in kinds for name in kind.members}
    for name, mismatch in trial.mismatches(steps).items():
        reason = f"a step of the model calls it otherwise than it was captured: {mismatch.explained}"
        if not descends:
            cure = "Leave it out; or, where its first call sets this, run the model once before planning"
            raise CaptureError(f"units: {name} cannot be a unit: {reason}. {cure}")
        left[name] = reason
        PLANNER.warning("%s: left as it is, unplanned: %s", name, reason)
    for kind in kinds:
        kind.members[:] = [name for name in kind.members if name not in left]
    return [kind for kind in kinds if kind.members]


def _add(
    kinds: list[UnitKind],
    name: str,
    module: nn.Module,
    calls: Sequence[Call],
    trial: Trial,
    options: PlanOptions,
    costs: CostsOf,
) -> None:
    """Count a unit among the kind that it is of, or capture it as the first of a new one."""
    call, used = calls[0], trial.submodules.gradient_strides[name][0]
    for kind in kinds:
        different = kind.difference(module, call, used) if type(module) is type(kind.captured.model) else "another class"
        if not different:
            _check_calls(trial, name, calls, kind)
            _check_inputs(trial, name, kind)
            kind.members.append(name)
            PLANNER.info("%s: the same as %s", name, kind.members[0])
            return
        PLANNER.debug("%s: not of the same kind as the first %s: %s", name, kind.name, different)
    step = _captured(module, call, used, trial.device, options)
    kind = UnitKind(step, *costs(step), call, used, [])
    kinds.append(kind)  # without members if it is refused now: the next unit like it is not captured again
    _check_calls(trial, name, calls, kind)
    _check_inputs(trial, name, kind)
    kind.members.append(name)
    PLANNER.info("%s: captured by itself", name)


def _check_alone(trial: Trial, name: str, module: nn.Module) -> None:
    """Raise CaptureError where a plan of this submodule could change the model's results, or there is nothing to plan."""
    if name in trial.submodules.refused:
        raise CaptureError(trial.submodules.refused[name])
    if not trial.submodules.counts[name] and trial.is_random:
        raise CaptureError("the measured step, of those tried the one that saves most, does not call it with gradients")
    if not trial.submodules.counts[name]:
        raise CaptureError("it is called 0 times in a step with gradients")
    mine = {id(inner) for inner in module.modules()}
    others = {id(p) for m in trial.original.modules() if id(m) not in mine for p in m._parameters.values() if p is not None}
    shared = [key for key, parameter in module.named_parameters() if id(parameter) in others]
    if shared:
        raise CaptureError(f"its {shared[0]} is also another module's, and the order in which gradients add up would change")
    for weight, users in trial.submodules.weight_users.items():
        outside = [user for user in users if not is_inside(user, name)]
        if is_inside(weight.rpartition(".")[0], name) and outside:
            raise CaptureError(
                f"its {weight.removeprefix(f'{name}.')} is also used by the forward of {outside[0] or 'the model'}, and the "
                "order in which gradients add up would change"
            )


def _check_calls(trial: Trial, name: str, calls: Sequence[Call], kind: UnitKind) -> None:
    """Raise CaptureError where a unit's calls in a step differ, or eager adds up over them what a plan does not.

    Under autocast the calls share a cast of each weight, whose gradient is added up before it is cast back.
    """
    if len(calls) == 1:
        return
    times = f"it is called {len(calls)} times in a step"
    module = trial.original.get_submodule(name)
    for call, used in zip(calls[1:], trial.submodules.gradient_strides[name][1:], strict=True):
        different = kind.difference(module, call, used)
        if different:
            raise CaptureError(f"{times}, and not alike: {different}")
    executable = kind.made(keep_all(kind.graph))[2]
    if executable is None:  # the code is bound to opaque modules, and no kind of several units
        return
    if executable.cast and torch.is_autocast_cache_enabled():
        raise CaptureError(f"{times}, and autocast casts its {executable.inputs[executable.cast[0]]} once for all of them")
    several = sorted(executable.summed - executable.separated)
    if several:
        raise CaptureError(
            f"{times}, and uses its {executable.inputs[several[0]]} several times in each: the order in which gradients add up "
            "would change"
        )


def _check_inputs(trial: Trial, name: str, kind: UnitKind) -> None:
    """Raise CaptureError where a unit uses an input several times, and code after it does, too."""
    executable = kind.made(keep_all(kind.graph))[2]
    if executable is None:
        return
    for i in sorted(trial.submodules.inputs_used_after[name]):
        if any(executable.inputs[k] == f"input {i}" for k in executable.summed - executable.separated):
            raise CaptureError(
                f"it uses its input {i} several times, which is used again after it, and the order in which gradients add up "
                "would change"
            )


def _captured(
    module: nn.Module, call: Call, used: Mapping[int, Strides], device: torch.device, options: PlanOptions
) -> CapturedStep:
    if not used:
        raise CaptureError("nothing it returns gets a gradient; what it writes into its arguments is not returned")

    def loss(out: Any) -> list[torch.Tensor]:
        leaves = pytree.tree_leaves(out)
        if len(leaves) <= max(used):
            raise CaptureError(
                "called by itself, it returns fewer values than in a step of the model, which changes what it reads"
            )
        return [leaves[i] for i in sorted(used)]

    with call.autocast.on(device):
        joint = capture(module, call.args, call.kwargs, loss=loss, gradients=[used[i] for i in sorted(used)])
    return CapturedStep(module, call.args, call.kwargs, replace(options, loss=loss), joint)
