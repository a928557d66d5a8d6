"""Plan, sweep, graph and cost-cache files that anybody may have written: PlanFileError, a valid plan or (cache) nothing."""

import contextlib
import functools
import gzip
import json
import random
from dataclasses import replace

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from planner.cli import main
from planner.errors import PlanFileError
from planner.graph import fields
from planner.graph.provenance import Provenance
from planner.graph.schedule import keep_all
from planner.graph.simulate import simulate
from planner.graph.solution import Solution
from planner.graph.source import Source
from planner.limits import Limits
from planner.profiler.cache import KernelCache
from planner.profiler.profile import KernelCost
from planner.results import plan_file, schema1
from planner.results.plan import Plan
from planner.results.sweep import Sweep
from tests.support import graphs
from tests.support.paths import FILES
from tests.support.sweeps import sweep_of

HUGE = 10**30
OLD_PLAN = FILES / "plan-schema-1.json"


@functools.cache
def plan_text():
    graph = graphs.skip()
    ops = (
        replace(op, source=Source(f"body.{n}", "model.py", n), kernel="aten.mul", arguments="%0:float32[2], 3")
        for n, op in enumerate(graph.ops)
    )
    graph = replace(graph, ops=tuple(ops))
    provenance = Provenance("measured", "cpu", num_kernels=9, num_estimated=1, opaque=("a", "b"), torch="2")
    return plan_file.dumps(
        graph, Plan(graph, 40, 2, Solution("optimal", keep_all(graph), 5, 0.25, "closure", 0.5, "time"), provenance)
    )


@functools.cache
def sweep_text(folder):
    swept = sweep_of(graphs.skip(), points=3, limits=Limits(0.5))
    swept.save(folder / "sweep.json")
    return (folder / "sweep.json").read_text()


def written(section, name, value):
    """The plan's text with one field replaced by what may be no JSON at all."""
    document = json.loads(plan_text())
    (document[section] if section else document)[name] = "HERE"
    return json.dumps(document).replace('"HERE"', value)


def put(old, new):
    """The plan's text with a piece replaced."""
    assert old in plan_text()
    return plan_text().replace(old, new)


