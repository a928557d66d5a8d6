"""Schedules of another backward after a forward that has run: they read only what that forward saved."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

from planner.errors import ScheduleError
from planner.graph.graph import RESIDENT_KINDS, Graph, Kind
from planner.graph.schedule import Schedule
from planner.graph.simulate import simulate
from planner.graph.source import Source


class MissingValueError(ScheduleError):
    """A backward reads a value that was not saved and cannot be recomputed from what was saved.

    Attributes:
        value: its name.
    """

    def __init__(self, value: str) -> None:
        super().__init__(f"{value} was not saved and cannot be recomputed")
        self.value = value


@dataclass(frozen=True, slots=True)
class Candidate:
    """A schedule with its simulated peak and time."""

    schedule: Schedule
    peak_bytes: int
    time_ns: int


def reschedule(
    graph: Graph, planned: Graph, schedule: Schedule, kept: Collection[str], limits: Sequence[int], is_fixed: bool
) -> Candidate:
    """The fastest candidate for `graph` within the lowest limit that one fits; else the candidate with the lowest peak.

    Candidates: the planned backward, mapped to the ops of this one; the captured order, with missing values recomputed right
    before they are read; and, where these exceed the limit, the captured order with values evicted and recomputed again.

    Args:
        graph: its forward is that of `planned`, op for op.
        planned: the plan's graph.
        schedule: the plan's; its forward has run.
        kept: values that the backward can read: saved activations, saved inputs, gradients of outputs.
        limits: bounds on the peak, ascending; a higher one is used where no candidate fits a lower one.
        is_fixed: backward ops must run in captured order.

    Raises:
        MissingValueError: no schedule exists.
    """
    forward = schedule.steps[: schedule.boundary(planned)]
    captured = list(graph.backward_ops)
    orders = [_complete(graph, kept, captured)]
    if not is_fixed:
        mapped = _mapped(graph, planned, schedule)
        orders.append(_complete(graph, kept, mapped))
    candidates = [_candidate(graph, forward, steps) for steps in orders]
    for limit in limits:
        if min(candidate.peak_bytes for candidate in candidates) > limit:
            candidates.append(_candidate(graph, forward, _Eviction(graph, kept, captured, limit).steps()))
        fitting = [candidate for candidate in candidates if candidate.peak_bytes <= limit]
        if fitting:
            return min(fitting, key=lambda candidate: candidate.time_ns)
    return min(candidates, key=lambda candidate: candidate.peak_bytes)


def _candidate(graph: Graph, forward: Sequence[int], backward: Sequence[int]) -> Candidate:
    schedule = Schedule((*forward, *_pruned(graph, forward, backward)))
    timeline = simulate(graph, schedule)
    return Candidate(schedule, timeline.peak_bytes, timeline.time_ns)


def _pruned(graph: Graph, forward: Sequence[int], backward: Sequence[int]) -> list[int]:
    """The steps without recomputes whose results are not read."""
    awaited: set[str] = set()
    first = {i: t for t, i in reversed([*enumerate(backward)])}
    kept = []
    for t, i in reversed([*enumerate(backward)]):
        op = graph.ops[i]
        is_first = i >= graph.num_forward_ops and first[i] == t
        if is_first or not awaited.isdisjoint(op.writes):
            kept.append(i)
            awaited.difference_update(op.writes)
            awaited.update(op.reads)
    return kept[::-1]


def _complete(graph: Graph, kept: Collection[str], steps: Iterable[int]) -> list[int]:
    """The steps, each preceded by recomputes of the values it reads that are not in memory."""
    there = set(kept)
    out: list[int] = []
    for i in steps:
        for name in graph.ops[i].reads:
            out += _recomputes(graph, there, name)
        out.append(i)
        there.update(graph.ops[i].writes)
    return out


def _recomputes(graph: Graph, there: set[str], name: str) -> Iterator[int]:
    """Ops to run, in order, to have a value in memory; updates `there`, the values in memory."""
    if name in there:
        return
    producer = graph.producer.get(name)
    if producer is None or producer >= graph.num_forward_ops or not graph.ops[producer].recomputable:
        raise MissingValueError(name)
    todo = [(producer, iter(graph.ops[producer].reads))]
    while todo:  # no recursion: chains are as long as the model is deep
        op, reads = todo[-1]
        for read in reads:
            if read in there:
                continue
            above = graph.producer.get(read)
            if above is None or above >= graph.num_forward_ops or not graph.ops[above].recomputable:
                raise MissingValueError(read)
            todo.append((above, iter(graph.ops[above].reads)))
            break
        else:
            todo.pop()
            if not there.issuperset(graph.ops[op].writes):
                there.update(graph.ops[op].writes)
                yield op


def _mapped(graph: Graph, planned: Graph, schedule: Schedule) -> list[int]:
    """The planned backward's steps as ops of `graph`; ops that the plan lacks run before the next captured op that it has."""
    counterpart = dict(zip(_identities(planned), planned.backward_ops, strict=True))
    here = {}
    for token, i in zip(_identities(graph), graph.backward_ops, strict=True):
        if token in counterpart:
            here[counterpart[token]] = i
    matched = set(here.values())
    before: dict[int, list[int]] = {}
    waiting: list[int] = []
    for i in graph.backward_ops:
        if i in matched:
            before[i], waiting = waiting, []
        else:
            waiting.append(i)
    steps: list[int] = []
    for i in schedule.steps[schedule.boundary(planned) :]:
        mine = i if i < planned.num_forward_ops else here.get(i)
        if mine is not None:
            steps += before.pop(mine, ())
            steps.append(mine)
    return _in_order(graph, [*steps, *waiting])


