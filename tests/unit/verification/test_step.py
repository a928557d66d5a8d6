"""One planned step at the end of `plan`: it runs apart from the model, and a plan whose step fails is never handed out."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import sys
import time
from dataclasses import replace

import numpy
import pytest
import torch
from torch import nn

from planner import CaptureError, InfeasibleBudgetError, MeasuredPeakError, Plan, PlanCheckError, apply, plan
from planner.cli import main
from planner.profiler.child import Child
from planner.results import plan_file
from planner.runtime.module import CheckpointedModule
from planner.tracer import trace_mode
from planner.tracer.capture import capture, one_at_a_time
from planner.units import format_bytes
from planner.verification import check_step, measured
from tests.support import models
from tests.support.text import unwrapped

QUICK = {"costs": "estimate", "progress": False}


def blocks(depth=4, width=32):
    torch.manual_seed(0)
    return nn.Sequential(*[nn.Sequential(nn.Linear(width, width), nn.GELU()) for _ in range(depth)]), torch.randn(128, width)


def with_results(monkeypatch, changed):
    """Every planned forward from now on runs `changed(run, inputs)` instead of the captured kernels' `run`."""
    from planner.runtime import module as home

    compile_step = home.make_executable

    def compiled(*args):
        program = compile_step(*args)
        return replace(program, forward=lambda inputs: changed(program.forward, inputs))

    monkeypatch.setattr(home, "make_executable", compiled)


@pytest.mark.one_in(4)
@pytest.mark.parametrize("name", ["attention", "convolution", "tied", "skips"])
def test_a_plan_says_what_its_step_was_measured_to_need(name):
    model, args, kwargs = models.build(name)
    made = plan(model, 1.0, args, kwargs, progress=False).plan
    assert made.check == "run" and 0 < made.measured_bytes <= made.budget_bytes
    assert f"{format_bytes(made.peak_bytes)} predicted" in unwrapped(made)
    assert f"{format_bytes(made.measured_bytes)} measured" in unwrapped(made)


def test_the_measured_peak_is_the_predicted_one_where_kernels_need_nothing_beside():
    model, x = blocks()
    made = plan(model, 0.7, (x,), **QUICK).plan
    assert made.solution.schedule.recomputes()
    assert made.measured_bytes == made.peak_bytes


class Everything(nn.Module):
    """Writes buffers, inputs, attributes, output and random state, in a part that runs as it is, too."""

    def __init__(self):
        super().__init__()
        self.body, self.norm, self.drop = blocks(2)[0], nn.BatchNorm1d(32), nn.Dropout(0.5)
        self.noisy = Noisy()

    def forward(self, x, counter):
        counter.add_(1)
        return self.noisy(self.drop(self.norm(self.body(x)))).sum() + counter.sum()


class Noisy(nn.Module):
    log = open(os.devnull, "w")  # noqa: SIM115

    def __init__(self):
        super().__init__()
        self.calls, self.scale = 0, nn.Parameter(torch.ones(1))

    def forward(self, x):
        print("a line of the user's")
        self.log.write("another\n")
        self.log.flush()
        self.calls += 1
        return x * self.scale * random.random() * numpy.random.rand()


def test_a_step_leaves_everything_as_it_was(tmp_path, monkeypatch, capfd):
    model, x, counter = Everything(), torch.randn(16, 32, requires_grad=True) * 1.0, torch.zeros(3)
    planned = plan(model, 1.0, (x, counter), opaque=["noisy"], check=False, **QUICK)
    fired = []
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 3.0)
        parameter.register_hook(fired.append)
        parameter.register_post_accumulate_grad_hook(fired.append)
    x.register_hook(fired.append)
    planned.register_forward_hook(lambda *given: fired.append(given))
    with open(tmp_path / "log", "w") as log:
        monkeypatch.setattr(Noisy, "log", log)
        log.write("before ")
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        rng, drawn, numbers = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].copy()
        calls, descriptors = model.noisy.calls, set(os.listdir("/proc/self/fd"))
        capfd.readouterr()
        assert check_step.run_step(planned, ((x, counter), {})) > 0
        assert capfd.readouterr() == ("", "")
        assert set(os.listdir("/proc/self/fd")) == descriptors
    assert (tmp_path / "log").read_text() == "before "
    assert not fired and model.noisy.calls == calls and counter.eq(0).all()
    assert all(torch.equal(p.grad, torch.full_like(p, 3.0)) for p in model.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), rng) and random.getstate() == drawn
    assert (numpy.random.get_state()[1] == numbers).all()
    assert (planned.num_planned_calls, planned.num_unplanned_calls) == (0, 0)


