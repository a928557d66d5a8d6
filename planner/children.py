"""plan_children: where a model's own forward cannot be captured, its largest submodules that can be, within one budget."""

from __future__ import annotations

import contextlib
import copy
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from planner import arguments, units
from planner._compat import pytree
from planner.analysis.budgets import Budget
from planner.captured import CapturedStep
from planner.errors import CaptureError, InputError, NoScheduleFoundError, PlannerError
from planner.levels import LEVELS, plans_by_level
from planner.limits import DEFAULT_EFFORT
from planner.log import PLANNER
from planner.options import PlanOptions
from planner.profiled import ProfiledStep, with_costs
from planner.profiler.memory import logical_peak
from planner.report.progress import stage
from planner.results.plan import Plan
from planner.runtime.install import install, uninstall
from planner.runtime.module import CheckpointedModule
from planner.runtime.step import DEFAULT_STAGES, RewrittenStep, make_step
from planner.tracer.capture import one_at_a_time
from planner.tracer.faults import concerns_model, is_fault, is_out_of_memory, noting
from planner.tracer.host.preserve import model_preserved
from planner.tracer.loss import Loss, loss_leaves
from planner.tracer.real_layouts import capture
from planner.tracer.refusal import own_words


@dataclass(frozen=True, slots=True)
class Children:
    """A model whose submodules are planned one by one. `install()` makes the model train so; prints as a table.

    Attributes:
        model: the user's model, as it was.
        planned: the planned submodules, by qualified name.
        left: the submodules that run as they are, and why.
        budget_bytes: bound on everything live on the device during a step.
        plain_bytes: measured peak of the plain step; None where it did not fit on the device.
        peak_bytes: measured peak of the planned step.
    """

    model: nn.Module
    planned: Mapping[str, CheckpointedModule]
    left: Mapping[str, str]
    budget_bytes: int
    plain_bytes: int | None
    peak_bytes: int

    def install(self, *, strict: bool = False) -> None:
        """Let the model train with its planned submodules; see `planner.install`."""
        arguments.check_flags(strict=strict)
        for module in self.planned.values():
            install(module.original, module, strict=strict)

    def uninstall(self) -> None:
        """Undo `install`."""
        for module in self.planned.values():
            uninstall(module.original)

    def __str__(self) -> str:
        sizes = [self.peak_bytes, self.budget_bytes, *([] if self.plain_bytes is None else [self.plain_bytes])]
        peak, budget, plain = (*map(units.format_bytes, sizes), "did not fit")[:3]
        rows = [
            f"peak     {peak} measured, budget {budget}, plain {plain}",
            *(f"planned  {name}: {plan_text(module.plan)}" for name, module in self.planned.items()),
            *(f"left     {name}: {reason}" for name, reason in self.left.items()),
        ]
        return "\n".join(rows)


def plan_text(plan: Plan) -> str:
    """A submodule's plan in a line."""
    recomputed = units.format_ns(plan.timeline.time_ns - plan.plain.time_ns)
    return (
        f"peak {units.format_bytes(plan.plain.peak_bytes)} -> {units.format_bytes(plan.peak_bytes)} of its own, "
        f"{recomputed} of recompute"
    )


def plan_children(
    model: nn.Module,
    budget: Budget,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    loss: Loss = None,
    costs: Literal["measure", "estimate"] | None = None,
    effort: float = DEFAULT_EFFORT,
    time_limit_s: float | None = None,
    num_stages: int = DEFAULT_STAGES,
    progress: bool = True,
) -> Children:
    """Plan the largest submodules of `model` that can be captured, each with its share of the budget.

    For models whose own forward no plan can hold (data-dependent shapes, an exotic loss), where `plan` raises CaptureError.
    What lies around the planned submodules runs as it is. Its memory is in no graph, so real steps of a copy of the model
    are run and measured: the shares grow together, as far as the measured peak stays within the budget. There is no bound on
    how far from the best this is.

    Args:
        model, args, kwargs, loss, costs, num_stages, progress: as for `plan`.
        budget: bytes, text ("6GiB"), or a float in (0, 1]: fraction of the plain step's measured peak.
        effort, time_limit_s: for the solver, for all submodules together; see `plan`.

    Returns:
        Children; the model is unchanged until its `install()` is called.

    Raises:
        BudgetError, InputError: as for `plan`.
        CaptureError: no submodule can be captured; says why, for each.
        NoScheduleFoundError: the step peaks above the budget with every submodule at its lowest.
    """
    arguments.check_model(model)
    args, kwargs = arguments.check_call(args, kwargs)
    options = PlanOptions(
        loss=loss, costs=costs, effort=effort, time_limit_s=time_limit_s, num_stages=num_stages, progress=progress
    )
    units.check_budget(budget)
    trial = _Trial(model, args, kwargs, options.loss)
    with one_at_a_time():
        with stage("capture", progress):
            found, left = _capturable(trial, options)
        with stage("solve", progress):
            plans = plans_by_level({name: child.step for name, child in found.items()}, options.limits)
        steps = partial(_steps, found, plans, trial, options.num_stages)
        with stage("measure steps", progress):
            plain = trial.peak({})
            if plain is None and units.is_fraction(budget):
                raise InputError("the plain step does not fit on the device, so a fraction of it is unknown: give bytes")
            budget_bytes = units.parse_budget(budget, plain or 0)
            level, peak = _highest_level(lambda level: trial.peak(steps(level)), budget_bytes)
    planned = {name: CheckpointedModule(model.get_submodule(name), step, made) for name, (step, made) in steps(level).items()}
    return Children(model, planned, left, budget_bytes, plain, peak)