def _in_order(graph: Graph, steps: list[int]) -> list[int]:
    """The steps, reordered so that each backward op runs after the backward ops whose results it reads."""
    done: set[int] = set()
    out: list[int] = []

    def run(i: int) -> None:
        todo = [i]
        while todo:
            above = [graph.producer.get(name) for name in graph.ops[todo[-1]].reads]
            missing = [j for j in above if j is not None and j >= graph.num_forward_ops and j not in done]
            if missing:
                todo.append(missing[0])
                continue
            last = todo.pop()
            if last not in done:
                done.add(last)
                out.append(last)

    for i in steps:
        if i < graph.num_forward_ops:
            out.append(i)
        elif i not in done:
            run(i)
    return out


def _identities(graph: Graph) -> list[tuple[str, Source, int]]:
    """Per backward op (kernel, source, how many equal ones up to here): identifies it in another capture."""
    seen: dict[tuple[str, Source], int] = {}
    out = []
    for i in graph.backward_ops:
        op = graph.ops[i]
        token = (op.kernel, op.source)
        seen[token] = seen.get(token, 0) + 1
        out.append((*token, seen[token]))
    return out


class _Eviction:
    """Backward ops in captured order; where a step would exceed the limit, values are evicted that can be recomputed.

    The value with the latest next read is evicted first. Nothing is evicted that could not be recomputed from what stays.
    """

    def __init__(self, graph: Graph, kept: Collection[str], order: Sequence[int], limit_bytes: int) -> None:
        self.graph, self.limit = graph, limit_bytes
        self.resident = {value.name for value in graph.values if value.kind in RESIDENT_KINDS}
        self.outputs = {*graph.forward_outputs, *graph.backward_outputs}
        self.there = {name for name in kept if name not in self.resident}
        self.inputs = {name for name in kept if name in self.resident}
        self.order = order
        self.reads_at: dict[str, list[int]] = {}
        for t, i in enumerate(order):
            for name in graph.ops[i].reads:
                self.reads_at.setdefault(name, []).append(t)
        held = {*graph.inputs, *graph.forward_outputs}
        self.fixed = sum(graph.value[name].nbytes for name in held)
        self.fixed_names = held
        self.out: list[int] = []
        self.time = 0

    def steps(self) -> list[int]:
        """The steps of the backward."""
        for t, i in enumerate(self.order):
            self.time = t
            self._run(i)
        return self.out

    def _run(self, i: int) -> None:
        todo = [i]
        while todo:
            op = self.graph.ops[todo[-1]]
            missing = next((n for n in op.reads if n not in self.there and n not in self.inputs), None)
            if missing is not None:
                producer = self.graph.producer.get(missing)
                if producer is None or producer >= self.graph.num_forward_ops or not self.graph.ops[producer].recomputable:
                    raise MissingValueError(missing)
                todo.append(producer)
                continue
            self._evict(todo[-1], {name for waiting in todo for name in self.graph.ops[waiting].reads})
            self.out.append(todo.pop())
            self.there.update(op.writes)

    def _evict(self, step: int, locked: set[str]) -> None:
        op = self.graph.ops[step]
        need = op.workspace_bytes + sum(self._bytes(name) for name in op.writes if name not in self.there)
        over = self._live() + need - self.limit
        if over <= 0:
            return
        self._free_dead(locked)
        over = self._live() + need - self.limit
        for name in sorted(self.there - locked, key=self._next_read, reverse=True):
            if over <= 0:
                return
            if self._bytes(name) and self._can_be_evicted(name):
                self.there.discard(name)
                over -= self._bytes(name)

    def _next_read(self, name: str) -> int:
        return next((t for t in self.reads_at.get(name, ()) if t >= self.time), len(self.order))

    def _live(self) -> int:
        return self.fixed + sum(map(self._bytes, self.there))

    def _bytes(self, name: str) -> int:
        return 0 if name in self.fixed_names else self.graph.value[name].nbytes

    def _can_be_evicted(self, name: str) -> bool:
        there = {*self.there, *self.inputs} - {name}
        try:
            for _ in _recomputes(self.graph, there, name):
                pass
        except MissingValueError:
            return False
        return self.graph.value[name].kind is Kind.ACTIVATION

    def _free_dead(self, locked: Collection[str] = ()) -> None:
        """Drop values that no later op needs, not even for a recompute."""
        if self._live() + max(self.graph.ops[i].workspace_bytes for i in self.order) < self.limit // 2:
            return
        needed: set[str] = {*locked, *self.outputs}
        known: set[str] = set()
        for i in self.order[self.time :]:
            todo: list[str] = [*self.graph.ops[i].reads]
            while todo:
                name = todo.pop()
                if name in known:
                    continue
                known.add(name)
                if name in self.there or name in self.inputs:
                    needed.add(name)
                elif (producer := self.graph.producer.get(name)) is not None and producer < self.graph.num_forward_ops:
                    todo.extend(self.graph.ops[producer].reads)
        self.there &= needed