def test_buffers_in_shared_memory_are_not_written():
    model, x = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).share_memory(), torch.randn(8, 4)
    made = plan(model, 1.0, (x,), **QUICK).plan
    assert made.check == "run"
    assert model[1].num_batches_tracked == 0 and model[1].running_mean.eq(0).all()


def test_a_step_planned_within_autocast_runs_in_it():
    model, x = blocks()
    with torch.autocast("cpu", torch.bfloat16):
        planned = plan(model, 1.0, (x,), **QUICK)
    assert planned.plan.check == "run"
    with torch.no_grad(), torch.autocast("cpu", torch.float16):
        assert check_step.run_step(planned, ((x,), {})) == planned.plan.measured_bytes


def test_a_step_that_raises_is_a_planners_fault_with_the_place_and_the_cure(monkeypatch):
    def faulty(run, inputs):
        raise RuntimeError("sizes do not match\nat some depth of torch")

    model, x = blocks()
    with_results(monkeypatch, faulty)
    with pytest.raises(PlanCheckError, match=r"planned step fails: RuntimeError: sizes do not match\. ") as caught:
        plan(model, 0.9, (x,), **QUICK)
    assert "fault of the planner" in str(caught.value) and "opaque=" in str(caught.value)
    assert "depth" not in str(caught.value)
    assert plan(model, 0.9, (x,), check=False, **QUICK).plan.check == "not run: switched off by check=False"


def test_the_kernel_that_fails_is_named(monkeypatch):
    """A kernel of the joint graph that cannot run on what the kernel before it really returns."""
    model, x = blocks()
    planned = plan(model, 1.0, (x,), **QUICK)
    last = [node for node in planned.graph.nodes if "gelu" in str(node.target)][-1]
    last.target, last.args = torch.ops.aten.view.default, (last.args[0], [7])
    planned.recompile()
    with pytest.raises(PlanCheckError, match=r"fails in 3\.1 \(GELU\).*opaque=\['3\.1'\]"):
        check_step.run_step(planned, ((x,), {}))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda out: out.t().contiguous().t(), r"strides \(1, 128\), captured with \(32, 1\)"),
        (lambda out: out.double(), r"dtype torch.float64, captured with torch.float32"),
        (lambda out: out[:1], r"shape \(1, 32\), captured with \(128, 32\)"),
    ],
)
def test_an_output_of_other_metadata_than_captured_is_an_error(monkeypatch, change, said):
    model, x = blocks()
    with_results(monkeypatch, lambda run, inputs: (lambda out, *saved: (change(out), *saved))(*run(inputs)))
    with pytest.raises(PlanCheckError, match=f"output the output has {said}"):
        plan(model, 0.9, (x,), **QUICK)


def test_strides_along_which_nobody_steps_are_no_difference(monkeypatch):
    model, _ = blocks()
    change = lambda out: out.as_strided(out.shape, (7, 1))
    with_results(monkeypatch, lambda run, inputs: (lambda out, *saved: (change(out), *saved))(*run(inputs)))
    assert plan(model, 1.0, (torch.randn(1, 32),), **QUICK).plan.check == "run"


def greedy(nbytes):
    def run_greedily(run, inputs):
        torch.empty(nbytes, dtype=torch.uint8)
        return run(inputs)

    return run_greedily


