"""verify: a plain and a planned step side by side, on copies of the model."""

from __future__ import annotations

import contextlib
import copy
import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from planner._torch import pytree
from planner.errors import CompileError, InfeasibleBudgetError, InputError, MeasuredPeakError, NoScheduleFoundError
from planner.graph.graph import Kind
from planner.profiler.memory import logical_peak
from planner.runtime.criterion import planned_model
from planner.runtime.module import CheckpointedModule
from planner.tracer.kernels import rng_state
from planner.units import format_bytes


@dataclass(frozen=True, slots=True)
class Report:
    """What `verify` saw.

    Attributes:
        differences: names of outputs, gradients, buffers ("rng" too) that are not bit-equal; empty is good.
        num_compared: how many tensors were compared.
        largest_difference: between entries of a tensor of the two steps, as a share of the largest entry of all outputs, all
            gradients or all buffers; inf where they cannot be compared.
        compiled: the planned step ran inductor's kernels, which round differently.
        budget_bytes, predicted_peak_bytes, measured_peak_bytes: of the planned step, everything resident included.
        plain_peak_bytes: measured, of the plain step; None where it did not fit on the device.
        time_ratio: planned over plain step, median of interleaved pairs; None where the plain step did not fit.
    """

    differences: tuple[str, ...]
    num_compared: int
    budget_bytes: int
    predicted_peak_bytes: int
    measured_peak_bytes: int
    plain_peak_bytes: int | None
    time_ratio: float | None
    largest_difference: float = 0.0
    compiled: bool = False

    @property
    def exact(self) -> bool:
        """Every compared tensor is bit-equal."""
        return not self.differences and self.num_compared > 0

    @property
    def within_budget(self) -> bool:
        """The measured peak is at or below the budget."""
        return self.measured_peak_bytes <= self.budget_bytes

    def __str__(self) -> str:
        some = ", ".join(self.differences[:5]) or "nothing could be compared"
        off = f"by up to {self.largest_difference:.1e}"
        unequal = f"compiled, different {off}" if self.compiled else f"DIFFERENT {off}: {some}"
        same = "bit-equal" if self.exact else unequal
        plain = "did not fit" if self.plain_peak_bytes is None else format_bytes(self.plain_peak_bytes)
        ratio = "not measured" if self.time_ratio is None else f"{self.time_ratio:.3f}x plain"
        return (
            f"results   {same} ({self.num_compared} tensors: outputs, gradients, buffers, RNG)\n"
            f"peak      measured {format_bytes(self.measured_peak_bytes)}, "
            f"predicted {format_bytes(self.predicted_peak_bytes)}, budget {format_bytes(self.budget_bytes)} "
            f"({'kept' if self.within_budget else 'EXCEEDED'}); plain {plain}\n"
            f"step time {ratio}"
        )


def verify(
    planned: CheckpointedModule, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None, *, rounds: int = 3
) -> Report:
    """Run a plain and a planned step from the same state and compare them bit for bit.

    Both run on deep copies, so that gradients, buffers and RNG state stay as they are, and under the autocast of the plan.

    Args:
        planned: from `plan` or `apply`.
        args, kwargs: a call that the plan was made for.
        rounds: pairs of steps timed, interleaved (CPU: process time; CUDA: synchronized wall time).

    Raises:
        InputError: `planned` is no planned module, or the call is not the one planned for.
    """
    if not isinstance(planned, CheckpointedModule):
        raise InputError(f"verify takes the module that plan() returned, not a {type(planned).__name__}")
    call = (tuple(args), dict(kwargs or {}))
    with _autocast(planned):
        miss = planned.difference(*call)
    if miss:
        raise InputError(f"verify needs the call that was planned for: {miss} differs")
    ours = _Side(copy.deepcopy(planned), planned, call)
    measured = ours.peak()
    result = ours.result()
    try:
        plain = _Side(copy.deepcopy(planned.original), planned, call)
        plain_peak: int | None = plain.peak()
        expected = plain.result()
        with torch.random.fork_rng():
            ratio: float | None = _time_ratio(ours.step, plain.step, rounds, planned.device)
        plain.restore()
    except torch.OutOfMemoryError:
        plain_peak, expected, ratio = None, {}, None
    differences = tuple(name for name in expected if not _same(expected[name], result.get(name)))
    return Report(
        differences=differences + tuple(name for name in result if expected and name not in expected),
        num_compared=len(expected),
        budget_bytes=planned.plan.budget_bytes,
        predicted_peak_bytes=planned.plan.peak_bytes,
        measured_peak_bytes=measured,
        plain_peak_bytes=plain_peak,
        time_ratio=ratio,
        largest_difference=_largest_difference(expected, result),
        compiled=planned.step.is_compiled,
    )


