"""What a graph checks when it is built."""

from __future__ import annotations

from dataclasses import replace

import pytest

from planner.errors import GraphError
from planner.graph.graph import freed_early
from planner.graph.schedule import keep_all
from planner.graph.simulate import simulate
from tests.support import graphs


def test_an_op_may_hold_less_than_it_reads_and_writes_by_what_it_alone_reads() -> None:
    graph = graphs.freeing(10, -10)
    assert freed_early(graph, graph.ops[1]) == {"h": 10}
    assert simulate(graph, keep_all(graph)).live_bytes == (15, 12)


@pytest.mark.parametrize(
    "make",
    [
        lambda: graphs.freeing(10, -11),  # `a` is an output, and lives on
        lambda: graphs.freeing(10, -1, recomputable=True),  # run twice, it would find nothing left
        lambda: replace(graphs.freeing(10, -1), backward_outputs=("g", "h")),
    ],
)
def test_it_frees_nothing_that_lives_on(make) -> None:
    with pytest.raises(GraphError, match="op b has cost 1 ns and workspace -"):
        make()
