"""What `doctor` says of a model: whether it can be planned, and how its training step is captured. Prints as a report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from planner.report.tables import Block, facts, number, render, table, words
from planner.results.figures import head
from planner.units import format_bytes

_SHOWN = 8
"""Lines of a list that are printed."""


@dataclass(frozen=True, slots=True)
class Opaque:
    """A submodule that runs as it is, unplanned.

    Attributes:
        module: its qualified name.
        kind: its class.
        why: why it is not captured.
        repeatable: it may run twice: it gave the same bits twice and changed nothing else.
        draws: it draws random numbers.
    """

    module: str
    kind: str
    why: str
    repeatable: bool
    draws: bool


@dataclass(frozen=True, slots=True)
class Read:
    """A tensor value that Python read: the plan holds for calls in which it is the same.

    Attributes:
        where: module, file and line.
        value: as Python writes it.
    """

    where: str
    value: str


@dataclass(frozen=True, slots=True)
class Once:
    """Forward kernels that no plan runs twice, for one reason.

    Attributes:
        why: the reason.
        count: how many.
        nbytes: of what they write.
        first: where the first of them comes from.
    """

    why: str
    count: int
    nbytes: int
    first: str


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """How a model's training step is captured, and what stands in the way of a plan. Plain data.

    Attributes:
        model: its class.
        problems: what prevents planning, the error's name first; empty where nothing does.
        warnings: what a user should know although planning works.
        device: where the step runs.
        num_ops, num_forward_ops: kernels of the step, and of its forward; 0 where it was not captured.
        peak_bytes: of the plain step, without workspaces.
        starts: outputs that the backward starts from.
        opaque: submodules that run as they are.
        refused: the first error of a capture without them; "" where none failed.
        carried: places in Python state whose tensors the forward reads, and buffers and inputs that it writes into.
        left: places in Python state that the forward leaves something in.
        guarded: what every call is compared with, in words.
        settings: places in Python state that a call is compared with.
        reads: tensor values that Python reads.
        repeats: (class, names) of equal blocks, captured once.
        once: forward kernels that are never recomputed, and why.
        captures_differ: the first difference between two captures; "" where they agree.
        calls_differ: names of what two steps of the model itself, from the same state, leave different.
        calls_not_run: why no two steps were run; "" where they were.
    """

    model: str
    problems: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    device: str = ""
    num_ops: int = 0
    num_forward_ops: int = 0
    peak_bytes: int = 0
    starts: tuple[str, ...] = ()
    opaque: tuple[Opaque, ...] = ()
    refused: str = ""
    carried: tuple[str, ...] = ()
    left: tuple[str, ...] = ()
    guarded: tuple[str, ...] = ()
    settings: tuple[str, ...] = ()
    reads: tuple[Read, ...] = ()
    repeats: tuple[tuple[str, tuple[str, ...]], ...] = ()
    once: tuple[Once, ...] = ()
    captures_differ: str = ""
    calls_differ: tuple[str, ...] = ()
    calls_not_run: str = ""

    @property
    def plannable(self) -> bool:
        """Nothing prevents planning."""
        return not self.problems

    def json(self) -> dict[str, Any]:
        """The same for machines, as json.dumps takes it (docs/json.md)."""
        return {**head("diagnosis"), "plannable": self.plannable, **asdict(self)}

    def __str__(self) -> str:
        verdict = f"{self.model} can be planned" if self.plannable else f"{self.model} CANNOT be planned"
        blocks: list[Block] = [verdict, facts([("problem", each) for each in self.problems])]
        if self.warnings:
            blocks.append(facts([("warning", each) for each in self.warnings]))
        if self.num_ops:
            blocks += ["", facts(self._facts())]
        if self.opaque:
            rows = [(each.module, each.kind, "yes" if each.repeatable else "no", each.why) for each in self.opaque]
            columns = [words("runs as it is"), words("class"), words("may run again"), words("why", at_least=24)]
            blocks += ["", table(columns, _first(rows, 4))]
        if self.reads:
            blocks += ["", table([words("Python reads"), words("value")], _first([(r.where, r.value) for r in self.reads], 2))]
        if self.once:
            rows = [(each.why, str(each.count), format_bytes(each.nbytes), each.first) for each in self.once]
            columns = [words("never recomputed: it ..."), number("ops"), number("bytes"), words("first at")]
            blocks += ["", table(columns, _first(rows, 4))]
        return render(*blocks)

    def _facts(self) -> list[tuple[str, str]]:
        repeats = (f"{len(names)} {kind} ({names[0]}, ...)" for kind, names in self.repeats)
        two = "two steps from the same state give the same bits"
        if self.calls_differ:
            two = f"two steps from the same state DIFFER in {_listed(self.calls_differ)}"
        if self.calls_not_run:
            two = f"no two steps were run: {self.calls_not_run}"
        same = "two captures agree" if not self.captures_differ else f"two captures DIFFER: {self.captures_differ}"
        return [
            ("captured", f"{self.num_ops} kernels, {self.num_forward_ops} of them in the forward, on {self.device}"),
            ("peak", f"{format_bytes(self.peak_bytes)} for the plain step, workspaces of kernels not counted"),
            ("backward", f"starts from {_listed(self.starts)}" if self.starts else ""),
            ("captured once", ", ".join(repeats)),
            ("carried", _listed(self.carried)),
            ("left", _listed(self.left)),
            ("guarded", "; ".join(self.guarded)),
            ("settings", _listed(self.settings)),
            ("captures", same),
            ("calls", two),
        ]


def _listed(names: tuple[str, ...]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _first(rows: Sequence[tuple[str, ...]], width: int) -> Sequence[tuple[str, ...]]:
    """The first rows, and one that says how many there are besides."""
    if len(rows) <= _SHOWN:
        return rows
    return [*rows[:_SHOWN], (f"({len(rows) - _SHOWN} more)", *[""] * (width - 1))]