def time_step(
    planned: CheckpointedModule, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None, *, rounds: int = 3
) -> tuple[float, int]:
    """Seconds of a planned step by the wall clock, the median of `rounds`, and its measured peak in bytes.

    It runs on a copy that shares the parameters' memory, so that it fits where the plan fits; gradients, hooks, buffers and the
    generator are not the model's, or are put back.

    Raises:
        InputError: the call is not the one planned for, or the model cannot be copied.
    """
    with _own_side(planned, args, kwargs) as side:
        peak_bytes = side.peak()
        with torch.random.fork_rng(devices=[planned.device] if planned.device.type == "cuda" else []):
            seconds = [_seconds(side.step, planned.device, time.perf_counter) for _ in range(max(1, rounds))]
        return statistics.median(seconds), peak_bytes


def step_peak(planned: CheckpointedModule, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> int:
    """Measured peak of a planned step in bytes, everything resident included; run and raises as `time_step`."""
    with _own_side(planned, args, kwargs) as side:
        return side.peak()


@contextlib.contextmanager
def _own_side(planned: CheckpointedModule, args: Sequence[Any], kwargs: Mapping[str, Any] | None) -> Iterator[_Side]:
    call = (tuple(args), dict(kwargs or {}))
    with _autocast(planned):
        miss = planned.difference(*call)
    if miss:
        raise InputError(f"a step can be measured for the call that was planned for: {miss} differs")
    side = _Side(_sharing(planned), planned, call)
    try:
        yield side
    finally:
        side.restore()


def _sharing(planned: CheckpointedModule) -> CheckpointedModule:
    """A copy whose parameters share the memory of the module's; an optimizer that hangs on the module's does not see it."""
    twins: dict[int, Any] = {id(p): nn.Parameter(p.detach(), p.requires_grad) for p in planned.parameters()}
    try:
        return copy.deepcopy(planned, twins)
    except (TypeError, RuntimeError, NotImplementedError) as error:
        raise CopyError(f"the model cannot be copied, so no step of it can be measured: {error}") from error


def measured_within(
    budget_bytes: int,
    plan: Callable[[int], CheckpointedModule],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    tries: int = 3,
) -> CheckpointedModule:
    """A planned module whose step is measured to fit a budget, where it may need more bytes than its plan predicts.

    Args:
        plan: makes the module for a budget; it is asked again for less by what the step needed too much.
        args, kwargs: the call planned for.
        tries: how often it is asked at most.

    Warns where the model cannot be copied: nothing was measured.

    Raises:
        CompileError, MeasuredPeakError: it needs more than the budget each time; compiled, or not.
        InfeasibleBudgetError, NoScheduleFoundError: there is no plan for the budget itself.
    """
    aim_bytes, fitting = budget_bytes, None
    for attempt in range(tries):
        try:
            planned = plan(aim_bytes)
        except (InfeasibleBudgetError, NoScheduleFoundError):
            if attempt == 0:
                raise
            break
        try:
            peak_bytes = step_peak(planned, args, kwargs)
        except CopyError as error:
            warnings.warn(f"whether the step keeps its budget was not measured: {error}", stacklevel=4)
            return planned
        # how far the allocator strays changes from step to step with the blocks at hand: half as far again is left free
        strayed = 0 if planned.step.is_compiled else max(0, peak_bytes - planned.plan.peak_bytes) // 2
        if peak_bytes + strayed <= budget_bytes:
            return planned
        fitting = planned if peak_bytes <= budget_bytes else fitting
        aim_bytes = planned.plan.peak_bytes - (peak_bytes + strayed - budget_bytes)
    if fitting is not None:
        return fitting
    raise _over(budget_bytes, peak_bytes, planned)


def _over(budget_bytes: int, peak_bytes: int, planned: CheckpointedModule) -> CompileError | MeasuredPeakError:
    """What to raise where a step was measured to need more than the budget."""
    needs = f"the step peaks at {format_bytes(peak_bytes)}, more than the budget of {format_bytes(budget_bytes)} "
    needs += f"(its plan: {format_bytes(planned.plan.peak_bytes)})"
    if planned.step.is_compiled:
        return CompileError(f"compiled, {needs}. Plan without compile=True, which keeps the budget")
    if dict(planned.plan.made_on).get("costs", "").startswith("estimated"):
        remedy = "plan with costs='measure': what kernels need for themselves cannot be estimated"
    else:
        remedy = "set PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True, where CUDA's allocator cuts every block to size"
    return MeasuredPeakError(
        f"measured, {needs}. Raise the budget to {peak_bytes} bytes, or {remedy}",
        budget_bytes=budget_bytes,
        peak_bytes=peak_bytes,
    )


class CopyError(InputError):
    """The model cannot be copied, and what is to be measured would change it."""


class _Side:
    """One of the two modules, run from the same state each time."""

    def __init__(self, module: nn.Module, planned: CheckpointedModule, call: tuple[Any, Any]) -> None:
        self.module, self._planned, self._call = module, planned, call
        self._device = planned.device
        self._state = {name: tensor.detach().clone() for name, tensor in module.named_buffers()}
        inputs = [leaf for leaf in pytree.tree_leaves(call) if isinstance(leaf, torch.Tensor)]
        self._inputs = [(tensor, tensor.detach().clone(), tensor.grad) for tensor in inputs]

    def step(self) -> Any:
        """Forward and backward; the module's gradients start at None."""
        self.module.zero_grad(set_to_none=True)
        with _autocast(self._planned):
            out = self.module(*self._call[0], **self._call[1])
        leaves = pytree.tree_leaves(out)
        starts = [leaves[i] for i in self._planned.differentiated]
        with torch.autocast(self._device.type, enabled=False):
            torch.autograd.backward(starts, [torch.ones_like(start) for start in starts])
        return out

    def peak(self) -> int:
        """Measured peak of a step, with everything that is resident."""
        with torch.random.fork_rng(devices=[self._device] if self._device.type == "cuda" else []):
            self.step()  # what a first call allocates for good is no part of a step
            self.module.zero_grad(set_to_none=True)
            above = logical_peak(self.step, self._device)
            if self._device.type == "cuda":  # whose blocks are cut to size anew: what one hands out depends on those at hand
                self.module.zero_grad(set_to_none=True)
                torch.cuda.empty_cache()
                above = max(above, logical_peak(self.step, self._device))
        graph = self._planned.plan.graph
        resident = sum(graph.value[name].nbytes for name in graph.inputs if graph.value[name].kind is not Kind.TANGENT)
        self.restore()
        return resident + above

    def result(self) -> dict[str, Any]:
        """Everything a step leaves behind, by name."""
        with torch.random.fork_rng(devices=[self._device] if self._device.type == "cuda" else []):
            out = self.step()
            rng = rng_state(self._device)
        leaves = pytree.tree_leaves(out)
        found = {
            f"output {i}": leaf.detach().clone() if isinstance(leaf, torch.Tensor) else leaf for i, leaf in enumerate(leaves)
        }
        found |= {f"gradient {name}": p.grad for name, p in planned_model(self.module).named_parameters()}
        found |= {f"input gradient {i}": tensor.grad for i, (tensor, _, _) in enumerate(self._inputs)}
        found |= {f"buffer {name}": tensor.clone() for name, tensor in planned_model(self.module).named_buffers()}
        found |= {f"input {i}": tensor.detach().clone() for i, (tensor, _, _) in enumerate(self._inputs)}
        found["rng"] = rng
        self.restore()
        return found

    def restore(self) -> None:
        """Put buffers and the call's tensors back."""
        with torch.no_grad():
            for name, tensor in self.module.named_buffers():
                tensor.copy_(self._state[name])
            for tensor, content, grad in self._inputs:
                if not torch.equal(tensor, content):
                    tensor.copy_(content)
                tensor.grad = grad


def _autocast(planned: CheckpointedModule) -> Any:
    """The context that the plan's forward was captured in, whatever the caller's is."""
    enabled, name = planned.step.key.autocast
    dtype = getattr(torch, name.removeprefix("torch.")) if enabled else None
    return torch.autocast(planned.device.type, dtype, enabled=enabled)


def _same(expected: Any, found: Any) -> bool:
    """Bit-equal: same dtype, shape and bytes, NaNs included."""
    if not isinstance(expected, torch.Tensor) or not isinstance(found, torch.Tensor):
        return type(expected) is type(found) and bool(expected == found)
    if expected.dtype != found.dtype or expected.shape != found.shape:
        return False
    return torch.equal(expected.contiguous().view(-1).view(torch.uint8), found.contiguous().view(-1).view(torch.uint8))


def _largest_difference(expected: Mapping[str, Any], found: Mapping[str, Any]) -> float:
    """See `Report`; a tensor's kind is the first word of its name."""
    off, scale = dict[str, float](), dict[str, float]()
    for name, one in expected.items():
        other, kind = found.get(name), name.split()[0]
        if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor) and one.shape == other.shape and one.numel():
            wide = one.to(torch.complex128)  # which holds every dtype's values
            gap = float((wide - other.to(torch.complex128)).abs().max())
            off[kind] = max(off.get(kind, 0.0), math.inf if math.isnan(gap) else gap)
            scale[kind] = max(scale.get(kind, 0.0), float(wide.abs().max()))
        elif not _same(one, other):
            return math.inf
    return max((gap / scale[kind] if scale[kind] else math.inf for kind, gap in off.items() if gap), default=0.0)


def _time_ratio(ours: Callable[[], Any], plain: Callable[[], Any], rounds: int, device: torch.device) -> float:
    ratios = []
    for turn in range(max(1, rounds)):
        order = (ours, plain) if turn % 2 else (plain, ours)
        spent = {step: _seconds(step, device) for step in order}
        ratios.append(spent[ours] / spent[plain])
    return statistics.median(ratios)


def _seconds(step: Callable[[], Any], device: torch.device, cpu_clock: Callable[[], float] = time.process_time) -> float:
    if device.type != "cuda":
        start = cpu_clock()
        step()
        return cpu_clock() - start
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    step()
    torch.cuda.synchronize(device)
    return time.perf_counter() - start
