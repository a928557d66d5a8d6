"""verify: planned and plain steps compared on copies of the model."""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from planner import arguments
from planner.results.verify_report import VerifyReport
from planner.runtime.criterion import planned_model
from planner.runtime.module import CheckpointedModule
from planner.runtime.reporting import MismatchWarning
from planner.verification.measured import seconds_of
from planner.verification.state import (
    StateEntry,
    generators,
    generators_as_leaves,
    largest_difference,
    same,
    set_generators,
    state_of,
    strides_that_matter,
)
from planner.verification.step_copy import CallArguments, StepCopy, check_call, copy_of

FEWEST_PAIRS = 5
"""Minimum number of timed pairs of steps: a median of fewer says little."""
_NUM_STEPS = 2
"""Two, because state that the forward carries from call to call shows in the second step."""
_SHORT_S = 2.0
"""A shorter plain step is timed twice per pair, to compare it with itself."""


def verify(
    planned: CheckpointedModule,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    rounds: int = FEWEST_PAIRS,
) -> VerifyReport:
    """Run plain and planned steps from the same state and compare them bit for bit.

    Two successive steps each, so that what the first changes shows in the second. Compared after each: outputs,
    gradients, inputs and their gradients, parameters, buffers, plain attributes of every module, and the random generators of
    torch, Python and numpy. Tensors that the forward leaves on modules take no part in the backward. Both run on deep copies,
    so that the model, its gradients and the generators stay as they are, and under the autocast of the plan. State outside of
    the model (globals, class attributes) is shared by both and not compared.

    Args:
        planned: from `plan` or `apply`.
        args, kwargs: a call that the plan was made for.
        rounds: pairs of steps that are timed, interleaved (CPU: process time; CUDA: synchronized wall time). At least 5 are,
            or none with 0.

    Raises:
        InputError: `planned` is no planned module, the call is not the one planned for, the model cannot be copied, or its copy
            does not run planned: then there is nothing to compare.
    """
    arguments.check_planned(planned, CheckpointedModule, "verify")
    args, kwargs = arguments.check_call(args, kwargs)
    rounds = arguments.count(rounds, "rounds", least=0)
    call = check_call(planned, args, kwargs, "verify needs")
    before = generators()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", MismatchWarning)  # the report says which steps ran unplanned
            return _verify(planned, call, rounds)
    finally:
        set_generators(before)


def _verify(planned: CheckpointedModule, call: CallArguments, rounds: int) -> VerifyReport:
    ours, num_first_calls = _planned_copy(planned, call)
    compared, plain_peak, times = _Compared(), None, _Times()
    try:
        plain = StepCopy(copy_of(planned.original), planned, call)
        plain.repeat_first_calls(num_first_calls)
        compared = _compare(plain, ours)
        plain_peak = plain.peak()
        if not compared.unplanned:
            times = _time(ours, plain, rounds, planned.device)
    except torch.OutOfMemoryError:
        compared = _Compared()
    plain = None  # type: ignore[assignment]  # frees it before the planned step is measured
    if compared.unplanned:  # measure the planned step from the state it was planned in
        ours, _ = _planned_copy(planned, call)
    else:
        ours.prepare()
        ours.step()
    return VerifyReport(
        differences=compared.differences,
        num_compared=compared.num_compared,
        budget_bytes=planned.plan.budget_bytes,
        predicted_peak_bytes=planned.plan.peak_bytes,
        measured_peak_bytes=ours.peak(),
        plain_peak_bytes=plain_peak,
        largest_difference=compared.largest,
        compiled=planned.step.is_compiled,
        num_steps=_NUM_STEPS,
        unplanned=compared.unplanned,
        time_ratio=times.ratio,
        time_spread=times.spread,
        noise=times.noise,
        num_pairs=times.num_pairs,
    )


