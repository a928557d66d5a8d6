"""The largest batch: it fits, the one above does not, and the table says what is faster."""

import copy
import gc
import json
import math
import re
import weakref
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from planner import BudgetError, InfeasibleBudgetError, InputError, NoScheduleFoundError, Plan, max_batch, plan
from planner.batch import extrapolated, search
from planner.cli import main
from planner.graph.schedule import keep_all
from planner.graph.simulate import simulate
from planner.results.max_batch import MaxBatch, MeasuredBatch, Tried
from planner.solver import work as work_module
from planner.solver.solve import solve
from tests.support import graphs
from tests.support.models import rows, tanh_blocks
from tests.support.text import unwrapped

GRAPH = graphs.blocks(4)
NO_RECOMPUTE = Plan(GRAPH, 10**9, 0, solve(GRAPH, 10**9))
RECOMPUTE = Plan(GRAPH, 10**9, 0, solve(GRAPH, NO_RECOMPUTE.peak_bytes * 3 // 4))


def plain_bytes(model, batch):
    return plan(model, 1.0, *rows(batch), costs="estimate", progress=False).plan.plain.peak_bytes


def fits(model, batch, budget):
    try:
        return plan(model, budget, *rows(batch), costs="estimate", progress=False, effort=1.0).plan.peak_bytes <= budget
    except (InfeasibleBudgetError, NoScheduleFoundError):
        return False


def test_the_batch_found_is_the_largest_that_plan_accepts():
    model = tanh_blocks()
    budget = plain_bytes(model, 6)
    before, rng = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    found = max_batch(rows, model, budget, costs="estimate", progress=False, effort=1.0)
    assert torch.equal(torch.get_rng_state(), rng) and model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    batch, made = found
    assert batch > 6 == found.largest_plain.batch and found.largest.recomputes
    assert made.peak_bytes <= budget == made.budget_bytes
    assert [fits(model, b, budget) for b in range(1, batch + 3)] == [True] * batch + [False] * 2
    by_batch = {tried.batch: tried for tried in found.tried}
    assert by_batch[6].plan and not by_batch[6].recomputes and by_batch[7].recomputes and by_batch[batch + 1].error
    assert list(by_batch) == sorted(by_batch)


def test_steps_are_run_and_timed_where_the_device_is_here():
    model = tanh_blocks()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    found = max_batch(rows, model, plain_bytes(model, 6), costs="estimate", progress=False, effort=1.0)
    seen = found.verify(2, rounds=2)
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in model.parameters())
    measured = [tried for tried in seen.tried if tried.measured]
    assert [tried.batch for tried in measured] == [found.largest_plain.batch, found.batch]
    for tried in measured:
        assert tried.measured.step_s > 0 and tried.measured.peak_bytes <= found.budget_bytes
        assert tried.measured.peak_bytes == pytest.approx(tried.plan.peak_bytes, rel=0.01)
        assert seen.rates[tried.batch].samples_per_s == tried.batch / tried.measured.step_s
    assert "measured samples/s" in str(seen) and seen.verdict.endswith("(measured)")
    assert not any(tried.measured for tried in found.tried)
    with pytest.raises(InputError, match="at least 1"):
        found.verify(0)


def test_inputs_of_one_batch_are_held_while_steps_are_timed():
    held, timing = [], []

    def make_inputs(batch):
        assert not timing or not [x for x in held if x() is not None], "another batch's inputs are alive"
        args, kwargs = rows(batch)
        held.append(weakref.ref(args[0]))
        return args, kwargs

    model = tanh_blocks()
    found = max_batch(make_inputs, model, plain_bytes(model, 4), costs="estimate", progress=False, effort=0.3)
    gc.collect()
    held.clear()
    timing.append(True)
    assert sum(each.measured is not None for each in found.verify(2, rounds=1).tried) == 2 and len(held) >= 2


def test_the_refusal_of_the_smallest_batch_is_raised_as_it_is():
    refused = NoScheduleFoundError("none found")
    with pytest.raises(NoScheduleFoundError) as caught:
        search(lambda batch: Tried(batch, 1, 2, None, refused), lambda batch: True, lambda known: known, 1)
    assert caught.value is refused and refused.args == ("none found",)


def test_a_prediction_is_asked_for_once_with_a_batch_that_has_a_plan():
    asked = []
    found = search(attempts(5, 1, 2, 100, []), lambda batch: batch <= 20, lambda known: asked.append(known) or 50, 100)
    assert asked == [20] and max(tried.batch for tried in found if tried.plan) == 50


def test_a_device_that_is_not_here_with_its_optimizer():
    with torch.device("meta"):
        model = nn.Sequential(*[nn.Sequential(nn.Linear(256, 256), nn.Tanh()) for _ in range(4)]).to(torch.bfloat16)
    make = lambda batch: ((torch.empty(batch, 512, 256, dtype=torch.bfloat16, device="meta"),), {})
    found = max_batch(make, model, "76MiB", device="H100", optimizer="adamw", progress=False, effort=0.5)
    assert found.batch > 4 and {"(libraries)", "(optimizer state)"} <= found.plan.graph.value.keys()
    assert found.verdict.endswith("(estimated)") and "estimated for H100-80GB" in unwrapped(found)
    with pytest.raises(InputError, match="not here"):
        found.verify()


def test_one_sample_that_does_not_fit_is_an_error_with_its_floor():
    with pytest.raises(InfeasibleBudgetError, match="one sample does not fit: Raise the budget to") as caught:
        max_batch(rows, tanh_blocks(), "20KiB", costs="estimate", progress=False)
    assert caught.value.floor_bytes > 20 * 2**10
    assert "reduce the batch" not in str(caught.value) and caught.value.advice in str(caught.value)


@pytest.mark.parametrize(
    ("make", "budget", "kind", "message"),
    [
        (rows, 0.5, BudgetError, "fraction of which batch"),
        (rows, "much", BudgetError, "much"),
        (lambda batch: rows(3), "1GiB", InputError, "must make inputs of `batch` samples"),
        (lambda batch: rows(batch)[0], "1GiB", InputError, r"must return \(args, kwargs\)"),
    ],
)
def test_what_makes_no_sense_is_refused(make, budget, kind, message):
    with pytest.raises(kind, match=message):
        max_batch(make, tanh_blocks(), budget, costs="estimate", progress=False)


def attempts(plain_each, floor_each, lowest_each, budget, seen):
    """A world in which bytes grow by so many a sample."""

    def attempt(batch):
        assert batch > 0 and batch not in seen, "tried twice"
        seen.append(batch)
        error = None
        if floor_each * batch > budget:
            error = InfeasibleBudgetError("too large", budget_bytes=budget, floor_bytes=floor_each * batch)
        elif lowest_each * batch > budget:
            error = NoScheduleFoundError("none found")
        made = None if error else NO_RECOMPUTE if plain_each * batch <= budget else RECOMPUTE
        return Tried(batch, floor_each * batch, plain_each * batch, made, error)

    return attempt


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 300), st.integers(0, 300), st.integers(0, 300), st.integers(1, 10**5), st.sampled_from([0.5, 1, 2, 100]))
def test_search_finds_the_boundary_in_few_attempts(floor_each, more, still_more, budget, foresight):
    lowest_each, plain_each = floor_each + more, floor_each + more + still_more
    seen = []
    attempt = attempts(plain_each, floor_each, lowest_each, budget, seen)
    plain_ahead = lambda batch: batch * plain_each <= foresight * budget
    predicted = lambda known: max(known, int(foresight * budget // lowest_each))
    ahead = plain_ahead, predicted
    if lowest_each > budget:
        with pytest.raises((InfeasibleBudgetError, NoScheduleFoundError), match=r"^(too large|none found)$"):
            search(attempt, *ahead, budget)
        return
    found = MaxBatch(budget, search(attempt, *ahead, budget))
    assert found.batch == budget // lowest_each
    above = floor_each * (found.batch + 1)
    assert found.proof.startswith(
        f"batch {found.batch + 1} cannot fit" if above > budget else f"for batch {found.batch + 1} no"
    )
    plain = budget // plain_each
    assert (found.largest_plain.batch if found.largest_plain else 0) == plain
    assert len(seen) <= (8 if foresight == 1 else 9 + 4 * math.log2(foresight * budget / lowest_each + 1))


def test_a_larger_batch_is_foreseen_from_two():
    model = tanh_blocks()
    one, two, nine = (plan(model, 1.0, *rows(b), costs="estimate", progress=False).plan.graph for b in (1, 2, 9))
    ahead = extrapolated(one, two, 8)
    assert ahead.values == tuple(replace(value, form="") for value in nine.values)
    assert simulate(ahead, keep_all(ahead)).time_ns == pytest.approx(simulate(nine, keep_all(nine)).time_ns, rel=0.02)
    assert extrapolated(one, plan(tanh_blocks(5), 1.0, *rows(2), costs="estimate", progress=False).plan.graph, 8) is None


def test_what_an_op_frees_as_it_goes_grows_with_the_batch():
    one, two = graphs.freeing(10, -8), graphs.freeing(20, -16)
    assert extrapolated(one, two, 3) == graphs.freeing(40, -32)
    assert extrapolated(one, graphs.freeing(11, -11), 30) == graphs.freeing(40, -40)  # it frees no more than there is


def curve(*figures):
    """MaxBatch of (batch, recomputes, seconds or None): the last one does not fit."""
    tried = [Tried(b, 1, 1, RECOMPUTE if again else NO_RECOMPUTE, None, MeasuredBatch(s, 1)) for b, again, s in figures]
    error = NoScheduleFoundError("none found")
    return MaxBatch(10, (*tried, Tried(figures[-1][0] + 1, 1, 1, None, error)))


@pytest.mark.parametrize(
    ("found", "fastest", "verdict"),
    [
        (curve((1, False, 1.0), (4, False, 2.0), (8, True, 3.0)), 8, r"recomputing pays: batch 8 .* \+33.3% on batch 4"),
        (
            curve((1, False, 1.0), (4, False, 2.0), (8, True, 3.98)),
            8,
            r"changes little: batch 8 .* \+0.5% on batch 4.*within the noise",
        ),
        (curve((1, False, 1.0), (4, False, 2.0), (8, True, 5.0)), 4, r"does not pay: batch 8 .*, -20.0% on batch 4"),
        (curve((1, False, 1.0), (4, False, 2.0)), 4, "the largest batch needs no recomputing: batch 4"),
        (curve((1, True, 1.0), (2, True, 1.5)), 2, "every batch needs recomputing; the fastest is batch 2"),
    ],
)
def test_the_verdict_says_which_is_faster(found, fastest, verdict):
    assert RECOMPUTE.solution.schedule.recomputes() and NO_RECOMPUTE.solution.schedule == keep_all(GRAPH)
    assert found.fastest.batch == fastest
    assert re.search(verdict, found.verdict)
    assert found.verdict in unwrapped(found) and "that none exists was not proven" in unwrapped(found)


def test_a_gain_within_the_noise_is_said_to_be_so():
    """It once said "+65 %" beside .78 and .75 samples a second."""
    quiet, loud = (curve((4, False, 4 / 0.75), (8, True, 8 / 0.83)) for _ in range(2))
    loud = replace(loud, tried=tuple(noisy(tried, 0.2) for tried in loud.tried))
    assert "recomputing pays" in quiet.verdict and "+10.7%" in quiet.verdict
    assert "changes little" in loud.verdict and "within the noise" in loud.verdict and "0.83 samples/s ±10%" in loud.verdict


def noisy(tried, spread):
    seen = tried.measured
    return tried if seen is None else replace(tried, measured=replace(seen, spread_s=spread * seen.step_s))


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_the_verdict_says_nothing_that_the_table_does_not(data):
    """Whatever was measured and predicted: the figures of the verdict are those of one column of the table."""
    seconds = st.floats(0.01, 100)
    found = curve((1, False, 1.0), (4, False, data.draw(seconds)), (8, True, data.draw(seconds)), (9, True, data.draw(seconds)))
    run = data.draw(st.sets(st.sampled_from([1, 4, 8, 9])))
    found = replace(found, tried=tuple(t if t.batch in run else replace(t, measured=None) for t in found.tried))
    rates = found.rates
    assert all(rate == (t.ran if found.is_measured else t.predicted) for t in found.fitting if (rate := rates.get(t.batch)))
    assert found.is_measured == ({4, 9} <= run)
    said = re.findall(r"batch (\d+) at ([\d.,]+) samples/s", found.verdict)
    text = unwrapped(found)
    for batch, rate in said:
        assert str(rates[int(batch)]).startswith(rate) and text.count(rate) >= 2
    (gain,) = re.findall(r"([+-][\d.]+)% on", found.verdict)
    assert float(gain) == pytest.approx(100 * rates[int(said[0][0])].gain_on(rates[4]), abs=0.051)
    assert found.verdict.startswith("recomputing pays") <= (float(gain) > 0)


def test_measured_against_prediction_is_named():
    found = curve((4, False, 4.0), (8, True, 8.0))
    predicted = found.largest.predicted.gain_on(found.largest_plain.predicted)
    other = curve((4, False, 4.0), (8, True, 8.0 / (1 + predicted)))
    assert not other.doubt
    wrong = curve((4, False, 4.0), (8, True, 8.0 / (1.7 + predicted)))
    assert "idle machine" in wrong.doubt and wrong.doubt in unwrapped(wrong)


def test_it_prints_as_it_goes_and_says_first_what_it_may_take(capsys):
    max_batch(rows, tanh_blocks(), "70KiB", costs="estimate", effort=1.0)
    lines = capsys.readouterr().err.splitlines()
    assert "at most 3 units of work on all of them" in lines[0]
    tried = [re.match(r"max_batch: batch (\d+), plain peak", line) for line in lines[1:]]
    assert len(tried) >= 4 and all(tried)


def test_the_work_of_the_whole_search_is_bounded(monkeypatch):
    calls = []
    begin = work_module.begin
    monkeypatch.setattr("planner.solver.solve.begin", lambda limits: calls.append(begin(limits)) or calls[-1])
    max_batch(rows, tanh_blocks(), "70KiB", costs="estimate", effort=0.5, progress=False)
    assert len(calls) > 5 and max(work.until for work in calls) <= 0.5
    slices = 0.05 * len(calls)  # what a call has begun, it ends
    assert 0 < sum(work.meter.spent for work in calls) <= 1.5 + slices


def test_command_line_prints_a_table_or_json(tmp_path, capsys):
    (tmp_path / "rows_model.py").write_text(
        "import torch\nfrom tests.support.models import rows, tanh_blocks\n\n\n"
        "def build(batch=2):\n    return tanh_blocks(), *rows(batch)\n"
    )
    target = f"{tmp_path / 'rows_model.py'}:build"
    options = ["--costs", "estimate", "--budget", "70KiB", "--effort", "1"]
    assert main(["max-batch", target, *options, "--save", str(tmp_path / "plan.json")]) == 0
    text = capsys.readouterr().out
    assert "<- largest" in text and "throughput" in text
    assert main(["max-batch", target, *options, "--json", "--verify", "2"]) == 0
    figures = json.loads(capsys.readouterr().out)
    by_batch = {tried["batch"]: tried for tried in figures["tried"]}
    assert by_batch[figures["batch"]]["peak_bytes"] <= figures["budget_bytes"] == 70 * 2**10
    assert by_batch[figures["batch"]]["measured"]["step_s"] > 0 and by_batch[figures["batch"] + 1]["error"]
    assert Plan.load(tmp_path / "plan.json").peak_bytes == by_batch[figures["batch"]]["peak_bytes"]
    assert main(["max-batch", target, *options, "--device", "H100", "--verify"]) == 1
    assert "not here" in capsys.readouterr().err
    assert main(["plan", target, "--budget", "0.9", "--device", "H900"]) == 1
    assert "A100-80GB" in capsys.readouterr().err
