"""Reference schedules: points to compare a sweep with."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from planner.graph.graph import Graph
from planner.graph.modules import block_of, module_of
from planner.graph.schedule import Schedule
from planner.graph.simulate import simulate
from planner.solver.baselines import per_block, segments, sqrt_segments

EVERY = "segments of equal time"
"""The family of `count` segments: "every k layers"."""
_COUNTS = (2, 4, 8, 16, 32, 64)


@dataclass(frozen=True, slots=True)
class Reference:
    """A schedule that needs no solver.

    Attributes:
        family: what it is an example of.
        name: which example.
        peak_bytes, time_ns: simulated.
        num_segments: of the family EVERY; else 0.
    """

    family: str
    name: str
    peak_bytes: int
    time_ns: int
    num_segments: int = 0


def references(graph: Graph) -> tuple[Reference, ...]:
    """Per-block, every-k and sqrt(n) checkpointing, and every module of a numbered list, as transformers does."""
    found = []
    for family, name, schedule, num_segments in _schedules(graph):
        timeline = simulate(graph, schedule)
        found.append(Reference(family, name, timeline.peak_bytes, timeline.time_ns, num_segments))
    return tuple(found)


def _schedules(graph: Graph) -> Iterator[tuple[str, str, Schedule, int]]:
    if not graph.num_forward_ops:
        return
    yield "per block", "per block (narrowest places)", per_block(graph), 0
    yield "sqrt(n)", "sqrt(n) segments", sqrt_segments(graph), 0
    for count in _COUNTS:
        if count < graph.num_forward_ops:
            yield EVERY, f"{count} segments", segments(graph, count), count
    whole = module_checkpoints(graph)
    if whole is not None:
        yield "whole modules", "whole modules (as in transformers)", whole, 0


def module_checkpoints(graph: Graph) -> Schedule | None:
    """Every module of a numbered list ("h.0", "h.1", ...) in `torch.utils.checkpoint`; None where there is no such module.

    This is what `gradient_checkpointing_enable()` of transformers does. Between the modules everything is kept. When the
    backward first needs something from inside a module, the module runs again as a whole, up to the last op that is needed.
    """
    forward_end = graph.num_forward_ops
    block = _blocks(graph)
    if not any(block):
        return None
    kept = set(graph.pinned)
    for i, op in enumerate(graph.ops[:forward_end]):
        if not block[i] or not op.recomputable:
            kept.update(op.writes)
        kept.update(name for name in op.reads if name not in graph.pinned and block[graph.producer[name]] != block[i])
    needed = {name for op in graph.ops[forward_end:] for name in op.reads} - kept
    recompute_sets: defaultdict[int, list[int]] = defaultdict(list)
    last: dict[int, int] = {}
    for i, op in enumerate(graph.ops[:forward_end]):
        if block[i] and op.recomputable:
            recompute_sets[block[i]].append(i)
            if needed.intersection(op.writes):
                last[block[i]] = i
    steps, ran = list(range(forward_end)), set[int]()
    for p in graph.backward_ops:
        wanted = {
            block[graph.producer[name]] for name in graph.ops[p].reads if name in needed and graph.producer[name] < forward_end
        }
        for own in sorted(wanted - ran):
            steps += [i for i in recompute_sets[own] if i <= last[own]]
        ran |= wanted
        steps.append(p)
    return Schedule(tuple(steps))


def _blocks(graph: Graph) -> list[int]:
    """Per forward op, the number of its run of ops in one numbered module, from 1; 0 outside of any.

    A module that is called twice makes two runs. An op without a module belongs to the run before it.
    """
    numbers: list[int] = []
    before, runs = "", 0
    for op in graph.ops[: graph.num_forward_ops]:
        own = block_of(module_of(op)) if op.source else before
        runs += own != before and own != ""
        numbers.append(runs if own else 0)
        before = own
    return numbers