DAMAGE = {
    "lists 200,000 deep": "[" * 200_000,
    "objects 100,000 deep": '{"a":' * 100_000,
    "a closed nest": "[" * 100_000 + "]" * 100_000,
    "nested within": written("plan", "steps", "[" * 50_000 + "]" * 50_000),
    "10,000 digits": written("plan", "budget_bytes", "9" * 10_000),
    "a workspace of 10**30": put('["a"], 4, 0,', f'["a"], 4, {HUGE},'),
    "a negative workspace": put('["a"], 4, 0,', '["a"], 4, -1,'),
    "a negative time": put('["a"], 4, 0,', '["a"], -4, 0,'),
    "infinity": written("plan", "budget_bytes", "Infinity"),
    "minus infinity": written("plan", "bound_ns", "-Infinity"),
    "nan": written("plan", "solve_s", "NaN"),
    "a number beyond floats": written("plan", "solve_s", "1e999"),
    "a float budget": written("plan", "budget_bytes", "40.0"),
    "a budget as a str": written("plan", "budget_bytes", '"40"'),
    "a budget of 10**30": written("plan", "budget_bytes", str(HUGE)),
    "a negative budget": written("plan", "budget_bytes", "-40"),
    "a margin above the budget": written("plan", "margin_bytes", "41"),
    "a bool for a number": written("plan", "margin_bytes", "true"),
    "steps as a str": written("plan", "steps", '"0123"'),
    "a step of 10**30": written("plan", "steps", f"[0, {HUGE}]"),
    "a negative step": written("plan", "steps", "[-1]"),
    "a float step": written("plan", "steps", "[0.0]"),
    "no steps": written("plan", "steps", "[]"),
    "steps as an object": written("plan", "steps", "{}"),
    "an unknown status": written("plan", "status", '"wonderful"'),
    "a status of a megabyte": written("plan", "status", '"' + "x" * 10**6 + '"'),
    "a provenance as a list": written("plan", "provenance", '[["torch", "2"]]'),
    "a provenance with little": written("plan", "provenance", '{"costs": "measured", "torch": "2"}'),
    "an unknown way to find costs": put('"costs": "measured"', '"costs": "guessed"'),
    "costs as a list": put('"costs": "measured"', '"costs": ["measured"]'),
    "more estimated than there are": put('"num_estimated": 1', '"num_estimated": 10'),
    "10**30 kernels": put('"num_kernels": 9', f'"num_kernels": {HUGE}'),
    "a submodule that is a number": put('"opaque": ["a", "b"]', '"opaque": ["a", 1]'),
    "an absent device in words": put('"is_here": true', '"is_here": "yes"'),
    "negative work": written("plan", "work", "-0.5"),
    "work of NaN": written("plan", "work", "NaN"),
    "an unknown limit": written("plan", "limit", '"memory"'),
    "no limit": written("plan", "limit", "null"),
    "a kernel that is a number": put('"aten.mul"', "4"),
    "arguments as a list": put('"%0:float32[2], 3"', '["%0"]'),
    "an op of schema 1": put(', "aten.mul", "%0:float32[2], 3"]', "]"),
    "schema 1, but fields of schema 2": put('"schema": 2', '"schema": 1'),
    "a plan that is a list": written("", "plan", "[]"),
    "a plan that is null": written("", "plan", "null"),
    "a graph that is a str": written("", "graph", '"graph"'),
    "a graph without values": written("graph", "values", "[]"),
    "values of None": written("graph", "values", "null"),
    "a row that is a str": written("graph", "values", '["abc"]'),
    "a row that is too short": written("graph", "ops", '[["a"]]'),
    "a name that is a list": written("graph", "ops", '[[["a"], [], [], [], 0, 0, true, ""]]'),
    "an unhashable output": written("graph", "forward_outputs", "[[]]"),
    "outputs as a str": written("graph", "forward_outputs", '"n"'),
    "num_forward_ops of 10**30": written("graph", "num_forward_ops", str(HUGE)),
    "num_forward_ops a float": written("graph", "num_forward_ops", "4.0"),
    "a fingerprint of None": written("", "fingerprint", "null"),
    "a fingerprint of a megabyte": written("", "fingerprint", '"' + "f" * 10**6 + '"'),
    "schema true": written("", "schema", "true"),
    "schema 1.0": written("", "schema", "1.0"),
    "schema of 4,000 digits": written("", "schema", "9" * 4000),
    "schema twice": put('"schema": 2', '"schema": 2, "schema": 2'),
    "a field twice": put('"margin_bytes": 2', '"margin_bytes": 2, "margin_bytes": 3'),
    "a byte order mark": "\ufeff" + plan_text(),
    "text behind": plan_text() + "x",
    "null": "null",
    "nothing": "",
    "a number": "1",
    "zeros": "\0" * 1000,
}


@pytest.mark.parametrize("text", DAMAGE.values(), ids=DAMAGE)
def test_damaged_plans(tmp_path, text):
    (tmp_path / "plan.json").write_text(text, encoding="utf-8")
    with pytest.raises(PlanFileError) as caught:
        Plan.load(tmp_path / "plan.json")
    assert len(str(caught.value)) < 1000 and len(str(caught.value).splitlines()) == 1


def test_a_hundred_megabytes_of_digits(tmp_path):
    file = tmp_path / "plan.json"
    file.write_text(written("plan", "budget_bytes", "9" * 10**8))
    with pytest.raises(PlanFileError, match="is not JSON"):
        Plan.load(file)


def test_files_that_are_larger_than_any_plan(tmp_path, monkeypatch):
    monkeypatch.setattr(fields, "MOST_FILE_BYTES", 10_000)
    (tmp_path / "plan.json").write_text(" " * 10_001)
    (tmp_path / "bomb.json.gz").write_bytes(gzip.compress(b" " * 10**7))
    for name in ("plan.json", "bomb.json.gz"):
        with pytest.raises(PlanFileError, match="larger than 10000 bytes"):
            plan_file.load_graph(tmp_path / name)


@pytest.mark.parametrize("content", [b"\xff\xfe", b"\x1f\x8b", b"\x1f\x8b\x08\x00" + b"x" * 50, plan_text().encode("utf-16")])
@pytest.mark.parametrize("name", ["plan.json", "plan.json.gz"])
def test_bytes_that_are_no_text(tmp_path, content, name):
    (tmp_path / name).write_bytes(content)
    for load in (Plan.load, plan_file.load_graph, Sweep.load):
        with pytest.raises(PlanFileError):
            load(tmp_path / name)


