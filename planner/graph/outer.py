"""A training step whose units are one op in the forward and one in the backward each: what lies around planned submodules.

Two sources: the graph of the whole step, contracted; or bytes that were measured between the units of a real step.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from planner.errors import GraphError
from planner.graph.accumulation import HELD, STAGE_END
from planner.graph.graph import Graph, Kind, Op, Value, reserved_name

FORWARD, BACKWARD = "(forward of a unit)", "(backward of a unit)"
"""Kernels of the ops that stand for units."""
HOLDS = "(what a unit was given is needed)"
"""Kernel of an op after the backward of a unit that has other ops in the whole graph than in its own graph, such as sums of
gradients of an input that it returns. What these read is not known to be free before they all have run."""
_RESIDENT = reserved_name("model and inputs")


class OuterCodeError(GraphError):
    """What lies around units cannot be told from the graph of the whole step, or from a measured step."""


class UnitCall(NamedTuple):
    """A call of a unit in a step.

    Attributes:
        unit: its qualified name.
        number: of the call, in the order of the forward.
    """

    unit: str
    number: int = 0

    def __str__(self) -> str:
        # as a submodule of the unit, which is no unit itself: no other call has this name
        return f"{self.unit}.(call {self.number + 1})" if self.number else self.unit


@dataclass(frozen=True, slots=True)
class OuterGraph:
    """A step in which each call of a unit is two ops; they take no time of their own.

    Attributes:
        graph: outer ops, and the units' ops.
        calls: per call of a unit, the indices of its two ops.
        is_measured: bytes were measured in a step; then outer ops have no time.
    """

    graph: Graph
    calls: Mapping[UnitCall, tuple[int, int]]
    is_measured: bool = False

    @property
    def held(self) -> frozenset[str]:
        """Units of which it is not known when their backwards free what they were given."""
        around = {op.name for op in self.graph.ops if op.kernel == HOLDS}
        return frozenset(call.unit for call in self.calls if self.is_measured or f"{call} {HOLDS}" in around)


@dataclass(frozen=True, slots=True)
class MeasuredSection:
    """A stretch of a measured step.

    Attributes:
        call: whose forward or backward it is; None for what lies between two of them.
        is_forward: of a call's section, that it is its forward.
        start_bytes: live at its start, above what is resident.
        peak_bytes: the most live in it, likewise.
    """

    call: UnitCall | None
    is_forward: bool
    start_bytes: int
    peak_bytes: int


def contracted(graph: Graph, units: Mapping[str, Graph]) -> OuterGraph:
    """The graph of a whole step with the ops of each unit, which is called once, merged into two.

    Args:
        graph: of one step; if it accumulates gradients, with each added once it is there.
        units: the graph of each, by qualified name; none inside another one.

    Raises:
        OuterCodeError: other ops run between a unit's, so that it cannot be told apart.
    """
    return _Contraction(graph, units).outer()


class _Contraction:
    """The ops of each unit, forward and backward, and who reads which value."""

    def __init__(self, graph: Graph, units: Mapping[str, Graph]) -> None:
        self.graph, self.units, self.owners = graph, units, _owners(graph, units)
        self.spans: dict[tuple[str, bool], list[int]] = {}
        self.readers: dict[str, set[str]] = {}
        for i, (op, unit) in enumerate(zip(graph.ops, self.owners, strict=True)):
            if unit:
                self.spans.setdefault((unit, i < graph.num_forward_ops), []).append(i)
            for name in op.reads:
                self.readers.setdefault(name, set()).add(unit)
        self._check()

    def _check(self) -> None:
        for (unit, is_forward), own in self.spans.items():
            apart = next((self.graph.ops[i] for i in range(own[0], own[-1] + 1) if self.owners[i] != unit), None)
            if apart is not None:
                which, where = "forward" if is_forward else "backward", apart.source or "of unknown source"
                raise OuterCodeError(f"in the {which} of {unit}, {apart.name} ({where}) runs, which is not its own")
        for unit in self.units:
            if not {(unit, True), (unit, False)} <= self.spans.keys():
                raise OuterCodeError(f"{unit} has no forward or no backward in the graph")

    def outer(self) -> OuterGraph:
        ops: list[Op] = []
        calls: dict[str, list[int]] = {unit: [] for unit in self.units}
        num_forward_ops = 0
        for i, op in enumerate(self.graph.ops):
            unit, is_forward = self.owners[i], i < self.graph.num_forward_ops
            if unit and i != self.spans[unit, is_forward][0]:
                continue
            num_forward_ops += is_forward
            if unit:
                calls[unit].append(len(ops))
            ops.append(self._merged(unit, is_forward) if unit else op)
            if unit and not is_forward and self._has_others(unit):
                ops.append(Op(f"{UnitCall(unit)} {HOLDS}", (), ops[-1].reads, (), 0, recomputable=False, kernel=HOLDS))
        found = {UnitCall(unit): (at[0], at[1]) for unit, at in calls.items()}
        return OuterGraph(_with_ops(self.graph, ops, num_forward_ops), found)

    def _has_others(self, unit: str) -> bool:
        """Its backward has other ops than its own graph."""
        own, alone = self.spans[unit, False], self.units[unit]
        kernels = [self.graph.ops[i].kernel for i in own if self.graph.ops[i].kernel != STAGE_END]
        return sorted(kernels) != sorted(alone.ops[i].kernel for i in alone.backward_ops if alone.ops[i].kernel != STAGE_END)

    def _merged(self, unit: str, is_forward: bool) -> Op:
        """A unit's forward or backward as one op. Its backward reads what its forward was given, which it may need again."""
        reads, wrote = self._interface(unit, is_forward)
        if not is_forward:
            given, theirs = self._interface(unit, True)
            reads = [*(name for name in reads if name not in theirs or self._is_seen(name, unit)), *given]
        writes = tuple(name for name in wrote if self._is_seen(name, unit))
        return _unit_op(UnitCall(unit), is_forward, tuple(dict.fromkeys(reads)), writes)

    def _interface(self, unit: str, is_forward: bool) -> tuple[list[str], dict[str, None]]:
        """What a unit's ops read of others' values, and what they write."""
        own = [self.graph.ops[i] for i in self.spans[unit, is_forward]]
        wrote = dict.fromkeys(name for op in own for name in op.writes)
        return [name for op in own for name in op.reads if name not in wrote], wrote

    def _is_seen(self, name: str, unit: str) -> bool:
        """A unit's value is an output, or others read it."""
        return name in self.graph.pinned or bool(self.readers.get(name, set()) - {unit})


