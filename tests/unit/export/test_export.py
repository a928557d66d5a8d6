"""The exported file: needs torch alone, trains bit for bit like eager within the budget, reads well, says what it cannot do."""

import copy
import functools
import inspect
import pickle
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from torch import nn

from planner import CheckpointedModule, export_source, plan
from planner.export.names import counted
from planner.export.skeleton import constant_text, folded
from planner.graph.graph import Kind
from planner.graph.schedule import Schedule
from planner.graph.solution import Solution
from planner.profiler.memory import logical_peak
from planner.results.plan import Plan
from planner.runtime.step import make_step
from planner.solver.lazy import lazy_schedule
from planner.tracer.capture import capture
from planner.tracer.lower import lower
from tests.support import exported
from tests.support.export_cases import (
    CASES,
    block_functions,
    branching,
    by_schedule,
    gpt2,
    recompute_everything,
    step_of,
    write,
)
from tests.support.strategies import scatter, schedules


def assert_same(expected: dict[str, Any], found: dict[str, Any]) -> None:
    assert expected.keys() == found.keys()
    for name, a in expected.items():
        b = found[name]
        same = torch.equal(a, b) and a.dtype == b.dtype if isinstance(a, torch.Tensor) else a == b and type(a) is type(b)
        assert same, name


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """What every case's exported file does in a process where planner cannot be imported, and what eager does."""
    folder = tmp_path_factory.mktemp("exported")
    cases, expected = {}, {}
    for i, name in enumerate(CASES):
        planned, args, kwargs, dtype = step_of(name, seed=i)
        assert planned.plan.solution.schedule.recomputes()
        path = folder / f"case_{i}.py"
        export_source(planned, path)
        twin = copy.deepcopy(planned.original)
        cases[name] = (str(path), copy.deepcopy(twin.state_dict()), *copy.deepcopy((args, kwargs)), dtype)
        expected[name] = exported.train(twin, args, kwargs, dtype)
    torch.save(cases, folder / "cases.pt")
    told = [str(folder / "cases.pt"), str(folder / "found.pt"), str(torch.get_num_threads())]
    run = [sys.executable, "-I", "-W", "error", exported.__file__, *told]
    done = subprocess.run(run, capture_output=True, text=True, check=False, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder, expected, torch.load(folder / "found.pt")


@pytest.mark.parametrize("name", CASES)
def test_trains_like_eager_where_planner_cannot_be_imported(name, trained):
    _, expected, found = trained
    assert_same(expected[name], found[name])


def test_the_files_compile_without_a_warning_and_keep_to_a_readable_width(trained):
    files = sorted(trained[0].glob("case_*.py"))
    run = [sys.executable, "-W", "error", "-m", "py_compile", *map(str, files)]
    done = subprocess.run(run, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = [line for file in files for line in file.read_text().splitlines()]
    assert sum(len(line) > 128 for line in lines) < len(lines) / 100
    assert {file.name.partition(".")[0] for file in trained[0].glob("case_*.constants.pt")} == {
        f"case_{list(CASES).index(n)}" for n in CASES if "uple" in n or n == "dataclass"
    }


def peak(module: nn.Module, planned: CheckpointedModule, kwargs: Any) -> int:
    """Measured peak of a step, with everything resident."""

    def step() -> Any:
        out = module(**kwargs)
        out.loss.backward()
        return out

    step()
    module.zero_grad(set_to_none=True)
    graph = planned.plan.graph
    resident = sum(graph.value[name].nbytes for name in graph.inputs if graph.value[name].kind is not Kind.TANGENT)
    return logical_peak(step, planned.device) + resident


def activations_again(graph: Any) -> Schedule:
    """In every layer alike, what lies between the two matmuls of the MLP runs again."""
    return lazy_schedule(graph, [name for op in graph.ops if "mlp.act" not in op.source.module for name in op.writes])


@functools.cache
def with_activations_again(layers: int) -> CheckpointedModule:
    return by_schedule(gpt2(layers), activations_again)


@pytest.mark.parametrize("made", ["by the solver", "by hand"])
def test_the_peak_is_the_plans(made, tmp_path):
    from examples.gpt2 import build

    model, args, kwargs = build(layers=4, width=64, heads=2, length=64, vocabulary=128)
    if made == "by hand":
        planned = by_schedule((model, args, kwargs), activations_again, measured=True)
    else:
        planned = plan(model, 0.7, args, kwargs, progress=False, effort=3)
    assert planned.plan.solution.schedule.recomputes()
    found = write(planned, tmp_path / "gpt2_ckpt.py")
    assert block_functions(found) == ["gpt2_block_forward", "gpt2_block_backward"] or made == "by the solver"
    assert peak(found.model, planned, kwargs) <= min(planned.plan.budget_bytes, planned.plan.peak_bytes + 4096)


def test_more_layers_are_more_calls_of_the_same_functions(tmp_path):
    texts, defined = [], []
    for layers in (3, 6):
        planned = with_activations_again(layers)
        assert planned.plan.solution.schedule.recomputes()
        export_source(planned, tmp_path / "gpt2_ckpt.py")
        texts.append((tmp_path / "gpt2_ckpt.py").read_text())
        defined.append([line for line in texts[-1].splitlines() if line.startswith("def ")])
    assert defined[0] == defined[1] and any("gpt2_block_backward(at, w, kept, grads, grad" in line for line in defined[0])
    calls = [text.count("gpt2_block_forward") + text.count("gpt2_block_backward") for text in texts]
    assert calls[1] - calls[0] == 6
    num_lines = [len(text.splitlines()) for text in texts]
    assert 0 < num_lines[1] - num_lines[0] <= 3 * calls[1] - 3 * calls[0] + 3


def test_it_says_what_is_kept_recomputed_and_where_from(tmp_path):
    planned = with_activations_again(3)
    export_source(planned, tmp_path / "gpt2_ckpt.py")
    text = (tmp_path / "gpt2_ckpt.py").read_text()
    head, _, code = text.partition("def gpt2_block_forward")
    for part in (
        "load_state_dict",
        "budget",
        "peak",
        "step time",
        "costs" if planned.plan.provenance else "optimality",
        "Output",
    ):
        assert part in head
    forward, _, backward = code.partition("def gpt2_block_backward")
    assert 'kept[at + ".' in forward and "# recomputed" not in forward
    assert "# recomputed" in backward and "kept.pop(" in backward and 'grads[at + ".mlp.c_fc.weight"]' in backward
    assert "# attn.c_attn  pytorch_utils.py:" in forward and "# mlp.act  activations.py:" in backward
    assert text == _again(planned, tmp_path / "gpt2_ckpt.py")


def _again(planned: CheckpointedModule, path: Path) -> str:
    export_source(planned, path)
    return path.read_text()


def test_a_module_out_of_a_pickle_exports_and_trains_the_same(tmp_path):
    planned, args, kwargs, _ = step_of("convolution", 3)
    again = write(pickle.loads(pickle.dumps(planned)), tmp_path / "again.py")
    assert_same(exported.train(copy.deepcopy(planned.original), args, kwargs), exported.train(again.model, args, kwargs))


def test_copies_and_accumulation_train_like_the_original(tmp_path):
    planned, args, kwargs, _ = step_of("tied", 5)
    found = write(planned, tmp_path / "tied_ckpt.py")
    twin, ours = copy.deepcopy(planned.original), pickle.loads(pickle.dumps(copy.deepcopy(found.model)))
    for module in (twin, ours):
        for _ in range(2):
            loss = module(*args, **kwargs)["loss"]
            loss.backward(retain_graph=True)
            loss.backward()
    for (name, p), q in zip(twin.named_parameters(), ours.parameters(), strict=True):
        assert p.requires_grad == q.requires_grad and (p.grad is None or torch.equal(p.grad, q.grad)), name
    assert all(p.grad is None for p in found.model.parameters())
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_a_value_that_was_read_is_read_again_and_random_kernels_run_under_their_state(tmp_path):
    planned = by_schedule(branching(), recompute_everything)
    found = write(planned, tmp_path / "branching.py")
    source = (tmp_path / "branching.py").read_text()
    assert "swap_rng_state(" in source.partition("def backward")[2].partition("def ")[0]
    x, mask = torch.randn(32, 64), torch.ones(32, 64, dtype=torch.bool)
    assert_same(exported.train(copy.deepcopy(planned.original), (x, mask), {}), exported.train(found.model, (x, mask), {}))
    mask[0, 0] = False
    with pytest.raises(found.CallError, match=r"the value that the model read at export_cases.py:\d+ is False, and was True"):
        found.model(x, mask)


def test_the_generator_is_put_back_when_a_backward_fails(tmp_path):
    planned = by_schedule(branching(), recompute_everything)
    found = write(planned, tmp_path / "branching.py")
    name = next(name for name in vars(found) if name.startswith("rrelu_with_noise_b"))
    setattr(found, name, lambda *args: 1 / 0)
    loss = found.model(torch.randn(32, 64), torch.ones(32, 64, dtype=torch.bool))
    torch.rand(7)
    state = torch.get_rng_state()
    with pytest.raises(ZeroDivisionError):
        loss.backward()
    assert torch.equal(state, torch.get_rng_state())


def test_the_signature_is_the_originals(tmp_path):
    planned, _, _, _ = step_of("tuple", 0)
    found = write(planned, tmp_path / "outputs.py")
    for ours, theirs in zip(
        *(inspect.signature(m.forward).parameters.values() for m in (found.model, planned.original)), strict=True
    ):
        assert (ours.name, ours.kind, ours.default) == (theirs.name, theirs.kind, theirs.default)


def test_equal_modules_become_loops():
    names = [f"stages.{i}.blocks.{j}.weight" for i in range(2) for j in range(3)] + ["stages.2.blocks.0.weight", "head.weight"]
    rows = [(name, f'parameter("{name}", 4)') for name in names]
    assert list(folded(rows)) == [
        "for i in range(2):",
        "    for j in range(3):",
        '        yield parameter(f"stages.{i}.blocks.{j}.weight", 4)',
        'yield parameter("stages.2.blocks.0.weight", 4)',
        'yield parameter("head.weight", 4)',
    ]
    rows = [(f"h.{i}.w", f'parameter("h.{i}.w", {4 if i < 3 else 5})') for i in range(1, 5)]
    assert list(folded(rows))[:2] == ["for i in range(1, 3):", '    yield parameter(f"h.{i}.w", 4)']


@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor([0.0, -0.0, 0.1, float("inf"), float("nan")]),
        torch.tensor([[1, -2], [3, 4]]),
        torch.tensor([True, False]),
        torch.tensor([0.1, 0.3], dtype=torch.bfloat16),
        torch.tensor([1 + 2j, 0.1 - 0.3j]),
        torch.full((100, 3), -0.0),
        torch.tensor(7, dtype=torch.uint8),
    ],
    ids=str,
)
def test_constants_are_written_to_the_last_bit(tensor):
    stored: dict[str, torch.Tensor] = {}
    text = constant_text("c", tensor, stored, torch.device("cpu"))
    made = eval(text, {"torch": torch, "DEVICE": torch.device("cpu")})
    assert not stored and made.dtype == tensor.dtype and made.shape == tensor.shape
    assert torch.equal(made.reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))