def test_a_step_that_needs_more_is_planned_for_less(monkeypatch):
    model, x = blocks(8)
    plain = plan(model, 1.0, (x,), **QUICK).plan
    budget = plain.peak_bytes - 2
    monkeypatch.setattr(measured, "step_peak", lambda planned, *_: planned.plan.peak_bytes + 1000)
    made = plan(model, budget, (x,), **QUICK).plan
    assert made.peak_bytes + 1000 == made.measured_bytes <= budget == made.budget_bytes
    assert made.timeline.time_ns > plain.timeline.time_ns


def test_a_step_that_always_needs_more_is_refused_with_a_budget_that_works(monkeypatch):
    model, x = blocks()
    with_results(monkeypatch, greedy(2**20))
    peak = plan(model, 1.0, (x,), check=False, **QUICK).plan.peak_bytes
    with pytest.raises(MeasuredPeakError, match="Raise the budget to") as caught:
        plan(model, peak, (x,), **QUICK)
    assert caught.value.peak_bytes > 2**20
    assert plan(model, caught.value.peak_bytes, (x,), **QUICK).plan.measured_bytes <= caught.value.peak_bytes


def test_a_fraction_of_an_estimate_is_no_promise_and_the_table_says_what_is_needed(monkeypatch, tmp_path):
    model, x = blocks()
    with_results(monkeypatch, greedy(2**20))
    planned = plan(model, 1.0, (x,), **QUICK)
    assert planned.plan.measured_bytes > 2**20 > planned.plan.budget_bytes
    assert "MORE than the budget: costs='estimate' leaves out" in unwrapped(planned.plan)
    planned.plan.save(tmp_path / "plan.json")
    assert apply(Plan.load(tmp_path / "plan.json"), model, (x,)).plan.check == "run", "which its plan knows"
    with pytest.raises(MeasuredPeakError, match="costs='measure'"):
        apply(replace(planned.plan, measured_bytes=None), model, (x,))


def test_memory_that_only_a_first_call_takes_is_no_part_of_the_peak(monkeypatch):
    kept = []
    with_results(monkeypatch, lambda run, inputs: (kept or kept.append(torch.empty(2**20)), run(inputs))[1])
    model, x = blocks()
    peak = plan(model, 1.0, (x,), check=False, **QUICK).plan.peak_bytes
    assert plan(model, peak, (x,), **QUICK).plan.measured_bytes <= peak


def killed(run, inputs):
    os.kill(os.getpid(), signal.SIGKILL)


def endless(run, inputs):
    time.sleep(60)


def left(run, inputs):
    sys.exit(3)


@pytest.mark.parametrize(
    ("fault", "reason"),
    [(killed, "was killed by signal 9"), (endless, "did not answer in time"), (left, "ended without an answer")],
)
def test_a_child_that_does_not_answer_says_nothing_about_the_plan(monkeypatch, fault, reason):
    monkeypatch.setattr(check_step, "_TIMEOUT_S", 0.5 if fault is endless else 60.0)
    model, x = blocks()
    with_results(monkeypatch, fault)
    with pytest.warns(UserWarning, match=f"was not measured: its process {reason}") as seen:
        made = plan(model, 1.0, (x,), **QUICK).plan
    assert seen[0].filename == __file__
    assert made.check == f"not run: its process {reason}" and made.measured_bytes is None
    assert f"not measured (its process {reason})" in unwrapped(made)


def test_a_model_that_fails_in_any_forked_process_is_not_the_planners_fault():
    class AtHome(nn.Module):
        def __init__(self):
            super().__init__()
            self.home, self.scale = os.getpid(), nn.Parameter(torch.ones(1))

        def forward(self, x):
            if os.getpid() != self.home:
                raise ConnectionError("another process")
            return x * self.scale

    model = nn.Sequential(nn.Linear(4, 4), AtHome())
    with pytest.warns(UserWarning, match="the model's own step fails in a forked process: ConnectionError: another process"):
        made = plan(model, 1.0, (torch.randn(2, 4),), opaque=["1"], **QUICK).plan
    assert made.check.startswith("not run: the model's own step fails")


