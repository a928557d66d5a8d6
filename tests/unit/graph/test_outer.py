"""The step around units: contracted from the whole graph, or from bytes that were measured."""

import re
from dataclasses import replace

import pytest

from planner.errors import GraphError
from planner.graph.compose import compose
from planner.graph.outer import MeasuredSection, UnitCall, contracted, from_measured
from planner.graph.schedule import Schedule, keep_all
from planner.graph.simulate import simulate
from planner.graph.source import Source
from planner.graph.unit_point import point
from planner.solver.baselines import recompute_all
from tests.support.unit_graphs import block, whole

NAMES = [f"blocks.{k}" for k in range(3)]
BLOCKS = dict.fromkeys(NAMES, block())


def composed(graph=None):
    return compose(contracted(graph or whole(3), BLOCKS), dict.fromkeys(NAMES, block()))


def test_each_unit_becomes_two_ops_around_what_others_see():
    outer = contracted(whole(3), BLOCKS)
    ops = {op.name.partition(" ")[0]: op for op in outer.graph.ops[: outer.graph.num_forward_ops]}
    assert list(ops) == ["embed", *NAMES, "head"]
    assert ops["blocks.1"].reads == ("blocks.0a3", "blocks.1w") and ops["blocks.1"].writes == ("blocks.1a3",)
    back = outer.graph.ops[outer.calls[UnitCall("blocks.1")][1]]
    assert {"blocks.2dx", "blocks.0a3", "blocks.1a3"} <= set(back.reads) and set(back.writes) == {"blocks.1dx", "blocks.1dw"}


def test_the_plain_composed_step_is_the_plain_whole_step():
    graph, made = whole(3), composed()
    one, other = simulate(graph, keep_all(graph)), simulate(made.graph, keep_all(made.graph))
    assert one.time_ns == other.time_ns and one.peak_bytes == other.peak_bytes
    assert simulate(made.graph, made.schedule({})) == other


def test_recompute_in_a_unit_is_that_in_the_whole_graph():
    """The same recomputes, written by hand on the whole graph, take the same bytes and time."""
    graph, made = whole(3), composed()
    at = {op.name: i for i, op in enumerate(graph.ops)}
    steps = []
    for i, op in enumerate(graph.ops):
        name = op.name.rpartition("b")[0]
        if i >= graph.num_forward_ops and op.name.endswith("b3"):
            steps += [at[f"{name}f{k}"] for k in range(3)]  # of the last one, the result is held
        steps.append(i)
    by_hand = simulate(graph, Schedule(tuple(steps)))
    own = block()
    schedule = Schedule((0, 1, 2, 3, 0, 1, 2, *own.backward_ops))
    found = simulate(made.graph, made.schedule(dict.fromkeys(NAMES, schedule)))
    assert found.time_ns == by_hand.time_ns and found.peak_bytes == by_hand.peak_bytes
    assert found.peak_bytes < simulate(graph, keep_all(graph)).peak_bytes


def test_an_op_of_another_module_within_a_unit_is_named():
    graph = whole(2)
    ops = list(graph.ops)
    ops[2] = replace(ops[2], source=Source(module="spy"))
    with pytest.raises(GraphError, match=re.escape("in the forward of blocks.0, blocks.0f1 (spy) runs, which is not its own")):
        contracted(replace(graph, ops=tuple(ops)), dict.fromkeys(["blocks.0", "blocks.1"], block()))
    with pytest.raises(GraphError, match=r"blocks\.7 has no forward or no backward"):
        contracted(graph, {"blocks.7": block()})


def measured_sections(graph, schedules):
    """What a measured step would find: sections of a simulated one."""
    made = compose(contracted(graph, BLOCKS), dict.fromkeys(NAMES, block()))
    schedule = made.schedule(schedules)
    live = simulate(made.graph, schedule).live_bytes
    resident = made.graph.resident_bytes
    bounds = {at[2 * k]: (call, k == 0, at[2 * k + 1]) for call, at in made.bounds.items() for k in range(2)}
    sections, end = [], None
    for step, i in enumerate(schedule.steps):
        if i in bounds:
            call, is_forward, end = bounds[i]
            sections.append(MeasuredSection(call, is_forward, live[step] - resident, live[step] - resident))
        elif end is None:
            peak = live[step] - resident
            if sections and sections[-1].call is None:
                peak = max(peak, sections.pop().peak_bytes)
            sections.append(MeasuredSection(None, False, 0, peak))
        end = None if i == end else end
    return resident, sections


def test_measured_bytes_around_units_give_the_peak_of_any_other_choice():
    own = block()
    low = recompute_all(own)
    resident, sections = measured_sections(whole(3), dict.fromkeys(NAMES, low))
    outer = from_measured(resident, sections, dict.fromkeys(NAMES, point(own, low).saved_bytes), [*map(UnitCall, NAMES)])
    held = replace(contracted(whole(3), BLOCKS), is_measured=True)  # nobody knows what is freed in units
    made, exact = (compose(around, dict.fromkeys(NAMES, own)) for around in (outer, held))
    for schedules in ({}, dict.fromkeys(NAMES, low), {"blocks.1": low}, {"blocks.0": low, "blocks.2": low}):
        peaks = [simulate(each.graph, each.schedule(schedules)).peak_bytes for each in (made, exact)]
        assert peaks[0] == peaks[1]


def test_a_unit_that_runs_twice_is_an_error():
    with pytest.raises(GraphError, match=r"a ran forward and backward 1 times"):
        from_measured(1, [MeasuredSection(UnitCall("a"), True, 0, 0)], {"a": 0}, [UnitCall("a")])