def _highest_level(peak_at: Callable[[int], int | None], budget_bytes: int) -> tuple[int, int]:
    """The highest level whose measured peak fits, by bisection, and that peak.

    Raises:
        NoScheduleFoundError: not even the lowest fits.
    """
    low, lowest = 0, peak_at(0)
    if lowest is None or lowest > budget_bytes:
        found = "did not fit on the device" if lowest is None else f"peaks at {units.format_bytes(lowest)} ({lowest} bytes)"
        if lowest is None:
            cure = "Reduce the batch."
        else:
            cure = f"Raise it to {units.enough_text(lowest)} ({lowest} bytes), or reduce the batch."
        raise NoScheduleFoundError(
            f"with every submodule at the lowest peak that was found for it, a measured step {found}; the budget is "
            f"{units.format_bytes(budget_bytes)}. {cure}"
        )
    high, peak = LEVELS + 1, lowest
    while high - low > 1:
        middle = (low + high) // 2
        measured = peak_at(middle)
        if measured is not None and measured <= budget_bytes:
            low, peak = middle, measured
        else:
            high = middle
    return low, peak


@dataclass(frozen=True, slots=True)
class _Call:
    """A submodule's one call in a step; tensors as they arrive, but leaves."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    autocast: tuple[bool, torch.dtype]


class _Trial:
    """A copy of the model, to run real steps on."""

    def __init__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], loss: Loss) -> None:
        tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if not model.training or not tensors:
            raise InputError("plan_children takes a model in training mode and an example call with tensors")
        try:
            self.original, self.model = model, copy.deepcopy(model)
        except Exception as error:
            if not concerns_model(error):
                raise
            raise InputError(f"the model cannot be copied, and steps are measured on a copy: {own_words(error)}") from error
        for module in self.model.modules():
            uninstall(module)
        self.device = tensors[0].device
        self._args, self._kwargs, self._loss = args, kwargs, loss
        self._inputs = tensors
        self.calls: Counter[str] = Counter()
        self.used: dict[str, list[int]] = {}
        try:
            self._look()
        except PlannerError:
            raise
        except Exception as error:
            if not concerns_model(error):
                raise
            raise InputError(f"a step of the model as it is {own_words(error)}") from error

    def step(self) -> None:
        """Forward and backward from empty gradients."""
        self.model.zero_grad(set_to_none=True)
        out = self.model(*self._args, **self._kwargs)
        starts = loss_leaves(out, pytree.tree_leaves(out), self._loss)
        with torch.autocast(self.device.type, enabled=False):
            torch.autograd.backward(starts, [torch.ones_like(start) for start in starts])

    @contextlib.contextmanager
    def untouched(self) -> Iterator[None]:
        """Steps leave no trace in the copy, the call's tensors or the random state."""
        grads = [(tensor, tensor.grad) for tensor in self._inputs]
        with model_preserved(self.model, [*self.model.buffers(), *self._inputs], guards_iterators=False):
            yield
        self.model.zero_grad(set_to_none=True)
        for tensor, grad in grads:
            tensor.grad = grad

    def peak(self, steps: Mapping[str, tuple[RewrittenStep, Plan]]) -> int | None:
        """The measured peak of a step with these submodules planned, everything resident included; None: out of memory."""
        modules = [CheckpointedModule(self.model.get_submodule(name), *made) for name, made in steps.items()]
        for module in modules:
            install(module.original, module, strict=True)
        try:
            with self.untouched():
                self.step()  # what a first call allocates for good is no part of a step
                self.model.zero_grad(set_to_none=True)
                above = logical_peak(self.step, self.device)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            return None
        finally:
            for module in modules:
                uninstall(module.original)
        tensors = (*self.model.parameters(), *self.model.buffers(), *self._inputs)
        storages = [tensor.untyped_storage() for tensor in tensors]
        return above + sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())

    def _look(self) -> None:
        """Run a step to see how often each submodule is called, and which leaves of what it returns get a gradient."""

        def after(name: str, _module: nn.Module, _args: Any, out: Any) -> Any:
            self.calls[name] += 1
            self.used[name] = []
            leaves, spec = pytree.tree_flatten(out)
            for i, leaf in enumerate(leaves):
                if isinstance(leaf, torch.Tensor) and leaf.requires_grad:
                    leaves[i] = leaf.view_as(leaf)  # what the submodule itself does with the leaf goes past this view
                    leaves[i].register_hook(lambda _, i=i: self.used[name].append(i))
            return pytree.tree_unflatten(leaves, spec)

        named = [(name, module) for name, module in self.model.named_modules() if name]
        with self.untouched(), torch.autograd.graph.save_on_cpu():
            # from here on: what hooks write to before is put back
            hooks = [module.register_forward_hook(partial(after, name)) for name, module in named]
            try:
                self.step()
            finally:
                for hook in hooks:
                    hook.remove()

    def record(self, names: Sequence[str]) -> dict[str, _Call]:
        """Run a forward that keeps nothing for a backward, but the arguments of these submodules."""
        found: dict[str, _Call] = {}

        def before(name: str, _module: nn.Module, args: Any, kwargs: Any) -> None:
            bare = pytree.tree_map_only(torch.Tensor, lambda t: t.detach().requires_grad_(t.requires_grad), (args, kwargs))
            kind = self.device.type
            found[name] = _Call(bare[0], bare[1], (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)))

        modules = [(name, self.model.get_submodule(name)) for name in names]
        with self.untouched(), torch.autograd.graph.saved_tensors_hooks(_nothing, _nothing):
            hooks = [module.register_forward_pre_hook(partial(before, name), with_kwargs=True) for name, module in modules]
            try:
                self.model(*self._args, **self._kwargs)
            finally:
                for hook in hooks:
                    hook.remove()
        return found