@pytest.mark.parametrize("reason", ["fork", "memory", "processes"])
def test_where_no_step_can_be_run_the_plan_says_why(monkeypatch, reason):
    def no_more():
        raise BlockingIOError("no more processes")

    model, x = blocks()
    if reason == "fork":
        monkeypatch.setattr(check_step, "CAN_FORK", False)
    elif reason == "memory":
        monkeypatch.setattr(check_step, "free_bytes", lambda: 10)
    else:
        monkeypatch.setattr(os, "fork", no_more)
    expected = reason == "fork"  # a property of the system, of which to warn at every plan helps nobody
    with contextlib.nullcontext() if expected else pytest.warns(UserWarning, match="was not measured"):
        made = plan(model, 1.0, (x,), **QUICK).plan
    said = {"fork": "this system cannot fork", "memory": "10 B are free", "processes": "no process can be forked"}[reason]
    assert made.check.startswith("not run: ") and said in made.check


def test_no_plain_step_is_run_where_the_free_memory_is_unknown(monkeypatch, tmp_path, caplog):
    monkeypatch.setattr("planner.profiler.timing._MEMINFO", tmp_path / "none")
    monkeypatch.setattr(check_step, "different_results", lambda *_: (tmp_path / "ran").touch())
    caplog.set_level("INFO", "planner")
    model, x = blocks()
    assert plan(model, 1.0, (x,), **QUICK).plan.check == "run"
    assert not (tmp_path / "ran").exists()
    assert "not compared with the model's own: this system does not say how much memory is free" in caplog.text


def test_a_device_that_is_not_here_is_not_run():
    with torch.device("meta"):
        model, x = nn.Sequential(nn.Linear(8, 8), nn.GELU()), torch.randn(4, 8)
    made = plan(model, 1.0, (x,), device="H100-80GB", progress=False).plan
    assert made.check == "not run: the device is not here"


def test_a_plan_file_keeps_what_was_measured(tmp_path):
    model, x = blocks()
    made = plan(model, 1.0, (x,), **QUICK).plan
    made.save(tmp_path / "plan.json")
    loaded = Plan.load(tmp_path / "plan.json")
    assert (loaded.measured_bytes, loaded.check) == (made.measured_bytes, "run") and loaded == made
    text = (tmp_path / "plan.json").read_text()
    with pytest.raises(plan_file.PlanFileError, match="measured_bytes"):
        plan_file.loads(text.replace(f'"measured_bytes": {made.measured_bytes}', '"measured_bytes": "much"'), Plan)


def test_the_shell_prints_the_measured_peak_and_can_leave_it_out(tmp_path, capsys):
    build = "def build():\n    return nn.Sequential(nn.Linear(8, 8), nn.GELU()), (torch.randn(4, 8),), {}\n"
    (tmp_path / "small_model.py").write_text(f"import torch\nfrom torch import nn\n\n{build}")
    shell = ["plan", f"{tmp_path / 'small_model.py'}:build", "--budget", "1.0", "--costs", "estimate"]
    assert main(shell) == 0
    assert " measured\n" in capsys.readouterr().out
    assert main([*shell, "--no-check"]) == 0
    assert "not measured (switched off by check=False)" in unwrapped(capsys.readouterr().out)
    assert main([*shell, "--json"]) == 0
    assert '"check": "run"' in capsys.readouterr().out


def test_a_budget_below_the_floor_stays_an_error_of_its_own():
    model, x = blocks()
    with pytest.raises(InfeasibleBudgetError):
        plan(model, 1, (x,), **QUICK)


def test_sweep_points_are_not_run():
    from planner import sweep

    model, x = blocks()
    swept = sweep(model, None, (x,), points=2, **QUICK)
    assert swept.plan(swept.points[0]).check == "not run"


def test_a_childs_answers_come_in_order_and_it_is_collected():
    child = Child(lambda: iter([{"one": 1}, [2]]))
    try:
        assert (child.read(60), child.read(60), child.read(60)) == (b'{"one": 1}', b"[2]", None)
        assert child.fate == "ended without an answer" and not child.hung
    finally:
        child.end()
    with pytest.raises(ChildProcessError):
        os.waitpid(child._pid, os.WNOHANG)


