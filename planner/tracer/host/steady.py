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
from planner.tracer.faults import is_out_of_memory
from planner.tracer.host.arguments import call_effects
from planner.tracer.host.changes import Changes, find_changes, refusal
from planner.tracer.host.counts import NO_COUNTS, Counts, is_number
from planner.tracer.host.fingerprint import alike
from planner.tracer.host.kernels import Run
from planner.tracer.host.one_call import registered, take_back
from planner.tracer.host.path import Path
from planner.tracer.host.preserve import Preserved
from planner.tracer.host.reads import ReadRecorder
from planner.tracer.host.restorers import restore_tensors
from planner.tracer.host.state import Effect, bare_fingerprint
from planner.tracer.host.tracked import Instructions, Tape, compares_objects, instructions_noted
from planner.tracer.model_call import Called

_RUNS = 4
"""Maximum number of runs; the first ones may fill caches and initial state."""


class Observes(Protocol):
    """What is asked of the `Observer`; see there."""

    model: nn.Module
    preserved: Preserved
    reads: ReadRecorder

    def run_once(self, call: Callable[[], Called], *, may_initialize: bool = False) -> Run:
        """Run the forward."""

    def snapshot(self) -> dict[Path, Any]:
        """Python state now."""

    def is_paused(self) -> bool:
        """A submodule that plans run as it is runs now."""

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

    def effects(self, on_state: Sequence[Effect]) -> tuple[Effect, ...]:
        """Those of the last run: `on_state`, on Python state, and those on its arguments; see `call_effects`."""
        before, last = self.runs[-2:]
        assert last.arguments is not None  # a run that has ended
        return call_effects(on_state, before.written, last.written, last.arguments)


def run_until_steady(
    observer: Observes, call: Callable[[], Called], inputs: Sequence[torch.Tensor], changes_of: Callable[[Runs], Changes]
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
    refused: CaptureError | None = None
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
                return found, changes, _Counting(observer, call, contents, found).all_of(changes.counted)
            except CaptureError as error:  # what comes late, from a call before the last one
                refused = error
                if len(runs) == _RUNS:
                    raise
    changes = find_changes(observer.model, befores[-1], observer.snapshot())  # names the attribute, if it is one
    if changes.counted:
        first = changes.counted[0]
        raise refused or refusal(first, befores[-1][first], first.get(observer.model))
    raise _unsteady(runs[-2], runs[-1])


def run_as_found(
    observer: Observes, call: Callable[[], Called], inputs: Sequence[torch.Tensor], changes_of: Callable[[Runs], Changes]
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
    runs, changes = found[0]
    return runs, *_Counting(observer, call, contents, runs).taken_from(changes)


class _Counting:
    """Finds how the last of some runs counts numbers, by further runs that find what that one found."""

    def __init__(
        self,
        observer: Observes,
        call: Callable[[], Called],
        contents: Sequence[tuple[torch.Tensor, torch.Tensor]],
        runs: Runs,
    ) -> None:
        self._observer, self._call, self._contents, self._runs = observer, call, contents, runs

    def all_of(self, places: Sequence[Path]) -> Counts:
        """How numbers are counted that are others after each run.

        Raises:
            CaptureError: one is used in another way.
        """
        model, before = self._observer.model, self._runs.before
        after = {path: path.get(model) for path in places}
        counts = self._counts(after)
        if isinstance(counts, str):
            raise refusal(places[0], before[places[0]], after[places[0]], counts)
        return counts

    def taken_from(self, changes: Changes) -> tuple[Changes, Counts]:
        """The changes of one call without those numbers that a plan can count, and how it counts them."""
        was = dict(changes.found)
        after = {e.path: e.template for e in changes.effects if is_number(e.template) and is_number(was.get(e.path))}
        counts = self._counts(after)
        if isinstance(counts, str):
            return changes, NO_COUNTS
        effects = tuple(effect for effect in changes.effects if effect.path not in after)
        others = tuple((path, value) for path, value in changes.found if path not in after)
        return replace(changes, effects=effects, found=others), counts

    def _counts(self, after: Mapping[Path, Any]) -> Counts | str:
        """How the numbers in these places are counted, or why no plan can count them.

        Args:
            after: the places, and what the last run left there.
        """
        if not after:
            return NO_COUNTS
        if self._observer.reads.of_backward.may_read([*after], self._observer.model):
            return "code of the model's own that runs in its backward may use it"
        before, places, tape = self._runs.before, [*after], Tape(self._observer.is_paused)
        found: list[Counts] = []
        try:
            plain = self._run({path: before[path] for path in places})
            tracked = self._run(
                {path: tape.number(before[path], ("found", i)) for i, path in enumerate(places)},
                lambda: found.append(tape.counts(self._observer.model, before, places)),
            )
            followed = [] if tape.use or not found else found[0].follow(found[0].captured)
        except Exception as error:  # Python's C code takes no other numbers than its own
            if is_out_of_memory(error):
                raise
            TRACER.debug("a run with tracked numbers fails", exc_info=True)
            return tape.use or "code that is not Python's uses it"
        if tape.use:
            return tape.use
        if not plain:
            return "this Python does not show which instructions are executed"
        if plain != tracked or compares_objects(plain):
            return "the forward asks what kind of number it is, or which object"
        if followed != [*after.values()] or tape.is_kept():
            return "it is kept in another place"
        return found[0]

    def _run(self, numbers: Mapping[Path, Any], at_end: Callable[[], None] = lambda: None) -> Instructions:
        """The instructions of a run that finds these numbers; what it changes is restored.

        Raises:
            CaptureError: it runs other kernels than the last one.
        """
        noted: Instructions = []

        def run() -> None:
            for path, number in numbers.items():
                path.set(self._observer.model, number)
            restore_tensors(self._contents)
            with instructions_noted() as instructions:
                again = self._observer.run_once(self._call)
            noted.extend(instructions)
            at_end()
            if not _same(self._runs.runs[-1], again):
                raise _unsteady(self._runs.runs[-1], again)

        self._observer.preserved.changed_by(run)
        return noted


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