def test_paths_are_listed_as_a_person_would():
    assert counted(["h.11", "h.3", "h.3", "h.4", "h.5", "h.0", "ln_f", "encoder.1"]) == "h.0, 3-5, 11; ln_f; encoder.1"


class Rows(nn.Module):
    """Equal layers with a random kernel each, whose generator's state several recomputes read."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.RReLU(), nn.Tanh(), nn.Linear(8, 8)) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x.square().mean()


@functools.cache
def rows():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, args = Rows(), (torch.randn(4, 8),)
    joint = capture(model, args)
    return model, args, joint, lower(joint), exported.train(copy.deepcopy(model), args, {})


def trains_the_same(schedule: Schedule, path: Path) -> Any:
    model, args, joint, graph, expected = rows()
    made = Plan(graph, 2**40, 0, Solution("feasible", schedule, 0, 0.0, "test"))
    found = write(CheckpointedModule(model, make_step(made, joint, model, args, {}, 4), made), path)
    assert_same(expected, exported.train(found.model, args, {}))
    return found


@settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_schedule_of_repeated_layers_exports_exactly(data, tmp_path):
    found = trains_the_same(data.draw(schedules(rows()[3])), tmp_path / "rows.py")
    event("has functions" if block_functions(found) else "has none")


@pytest.mark.parametrize("seed", [4, 7])
def test_a_kept_value_is_taken_off_after_its_last_reader_in_a_function(seed, tmp_path):
    schedule = scatter(rows()[3], random.Random(seed), keep=0.7, drop=0.2, extra=0.5)
    found = trains_the_same(schedule, tmp_path / "rows.py")
    assert block_functions(found)