def _planned_copy(planned: CheckpointedModule, call: CallArguments) -> tuple[StepCopy, int]:
    """A copy of the planned module that runs planned, and how many forwards had to fill its Python state first.

    Raises:
        InputError: the call is not the planned one for the copy.
    """
    module = copy_of(planned)
    module.strict = False
    step_copy = StepCopy(module, planned, call)
    return step_copy, step_copy.run_first_calls()


class _Compared(NamedTuple):
    """What `VerifyReport` says of results."""

    differences: tuple[str, ...] = ()
    num_compared: int = 0
    largest: float = 0.0
    unplanned: tuple[str, ...] = ()


def _compare(plain: StepCopy, ours: StepCopy) -> _Compared:
    """Compare successive steps; each starts from what the previous one of the same copy left."""
    differences: list[str] = []
    unplanned: list[str] = []
    num_compared, largest = 0, 0.0
    states = [generators()] * 2
    for number in range(1, _NUM_STEPS + 1):
        suffix = "" if number == 1 else f" (step {number})"
        expected, states[0] = _result(plain, states[0])
        before, mismatch = ours.module.num_planned_calls, ours.mismatch()
        found, states[1] = _result(ours, states[1])
        if ours.module.num_planned_calls == before:
            unplanned.append(f"step {number}, because {mismatch or 'the call is not the planned one'}")
        leaves = dict.fromkeys([*expected, *found])
        wrong = [leaf for leaf in leaves if leaf not in expected or leaf not in found or not same(expected[leaf], found[leaf])]
        differences += [f"{leaf}{suffix}" for leaf in wrong]
        num_compared += len(leaves)
        if wrong:
            largest = max(largest, largest_difference(expected, found))
    return _Compared(tuple(differences), num_compared, largest, tuple(unplanned))


def _result(step_copy: StepCopy, states: Mapping[str, Any]) -> tuple[dict[StateEntry, Any], dict[str, Any]]:
    """Everything a step changes or returns, and the generators' states. Tensors are not copied."""
    set_generators(states)
    step_copy.prepare()
    leaves = step_copy.step()
    after = generators()
    found: dict[StateEntry, Any] = {}
    for i, leaf in enumerate(leaves):
        found[StateEntry("output", f"{i}")] = leaf
        if isinstance(leaf, torch.Tensor):
            found[StateEntry("output", f"{i} strides")] = strides_that_matter(leaf)
    found |= {StateEntry("gradient", name): p.grad for name, p in planned_model(step_copy.module).named_parameters()}
    found |= {StateEntry("input", f"{i}"): tensor for i, tensor in enumerate(step_copy.inputs)}
    found |= {StateEntry("input gradient", f"{i}"): tensor.grad for i, tensor in enumerate(step_copy.inputs)}
    module = step_copy.module.original if isinstance(step_copy.module, CheckpointedModule) else step_copy.module
    return found | state_of(planned_model(module)) | generators_as_leaves(after), after


class _Times(NamedTuple):
    """What `VerifyReport` says of time."""

    ratio: float | None = None
    spread: tuple[float, float] | None = None
    noise: tuple[float, float] | None = None
    num_pairs: int = 0


def _time(ours: StepCopy, plain: StepCopy, rounds: int, device: torch.device) -> _Times:
    """Time ratios of pairs of steps, which start with the plain and the planned step alternately. Both have run before."""
    if rounds <= 0:
        return _Times()
    ratios, noise = [], []
    num_pairs = max(FEWEST_PAIRS, rounds)
    for pair in range(num_pairs):
        order = (plain, ours) if pair % 2 == 0 else (ours, plain)
        spent = {id(step_copy): seconds_of(step_copy, device) for step_copy in order}
        ratios.append(spent[id(ours)] / spent[id(plain)])
        if spent[id(plain)] < _SHORT_S:
            noise.append(seconds_of(plain, device) / spent[id(plain)])
    return _Times(statistics.median(ratios), (min(ratios), max(ratios)), (min(noise), max(noise)) if noise else None, num_pairs)
