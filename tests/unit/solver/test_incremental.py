"""A draft's live bytes are those of a new simulation, deletion after deletion."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import assume, event, given, settings
from hypothesis import strategies as st

from planner.graph.schedule import Schedule
from planner.graph.simulate import Simulator, simulate
from planner.solver.incremental import IncrementalSchedule
from tests.support.strategies import random_schedule, training_graphs


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_deleting_recomputes_keeps_the_count_of_a_new_simulation(data: st.DataObject) -> None:
    graph = replace(data.draw(training_graphs(max_forward=8)), in_flight=data.draw(st.sampled_from((1, 1, 3))))
    draft = IncrementalSchedule(Simulator(graph), random_schedule(data.draw, graph).steps)
    assume(draft.again())
    deleted = 0
    while draft.again():
        t = data.draw(st.sampled_from(draft.again()))
        before = draft.done()
        # the first without a budget, so that every example deletes
        budget = data.draw(st.sampled_from((None, int(draft.live_bytes[draft.kept].max())))) if deleted else None
        if not draft.delete(t, budget):
            assert draft.done() == before
            break
        deleted += 1
        expected = simulate(graph, Schedule(tuple(draft.done())))
        assert draft.live_bytes[draft.kept].tolist() == list(expected.live_bytes)
        assert budget is None or expected.peak_bytes <= budget
    event(f"deleted: {min(deleted, 5)}")
    assert deleted