def test_a_folder_is_no_plan(tmp_path):
    for load in (Plan.load, plan_file.load_graph, Sweep.load):
        with pytest.raises(PlanFileError, match="cannot read"):
            load(tmp_path)


@pytest.mark.parametrize("text", [DAMAGE["lists 200,000 deep"], DAMAGE["10,000 digits"], DAMAGE["a workspace of 10**30"], "\0"])
def test_damaged_files_at_the_shell(tmp_path, capsys, text):
    file = tmp_path / "plan.json"
    file.write_text(text)
    for arguments in (["show", str(file)], ["explain", str(file)], ["solve", str(file), "--budget", "30"]):
        # the plan of "10,000 digits" holds a graph that solve could take, were it JSON
        assert main(arguments) == 1
        assert capsys.readouterr().err.startswith("planner: PlanFileError: ")


VALUES = [
    None, True, False, 0, 1, -1, 2, 26, 10**9, 2**53, 2**53 + 1, 2**63, HUGE, 0.5, 26.0, -0.0, 1e308, "", "a", "0", "26", "gn",
    "forward", "optimal", "measured", "\ud800", "x" * 300, "[/b]", [], {}, [0], ["a"], [[]], {"a": 1}, ["a", 1, "activation"],
]  # fmt: skip


def places(document, path=()):
    """Paths to everything in a JSON document."""
    yield path
    children = document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ()
    for key, child in children:
        yield from places(child, (*path, key))


def changed(document, rng):
    """The document with one thing in it replaced, dropped, doubled, swapped or nudged."""
    path = rng.choice(list(places(document))[1:])
    holder = functools.reduce(lambda held, key: held[key], path[:-1], document)
    key, how = path[-1], rng.choice(("replace", "replace", "drop", "double", "swap", "nudge"))
    if how == "replace":
        holder[key] = json.loads(json.dumps(rng.choice(VALUES)))
    elif how == "drop":
        del holder[key]
    elif how == "double" and isinstance(holder, list):
        holder.insert(key, json.loads(json.dumps(holder[key])))
    elif how == "swap" and isinstance(holder, list):
        other = rng.randrange(len(holder))
        holder[key], holder[other] = holder[other], holder[key]
    elif how == "nudge" and type(holder[key]) is int:
        holder[key] += rng.choice((-1, 1, 7, 10**6))
    return document


def refingerprinted(document, where=plan_file):
    """With the fingerprint that its graph would have, so that what is behind the fingerprint is met too."""
    with contextlib.suppress(Exception):
        found = []
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(where, "fingerprint", lambda graph: found.append(graph))
            with contextlib.suppress(PlanFileError):
                plan_file.read_graph(plan_file.read_document(json.dumps(document), "it"), "it")
        document["fingerprint"] = where.fingerprint(*found)
    return document


def read_or_refused(text):
    """The plan; None after a PlanFileError."""
    try:
        plan = plan_file.loads(text, Plan)
    except PlanFileError as error:
        assert len(str(error)) < 1000
        return None
    assert simulate(plan.graph, plan.solution.schedule).peak_bytes <= plan.budget_bytes
    assert plan_file.loads(plan_file.dumps(plan.graph, plan), Plan) == plan
    assert str(plan)
    return plan


def test_what_is_signed_anew_reaches_behind_the_fingerprint():
    for text, where in ((plan_text(), plan_file), (OLD_PLAN.read_text(), schema1)):
        document = json.loads(text)
        document["graph"]["ops"][0][4] += 1
        document["graph"]["values"][2][1] += 1
        assert not read_or_refused(json.dumps(document)) and read_or_refused(json.dumps(refingerprinted(document, where)))


@settings(deadline=None, max_examples=600)
@given(seed=st.integers(0, 2**32), changes=st.integers(1, 4), is_signed=st.booleans())
def test_random_changes_make_a_plan_file_error_or_a_valid_plan(seed, changes, is_signed):
    rng, document = random.Random(seed), json.loads(plan_text())
    for _ in range(changes):
        document = changed(document, rng)
        if not document:
            break
    plan = read_or_refused(json.dumps(refingerprinted(document) if is_signed else document))
    event("refused" if plan is None else "a valid plan")