def _owners(graph: Graph, units: Mapping[str, Graph]) -> list[str]:
    """Per op, the unit that it belongs to; "" for outer ops.

    The end of a stage belongs to the unit that made its gradients. Any other op that no line of the user's code runs belongs to
    the unit around it. After a unit's backward these are sums of gradients of what it was given: its own, where it knows all
    terms and has such an op alone, too (a residual connection inside of the unit, not one around it).
    """
    left = {unit: sum(alone.ops[i].kernel != STAGE_END for i in alone.backward_ops) for unit, alone in units.items()}
    prefixes = sorted(units, key=len, reverse=True)
    found = [
        next((u for u in prefixes if op.source.module == u or op.source.module.startswith(f"{u}.")), "") for op in graph.ops
    ]
    last = {(unit, i < graph.num_forward_ops): i for i, unit in enumerate(found) if unit}
    known: dict[str, set[str]] = {}
    inside = ""
    for i, op in enumerate(graph.ops):
        is_forward = i < graph.num_forward_ops
        if op.kernel == STAGE_END:
            found[i] = found[graph.producer[op.reads[0]]]
        is_sum = not is_forward and left.get(inside, 0) > 0 and len(op.reads) > 1 and set(op.reads) <= known.get(inside, set())
        if found[i]:
            inside = found[i]
        elif inside and not op.source and (i < last.get((inside, is_forward), -1) or is_sum):
            found[i] = inside
        else:
            inside = ""
        if not is_forward and inside and op.kernel != STAGE_END:
            left[inside] -= 1
        if found[i] and not is_forward:
            known.setdefault(found[i], set()).update((*op.reads, *op.writes))
    return found


def from_measured(
    resident_bytes: int,
    sections: Sequence[MeasuredSection],
    saved: Mapping[str, int],
    expected: Collection[UnitCall],
    held_bytes: int = 0,
) -> OuterGraph:
    """What a measured step held beside what its units saved.

    Args:
        resident_bytes: parameters, buffers and inputs.
        sections: of the step, in order of time; the first is the outer code's.
        saved: per unit, the bytes that each of its calls kept for its backward in that step.
        expected: the calls of units; each of them has a forward and a backward among the sections.
        held_bytes: gradients of earlier micro-steps, which that step found.

    Raises:
        OuterCodeError: a call of a unit ran otherwise than once.
    """
    ops: list[Op] = []
    values = [Value(_RESIDENT, resident_bytes, Kind.RESERVED)]
    values += [Value(HELD, held_bytes, Kind.RESERVED)] if held_bytes else []
    resident = tuple(value.name for value in values)
    calls: dict[UnitCall, list[int]] = {call: [] for call in expected}
    held, num_forward_ops = 0, None
    for k, section in enumerate(sections):
        call = section.call
        if call is None:
            ops.append(Op(f"(outer code {k})", (), (), (), 0, max(0, section.peak_bytes - held), recomputable=False))
            continue
        if not section.is_forward and num_forward_ops is None:
            num_forward_ops = len(ops)
        around = Value(f"(held around {call}, {k})", max(0, section.start_bytes - held), _kind(section.is_forward))
        values.append(around)
        ops.append(Op(f"(enter {k})", (), (), (around.name,), 0, recomputable=False))
        calls.setdefault(call, []).append(len(ops))
        ops.append(_unit_op(call, section.is_forward, (around.name,), ()))
        held += saved[call.unit] if section.is_forward else -saved[call.unit]
    wrong = next((call for call, at in calls.items() if len(at) != 2 or call not in expected), None)
    if wrong is not None or num_forward_ops is None:
        times = 0 if wrong is None else len(calls[wrong])
        raise OuterCodeError(f"in a measured step, {wrong or 'no unit'} ran forward and backward {times} times")
    graph = Graph(tuple(ops), tuple(values), resident, (), (), num_forward_ops, backward_is_fixed=True)
    return OuterGraph(graph, {call: (at[0], at[1]) for call, at in calls.items()}, is_measured=True)


def _kind(is_forward: bool) -> Kind:
    return Kind.ACTIVATION if is_forward else Kind.GRADIENT


def _unit_op(call: UnitCall, is_forward: bool, reads: tuple[str, ...], writes: tuple[str, ...]) -> Op:
    kernel = FORWARD if is_forward else BACKWARD
    return Op(f"{call} {kernel}", (), reads, writes, 0, recomputable=False, kernel=kernel)


def _with_ops(graph: Graph, ops: Sequence[Op], num_forward_ops: int) -> Graph:
    """The graph with other ops, and the values that they write."""
    written = {name for op in ops for name in op.writes} | set(graph.inputs)
    return Graph(
        ops=tuple(ops),
        values=tuple(value for value in graph.values if value.name in written),
        inputs=graph.inputs,
        forward_outputs=graph.forward_outputs,
        backward_outputs=graph.backward_outputs,
        num_forward_ops=num_forward_ops,
        backward_is_fixed=True,
    )
