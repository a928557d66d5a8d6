"""A member of a class of behaviour: a program, and what may come of it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import pytest

from tests.support.harness import Outcome, outcome
from tests.support.source import Program

SAME = frozenset({"same"})
REFUSABLE = frozenset({"same", "refused"})
GUARDED = frozenset({"same", "mismatch"})
ANY = frozenset({"same", "mismatch", "refused"})


@dataclass(frozen=True, slots=True)
class Member:
    """A program with its allowed outcomes.

    Attributes:
        allowed: verdicts.
        planned_from: from this step on every step must have run planned, unless it was refused; None: none needs to.
        planned_to: the step before which that ends.
        word: pattern of what a mismatch or refusal must contain.
        measured: the peak of a step is measured as well.
    """

    program: Program
    allowed: frozenset[str] = SAME
    planned_from: int | None = 0
    planned_to: int | None = None
    word: str = ""
    measured: bool = False

    @property
    def name(self) -> str:
        """The program's."""
        return self.program.name


def member(name: str, forward: str = "", *, allowed: frozenset[str] = SAME, **fields: Any) -> Member:
    """A member; `fields` are those of `Program`, but `planned_from`, `planned_to`, `word` and `measured`."""
    own = {key: fields.pop(key) for key in ("planned_from", "planned_to", "word", "measured") if key in fields}
    return Member(Program(name, forward, **fields), allowed, **own)


def check(of: Member, **options: Any) -> Outcome:
    """Run a member.

    Raises:
        AssertionError: it is not as it may be.
    """
    found = outcome(of.program, measure=of.measured, **options)
    assert found.verdict in of.allowed, f"{of.name}: {found}\n{of.program.source}"
    if found.verdict != "same" and of.word:
        assert any(re.search(of.word, message) for message in found.messages), f"{of.name}: not named: {found.messages}"
    if found.verdict != "refused" and of.planned_from is not None:
        first = max(of.planned_from - of.program.warm, 0)
        planned = found.planned[first : None if of.planned_to is None else of.planned_to - of.program.warm]
        assert planned and all(planned), f"{of.name}: ran planned: {found.planned}; {found.messages}\n{of.program.source}"
    return found


def inside(of: Member, allowed: frozenset[str] | None = None) -> Member:
    """The same in a submodule, which may run as it is inside a planned model."""
    program = of.program.within(inside=True, name=f"{of.name}, in a submodule")
    return Member(program, of.allowed if allowed is None else allowed, of.planned_from, of.planned_to, of.word, of.measured)


def ids(members: list[Member]) -> list[str]:
    """Names for pytest, each of which must be another."""
    names = [of.name for of in members]
    assert len({*names}) == len(names)
    return names


def sampled(members: list[Member], every: int = 6) -> list[Any]:
    """Parameters for pytest: every sixth member, or as given, in each run; the others behind the marker `zoo`."""
    assert ids(members)
    marks = [() if i % every == 0 else (pytest.mark.zoo,) for i in range(len(members))]
    return [pytest.param(of, id=of.name, marks=marks[i]) for i, of in enumerate(members)]
