"""Hypothesis strategies: graphs shaped like training steps, budgets between their floor and their plain peak, schedules.

A plain random DAG hardly ever needs a recompute. These forwards are chains with skips, and every
backward op reads gradients of its op's readers and forward values of its op, in reverse order. Some forward ops leave a
handle, as opaque modules do: their backward alone reads it, and frees it as it goes.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from hypothesis import strategies as st

from planner.graph.floor import floor
from planner.graph.graph import RESIDENT_KINDS, Graph, Kind, Op, Value
from planner.graph.schedule import Schedule, keep_all
from planner.graph.simulate import simulate
from planner.graph.source import Source

Draw = Callable[[st.SearchStrategy[Any]], Any]


_LARGE = (6, 8, 11, 4)
_SMALL = (1, 3, 0)


class _Step:
    """A training step as it is drawn, op by op."""

    def __init__(self, draw: Draw) -> None:
        self.draw = draw
        self.values: list[Value] = []
        self.forward: list[Op] = []
        self.backward: list[Op] = []

    def value(self, name: str, kind: Kind, sizes: tuple[int, ...]) -> str:
        self.values.append(Value(name, self.draw(st.sampled_from(sizes)), kind))
        return name

    def op(self, name: str, reads: list[str], writes: list[str], *, recomputable: bool = True) -> Op:
        cost, workspace = self.draw(st.sampled_from((1, 2, 3, 5, 9, 0))), self.draw(st.sampled_from((0, 0, 0, 0, 3)))
        source = Source(file=f"my {name}.py", line=1)
        return Op(name, (name,), tuple(dict.fromkeys(reads)), tuple(writes), cost, workspace, recomputable, source)


@st.composite
def training_graphs(draw: Draw, max_forward: int = 5, all_recomputable: bool = False, min_forward: int = 3) -> Graph:
    """A step of `min_forward` to `max_forward` forward ops and at most as many backward ops."""
    step = _Step(draw)
    count = draw(st.integers(min(min_forward, max_forward), max_forward))
    wrote: list[list[str]] = []
    readers: list[list[int]] = [[] for _ in range(count)]
    step.value("x", Kind.INPUT, (1, 3))
    for i in range(count):
        reads = ["x"] if i == 0 else [draw(st.sampled_from(wrote[i - 1]))]
        sources = [i - 1] if i else []
        if i >= 2 and draw(st.booleans()):
            j = draw(st.integers(0, i - 2))
            reads.append(draw(st.sampled_from(wrote[j])))
            sources.append(j)
        for j in sources:
            readers[j].append(i)
        if draw(st.booleans()):
            reads.append(step.value(f"w{i}", Kind.PARAM, (1, 2)))
        sizes = (_LARGE, _SMALL) if draw(st.sampled_from((False, False, True))) else (_LARGE,)
        wrote.append([step.value(f"a{i}_{k}", Kind.ACTIVATION, size) for k, size in enumerate(sizes)])
        again = all_recomputable or draw(st.sampled_from((True, True, True, True, False)))
        handle = [step.value(f"h{i}", Kind.ACTIVATION, _LARGE)] if draw(st.sampled_from((False, False, False, True))) else []
        step.forward.append(step.op(f"f{i}", reads, [*wrote[i], *handle], recomputable=again))
    outputs = [wrote[-1][0]]
    if draw(st.sampled_from((False, False, True))):
        outputs.append(draw(st.sampled_from(wrote[0])))
    tangents = [step.value(f"t{k}", Kind.TANGENT, (1, 2)) for k in range(len(outputs))]
    gradients = _draw_backward(step, wrote, readers, tangents)
    values = tuple(step.values)
    return Graph(
        ops=(*step.forward, *step.backward),
        values=values,
        inputs=tuple(value.name for value in values if value.kind in RESIDENT_KINDS),
        forward_outputs=tuple(dict.fromkeys(outputs)),
        backward_outputs=tuple(gradients),
        num_forward_ops=count,
    )


def _draw_backward(step: _Step, wrote: list[list[str]], readers: list[list[int]], tangents: list[str]) -> list[str]:
    """One backward op for each forward op, last first: upstream gradients and saved values in, gradients out."""
    draw, gradients = step.draw, []
    for i in reversed(range(len(wrote))):
        upstream = [f"g{j}" for j in readers[i]] or [tangents[0]]
        if i == 0:
            upstream += tangents[1:]
        saved = [name for name in (*step.forward[i].reads, *wrote[i]) if draw(st.sampled_from((True, True, False)))]
        writes = [step.value(f"g{i}", Kind.ACTIVATION, _SMALL)] if i else []
        if f"w{i}" in step.forward[i].reads or not writes:
            gradients.append(step.value(f"dw{i}", Kind.GRADIENT, (1, 2)))
            writes.append(gradients[-1])
        op = step.op(f"b{i}", [*saved, *upstream], writes)
        handle = next((value for value in step.values if value.name == f"h{i}"), None)
        if handle is not None:
            freed = draw(st.integers(0, handle.nbytes))
            op = replace(op, reads=(*op.reads, handle.name), workspace_bytes=-freed, recomputable=False)
        step.backward.append(op)
    return gradients


@st.composite
def budgets(draw: Draw, graph: Graph) -> int:
    """A budget between the proven floor and the plain step's peak, now and then just outside."""
    least, plain = floor(graph)[0], simulate(graph, keep_all(graph)).peak_bytes
    share = draw(st.sampled_from((0.3, 0.5, 0.1, 0.7, 0.0, 0.9, 1.0)))
    return max(1, round(least + share * (plain - least)) - draw(st.sampled_from((0, 0, 0, 0, 1))))


