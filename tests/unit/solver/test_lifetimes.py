"""What is decided about, what is held: checked against the simulator."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from planner.graph.simulate import simulate
from planner.solver.lazy import lazy_schedule
from planner.solver.lifetimes import lifetimes
from tests.support.strategies import training_graphs


@settings(deadline=None, max_examples=100)
@given(st.data())
def test_the_plain_row_of_a_kept_set_is_what_the_simulator_sees(data: st.DataObject) -> None:
    """Keep everything droppable: base, what is finished and still wanted, and what the op reads, make up the live bytes."""
    graph = data.draw(training_graphs(max_forward=7))
    life = lifetimes(graph)
    lasting = {name for name, last in zip(life.names, life.last_use, strict=True) if last >= 0}
    live = simulate(graph, lazy_schedule(graph, lasting)).live_bytes
    for t, base in enumerate(life.base.tolist()):
        held = [
            d for d, name in enumerate(life.names) if name in lasting and life.last_forward[d] < t and life.last_use[d] >= t
        ]
        assert base + sum(int(life.nbytes[d]) for d in held) == live[t]
