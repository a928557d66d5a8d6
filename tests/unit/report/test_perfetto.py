"""The trace follows the rules of the Trace Event Format, and says what `simulate` says."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner import InputError, Plan
from planner.graph.modules import block_of
from planner.graph.schedule import keep_all
from planner.graph.simulate import simulate
from planner.graph.solution import Solution
from planner.graph.source import Source
from planner.report import perfetto
from tests.support import graphs
from tests.support.strategies import schedules, training_graphs
from tests.support.sweeps import plan_of

Event = dict[str, Any]


def events_of(plan: Plan) -> list[Event]:
    document = json.loads(perfetto.dumps(plan))
    assert document["displayTimeUnit"] in ("ms", "ns")  # what the format allows
    return document["traceEvents"]


def broken_rules(events: list[Event]) -> list[str]:
    """What the format forbids, and what viewers cannot show."""
    found, opened, last = [], defaultdict[tuple[int, int], list[float]](list), defaultdict[tuple[int, int], float](float)
    named: set[int] = set()
    for event in events:
        thread = event["pid"], event["tid"]
        found += [f"{field} is no integer" for field in ("pid", "tid") if type(event[field]) is not int]
        if event["ph"] == "M":
            named.update([event["pid"]] if event["name"] == "process_name" and event["args"]["name"] else [])
            continue
        if event["pid"] not in named:
            found.append("a process without a name")
        if not isinstance(event["ts"], (int, float)) or event["ts"] < last[thread]:
            found.append(f"ts goes back to {event['ts']}")
        last[thread] = event["ts"]
        if event["ph"] == "B":
            opened[thread].append(event["ts"])
            found += [] if event["name"] else ["a slice without a name"]
        elif event["ph"] == "E":
            found += [] if opened[thread] else ["an end without a beginning"]
            opened[thread] and opened[thread].pop()
        elif event["ph"] == "C":
            found += [f"{event['name']} is no number" for it in event["args"].values() if not isinstance(it, (int, float))]
        else:
            found.append(f"an event of type {event['ph']}")
    return found + ["a slice that does not end" for slices in opened.values() for _ in slices]


def slices(events: list[Event], process: int) -> list[tuple[tuple[tuple[str, str], ...], float, float, Event]]:
    """Every slice with the (name, category) of those around it and its own, its start and its end, in order of their starts."""
    found: list[Any] = []
    opened: list[int] = []
    for event in events:
        if event["pid"] == process and event["ph"] == "B":
            around = found[opened[-1]][0] if opened else ()
            opened.append(len(found))
            found.append([(*around, (event["name"], event["cat"])), event["ts"], None, event])
        elif event["pid"] == process and event["ph"] == "E":
            found[opened.pop()][2] = event["ts"]
    return [tuple(slice) for slice in found]


def in_modules() -> Plan:
    """A plan of a model whose submodule is called as a phase is."""
    graph = graphs.in_modules()
    ops = (replace(graph.ops[0], source=Source("recompute.0.forward", "model.py", 3)), *graph.ops[1:])
    return plan_of(replace(graph, ops=ops))


def test_the_rules_are_kept() -> None:
    assert broken_rules(events_of(in_modules())) == []


@settings(deadline=None, max_examples=30)
@given(st.data())
def test_the_rules_are_kept_for_random_schedules(data: st.DataObject) -> None:
    graph = data.draw(training_graphs(max_forward=6))
    schedule = data.draw(schedules(graph))
    plan = Plan(graph, simulate(graph, schedule).peak_bytes, 0, Solution("feasible", schedule, 0, 0.0, "drawn"))
    events = events_of(plan)
    assert broken_rules(events) == []
    ops = [slice for slice in slices(events, 2) if slice[0][-1][1] == "op"]
    assert [event["name"] for *_, event in ops] == [graph.ops[i].name for i in schedule.steps]


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        (lambda events: events.remove(next(event for event in events if event["ph"] == "E")), "does not end"),
        (lambda events: events.remove(next(event for event in events if event["ph"] == "B")), "without a beginning"),
        (lambda events: events.append(events[20] | {"ts": 0}), "goes back"),
        (lambda events: events.insert(0, events.pop()), "without a name"),
    ],
)
def test_a_broken_rule_is_seen(wrong: Any, complaint: str) -> None:
    events = events_of(in_modules())
    wrong(events)
    assert any(complaint in rule for rule in broken_rules(events))


def test_ops_lie_in_their_modules_and_these_in_their_phases() -> None:
    plan = in_modules()
    events = events_of(plan)
    for process, schedule in ((1, keep_all(plan.graph)), (2, plan.solution.schedule)):
        boundary, again = schedule.boundary(plan.graph), set(schedule.recomputes())
        found = [slice for slice in slices(events, process) if slice[0][-1][1] == "op"]
        simulated = simulate(plan.graph, schedule)
        for t, (path, start, end, event) in enumerate(found):
            op = plan.graph.ops[schedule.steps[t]]
            phases = [name for name, category in path if category == "phase"]
            modules = ".".join(name for name, category in path if category == "module")
            assert (event["name"], modules, event["args"]["step"]) == (op.name, op.source.module, t)
            assert phases == ["forward" if t < boundary else "backward", *(["recompute"] if t in again else [])]
            assert end - start == pytest.approx(op.cost_ns / 1000)  # microseconds
        assert all(one[2] == other[1] for one, other in pairwise(found))
        assert found[-1][2] == pytest.approx(simulated.time_ns / 1000)
    assert again


def test_ops_in_a_row_share_the_slice_of_their_module() -> None:
    plan = in_modules()
    opened = [path for path, *_, event in slices(events_of(plan), 1) if event["cat"] == "module"]
    blocks = [path for path in opened if path[0][0] == "forward" and block_of(path[-1][0]) == path[-1][0]]
    assert len(blocks) == len(set(blocks)) >= 4


def test_counters_are_what_is_simulated() -> None:
    plan = in_modules()
    events = events_of(plan)
    for process, schedule in ((1, keep_all(plan.graph)), (2, plan.solution.schedule)):
        counted = defaultdict[str, list[int]](list)
        for event in events:
            if event["pid"] == process and event["ph"] == "C":
                counted[event["name"]].append(sum(event["args"].values()))
        live = [*simulate(plan.graph, schedule).live_bytes, 0]
        assert counted[perfetto.TOTAL] == counted[perfetto.BY_KIND] == live
        assert set(counted[perfetto.BUDGET]) == {plan.budget_bytes}


def test_the_file(tmp_path: Path) -> None:
    plan = in_modules()
    plan.perfetto(tmp_path / "step.json")
    assert (tmp_path / "step.json").read_text() == perfetto.dumps(plan)
    with pytest.raises(InputError, match="cannot write"):
        plan.perfetto(tmp_path / "none" / "step.json")


def test_the_former_name_works_and_warns(tmp_path: Path) -> None:
    plan = in_modules()
    with pytest.warns(DeprecationWarning, match=r"Plan\.perfetto"):
        plan.trace(tmp_path / "step.json")
    assert (tmp_path / "step.json").read_text() == perfetto.dumps(plan)
