"""Reference schedules: keep everything, recompute segments, keep the expensive ops, drop the largest first."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from planner.graph.graph import Graph
from planner.graph.schedule import Schedule, keep_all
from planner.graph.simulate import Simulator
from planner.solver.lazy import lazy_schedule
from planner.solver.lifetimes import lifetimes


def all_baselines(graph: Graph, budget_bytes: int) -> Iterator[tuple[str, Schedule]]:
    """Every baseline by name."""
    yield "greedy", greedy(graph, budget_bytes)
    yield from fixed_baselines(graph)


def fixed_baselines(graph: Graph) -> Iterator[tuple[str, Schedule]]:
    """Those that do not look at a budget."""
    yield "keep all", keep_all(graph)
    yield "selective", selective(graph)
    yield "per block", per_block(graph)
    yield "sqrt segments", sqrt_segments(graph)
    for count in (2, 4, 8, 16, 32, 64):
        if count < graph.num_forward_ops:
            yield f"{count} segments", segments(graph, count)
    yield "recompute all", recompute_all(graph)


def crossing_bytes(graph: Graph) -> NDArray[np.int64]:
    """Per forward op, the bytes written by it or before it that later forward ops read (outputs left aside)."""
    forward_end, pinned = graph.num_forward_ops, graph.pinned
    change = np.zeros(forward_end + 1, dtype=np.int64)
    last = {name: i for i, op in enumerate(graph.ops[:forward_end]) for name in op.reads if name not in pinned}
    for name, i in last.items():
        change[graph.producer[name]] += graph.value[name].nbytes
        change[i] -= graph.value[name].nbytes
    crossing: NDArray[np.int64] = np.cumsum(change[:forward_end])
    return crossing


def _crossing(graph: Graph, cuts: set[int]) -> set[str]:
    """Values that cross one of the cuts, a cut lying right after an op."""
    forward_end = graph.num_forward_ops
    last = {name: i for i, op in enumerate(graph.ops[:forward_end]) for name in op.reads if name in graph.producer}
    return {name for name, i in last.items() if any(graph.producer[name] <= cut < i for cut in cuts)}


def segments(graph: Graph, count: int) -> Schedule:
    """Keep what crosses `count - 1` cuts, each the narrowest place in an equal share of the forward's time."""
    costs = np.cumsum([op.cost_ns + 1 for op in graph.ops[: graph.num_forward_ops]])
    crossing = crossing_bytes(graph)
    cuts: set[int] = set()
    for share in range(1, count):
        low, high = (np.searchsorted(costs, costs[-1] * (share + half) / count) for half in (-0.5, 0.5))
        if low < high:
            cuts.add(int(low + crossing[low:high].argmin()))
    return lazy_schedule(graph, _crossing(graph, cuts))


def sqrt_segments(graph: Graph) -> Schedule:
    """About the square root of the number of forward ops segments (Chen et al. 2016)."""
    return segments(graph, max(1, math.isqrt(graph.num_forward_ops)))


def per_block(graph: Graph) -> Schedule:
    """Keep what crosses the narrowest places of the forward: the input of every block."""
    crossing = crossing_bytes(graph)
    inside = crossing[crossing > 0]
    if not inside.size:
        return keep_all(graph)
    narrow = crossing <= np.quantile(inside, 0.1)
    # a run of equally narrow places is one cut
    starts = np.flatnonzero(narrow & ~np.concatenate(([False], narrow[:-1])))
    return lazy_schedule(graph, _crossing(graph, {int(i) for i in starts}))


def selective(graph: Graph) -> Schedule:
    """Keep the outputs of the expensive ops, recompute the cheap ones: cheap is below the forward's mean time a byte."""
    life = lifetimes(graph)
    costs = np.array([graph.ops[i].cost_ns for i in life.producer.tolist()], dtype=np.float64)
    rate = costs / np.maximum(1, life.nbytes)
    mean = costs.sum() / max(1, life.nbytes.sum())
    return lazy_schedule(graph, {name for name, own in zip(life.names, rate, strict=True) if own > mean})


def recompute_all(graph: Graph) -> Schedule:
    """Keep nothing that can be recomputed."""
    return lazy_schedule(graph, ())


def greedy(graph: Graph, budget_bytes: int) -> Schedule:
    """Drop values in order of bytes a nanosecond of recompute, as few as fit the budget (found by bisection)."""
    life = lifetimes(graph)
    costs = np.array([graph.ops[i].cost_ns for i in life.producer.tolist()], dtype=np.float64)
    order = [life.names[d] for d in np.argsort(-life.nbytes / np.maximum(1.0, costs), kind="stable")]
    low, high, simulator = 0, len(order), Simulator(graph)
    while low < high:
        middle = (low + high) // 2
        if int(simulator.run(lazy_schedule(graph, order[middle:]).steps).live_bytes.max(initial=0)) <= budget_bytes:
            high = middle
        else:
            low = middle + 1
    return lazy_schedule(graph, order[low:])
