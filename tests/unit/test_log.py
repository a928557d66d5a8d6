"""The log of planning: who says what, at which level, and that nothing is said where nobody listens."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from torch import nn

from planner import InfeasibleBudgetError, MismatchWarning, log, max_batch, plan, plan_units
from planner.cli import main
from planner.profiler.cache import KernelCache
from planner.profiler.measure import measure
from planner.profiler.profile import KernelCost
from planner.verification.measured import measured_within
from tests.support.models import MODEL_FILE, Block, Ragged, Wrapped, rows_of_data
from tests.support.nodes import crash, mm, on_function, refuse
from tests.support.planned import planned_attention, within_of
from tests.support.text import without_stages

X = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
CPU = torch.device("cpu")


@pytest.fixture
def logged(caplog):
    """What was logged so far, as "room LEVEL message"."""
    caplog.set_level(logging.DEBUG, "planner")

    def lines(room, *levels):
        name = f"planner.{room}" if room else "planner"
        return [r.getMessage() for r in caplog.records if r.name == name and (not levels or r.levelname in levels)]

    return lines


def planned(model, **options):
    return plan(model, 1.0, (X,), costs="estimate", progress=False, **options)


def two_blocks(act):
    return Wrapped(nn.Sequential(Block(act), nn.Linear(4, 4)))


def test_the_package_writes_nowhere_by_itself(capfd):
    assert [type(handler) for handler in log.PLANNER.handlers] == [logging.NullHandler]
    logger = logging.getLogger("planner.tracer")
    assert logger is log.TRACER and logger.propagate and not logger.handlers
    root, held = logging.getLogger(), logging.getLogger().handlers[:]
    root.handlers.clear()  # as in a program that does not configure logging
    try:
        planned(two_blocks(rows_of_data))
    finally:
        root.handlers[:] = held
    assert capfd.readouterr() == ("", "")


def test_the_steps_of_planning_are_info(logged):
    plan(nn.Sequential(nn.Linear(4, 4), nn.Tanh()), 1.0, (X,), progress=False)
    assert any("captured in" in line for line in logged("tracer", "INFO"))
    assert any("distinct kernels" in line for line in logged("profiler", "INFO"))
    assert [line.split()[0] for line in logged("", "INFO")] == [line.split()[0] for line in logged("")]
    assert any("the plain step peaks at" in line for line in logged("", "INFO"))
    assert any(line.startswith("planned for") for line in logged("", "INFO"))
    assert any("one planned step was run" in line for line in logged("verification", "DEBUG"))
    assert not [line for room in ("", "tracer", "profiler", "verification", "runtime") for line in logged(room, "WARNING")]


def test_kernels_that_cannot_be_measured_are_named_with_the_reason(logged):
    measure([mm(8), on_function(refuse), on_function(crash)], CPU, cache_dir=None)
    (warned,) = logged("profiler", "WARNING")
    assert warned.startswith("2 of 3 kernels could not be measured")
    crashed, refused = sorted(logged("profiler", "DEBUG"))
    assert "crash" in crashed and "its process was killed by signal" in crashed
    assert "refuse" in refused and refused.endswith("RuntimeError: not today")
    first = warned.partition("the first: ")[2]
    assert first in crashed or first in refused


def test_a_cache_that_cannot_be_read_or_written_is_info(logged, tmp_path):
    cache = KernelCache(tmp_path, {})
    assert cache.load() == {} and not logged("profiler"), "there is none yet"
    cache.path.write_text("{")
    assert cache.load() == {}
    assert ["cannot be read" in line for line in logged("profiler", "INFO")] == [True]
    (tmp_path / "file").touch()
    KernelCache(tmp_path / "file", {}).add({"a": KernelCost(1, 2)})
    assert "cannot be written" in logged("profiler", "INFO")[-1]


def test_what_runs_as_it_is_is_a_warning_with_the_first_error_once(logged):
    module = planned(two_blocks(rows_of_data))
    assert module.plan.provenance.opaque == ("body.0",)
    (warned,) = logged("tracer", "WARNING")
    assert "runs as it is" in warned and "body.0" in warned
    assert "The first error: " in warned and "shape depends on the data" in warned
    again = [line for line in logged("tracer", "INFO") if "capture again" in line]
    assert again and "with 'body.0' opaque" in again[0] and "shape depends on the data" in again[0]


def test_what_was_asked_to_run_as_it_is_is_no_warning(logged):
    planned(two_blocks(lambda x: x), opaque=["body.0"])
    assert not logged("tracer", "WARNING")
    assert any("as asked for or always: 'body.0'" in line for line in logged("tracer", "INFO"))


def test_planning_again_for_less_is_info(logged, monkeypatch):
    _, made, args, kwargs = planned_attention()
    peak, asked = made.plan.peak_bytes, []
    peaks = iter([peak + 200, peak])
    monkeypatch.setattr("planner.verification.measured.step_peak", lambda *_: next(peaks))
    measured_within(peak + 100, within_of(made, asked), args, kwargs)
    assert len(asked) == 2
    (again,) = [line for line in logged("verification", "INFO") if "plan again, for" in line]
    assert again.startswith("planned for ")


def test_other_shapes_are_logged_when_they_are_captured_and_when_they_cannot_be(logged):
    class Alternates(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            return self.layer(x).tanh().sum() if len(x) > 2 else self.layer(x).sum()

    module = planned(Alternates(), dynamic=True)
    assert not logged("runtime")
    for _ in range(2):
        module(X[:4]).backward()
    (captured,) = logged("runtime")
    assert captured.startswith("Alternates: captured (4, 4), the second size, in")
    assert logged("runtime", "INFO") == [captured]
    module(X[:2])
    anew, planned_anew = logged("runtime", "INFO")[1:]
    assert anew.startswith("planned anew: ") and "its graph is another one" in anew
    assert planned_anew.startswith("Alternates: planned (2, 4), the third size, in")
    with pytest.warns(MismatchWarning):
        module(X.repeat(100, 1))
    (refused,) = logged("runtime", "WARNING")
    assert "run unplanned" in refused and "the least any schedule" in refused


def test_a_planned_step_logs_nothing(logged):
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    module = planned(model)
    module(X).sum().backward()  # a sum's gradient may be of other strides: captured once
    before = [logged(room) for room in ("", "tracer", "profiler", "verification", "runtime")]
    for _ in range(3):
        module(X).sum().backward()
    assert before == [logged(room) for room in ("", "tracer", "profiler", "verification", "runtime")]


def test_a_backward_above_the_bytes_planned_for_within_the_fraction_is_a_warning(logged):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 512)), torch.randn(8, 16, 64)
    out = plan(model, 1.0, (x,), progress=False)(x)
    out.backward(torch.randn(out.shape[::-1]).permute(2, 1, 0))
    (warned,) = logged("runtime", "WARNING")
    assert "captured in" in warned and "its step peaks at" in warned and "planned for" in warned
    assert not logged("runtime", "INFO")


def test_batches_and_children_are_logged(logged):
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    with pytest.raises(InfeasibleBudgetError):
        max_batch(lambda batch: ((X[:batch],), {}), model, 1, costs="estimate", progress=False)
    assert [line.split(":")[0] for line in logged("", "INFO") if line.startswith("batch")] == ["batch 1"]
    children = plan_units(Ragged(rows_of_data), "1MiB", (X,), costs="estimate", progress=False)
    assert "second: captured by itself" in logged("", "INFO")
    left = logged("", "WARNING")
    assert len(left) == len(children.left) and all(name in "".join(left) for name in children.left)


def test_the_command_line_shows_the_log_where_it_is_asked_to(tmp_path, capsys):
    (tmp_path / "model.py").write_text(MODEL_FILE)
    command = ["plan", f"{tmp_path / 'model.py'}:build", "--budget", "1.0", "--costs", "estimate", "--no-check"]
    assert main(command) == 0
    quiet = capsys.readouterr()
    handlers, level = copy.copy(log.PLANNER.handlers), log.PLANNER.level
    assert main([*command, "--log-level", "info"]) == 0
    shown = capsys.readouterr()
    assert without_stages(quiet.err) == [] and "planner.tracer: INFO: Sequential: captured in" in shown.err
    assert "DEBUG" not in shown.err and "INFO" not in shown.out
    assert (log.PLANNER.handlers, log.PLANNER.level) == (handlers, level)