def scatter(graph: Graph, rng: random.Random, *, keep: float = 0.5, drop: float = 0.1, extra: float = 0.1) -> Schedule:
    """A valid schedule of any graph, by chance: forward ops run again in the backward, just before a need or for nothing.

    Args:
        graph: of any size.
        rng: the only source of chance.
        keep: probability that a forward value is kept for the backward.
        drop: probability, per backward op and value at hand, that it is thrown away again.
        extra: probability, per backward op, that some op and what it needs run again for nobody.
    """
    turn = graph.num_forward_ops
    again = [i for i in range(turn) if graph.ops[i].recomputable]
    loose = [name for i in again for name in graph.ops[i].writes if name not in graph.pinned]
    missing = {name for name in loose if rng.random() >= keep}
    steps = list(range(turn))
    for p in graph.backward_ops:
        missing.update(name for name in loose if rng.random() < drop)
        wanted = [name for name in graph.ops[p].reads if name in missing]
        lane: set[int] = set()
        if again and rng.random() < extra:
            lane.add(rng.choice(again))
            wanted += [name for i in lane for name in graph.ops[i].reads if name in missing]
        while wanted:
            i = graph.producer[wanted.pop()]
            if i not in lane:
                lane.add(i)
                wanted += [name for name in graph.ops[i].reads if name in missing]
        missing.difference_update(name for i in lane for name in graph.ops[i].writes)
        steps += [*sorted(lane), p]
    return Schedule(tuple(steps))


def shuffled(graph: Graph, rng: random.Random, reach: int) -> tuple[int, ...]:
    """Op indices in an order that is valid: backward ops by chance, each of the next `reach` that could run."""
    waiting = {name for p in graph.backward_ops for name in graph.ops[p].writes}
    todo, order = list(graph.backward_ops), list(range(graph.num_forward_ops))
    while todo:
        ready = [p for p in todo[:reach] if waiting.isdisjoint(graph.ops[p].reads)]
        order.append(rng.choice(ready))
        todo.remove(order[-1])
        waiting.difference_update(graph.ops[order[-1]].writes)
    return tuple(order)


def random_schedule(draw: Draw, graph: Graph) -> Schedule:
    """A random valid schedule of any graph, now and then with backward ops moved; shrinks towards the plain step."""
    chance = st.sampled_from((0.0, 0.05, 0.2, 0.5, 1.0))
    keep, drop, extra = 1.0 - draw(chance), 0.3 * draw(chance), draw(chance)
    rng = random.Random(draw(st.integers(0, 2**16)))
    order = shuffled(graph, rng, draw(st.sampled_from((1, 1, 3, 20))))
    moved = replace(graph, ops=tuple(graph.ops[i] for i in order))
    return Schedule(tuple(order[i] for i in scatter(moved, rng, keep=keep, drop=drop, extra=extra).steps))


@st.composite
def schedules(draw: Draw, graph: Graph) -> Schedule:
    """`random_schedule` as a strategy."""
    return random_schedule(draw, graph)