def _nothing(_: Any) -> Any:
    """What is kept of a saved tensor where no backward follows."""


@dataclass(frozen=True, slots=True)
class _Child:
    """A captured submodule."""

    call: _Call
    step: ProfiledStep


def _capturable(trial: _Trial, options: PlanOptions) -> tuple[dict[str, _Child], dict[str, str]]:
    """The largest submodules that can be captured, and why others are left."""
    found: dict[str, _Child] = {}
    left: dict[str, str] = {}
    frontier = [name for name, _ in trial.model.named_children()]
    while frontier:
        calls = trial.record([name for name in frontier if trial.calls[name] == 1])
        below = []
        for name in frontier:
            module = trial.original.get_submodule(name)
            try:
                _check_alone(trial, name, module)
                if name not in calls:
                    raise CaptureError("a second forward did not call it: what runs is drawn at random in each forward")
                with noting(f"capturing the submodule {name}"):
                    found[name] = _captured(module, calls.pop(name), trial.used[name], trial.device, options)
                PLANNER.info("%s: captured by itself", name)
            except PlannerError as error:
                if is_fault(error):
                    raise
                children = [f"{name}.{child}" for child, _ in module.named_children()]
                below += children
                if trial.calls[name] and not (children and trial.calls[name] == 1):
                    left[name] = str(error)
                    PLANNER.warning("%s: left as it is, unplanned: %s", name, error)
                else:
                    PLANNER.info("%s: not captured by itself (its submodules may be): %s", name, error)
        frontier = below
    if not found:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in left.items())
        raise CaptureError(f"no submodule of the model can be captured ({reasons or 'it has none'})")
    return found, left


def _check_alone(trial: _Trial, name: str, module: nn.Module) -> None:
    """Raise CaptureError where a plan of this submodule could change the model's results, or there is nothing to plan."""
    if trial.calls[name] != 1:
        raise CaptureError(f"it is called {trial.calls[name]} times in a step")
    mine = {id(inner) for inner in module.modules()}
    others = {id(p) for m in trial.original.modules() if id(m) not in mine for p in m._parameters.values() if p is not None}
    shared = [key for key, parameter in module.named_parameters() if id(parameter) in others]
    if shared:
        raise CaptureError(f"its {shared[0]} is also another module's, and the order in which gradients add up would change")


def _captured(module: nn.Module, call: _Call, used: Sequence[int], device: torch.device, options: PlanOptions) -> _Child:
    if not used:
        raise CaptureError("nothing it returns gets a gradient")
    enabled, dtype = call.autocast

    def loss(out: Any) -> list[torch.Tensor]:
        leaves = pytree.tree_leaves(out)
        return [leaves[i] for i in sorted(set(used))]

    with torch.autocast(device.type, dtype, enabled=enabled):
        joint = capture(module, call.args, call.kwargs, loss=loss)
    return _Child(call, with_costs(CapturedStep(module, call.args, call.kwargs, replace(options, loss=loss), joint)))


def _steps(
    found: Mapping[str, _Child], plans: Mapping[str, Sequence[Plan]], trial: _Trial, num_stages: int, level: int
) -> dict[str, tuple[RewrittenStep, Plan]]:
    steps = {}
    for name, child in found.items():
        module, made = trial.original.get_submodule(name), plans[name][level]
        with torch.autocast(trial.device.type, child.call.autocast[1], enabled=child.call.autocast[0]):
            steps[name] = make_step(made, child.step.joint, module, child.call.args, child.call.kwargs, num_stages), made
    return steps
