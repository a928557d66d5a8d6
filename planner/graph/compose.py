"""Outer code and planned units as one graph: what `simulate` computes the peak of a step with units from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from planner.errors import GraphError
from planner.graph.graph import Graph, Kind, Op
from planner.graph.outer import OuterCodeError, OuterGraph, UnitCall
from planner.graph.schedule import Schedule, keep_all


@dataclass(frozen=True, slots=True)
class Composed:
    """The graph of a step with the ops of its units in it.

    A unit's section is an op that enters it, its own ops, and an op that leaves it, in the forward and in the backward. While
    its forward runs, what it was given is alive. Its backward frees what it was given and what it returned after the last read,
    where that can be told from the graphs and nobody else reads it later; what it saved is alive in between.

    Attributes:
        graph: all ops.
        units: per unit, its own graph.
        places: per call of a unit, for each op of its own graph the index in `graph`.
        bounds: per call, the indices of the ops that enter and leave its forward, then its backward.
    """

    graph: Graph
    units: Mapping[str, Graph]
    places: Mapping[UnitCall, tuple[int, ...]]
    bounds: Mapping[UnitCall, tuple[int, int, int, int]]

    def schedule(self, schedules: Mapping[str, Schedule]) -> Schedule:
        """The step in which each unit runs by its own schedule, in all of its calls; without one, it keeps all."""
        inside: dict[int, Sequence[int]] = {}
        for call, place in self.places.items():
            graph = self.units[call.unit]
            own = schedules.get(call.unit) or keep_all(graph)
            boundary, (enter, leave, enter_again, leave_again) = own.boundary(graph), self.bounds[call]
            inside[enter] = [enter, *(place[i] for i in own.steps[:boundary]), leave]
            inside[enter_again] = [enter_again, *(place[i] for i in own.steps[boundary:]), leave_again]
        units = {i for steps in inside.values() for i in steps} | {i for place in self.places.values() for i in place}
        steps: list[int] = []
        for i in range(len(self.graph.ops)):
            if i in inside:
                steps += inside[i]
            elif i not in units:
                steps.append(i)
        return Schedule(tuple(steps))


def compose(outer: OuterGraph, units: Mapping[str, Graph]) -> Composed:
    """Put each unit's ops in the place of the two ops of each of its calls.

    What a unit is given (parameters, buffers, inputs, gradients of its outputs) is the outer graph's. What it returns is its
    own value. Both are known under the outer graph's name where the two have equal bytes, in order of the reads and writes. Of
    the others, the outer graph's exist from the beginning of the section to its end.

    Raises:
        OuterCodeError: the units' graphs are other ones than their parts of the whole step.
    """
    builder = _Builder(outer, units)
    for i, op in enumerate(outer.graph.ops):
        builder.add(i, op)
    try:
        return builder.composed()
    except GraphError as error:
        raise OuterCodeError(f"the graphs of the units are other ones than their parts of the whole step: {error}") from error


class _Builder:
    def __init__(self, outer: OuterGraph, units: Mapping[str, Graph]) -> None:
        self.outer, self.units = outer, dict(units)
        self.ops: list[Op] = []
        self.values = {value.name: value for value in outer.graph.values}
        self.bounds: dict[UnitCall, list[int]] = {call: [] for call in outer.calls}
        self.places: dict[UnitCall, dict[int, int]] = {call: {} for call in outer.calls}
        self.names: dict[UnitCall, dict[str, str | None]] = {}
        self.at = {i: (call, k == 0) for call, pair in outer.calls.items() for k, i in enumerate(pair)}
        self.num_forward_ops = 0

    def add(self, i: int, op: Op) -> None:
        if i in self.at:
            self._section(*self.at[i], op)
        else:
            self.ops.append(op)
        if i < self.outer.graph.num_forward_ops:
            self.num_forward_ops = len(self.ops)

    def _section(self, call: UnitCall, is_forward: bool, op: Op) -> None:
        graph = self.units[call.unit]
        own = range(graph.num_forward_ops) if is_forward else graph.backward_ops
        results = [name for name in (graph.forward_outputs if is_forward else graph.backward_outputs) if name in graph.producer]
        names = self.names.setdefault(call, dict.fromkeys(graph.inputs))  # None: what the outer graph holds
        names.update(self._given(graph, op, is_forward))
        matched = _matched(sorted(results, key=lambda name: graph.producer[name]), graph, op.writes, self.outer.graph)
        for j in own:
            for name in graph.ops[j].writes:
                names[name] = matched.get(name) or f"{call}: {name}"
                if name not in matched:
                    self.values[f"{call}: {name}"] = replace(graph.value[name], name=f"{call}: {name}")
        theirs = tuple(name for name in op.writes if name not in matched.values())
        self._boundary(f"enter {op.name}", op, op.reads, theirs)
        for j in own:
            self.places[call][j] = len(self.ops)
            self.ops.append(self._renamed(call, graph.ops[j], names))
        returned = tuple(named for name in results if (named := names[name]) is not None)
        freed = set() if is_forward or self.outer.is_measured else {*names.values()}
        held = tuple(name for name in op.reads if name not in freed)
        self._boundary(f"leave {op.name}", op, tuple(dict.fromkeys((*held, *returned))), ())
        self.bounds[call] += [self.places[call][own[0]] - 1 if len(own) else len(self.ops) - 2, len(self.ops) - 1]
        if is_forward:
            names.update((name, None) for name in results if name not in matched)

    def _given(self, graph: Graph, op: Op, is_forward: bool) -> dict[str, str]:
        """Per activation, or gradient of an output, that a unit is given: the outer graph's value, where it is known."""
        outer, first = self.outer.graph, 0 if is_forward else self.outer.graph.num_forward_ops
        if self.outer.is_measured:
            return {}
        kind, own = (Kind.INPUT, graph.ops[: graph.num_forward_ops]) if is_forward else (Kind.TANGENT, graph.ops)
        reads = dict.fromkeys(name for own_op in own for name in own_op.reads if graph.value[name].kind is kind)
        theirs = [name for name in op.reads if outer.producer.get(name, -1) >= first]
        return _matched(list(reads), graph, theirs, outer)

    def _boundary(self, name: str, op: Op, reads: tuple[str, ...], writes: tuple[str, ...]) -> None:
        self.ops.append(replace(op, name=name, reads=reads, writes=writes))

    def _renamed(self, call: UnitCall, op: Op, names: Mapping[str, str | None]) -> Op:
        source = replace(op.source, module=f"{call.unit}.{op.source.module}".rstrip("."))
        return replace(
            op,
            name=f"{call}: {op.name}",
            nodes=(),
            reads=tuple(dict.fromkeys(named for name in op.reads if (named := names[name]) is not None)),
            writes=tuple(named for name in op.writes if (named := names[name]) is not None),
            source=source,
        )

    def composed(self) -> Composed:
        graph = self.outer.graph
        written = {name for op in self.ops for name in op.writes} | set(graph.inputs)
        return Composed(
            Graph(
                ops=tuple(self.ops),
                values=tuple(value for name, value in self.values.items() if name in written),
                inputs=graph.inputs,
                forward_outputs=graph.forward_outputs,
                backward_outputs=graph.backward_outputs,
                num_forward_ops=self.num_forward_ops,
                backward_is_fixed=True,
            ),
            self.units,
            {call: tuple(at[j] for j in range(len(self.units[call.unit].ops))) for call, at in self.places.items()},
            {call: (at[0], at[1], at[2], at[3]) for call, at in self.bounds.items()},
        )


def _matched(names: Sequence[str], graph: Graph, theirs: Sequence[str], outer: Graph) -> dict[str, str]:
    """Per value of a unit that the outer code sees, the outer graph's value that it is: of equal bytes, in this order."""
    left: dict[int, list[str]] = {}
    for name in theirs:
        left.setdefault(outer.value[name].nbytes, []).append(name)
    found: dict[str, str] = {}
    for name in names:
        alike = left.get(graph.value[name].nbytes)
        if alike:
            found[name] = alike.pop(0)
    return found
