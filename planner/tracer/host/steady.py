"""Real forwards, one after another, until they show what every later one does."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import nn

from planner.errors import CaptureError
from planner.kernels.custom import laid_out
from planner.log import TRACER
from planner.tracer.host.changes import Changes, find_changes, refusal
from planner.tracer.host.counts import NO_COUNTS, Counts, counts_of, evaluated, is_number, numbers_tracked
from planner.tracer.host.fingerprint import alike
from planner.tracer.host.kernels import Run
from planner.tracer.host.one_call import registered, take_back
from planner.tracer.host.path import Path
from planner.tracer.host.preserve import Preserved
from planner.tracer.host.reads import ReadRecorder
from planner.tracer.host.restorers import restore_tensors
from planner.tracer.host.state import bare_fingerprint

_RUNS = 4
"""Maximum number of runs; the first ones may fill caches and initial state."""


class Observes(Protocol):
    """What is asked of the `Observer`; see there."""

    model: nn.Module
    preserved: Preserved
    reads: ReadRecorder

    def run_once(self, call: Callable[[], Any], *, may_initialize: bool = False) -> Run:
        """Run the forward."""

    def snapshot(self) -> dict[Path, Any]:
        """Python state now."""

    def replace_tensors(self, copies: Mapping[int, torch.Tensor]) -> None:
        """Put other tensors into it."""


@dataclass(frozen=True, slots=True)
class Runs:
    """Forwards that were run.

    Attributes:
        runs: in order; the last two did the same.
        before: snapshot of what the last one found.
    """

    runs: Sequence[Run]
    before: Mapping[Path, Any]

    @property
    def are_alike(self) -> bool:
        """Every run did the same, though the first one started from other values."""
        return all(_same(self.runs[0], run) for run in self.runs)


def run_until_steady(
    observer: Observes, call: Callable[[], Any], inputs: Sequence[torch.Tensor], changes_of: Callable[[Runs], Changes]
) -> tuple[Runs, Changes, Counts]:
    """Run the forward until two runs do the same, each with what the one before left, and what the last one changes there.

    Args:
        changes_of: finds that.

    Returns:
        the forwards, what the last one changes, and what it counts.

    Raises:
        CaptureError: it does something else each time, or changes what no plan can write; names the attribute or the kernel.
    """
    contents = _contents(inputs)
    runs: list[Run] = []
    befores: list[Mapping[Path, Any]] = []
    left: list[Places] = []
    while len(runs) < _RUNS:
        now = observer.snapshot() if runs else {}
        left.append(_places({id(tensor) for tensor in inputs}, now))
        befores.append(left_to_next_call(observer, inputs, now))
        restore_tensors(contents)
        runs.append(observer.run_once(call, may_initialize=not runs))
        read = [_places(run.outside, before) for run, before in zip(runs, befores, strict=True)]
        if len(runs) > 1 and _same(runs[-2], runs[-1]) and _is_told_apart(read) and _is_told_apart(left):
            found = Runs(runs, befores[-1])
            try:
                changes = changes_of(found)
                return found, changes, _all_counted(observer, call, contents, found, changes)
            except CaptureError:  # what comes late, from a call before the last one
                if len(runs) == _RUNS:
                    raise
    changes = find_changes(observer.model, befores[-1], observer.snapshot())  # names the attribute, if it is one
    for path in changes.counted:
        raise refusal(path, befores[-1][path], path.get(observer.model))
    raise _unsteady(runs[-2], runs[-1])


def _all_counted(
    observer: Observes,
    call: Callable[[], Any],
    contents: Sequence[tuple[torch.Tensor, torch.Tensor]],
    runs: Runs,
    changes: Changes,
) -> Counts:
    """How the numbers that are others after each run are counted.

    Raises:
        CaptureError: they are used in another way.
    """
    if not changes.counted:
        return NO_COUNTS
    after = {path: path.get(observer.model) for path in changes.counted}
    counts = _counts(observer, call, contents, runs, after)
    if counts is None:
        first = changes.counted[0]
        raise refusal(first, runs.before[first], after[first])
    return counts


def _counts(
    observer: Observes,
    call: Callable[[], Any],
    contents: Sequence[tuple[torch.Tensor, torch.Tensor]],
    runs: Runs,
    after: Mapping[Path, Any],
) -> Counts | None:
    """How a call counts numbers, from a further run that finds those that the last run found; None where no plan can.

    Args:
        after: the places, and what the last run left there.
    """
    with numbers_tracked(observer.model, runs.before, [*after]) as tape:
        restore_tensors(contents)
        try:
            again = observer.run_once(call)
        except Exception:  # Python's C code takes no other numbers than its own
            TRACER.debug("a run with tracked numbers fails", exc_info=True)
            return None
        counts = counts_of(tape, observer.model, runs.before, [*after]) if _same(runs.runs[-1], again) else None
    if counts is None or tape.num_alive():
        return None
    left = [evaluated(expression, counts.found) for expression in counts.after]
    return counts if left == [*after.values()] else None


def run_as_found(
    observer: Observes, call: Callable[[], Any], inputs: Sequence[torch.Tensor], changes_of: Callable[[Runs], Changes]
) -> tuple[Runs, Changes, Counts]:
    """Run the forward twice from the Python state that is found now, which is restored; what the second run changes there.

    Args:
        changes_of: finds that, after the second run.

    Raises:
        CaptureError: the two runs differ, or change what no plan can write.
    """
    contents = _contents(inputs)
    first = observer.run_once(call)
    left = {path: bare_fingerprint(value) for path, value in observer.snapshot().items()}
    observer.preserved.restore()
    before = left_to_next_call(observer, inputs)
    had = registered(observer.model)
    found: list[tuple[Runs, Changes]] = []

    def again() -> None:
        restore_tensors(contents)
        runs = Runs([first, observer.run_once(call)], before)
        if not runs.are_alike:
            raise _unsteady(*runs.runs)
        found.append((runs, changes_of(runs)))
        for effect in found[0][1].effects:
            now = bare_fingerprint(effect.path.get(observer.model))
            if not alike(left.get(effect.path, now), now):
                raise CaptureError(
                    f"the model's forward sets {effect.path} to another value each time that it is run (a clock, a count?)",
                    module=effect.path.module,
                )
        take_back(observer.model, found[0][1].effects, before)
        changed = next((name for name, held in registered(observer.model).items() if had.get(name) != held), None)
        if changed is not None:
            raise CaptureError(f"the model's forward registers hooks, parameters, buffers or submodules ({changed})")

    observer.preserved.changed_by(again)
    return found[0][0], *_found_counted(observer, call, contents, *found[0])


def _found_counted(
    observer: Observes,
    call: Callable[[], Any],
    contents: Sequence[tuple[torch.Tensor, torch.Tensor]],
    runs: Runs,
    changes: Changes,
) -> tuple[Changes, Counts]:
    """The changes of one call without those numbers that a plan can count, and how it counts them."""
    was = dict(changes.found)
    after = {e.path: e.template for e in changes.effects if is_number(e.template) and is_number(was.get(e.path))}
    counted: list[Counts | None] = []
    if after:
        observer.preserved.changed_by(lambda: counted.append(_counts(observer, call, contents, runs, after)))
    if not counted or counted[0] is None:
        return changes, NO_COUNTS
    effects = tuple(effect for effect in changes.effects if effect.path not in after)
    others = tuple((path, value) for path, value in changes.found if path not in after)
    return replace(changes, effects=effects, found=others), counted[0]


def left_to_next_call(
    observer: Observes, inputs: Sequence[torch.Tensor], now: Mapping[Path, Any] | None = None
) -> Mapping[Path, Any]:
    """Put copies where the call's tensors are in Python state: what one call leaves there is no input of the next.

    A forward that compares identities sees its own; where those are is compared before each planned call.

    Args:
        now: the observer's snapshot, where it is known.

    Returns:
        the snapshot afterwards.
    """
    now = observer.snapshot() if now is None else now
    held = {id(value) for value in now.values()}
    copies = {id(tensor): _copied(tensor) for tensor in inputs if id(tensor) in held}
    if not copies or observer.reads.compares_identities:
        return now
    observer.replace_tensors(copies)
    return observer.snapshot()


def _contents(inputs: Sequence[torch.Tensor]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(tensor, tensor.detach().clone()) for tensor in inputs]


def _copied(tensor: torch.Tensor) -> torch.Tensor:
    plain = tensor.detach()
    is_strided = tensor.layout is torch.strided
    copy = laid_out(plain, plain.shape, plain.stride()) if is_strided else plain.clone()
    return copy.requires_grad_(tensor.requires_grad)


def _same(one: Run, other: Run) -> bool:
    return one.kernels == other.kernels and one.reads == other.reads


Places = frozenset[frozenset[Path]]
"""Of each of some tensors, the places of Python state that held it."""


def _places(tensors: Container[int], snapshot: Mapping[Path, Any]) -> Places:
    """Of these tensors, by identity."""
    found: dict[int, set[Path]] = {}
    for path, value in snapshot.items():
        if id(value) in tensors:
            found.setdefault(id(value), set()).add(path)
    return frozenset(map(frozenset, found.values()))


def _is_told_apart(places: Sequence[Places]) -> bool:
    """Whether it is known which place counts: no tensor is in several, or the same places as in the run before hold one.

    `[initial] * 3` does not say from which of its places a tensor was read.
    """
    return all(len(paths) == 1 for paths in places[-1]) or (len(places) > 2 and places[-1] == places[-2])


def _unsteady(one: Run, other: Run) -> CaptureError:
    pairs = zip(one.kernels, other.kernels, strict=False)
    first = next((kernel for kernel, again in pairs if kernel != again), (one.kernels + other.kernels + [("", "")])[-1])
    return CaptureError(
        f"the model's forward changes from call to call: {first[0]} in {first[1] or 'the model itself'} ran with other "
        "arguments or did not run (a counter, a clock, a schedule in Python?); a plan would repeat one call forever. Pass "
        "what changes as a tensor argument, or make it a buffer",
        module=first[1],
    )
