"""The moment between forward and backward, as an op at the end of the forward that takes no time.

What is alive while it runs is what a schedule saves. A cut there (`planner.solver.relaxation`) lets a program count what the
other forwards in flight hold; a workspace of w bytes there makes a budget b bound the saved bytes, by b - resident - w.
"""

from __future__ import annotations

from dataclasses import replace

from planner.graph.graph import Graph, Op
from planner.graph.schedule import Schedule


def with_forward_end(graph: Graph, workspace_bytes: int = 0) -> Graph:
    """The graph with such an op at the end of its forward."""
    end = graph.num_forward_ops
    op = Op("(end of the forward)", (), (), (), 0, workspace_bytes, recomputable=False)
    return replace(graph, ops=(*graph.ops[:end], op, *graph.ops[end:]), num_forward_ops=end + 1)


def without_forward_end(schedule: Schedule, graph: Graph) -> Schedule:
    """A schedule of `with_forward_end(graph)` as one of `graph`."""
    end = graph.num_forward_ops
    return Schedule(tuple(i - (i > end) for i in schedule.steps if i != end))
