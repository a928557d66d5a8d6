"""Marks around the forwards and backwards of a trial's planned modules, and the sections that they cut a step into."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from planner.graph.outer import MeasuredSection, UnitCall
from planner.profiler.marks import Mark
from planner.runtime.autograd import BackwardFinder
from planner.runtime.backward_key import BackwardKey
from planner.runtime.executable import Boxed, Executable, OtherBackward
from planner.runtime.module import CheckpointedModule


def mark_module(module: CheckpointedModule, name: str, mark: Mark) -> None:
    """Mark the forwards and the backwards of a trial's planned module: the last call's backward runs first."""
    number = 0
    waiting: list[UnitCall] = []
    running = UnitCall(name)

    def forward(code: Boxed) -> Boxed:
        def run(inputs: list[Any]) -> tuple[Any, ...]:
            nonlocal number
            call = UnitCall(name, number)
            number += 1
            waiting.append(call)
            with mark(call, True):
                return code(inputs)

        return run

    def backward(code: Boxed, is_first: bool = True) -> Boxed:
        def run(inputs: list[Any]) -> tuple[Any, ...]:
            nonlocal running
            if is_first and waiting:
                running = waiting.pop()
            with mark(running, False):
                return code(inputs)

        return run

    code: Executable = module.__dict__["_executable"]
    stages = tuple(backward(stage, k == 0) for k, stage in enumerate(code.stages))
    module.__dict__["_executable"] = replace(code, forward=forward(code.forward), stages=stages)
    others: BackwardFinder = module.__dict__["_other_backwards"]
    module.__dict__["_other_backwards"] = _MarkedBackwards(others, backward)


@dataclass(frozen=True, slots=True)
class _MarkedBackwards:
    """Finds backwards for gradients that are not as planned, and marks them."""

    others: BackwardFinder
    marked: Callable[[Boxed], Boxed]

    def find(
        self, key: BackwardKey, gradients: Sequence[Any], written: tuple[int, ...], leaves: tuple[bool, ...]
    ) -> OtherBackward | None:
        """See `BackwardFinder`."""
        found = self.others.find(key, gradients, written, leaves)
        return None if found is None else replace(found, run=self.marked(found.run))

    def modified(self, read: Iterable[tuple[str, int, torch.Tensor | None]]) -> str:
        """See `BackwardFinder`."""
        return self.others.modified(read)


def joined(found: Sequence[MeasuredSection]) -> list[MeasuredSection]:
    """Sections with the stages of one backward, and what runs between them, as one."""
    places = [(one.call, one.is_forward) for one in found]
    last = {place: k for k, place in enumerate(places)}
    made: list[MeasuredSection] = []
    end = -1
    for k, (one, place) in enumerate(zip(found, places, strict=True)):
        if k > end:
            made.append(one)
            end = k if one.call is None else last[place]
    return made