def test_a_child_can_capture_though_its_parent_holds_the_lock():
    """The step of a plan may need another backward, which the child captures, while the parent's lock is held."""
    model, x = blocks()
    with one_at_a_time():
        child = Child(lambda: iter([capture(model, (x,)).num_forward_nodes]))
        try:
            answer = child.read(300)
        finally:
            child.end()
    assert answer is not None and int(answer) == capture(model, (x,)).num_forward_nodes > 0


class Varying(nn.Module):
    """Its derivative is traced as other kernels than eager runs, which add in another order."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        self.layer, self.value = nn.Linear(8, 8), nn.Parameter(torch.tensor(0.5))

    def forward(self, x):
        h = self.layer(x)
        h = h.masked_fill(h > 0, self.value) if self.how == "fill" else torch.sigmoid(h).add(0.3).prod(1)
        return (h * torch.linspace(0.1, 1, h.numel()).view_as(h)).square().mean()


@pytest.mark.parametrize(("how", "cure"), [("fill", r"torch\.where"), ("product", "a submodule of its own")])
def test_a_gradient_of_other_bits_is_found(monkeypatch, how, cure):
    torch.manual_seed(0)
    model, x = Varying(how), torch.randn(33, 8)
    with pytest.raises(CaptureError, match=rf"the backward of aten.\S+ at test_step\.py:\d+ .*{cure}"):
        plan(model, 1.0, (x,), **QUICK)
    monkeypatch.setattr(trace_mode, "_BACKWARDS_OF_VARYING_SHAPES", {})  # as for a kernel of which nobody knows
    with pytest.raises(PlanCheckError, match=r"results differ from the model's in: .*gradient of "):
        plan(model, 1.0, (x,), **QUICK)


def test_a_step_that_does_not_repeat_itself_is_not_accused():
    class Draws(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.noise = nn.Linear(8, 8), Noise()

        def forward(self, x):
            return self.noise(self.layer(x)).square().mean()

    class Noise(nn.Module):
        def forward(self, x):
            return x * torch.tensor(numpy.frombuffer(os.urandom(1), numpy.uint8)[0] / 256.0)

    model, x = Draws(), torch.randn(4, 8)
    assert plan(model, 1.0, (x,), opaque=["noise"], **QUICK).plan.check == "run"


def test_planned_modules_made_without_plan_are_not_run(monkeypatch):
    monkeypatch.setattr(check_step, "Child", lambda work: pytest.fail("a step was run"))
    model, x = blocks()
    planned = plan(model, 1.0, (x,), check=False, **QUICK)
    assert CheckpointedModule(model, planned.step, planned.plan).plan.measured_bytes is None


@pytest.mark.parametrize("fault", ["", "raises", "metadata", "memory"])
def test_in_this_process_as_for_an_accelerator_it_says_the_same(monkeypatch, fault):
    monkeypatch.setattr(check_step, "_in_child", check_step._in_process)

    def changed(run, inputs):
        if fault == "raises":
            raise RuntimeError("sizes do not match")
        if fault == "memory":
            raise torch.OutOfMemoryError("none left")
        out, *saved = run(inputs)
        return (out.double() if fault == "metadata" else out, *saved)

    model, x = blocks()
    expected = plan(model, 0.9, (x,), check=False, **QUICK).plan.peak_bytes
    with_results(monkeypatch, changed)
    rng = torch.get_rng_state()
    if fault == "memory":
        with pytest.warns(UserWarning, match="the device has too little memory for the step's"):
            assert plan(model, 0.9, (x,), **QUICK).plan.check.startswith("not run: the device has too little")
    elif fault:
        with pytest.raises(PlanCheckError, match="sizes do not match" if fault == "raises" else "has dtype torch.float64"):
            plan(model, 0.9, (x,), **QUICK)
    else:
        assert plan(model, 0.9, (x,), **QUICK).plan.measured_bytes == expected
    assert all(p.grad is None for p in model.parameters()) and torch.equal(torch.get_rng_state(), rng)
