"""What is left free of a budget, and the smallest budget that leaves enough."""

from __future__ import annotations

from collections.abc import Callable

from planner.graph.graph import Graph
from planner.graph.schedule import keep_all
from planner.graph.simulate import simulate
from planner.units import MOST_BYTES


def allocator_margin(graph: Graph, budget_bytes: int) -> int:
    """Part of the budget left free for what no graph shows: allocator rounding, host-side tensors, the engine.

    A thousandth of what the plain step allocates, at most a hundredth of the budget; none when the plain
    step itself fits, so that a full budget never forces a recompute.
    """
    return margin_of(graph)(budget_bytes)


def margin_of(graph: Graph) -> Callable[[int], int]:
    """The margin by budget; what is left of a budget never falls as it grows."""
    plain = simulate(graph, keep_all(graph)).peak_bytes
    resident = sum(graph.value[name].nbytes for name in graph.inputs)
    return lambda budget_bytes: 0 if plain <= budget_bytes else min((plain - resident) // 1000, budget_bytes // 100)


def smallest_budget(needed_bytes: int, margin: Callable[[int], int]) -> int:
    """The smallest budget that leaves `needed_bytes` when its margin is taken off.

    Args:
        margin: bytes of a budget that are left free; `budget - margin(budget)` never falls as the budget grows.
    """
    low, high = needed_bytes - 1, needed_bytes
    while high - margin(high) < needed_bytes and high < MOST_BYTES:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if middle - margin(middle) < needed_bytes else (low, middle)
    return high