@settings(deadline=None, max_examples=300)
@given(seed=st.integers(0, 2**32), changes=st.integers(1, 4), is_signed=st.booleans())
def test_random_changes_of_an_older_plan(seed, changes, is_signed):
    rng, document = random.Random(seed), json.loads(OLD_PLAN.read_text())
    for _ in range(changes):
        document = changed(document, rng)
        if not document:
            break
    plan = read_or_refused(json.dumps(refingerprinted(document, schema1) if is_signed else document))
    event("refused" if plan is None else "a valid plan")


@settings(deadline=None, max_examples=300)
@given(data=st.data())
def test_random_text_is_never_more_than_a_plan_file_error(data):
    text = plan_text()
    start = data.draw(st.integers(0, len(text)))
    end = data.draw(st.integers(start, min(len(text), start + 40)))
    piece = data.draw(
        st.one_of(st.text(max_size=5), st.sampled_from(["[", "{", '"', "NaN", "1e999", "-", "9" * 5000, "\\u0000"]))
    )
    try:
        assert plan_file.loads(text[:start] + piece + text[end:], Plan)
    except PlanFileError as error:
        assert len(str(error)) < 1000


@settings(deadline=None, max_examples=200)
@given(seed=st.integers(0, 2**32), changes=st.integers(1, 3))
def test_random_changes_of_a_sweep_file(tmp_path_factory, seed, changes):
    folder = tmp_path_factory.getbasetemp()
    rng, document = random.Random(seed), json.loads(sweep_text(folder))
    document["sweep"]["measured"] = [[30, 29, 1.5, True], [31, 29, None, False]]
    for _ in range(changes):
        document = changed(document, rng)
        if not document:
            break
    file = folder / "changed.json"
    file.write_text(json.dumps(document))
    try:
        swept = Sweep.load(file)
    except PlanFileError as error:
        assert len(str(error)) < 1000
        return
    assert all(point.peak_bytes <= point.budget_bytes for point in swept.points)
    assert str(swept)


COST = KernelCost(1000, 64, (8,))
CACHES = {
    "deep": "[" * 200_000,
    "digits": '{"conditions": {"rule": 4, "a": 1}, "kernels": {"k": [' + "9" * 10_000 + ", 0]}}",
    "a workspace of 10**30": [1000, HUGE],
    "a time of 10**30": [HUGE, 0],
    "hidden bytes of 10**30": [1000, 0, HUGE],
    "negative": [-1, 0],
    "a negative workspace": [1000, -1],
    "a float": [1000.0, 0],
    "infinity": "Infinity",
    "nan": "NaN",
    "a bool": [True, 0],
    "a str": ["1000", 0],
    "too short": [1000],
    "no list": 3,
    "a word": "abc",
    "null": None,
    "kernels as a list": "kernels",
    "a key twice": '{"conditions": {"rule": 4, "a": 1}, "kernels": {"k": [1, 0], "k": [2, 0]}}',
    "latin": "\xff",
    "empty": "",
}


@pytest.mark.parametrize("wrong", CACHES.values(), ids=CACHES)
def test_a_cache_that_cannot_be_trusted_is_ignored(tmp_path, wrong):
    cache = KernelCache(tmp_path, {"a": 1})
    cache.add({"k": COST})
    assert cache.load() == {"k": COST}
    document = {"conditions": cache.conditions, "kernels": {"k": wrong}}
    is_text = isinstance(wrong, str) and wrong not in ("abc", "Infinity", "NaN", "kernels")
    text = wrong if is_text else json.dumps(document)
    if wrong in ("Infinity", "NaN"):
        text = json.dumps({**document, "kernels": {"k": [1, 0]}}).replace("[1, 0]", f"[{wrong}, 0]")
    elif wrong == "kernels":
        text = json.dumps({**document, "kernels": [["k", [1, 0]]]})
    cache.path.write_text(text, encoding="latin-1" if wrong == "\xff" else "utf-8")
    assert cache.load() == {}
    cache.add({"k": COST})
    assert cache.load() == {"k": COST}


def test_a_cache_that_is_larger_than_any(tmp_path, monkeypatch):
    cache = KernelCache(tmp_path, {"a": 1})
    cache.add({"k": COST})
    monkeypatch.setattr(fields, "MOST_FILE_BYTES", 10)
    assert cache.load() == {}
